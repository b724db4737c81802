"""The commands and the code of docs/data.md work as they stand."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from recurformer.cli import main
from recurformer.data.sidecar import ShardInfo, Sidecar, SourceInfo, TokenizerInfo

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
TEXT = "It is a truth universally acknowledged. " * 200


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the page speaks of."""
    monkeypatch.chdir(tmp_path)
    for folder in ("books", "notes", "shards"):
        (tmp_path / folder).mkdir()
    (tmp_path / "books" / "one.txt").write_text(TEXT)
    (tmp_path / "notes" / "two.md.gz").write_bytes(gzip.compress(TEXT.encode()))
    (tmp_path / "corpus.jsonl.zst").write_bytes(
        zstandard.compress("".join(json.dumps({"text": f"{number} {TEXT}"}) + "\n" for number in range(200)).encode())
    )
    pyarrow.parquet.write_table(pyarrow.table({"body": [TEXT]}), tmp_path / "table.parquet")
    np.arange(50, dtype="<u2").tofile(tmp_path / "shards" / "part-0.npy")
    return tmp_path


def test_every_command_and_every_piece_of_code_runs(inputs: Path):
    commands = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 3
    for line in commands:
        words = shlex.split(line.replace("books/*.txt", "books/one.txt"), comments=True)
        assert words[0] == "recurformer"
        with pytest.raises(SystemExit) as stopped:
            main(words[1:])
        assert stopped.value.code == 0
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {"consumed": 0, "rank": 0, "world_size": 2}
    for block in blocks:
        exec(block.replace("    ...", "    break"), names)
    assert [tuple(names["batch"].tokens.shape)] == [(16, 256)]  # pyright: ignore[reportAttributeAccessIssue]


def test_every_field_of_the_sidecar_is_described():
    for model in (Sidecar, ShardInfo, SourceInfo, TokenizerInfo):
        for field in model.model_fields:
            assert f"`{field}`" in PAGE, field
