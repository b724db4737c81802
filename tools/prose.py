"""Checks the sentences that people read: docstrings, comments, help texts and pages. `make lint` runs it.

A finding is a sentence of more than 30 words, or one that starts with a word that hides its subject ("Of raw shards",
"What is kept"). Code, tables, quotations and lists of names are left out. Usage: `python tools/prose.py [FILE...]`.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST = 30  # words
OPENINGS = re.compile(r"(Of|What|There too|So that|That of|Those of|Likewise)\b(?!.*\?)")


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of one paragraph."""
    text = re.sub(r"``?[^`]+``?", "CODE", " ".join(text.split()))
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)
    text = re.sub(r"\((?:[^()]|\([^()]*\))*\)", "", text)  # a remark in brackets is a thought of its own
    text = text.replace("**", "")
    text = re.sub(r"\b(e\.g|i\.e|et al|vs|Fig|approx)\.", r"\1", text)
    yield from re.split(r"(?<=[.!?;:])\s+(?=[A-Z0-9\"*(])|;\s+|:\s+|\s–\s", text)


def docstring_parts(text: str) -> Iterator[str]:
    """Yield the paragraphs of a docstring; an entry of Args, Returns, Raises or Attributes is one of its own."""
    part: list[str] = []
    for line in [*text.splitlines(), ""]:
        stripped = line.strip()
        entry = re.match(
            r"(Args|Returns|Raises|Yields|Attributes|Example|Source):$|[\w, *./\[\]]+: |[-*|] |\d\. ", stripped
        )
        if (not stripped or entry or line.startswith("        ")) and part and (not stripped or entry):
            yield " ".join(part)
            part = []
        is_table = re.search(r"\S {2,}\S", line)  # columns of a listing are no sentence
        if stripped and not is_table and not line.startswith("    " * 4):
            part.append(re.sub(r"^[\w, *./\[\]]+: ", "", stripped) if entry else stripped)


def python_texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, paragraph) for the docstrings, help texts and comments of a Python file."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                for part in docstring_parts(text):
                    yield node.body[0].lineno, part
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            shown = [k.value for k in node.keywords if k.arg == "help"]
            shown += node.args[1:2] if name == "setting" else []
            for value in shown:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.lineno, value.value
    comment: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or re.match(r"#\s*(fmt|pyright|noqa|type|ruff|---|!)", token.string):
            continue
        text = token.string.lstrip("#").strip()
        alone = not token.line[: token.start[1]].strip()
        if comment and alone and token.start[0] == last + 1:
            comment.append(text)
        else:
            if comment:
                yield first, " ".join(comment)
            comment, first = [text], token.start[0]
        last = token.start[0]
    if comment:
        yield first, " ".join(comment)


def page_texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, paragraph) for the prose of a Markdown page."""
    text = path.read_text(encoding="utf-8")
    blank = lambda match: "\n" * match[0].count("\n")  # noqa: E731
    text = re.sub(r"^```.*?^```$|<!--.*?-->|!\[[^\]]*\]\([^)]*\)", blank, text, flags=re.MULTILINE | re.DOTALL)
    part: list[str] = []
    first = 1
    for number, line in enumerate([*text.splitlines(), ""], 1):
        stripped = line.strip()
        begins = re.match(r"[-*] |\d+\. |#|\|", stripped)
        if (not stripped or begins) and part:
            yield first, " ".join(part)
            part = []
        if stripped and not stripped.startswith(("|", "#")):
            if not part:
                first = number
            part.append(re.sub(r"^[-*] |^\d+\. ", "", stripped))


def findings(path: Path) -> Iterator[str]:
    """Yield one line for each sentence that breaks a rule."""
    texts = python_texts(path) if path.suffix == ".py" else page_texts(path)
    for line, text in texts:
        for sentence in sentences(text):
            words = [word for word in sentence.split() if re.search(r"\w", word)]
            opening = OPENINGS.match(sentence.lstrip("*_\"'("))
            if len(words) > LONGEST:
                reason = f"{len(words)} words"
            elif opening and len(words) > 1:
                reason = f"starts with {opening[1]!r}"
            else:
                continue
            shown = sentence if len(sentence) < 100 else f"{sentence[:97]}..."
            yield f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{line}: {reason}: {shown}"


def main(names: list[str]) -> int:
    """Print the findings of the named files, or of the package, its tools and its pages; return the exit code."""
    places = [ROOT / "src", ROOT / "tools", ROOT / "benchmarks", ROOT / "runs"]
    files = [Path(name).resolve() for name in names] or [
        *(file for place in places for file in sorted(place.rglob("*.py"))),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
        *sorted((ROOT / "docs").glob("*.md")),
    ]
    found = [line for file in files for line in findings(file)]
    print("\n".join(found))
    print(f"{len(found)} sentences to rewrite" if found else "Every sentence keeps the rules.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
