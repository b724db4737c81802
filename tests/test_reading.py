"""Files of values: limits, syntax and types, each fault one sentence."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from recurformer import reading
from recurformer.reading import DEEPEST, build, parse, read_lines, read_table, read_text, read_values
from recurformer.settings import Natural, Settings

MANY = 100_000


@pytest.mark.parametrize(
    ("suffix", "text", "values"),
    [
        (".json", '{"a": [1, {"b": null}]}', {"a": [1, {"b": None}]}),
        (".json", '\ufeff{"a": "\\u00e9[[[{{"}', {"a": "é[[[{{"}),
        (".toml", "a.b = 1e-3\n[c]\nd = ['[', \"]\"]", {"a": {"b": 1e-3}, "c": {"d": ["[", "]"]}}),
        (".toml", "a = [" + "0.1, " * 500 + "]", {"a": [0.1] * 500}),
        (".toml", "a = '" + "x." * 500 + "'  # " + "y." * 500, {"a": "x." * 500}),
        (".yaml", "a: 1e-3\nb: &x [1]\nc: *x", {"a": 1e-3, "b": [1], "c": [1]}),
        (".yml", "base: &b {x: 1}\nc: {<<: *b, y: 2}", {"base": {"x": 1}, "c": {"x": 1, "y": 2}}),
        (".yaml", "", {}),
        (".json", "[" * DEEPEST + "]" * DEEPEST, None),
    ],
)  # fmt: skip
def test_files_are_read(tmp_path: Path, suffix: str, text: str, values: Any):
    (file := tmp_path / f"file{suffix}").write_text(text, encoding="utf-8")
    if values is None:
        assert isinstance(read_values(file), list)
    else:
        assert read_table(file) == values


BOMB = "b0: &b0 [1, 1]\n" + "".join(f"b{n}: &b{n} [*b{n - 1}, *b{n - 1}]\n" for n in range(1, 45))


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        (".json", "[" * MANY, "nests lists or tables more than 64 deep"),
        (".json", '{"a":' * MANY, "nests lists or tables more than 64 deep"),
        (".toml", "a = " + "[" * MANY, "nests lists or tables more than 64 deep"),
        (".toml", "a = " + "{b = " * MANY, "nests lists or tables more than 64 deep"),
        (".toml", ".".join("a" * MANY) + " = 1", "nests lists or tables more than 64 deep"),
        (".toml", "# it's\n# '''\n" + "'b' . " * MANY + "a = 1\n# '''", "nests lists or tables more than 64 deep"),
        (".yaml", "[" * MANY, "nests lists or tables more than 64 deep"),
        (".yaml", "- " * MANY, "nests lists or tables more than 64 deep"),
        (".yaml", "&a [*a]", "nests lists or tables more than 64 deep"),
        (".yaml", BOMB, "not valid YAML .more than 20,000 values"),
        (".yaml", "[" + "1," * 30_000 + "]", "not valid YAML .more than 20,000 values"),
        (".yaml", "a: &a 1\nb: [" + "*a, " * 200 + "]", "more than 100 aliases"),
        (".yaml", "a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        (".json", "9" * MANY, "a number of too many digits"),
        (".toml", "a = " + "9" * MANY, "a number of too many digits"),
        (".json", '"' + '\\"' * MANY, "Unterminated string"),
        (".toml", '"' * MANY, "not valid TOML"),
        (".toml", "a" * MANY, "not valid TOML"),
        (".yaml", "a: b: c", "line 1"),
    ],
)  # fmt: skip
def test_hostile_text_costs_a_sentence_and_little_time(suffix: str, text: str, message: str):
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as error:
        parse(text, suffix, "FILE")
    assert time.process_time() - start < 2
    assert str(error.value).startswith("FILE ")
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


def test_merges_that_stay_small_are_read():
    text = "b0: &b0 {x: 1}\n" + "".join(f"b{n}: &b{n} {{<<: [*b{n - 1}, *b{n - 1}], y: {n}}}\n" for n in range(1, 40))
    assert parse(text, ".yaml", "FILE")["b39"] == {"x": 1, "y": 39}


def test_what_is_no_file_of_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "large.json").write_text(" " * 2000)
    (tmp_path / "binary.json").write_bytes(b"\x80")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "keys.yaml").write_text("1: 2")
    (tmp_path / "file.ini").write_text("")
    monkeypatch.setattr(reading, "LARGEST", 1000)
    for name, message in {
        "pipe.json": "is no regular file",
        "zero.json": "is no regular file",
        "folder.json": "is no regular file",
        "missing.json": "is missing",
        "large.json": "has 2,000 bytes, more than the 1,000 that such a file may have",
        "binary.json": "is not UTF-8 text",
        "list.json": "holds a list, not a table",
        "keys.yaml": "has the key 1; keys must be text",
        "file.ini": "the name must end in .toml, .yaml, .yml, .json",
    }.items():
        with pytest.raises(ValueError, match=f"{re.escape(name)}.*{message}"):
            read_table(tmp_path / name, 1000)
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(ValueError, match="cannot be read") as error:
            read_text(tmp_path / name)
        assert len(str(error.value)) < 500


@dataclass(frozen=True)
class Sizes(Settings):
    width: Natural
    name: str = ""


def test_values_get_types():
    assert build(Sizes, {"width": 3, "other": []}, "FILE") == Sizes(3)
    for values, message in (
        ({}, "FILE lacks width; it is incomplete; copy it again"),
        ([], r"FILE holds \[\], not a table of named values; copy it again"),
        ({"width": 1.5}, "FILE: width is 1.5; it must be a whole number of at least 0; copy it again"),
        ({"width": True}, "FILE: width is True; it must be a whole number"),
        ({"width": 1, "name": ["x" * MANY]}, "FILE: name is .'x+... .100,005 characters.; it must be text"),
    ):
        with pytest.raises(ValueError, match=message):
            build(Sizes, values, "FILE", "copy it again")


def test_lines(tmp_path: Path):
    (file := tmp_path / "lines.jsonl").write_bytes(b'{"a": 1}\n[]\n{"cut')
    assert [values for _, values in read_lines(file)] == [{"a": 1}, []]
    file.write_bytes(b'{"a": 1}\n' + b"\0" * 100 + b'\n\0\0{"b": 2}\n\0\0')
    assert [values for _, values in read_lines(file)] == [{"a": 1}, {"b": 2}]
    file.write_bytes(b'{"a": 1}\n{"b"\0: 2}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*lines.jsonl is not valid JSON"):
        list(read_lines(file))
    file.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is not UTF-8"):
        list(read_lines(file))
    file.write_bytes(b"[" + b" " * reading.LARGEST + b"]\n")
    with pytest.raises(ValueError, match=r"line 1 of .* has more than"):
        list(read_lines(file))
