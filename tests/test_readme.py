"""What the documentation shows is run: commands and Python of README.md, CONTRIBUTING.md and docs/*.md.

Blocks of one page run in order in one folder that holds a few small texts. Long commands are shortened (`SHORTER`). A
block after `<!-- test: not run, REASON -->` is left out; `<!-- test: fresh FOLDER -->` deletes a folder before a block.
What `torchrun` starts is run by one process.
"""

from __future__ import annotations

import glob
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch.distributed.run import get_args_parser

from recurformer import cli
from recurformer.experiments import demo

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
page_by_page = pytest.mark.parametrize("page", PAGES, ids=[path.name for path in PAGES])

SMALL = {"data.window": 32, "batch_size": 2, "schedule.steps": 2, "evaluation.batches": 1, "sample.tokens": 4}
TINY = ["--steps", "1", "--length", "12", "--d-model", "16", "--n-heads", "2"]
TINY_SHAPE = ["--length", "8", "--dtype", "fp32", "--repeats", "1", "--warmup", "1"]
SHORTER = {
    "train": [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")],
    "generate": ["--max-new-tokens", "8"],
    "bench layer": [*TINY_SHAPE, "--d-model", "16", "--n-heads", "2", "--batch-size", "1"],
    "bench model": [*TINY_SHAPE, "--presets", "nano", "--tokens", "16", "--micro-batch-sizes", "2"],
    "bench prefill": [*TINY_SHAPE, "--presets", "nano"],
    "bench decode": [
        "--models",
        "nano:recurrent,nano:standard",
        "--batch-sizes",
        "1",
        "--contexts",
        "20",
        "--tokens",
        "2",
        "--dtype",
        "fp32",
        "--repeats",
        "1",
        "--warmup",
        "1",
    ],
    "tasks run": [*TINY, "--test-count", "4", "--batch-size", "2"],
    "tasks hybrids": [*TINY, "--n-layers", "2", "--batch-size", "2"],
    "bench stability": [*TINY, "--n-layers", "1", "--uniform-width", "16", "--no-training"],
    "bench scan": ["--d-model", "16", "--n-layers", "1", "--batch-size", "1", "--repeats", "1", "--warmup", "0"],
}


class Block(NamedTuple):
    """One fenced block."""

    language: str
    text: str
    line: int
    order: str  # the hidden comment before it, or ""


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page that have a language."""
    pattern = r"(?:^<!-- test: (.*?) -->\n)?^```(\w+)\n(.*?)^```$"
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
        yield Block(match[2], match[3], text.count("\n", 0, match.start(2)) + 1, match[1] or "")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the texts that the documentation speaks of."""
    prose = [json.loads(line)["text"] for line in Path(demo.quickstart("validation.jsonl")).read_text().splitlines()]
    for name in ("books", "notes", "shards"):
        (tmp_path / name).mkdir()
    for n, text in enumerate(prose[:2]):
        (tmp_path / "books" / f"{n}.txt").write_text(text[:3000], encoding="utf-8")
    (tmp_path / "notes" / "note.md").write_text(prose[2][:3000], encoding="utf-8")
    (tmp_path / "held-out.txt").write_text(prose[3][:2000], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def add_other_formats(place: Path) -> None:
    """The inputs that need optional libraries to be made."""
    import numpy as np
    import pyarrow as arrow
    import pyarrow.parquet as parquet
    import zstandard

    lines = Path(demo.quickstart("validation.jsonl")).read_bytes()
    (place / "corpus.jsonl.zst").write_bytes(zstandard.compress(lines))
    parquet.write_table(arrow.table({"body": ["A short text.", "Another one."]}), place / "table.parquet")
    np.arange(50, dtype=np.uint16).tofile(place / "shards" / "part.npy")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def write_files(page: Path, place: Path) -> None:
    """TOML blocks that begin with `# NAME.toml` become that file, shortened."""
    for block in blocks(page):
        name = re.match(r"# (\S+\.toml)\n", block.text)
        if block.language == "toml" and name:
            values = {**flat(tomllib.loads(block.text)), **SMALL}
            (place / name[1]).write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))


def words_of(line: str) -> list[str]:
    """A shell line as words: comments gone, unquoted globs filled in."""
    found: list[str] = []
    for word in shlex.split(line, comments=True):
        quoted = f"'{word}'" in line or f'"{word}"' in line
        matches = sorted(glob.glob(word)) if "*" in word and not quoted else []
        found += matches or [word]
    return found


def run_line(line: str) -> None:
    """One command of the documentation."""
    words = words_of(line)
    if not words:
        return
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
        return
    if words[0] == "torchrun":  # its options are checked, its command is run by one process
        asked = get_args_parser().parse_args(words[1:])
        assert asked.module, f"{line!r}: torchrun without -m"
        words = [asked.training_script, *asked.training_script_args]
    assert words[0] == "recurformer", f"{line!r}: neither recurformer nor make, and not marked as not run"
    assert not {"|", ">", "&&", ";"} & set(words), f"{line!r} needs a shell"
    with pytest.raises(SystemExit) as stop:
        cli.main([*words[1:], *SHORTER.get(words[1], []), *SHORTER.get(" ".join(words[1:3]), [])])
    assert stop.value.code == 0, f"{line!r} ended with {stop.value.code}"


@page_by_page
def test_commands_and_python(page: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if page.name == "data.md":
        add_other_formats(place)
    write_files(page, place)
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.order.startswith("not run"):
            continue
        for folder in re.findall(r"fresh (\S+)", block.order):
            shutil.rmtree(place / folder, ignore_errors=True)
        try:
            if block.language in ("sh", "bash"):
                for line in block.text.replace("\\\n", " ").splitlines():
                    run_line(line)
            elif block.language == "python":
                exec(compile(block.text, f"{page.name}:{block.line}", "exec"), names)
        except BaseException as error:
            raise AssertionError(f"{page.name}, line {block.line}: {error}\n{capsys.readouterr().err}") from error


@page_by_page
def test_links_and_pictures_exist(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    for target in targets:
        if not re.match(r"https?://", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_file_tree_is_true() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = re.search(r"^```\nsrc/recurformer/\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert tree is not None
    listed: list[str] = []
    folders: list[str] = []
    for line in tree[1].splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0].rstrip("/")
        if depth == 0:  # the repository's other folders
            assert (REPOSITORY / name).exists(), f"the file tree names {name}"
            continue
        folders = [*folders[: depth - 1], name]
        path = "/".join(["src/recurformer", *folders])
        assert (REPOSITORY / path).exists(), f"the file tree names {path}"
        listed.append(path)
    for path in (REPOSITORY / "src" / "recurformer").iterdir():
        if path.name not in ("__init__.py", "__main__.py", "__pycache__", "py.typed", "version.py"):
            assert f"src/recurformer/{path.name}" in listed, f"the file tree lacks {path.name}"


def test_every_verb_is_documented() -> None:
    everything = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for verb in cli.VERBS:
        assert f"recurformer {verb}" in everything


def test_the_pages_are_true_to_the_code() -> None:
    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    from recurformer.version import __version__

    assert f"## [Unreleased] - {__version__}" in changes
