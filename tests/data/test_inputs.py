"""Which files an input names: links, pipes, names of any bytes, standard input, formats."""

from __future__ import annotations

import glob
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recurformer.cli import main
from recurformer.data import TokenDataset, prepare
from recurformer.data.inputs import find_sources


def texts(folder: Path) -> list[str]:
    """The documents of a folder of bytes, without their end tokens."""
    dataset = TokenDataset(folder)
    rows = [dataset.read(shard, start, stop - start - 1) for shard, start, stop in dataset.documents()]
    return [bytes(row.tolist()).decode() for row in rows]


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


# --- links, pipes and devices -----------------------------------------------------------------------------------------


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder with a text of its own and a link to a folder with another."""
    (tmp_path / "disk" / "b").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("first")
    (tmp_path / "disk" / "b" / "b.txt").write_text("second")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "disk" / "b")
    return tmp_path / "data"


@pytest.mark.parametrize("pattern", ["", "**/*.txt"])
def test_linked_folders_are_read(pattern: str, linked: Path):
    found = [source.name for source in find_sources([str(linked / pattern) if pattern else linked])]
    assert [Path(name).name for name in found] == ["a.txt", "b.txt"]


@pytest.mark.parametrize("pattern", ["", "**/*.txt"])
def test_loops_of_links_are_read_once(pattern: str, linked: Path, tmp_path: Path):
    (linked / "itself").symlink_to(linked)
    (linked / "up").symlink_to(tmp_path)
    (tmp_path / "disk" / "b" / "back").symlink_to(linked)  # data -> b -> data
    found = [source.name for source in find_sources([str(linked / pattern) if pattern else linked])]
    assert [Path(name).name for name in found] == ["a.txt", "b.txt"]


def test_patterns_match_as_in_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.md", "x/c.txt", "x/y/d.txt", "x/.h/e.txt", ".f.txt", "[1].txt", "x/yy/g.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("t")
    for pattern in ("*.txt", "**/*.txt", "x/**", "x/**/d.*", "x/*/*", "./x/../*.md", "[ab].*", "x/y?/*", "**/y/*.txt"):
        for prefix in ("", f"{tmp_path}/"):
            expected = sorted({os.path.normpath(path) for path in glob.glob(prefix + pattern, recursive=True)
                               if os.path.isfile(path)})  # fmt: skip
            found = sorted(os.path.normpath(source.name) for source in find_sources([prefix + pattern]))
            assert found == expected, pattern
    assert [source.name for source in find_sources(["[1].txt"])] == ["[1].txt"]  # a name that looks like a pattern
    with pytest.raises(ValueError, match=r"\*\.none does not exist"):
        find_sources(["*.none"])


def test_two_links_to_one_folder_are_named(linked: Path, tmp_path: Path):
    (linked / "again").symlink_to(tmp_path / "disk" / "b")
    with pytest.raises(ValueError, match=r"b/b\.txt is given twice, by .*name it once"):
        find_sources([linked])


@pytest.mark.parametrize("glob", [False, True])
def test_what_would_be_skipped_or_hang_is_refused(glob: bool, linked: Path, tmp_path: Path):
    given = str(linked / "*") if glob else linked
    (linked / "z.txt").symlink_to("nowhere.txt")
    with pytest.raises(ValueError, match=r"z\.txt is a link to nowhere\.txt, which does not exist; remove the link"):
        find_sources([given])
    (linked / "z.txt").unlink()
    os.mkfifo(linked / "z.txt")
    with pytest.raises(ValueError, match=r"z\.txt is no regular file but a pipe or a device; pipe text into .*prepare"):
        find_sources([given])
    (linked / "z.txt").unlink()
    (linked / "z.jsonl").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"z\.jsonl is no regular file"):
        find_sources([given])


def test_a_pipe_or_a_device_by_its_name_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.txt")
    for given in (tmp_path / "pipe.txt", "/dev/zero"):
        with pytest.raises(ValueError, match=r"is no regular file|files of this kind are not read"):
            find_sources([given])
    with pytest.raises(ValueError, match="is no regular file"):
        find_sources(["/dev/zero"], input_format="txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_and_folders_without_permission_are_named(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(ValueError, match=r"a\.txt may not be read by this user"):
        find_sources([tmp_path])


@pytest.mark.parametrize(
    ("given", "message"),
    [("", 'an input is ""; give a file'), ("hf:", "'hf:' names no dataset; write hf:NAME"), ("hf::en", "names no dat")],
)
def test_empty_names_are_refused(given: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.chdir(tmp_path)  # "" must not mean this folder
    with pytest.raises(ValueError, match=message):
        find_sources([given])


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
@pytest.mark.parametrize("locale", [{}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
def test_names_that_are_not_utf8_are_read_recorded_and_shown(locale: dict[str, str], tmp_path: Path):
    """Latin-1 in an old archive; an ASCII terminal; a locale that Python does not take for UTF-8."""
    folder = os.fsencode(tmp_path) + b"/in"
    os.mkdir(folder)
    for name, content in ((b"caf\xe9.txt", "coffee"), ("größer.txt".encode(), "greater")):
        with open(folder + b"/" + name, "w") as file:
            file.write(content)
    environment = {**os.environ, "PYTHONUTF8": "0", **locale}
    words = [sys.executable, "-m", "recurformer", "prepare"]
    done = subprocess.run([*words, "in", "--out", b"\xfct"], cwd=tmp_path, capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    out = next(path for path in tmp_path.iterdir() if path.name != "in")
    assert os.fsencode(out.name) == b"\xfct"
    assert texts(out) == ["coffee", "greater"]
    names = [source["name"] for source in json.loads((out / "dataset.json").read_text())["sources"]]
    assert names == [r"in/caf\xe9.txt", "in/größer.txt"]
    with open(folder + b"/caf\xe9.txt", "wb") as file:
        file.write(b"\xff")
    done = subprocess.run([*words, "in", "--out", "o"], cwd=tmp_path, capture_output=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith(rb"recurformer: error: in/caf\xe9.txt, line 1: byte 0xff is not UTF-8")
    assert done.stderr.count(b"\n") == 1


# --- standard input and formats ---------------------------------------------------------------------------------------


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_standard_input_is_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    piped(monkeypatch, "one\nGrüße\n".encode())
    assert command("prepare", "-", "--out", tmp_path / "out", "--quiet") == 0
    assert texts(tmp_path / "out") == ["one\nGrüße\n"]
    source = json.loads((tmp_path / "out" / "dataset.json").read_text())["sources"][0]
    assert (source["name"], source["n_bytes"]) == ("standard input", len("one\nGrüße\n".encode()))


def test_standard_input_as_json_lines_and_as_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, content in (("jsonl", b'{"text": "a"}\n{"text": "b"}\n'), ("csv", b"id,text\n1,a\n2,b\n"),
                          ("json", b'[{"text": "a"}, {"text": "b"}]')):  # fmt: skip
        piped(monkeypatch, content)
        assert command("prepare", "-", "--input-format", name, "--out", tmp_path / name, "--quiet") == 0
        assert texts(tmp_path / name) == ["a", "b"]


def test_errors_of_standard_input_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    piped(monkeypatch, b'{"text": "a"}\n{"text": }\n')
    with pytest.raises(ValueError, match="standard input, line 2: not JSON"):
        prepare(["-"], tmp_path / "out", input_format="jsonl")
    with pytest.raises(ValueError, match="standard input can be read once, but train-bpe:300 reads the text twice"):
        prepare(["-"], tmp_path / "out", "train-bpe:300")
    with pytest.raises(ValueError, match=r"- is given twice"):
        find_sources(["-", "-"])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="standard input is closed"):
        prepare(["-"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/stdin").exists(), reason="has no /dev/stdin")
@pytest.mark.parametrize("given", ["/dev/stdin", "/dev/fd/0"])
def test_standard_input_by_its_path(given: str, tmp_path: Path):
    words = [sys.executable, "-m", "recurformer", "prepare", given, "--out", "out"]
    done = subprocess.run(words, cwd=tmp_path, input=b"piped", capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert texts(tmp_path / "out") == ["piped"]


def test_tables_and_arrays(tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfid,text\r\n1,"two\r\nlines, ""quoted"""\r\n\r\n2,\r\n3,last')
    (tmp_path / "b.TSV").write_text("text\tid\na,b\t1\n")
    (tmp_path / "c.json").write_text('\n[\n {"text": "x"},\n {"text": "y", "id": 1}\n]\n')
    (tmp_path / "d.json").write_text('{"text": "lines"}\n\n{"text": "of JSON"}\n')
    prepare([tmp_path / name for name in ("a.csv", "b.TSV", "c.json", "d.json")], tmp_path / "out", progress=False)
    assert texts(tmp_path / "out") == ['two\r\nlines, "quoted"', "last", "a,b", "x", "y", "lines", "of JSON"]


def test_files_with_other_endings_are_read_when_their_format_is_given(tmp_path: Path):
    (tmp_path / "notes").write_text("plain")
    (tmp_path / "part-0001").write_text('{"text": "record"}\n')
    with pytest.raises(ValueError, match=r"notes: files of this kind are not read; known are .*; --input-format reads"):
        prepare([tmp_path / "notes"], tmp_path / "out")
    prepare([tmp_path / "notes"], tmp_path / "out", input_format="txt")
    assert texts(tmp_path / "out") == ["plain"]
    prepare([str(tmp_path / "part-*")], tmp_path / "more", input_format="jsonl")
    assert texts(tmp_path / "more") == ["record"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"id,txt\n1,x\n", r"a\.csv, line 1: no field 'text'; did you mean 'txt'"),
        ("a.csv", b"id,text\n1,x\n2\n", r"a\.csv, line 3: 1 columns, so 'text' is missing"),
        ("a.csv", b"text\n\xff\n", r"a\.csv, line 2: not UTF-8"),
        ("a.csv", b'text\n"' + b"x\n" * 600, r"line \d+: the record is longer than 1,000 bytes; close its quotes"),
        ("a.json", b'[{"text": "x"}, 3]', r"a\.json, record 2: a JSON int; each"),
        ("a.json", b'[{"text": "x"}', r"a\.json, line 1: not JSON"),
        ("a.json", b"[" + b'{"text": "x"},\n' * 100 + b'{"text": "x"}]', r"the array is longer than 1,000 bytes; .*jq"),
        ("a.jsonl", b"[" * 900, r"a\.jsonl, line 1: (JSON nested too deeply|not JSON)"),
        ("a.jsonl", b'{"text": "' + b"x" * 1000 + b'"}', r"line 1: longer than 1,000 bytes; .*max-document-by"),
        ("a.jsonl", b'{"' + b"k" * 900 + b'": 1}', r"a\.jsonl, line 1: no field 'text'; present: 'kkk"),
    ],
)  # fmt: skip
def test_records_that_cannot_be_read(name: str, content: bytes, message: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as found:
        prepare([tmp_path / name], tmp_path / "out", max_document_bytes=1000)
    assert len(str(found.value)) < 500 + len(str(tmp_path))


def test_a_key_of_ten_million_characters_is_not_repeated(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"k" * 10_000_000: 1}))
    began = time.monotonic()
    with pytest.raises(ValueError, match="no field 'text'") as found:
        prepare([tmp_path / "a.jsonl"], tmp_path / "out")
    assert len(str(found.value)) < 1000
    assert time.monotonic() - began < 10
