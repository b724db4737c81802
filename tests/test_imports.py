"""Imports between the package's files stand at the top, but for those that are named here with their reason."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "recurformer"

# (file, imported module): why the import waits until the function runs.
LATE = {
    ("info.py", "recurformer.store.folders"): "a preset is described without torch",
    ("model.py", "recurformer.generation.rows"): "the one arrow that points up: LanguageModel.generate",
    ("experiments/bench/decode.py", "recurformer.hf"): "transformers may be missing",
    ("interop/conversion.py", "recurformer"): "transformers may be missing",
    ("interop/tokenizer.py", "recurformer.hf.tokenizer"): "transformers may be missing",
    ("generation/fused/several_rows.py", "recurformer.scan.fused"): "Triton may be missing",
    ("generation/fused/step.py", "recurformer.generation.fused"): "Triton may be missing",
    ("scan/fused/engines.py", "recurformer.scan.fused.engine"): "Triton may be missing",
}


def late_imports(file: Path) -> set[str]:
    """Return the modules of this package that functions of a file import."""
    functions = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef)]
    return {
        node.module
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "recurformer"
    } - {None}  # pyright: ignore[reportReturnType]


def test_functions_import_nothing_but_what_may_be_missing() -> None:
    found = set()
    for file in SOURCE.rglob("*.py"):
        name = file.relative_to(SOURCE).as_posix()
        if not name.startswith("cli/"):  # verbs import what they need when they run
            found |= {(name, module) for module in late_imports(file)}
    assert found == set(LATE)
