"""`prepare`: every input, the same bytes from any number of workers, flat memory, and nothing half-made."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from recurformer.cli import main
from recurformer.data import PrepareSummary, TokenDataset, Tokenizer, prepare, sources
from recurformer.data.inputs import find_sources
from recurformer.data.preparation import SHARD_TOKENS
from recurformer.data.tokenizer import BytesTokenizer, JsonTokenizer, load_tokenizer, train_bpe
from recurformer.files import WORK

SHARED = Path(os.environ.get("RECURFORMER_TEST_DATA", Path(__file__).parents[3] / "shared"))
DOCUMENTS = ["First document.\n", "Zweites, größeres: 🦊\r\nwith two lines", "third"]


def texts(folder: Path) -> list[str]:
    """The documents of a folder, decoded, their end tokens checked and taken off."""
    dataset = TokenDataset(folder)
    tokenizer = dataset.tokenizer()
    assert tokenizer is not None
    found = []
    for shard, start, stop in dataset.documents():
        ids = dataset.read(shard, start, stop - start).tolist()
        assert ids[-1] == dataset.eos_id
        found.append(tokenizer.decode(ids[:-1]))
    return found


def packed(content: bytes) -> bytes:
    """Gzip without the time of day: names of tests are made of it."""
    return gzip.compress(content, mtime=0)


def lines(documents: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: text, "id": 1}, ensure_ascii=False) + "\n" for text in documents).encode()


def sidecar(folder: Path) -> dict:
    return json.loads((folder / "dataset.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "md", "jsonl"])
def test_text_and_json_lines_plain_and_packed(kind: str, packing: str, tmp_path: Path):
    expected = DOCUMENTS if kind == "jsonl" else [DOCUMENTS[1]]
    content = lines(DOCUMENTS) if kind == "jsonl" else DOCUMENTS[1].encode()
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[packing]
    path = tmp_path / f"in.{kind}{packing}"
    path.write_bytes(pack(content[:20]) + pack(content[20:]))  # frames end to end are one stream
    summary = prepare([path], tmp_path / "out")
    assert texts(tmp_path / "out") == expected
    assert summary == PrepareSummary(
        folder=tmp_path / "out",
        n_tokens=sum(len(text.encode()) + 1 for text in expected),
        n_documents=len(expected),
        n_bytes=sum(len(text.encode()) for text in expected),
        n_shards=1,
        vocab_size=256,
        dtype="uint16",
        eos_id=0,
    )


def test_packed_json_is_json_lines(tmp_path: Path):
    """As the files of C4 are named; a plain .json in the same folder is something else."""
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "train.00000-of-01024.json.gz").write_bytes(gzip.compress(b'{"text": "one", "url": "u"}\n'))
    (tmp_path / "c4" / "train.00001-of-01024.json.zst").write_bytes(
        zstandard.ZstdCompressor().compress(b'{"text": "two"}\n')
    )
    (tmp_path / "c4" / "dataset_info.json").write_text('{"splits": 2}')
    made = prepare([tmp_path / "c4"], tmp_path / "out", progress=False)
    assert (made.n_documents, made.n_bytes) == (2, 6)
    with pytest.raises(ValueError, match=r"dataset_info\.json, line 1: no field 'text'; present: 'splits'"):
        prepare([tmp_path / "c4" / "dataset_info.json"], tmp_path / "other")


def test_parquet(tmp_path: Path):
    table = pyarrow.table({"id": range(200), "body": [f"{DOCUMENTS[1]} {row}" for row in range(200)]})
    pyarrow.parquet.write_table(table, tmp_path / "in.parquet", row_group_size=70)
    prepare([tmp_path / "in.parquet"], tmp_path / "out", text_field="body")
    assert texts(tmp_path / "out") == table["body"].to_pylist()


def test_folders_and_globs_are_read_in_order_of_path(tmp_path: Path):
    corpus = tmp_path / "corpus"
    for name in ("b.txt", "a/z.md", "a/y.jsonl", "c.txt", ".hidden/x.txt", "a/.x.txt", "ignored.pdf"):
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_bytes(lines([name]) if name.endswith("jsonl") else name.encode())
    prepare([corpus / "c.txt", corpus / "a", str(corpus / "b*")], tmp_path / "out")
    assert texts(tmp_path / "out") == ["c.txt", "a/y.jsonl", "a/z.md", "b.txt"]
    prepare([str(corpus / "**" / "*.txt")], tmp_path / "glob")
    assert texts(tmp_path / "glob") == ["b.txt", "c.txt"]
    prepare([corpus], tmp_path / "all")
    assert texts(tmp_path / "all") == ["a/y.jsonl", "a/z.md", "b.txt", "c.txt"]
    assert [Path(source["name"]).name for source in sidecar(tmp_path / "all")["sources"]] == [
        "y.jsonl", "z.md", "b.txt", "c.txt",
    ]  # fmt: skip


def test_datasets_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return ({"text": text} for text in DOCUMENTS)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for number, name in enumerate(["hf:tiny", "hf:tiny:en", "hf:owner/tiny"]):
        prepare([name], tmp_path / str(number), split="test")
        assert texts(tmp_path / str(number)) == DOCUMENTS
    assert [args for args, _ in calls] == [("tiny", None), ("tiny", "en"), ("owner/tiny", None)]
    assert calls[0][1] == {"split": "test", "streaming": True}
    with pytest.raises(ValueError, match="hf:owner/tiny: no field 'txt'; did you mean 'text'"):
        prepare(["hf:owner/tiny"], tmp_path / "field", text_field="txt")


def test_unknown_datasets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no such dataset")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match="hf:owner/none cannot be loaded: no such"):
        prepare(["hf:owner/none"], tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_byte_order_marks_and_blank_lines_are_no_text(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "two"}\r\n\n  \n{"text": ""}\n{"text": "three"}')
    prepare([tmp_path], tmp_path / "out")
    assert texts(tmp_path / "out") == ["one", "two", "three"]
    assert [source["n_documents"] for source in sidecar(tmp_path / "out")["sources"]] == [1, 2]


def test_the_sidecar_tells_where_the_tokens_are_from(tmp_path: Path):
    (tmp_path / "in.jsonl").write_bytes(lines(DOCUMENTS))
    prepare([tmp_path / "in.jsonl"], tmp_path / "out", shard_tokens=20)
    content = sidecar(tmp_path / "out")
    digest = subprocess.run(["sha256sum", tmp_path / "in.jsonl"], capture_output=True, text=True, check=True).stdout[
        :64
    ]
    assert content["sources"] == [
        {"name": str(tmp_path / "in.jsonl"), "sha256": digest, "n_bytes": len(lines(DOCUMENTS)), "n_documents": 3}
    ]
    assert content["tokenizer"]["kind"] == content["tokenizer"]["requested"] == "bytes"
    assert [shard["n_documents"] for shard in content["shards"]] == [2, 1]
    TokenDataset(tmp_path / "out").verify()


# --- input that cannot be read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nfine\nb\xe4d", r"a\.txt, line 3: byte 0xe4 is not UTF-8 .*; convert the file"),
        ("a.txt", b"x" * 65535 + b"\n\xc3\n", r"a\.txt, line 2: byte 0xc3 is not UTF-8"),
        ("a.txt", b"cut \xf0\x9f", r"a\.txt, line 1: byte 0xf0 is not UTF-8 \(unexpected end of data\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": }\n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "\xff"}\n', r"a\.jsonl, line 3: not UTF-8"),
        ("a.jsonl", b'{"txt": "x"}', r"a\.jsonl, line 1: no field 'text'; did you mean 'txt'.*; present: 'txt'; "),
        ("a.jsonl", b'["x"]', r"a\.jsonl, line 1: a JSON list; each line must be an object with a 'text' field"),
        ("a.jsonl", b'{"text": null}', r"a\.jsonl, line 1: the text is missing"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl, line 1: the text is a int; it must be a string"),
        ("a.jsonl", rb'{"text": "x\ud800"}', r"a\.jsonl, line 1: half a surrogate pair at character 1"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: (JSON nested too deeply|not JSON)"),
        ("a.txt.gz", packed(b"one\ntwo\n" * 99)[:-9], r"a\.txt\.gz, line \d+: the compressed data is cut short"),
        ("a.txt.zst", zstandard.compress(b"one\ntwo\n" * 9)[:-1], r"a\.txt\.zst, line \d+: the .* data is cut short"),
        ("a.jsonl.gz", packed(lines(["x"] * 99))[:-4], r"a\.jsonl\.gz, line 100: the .* data is cut short"),
        ("a.jsonl.zst", zstandard.compress(lines(["x"]))[:-1], r"a\.jsonl\.zst, line \d: the .* data is cut short"),
        ("a.txt.gz", b"plain text", r"a\.txt\.gz, line 1: the compressed data is damaged"),
        ("a.jsonl.zst", b"plain text", r"a\.jsonl\.zst, line 1: the compressed data is damaged"),
        ("a.parquet", b"PAR1 and nothing", r"a\.parquet: not a readable parquet file"),
        ("a.txt", b"", r"no text in .*a\.txt; nothing to prepare"),
        ("a.jsonl", b"\n\n", r"no text in .*a\.jsonl; nothing to prepare"),
        ("a.txt.gz", b"", r"no text in .*a\.txt\.gz; nothing to prepare"),
        ("a.pdf", b"x", r"a\.pdf: files of this kind are not read; known are \.txt, \.md, \.jsonl"),
    ],
)  # fmt: skip
def test_unreadable_input_is_named_with_its_line(name: str, content: bytes, message: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare([tmp_path / name], tmp_path / "out")
    assert left_behind(tmp_path) == [name]


def test_parquet_without_the_field_or_with_a_hole(tmp_path: Path):
    pyarrow.parquet.write_table(pyarrow.table({"texts": ["a", None]}), tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=r"in\.parquet: no field 'text'; did you mean 'texts'"):
        prepare([tmp_path / "in.parquet"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"in\.parquet, row 2: the text is missing"):
        prepare([tmp_path / "in.parquet"], tmp_path / "out", text_field="texts")


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(lines(["x" * 200_000]))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: longer than 100,000 bytes; put one record on each line"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", max_document_bytes=100_000)


def test_inputs_that_name_nothing(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for given, message in [
        ([], "no input; give files"),
        ([tmp_path / "none.txt"], r"none\.txt does not exist; a Hugging Face dataset is written hf:NAME"),
        (["owner/none"], "owner/none does not exist"),
        ([str(tmp_path / "*.md")], r"\*\.md does not exist"),
        ([tmp_path / "empty"], "empty holds no file that can be read; known are"),
        ([tmp_path / "a.txt", tmp_path], r"a\.txt is given twice, by .*a\.txt' and '"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare(given, tmp_path / "out")


def test_options_that_do_not_fit(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a b")
    unending = JsonTokenizer(json.dumps(UNENDING).encode(), eos_id=None, pad_id=None)
    for options, message in [
        ({"shard_tokens": 0}, "shard_tokens is 0; it must be a whole number of at least 1"),
        ({"workers": 0}, "workers is 0; it must be a whole number of at least 1"),
        ({"tokenizer": "train-bpe"}, "'train-bpe': write train-bpe:SIZE"),
        ({"tokenizer": "train-bpe:4k"}, "'train-bpe:4k': write train-bpe:SIZE"),
        ({"tokenizer": "train-bpe:10"}, "a BPE vocabulary of 10 is too small; it needs 257"),
        ({"tokenizer": "byte"}, "tokenizer 'byte' does not exist; give 'bytes'"),
        ({"tokenizer": unending}, "has no end-of-document token; prepare with --no-append-eos"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare([tmp_path / "a.txt"], tmp_path / "out", **options)
    prepare([tmp_path / "a.txt"], tmp_path / "out", unending, append_eos=False)
    dataset = TokenDataset(tmp_path / "out")
    assert dataset.eos_id is None
    assert dataset.read(0, 0, 2).tolist() == [0, 1]


UNENDING = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
}


class Lying(Tokenizer):
    """Gives an id outside its vocabulary."""

    kind = "lying"
    vocab_size, eos_id, pad_id = 65536, 0, None

    def encode(self, text: str) -> list[int]:
        return [65535, 70000] if "70000" in text else [-1]

    def _decode(self, ids: list[int]) -> str:
        return ""


@pytest.mark.parametrize("wrong", ["70000", "-1"])
def test_ids_outside_the_vocabulary_are_never_written(wrong: str, tmp_path: Path):
    (tmp_path / "a.txt").write_text(wrong)
    with pytest.raises(ValueError, match=f"the tokenizer gave id {wrong}, outside its vocabulary of 65536"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", Lying())
    assert left_behind(tmp_path) == ["a.txt"]


# --- the same bytes ---------------------------------------------------------------------------------------------------


def test_the_output_depends_on_the_input_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One process and two write the same files; cuts of shards, tasks and pieces do not show in the tokens."""
    documents = [f"{number} The quick brown fox, größer. " * (number % 97) for number in range(200)]
    (tmp_path / "in.jsonl").write_bytes(lines(documents))
    bpe = train_bpe(documents, 300)
    bpe.save(tmp_path / "bpe")
    monkeypatch.setattr("recurformer.data.preparation.PIECE", 1 << 16)  # several tasks
    for workers in (1, 2):
        prepare(
            [tmp_path / "in.jsonl"], tmp_path / str(workers), tmp_path / "bpe", workers=workers, shard_tokens=30_000
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert sidecar(tmp_path / "1")["n_documents"] == 200 - 3  # the empty ones leave no trace
    assert texts(tmp_path / "1") == [text for text in documents if text]
    shards = sidecar(tmp_path / "1")["shards"]
    assert len(shards) > 2
    assert all(30_000 <= shard["n_tokens"] < 32_000 for shard in shards[:-1])


def test_a_bpe_trained_on_the_input_is_the_same_each_time(tmp_path: Path):
    (tmp_path / "in.jsonl").write_bytes(lines(["the cat and the hat " * 9, "größer"]))
    for out in ("a", "b"):
        summary = prepare([tmp_path / "in.jsonl"], tmp_path / out, "train-bpe:270")
        assert (summary.vocab_size, summary.eos_id) == (270, 0)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert texts(tmp_path / "a") == ["the cat and the hat " * 9, "größer"]


def test_a_bpe_is_trained_on_a_sample_spread_over_a_large_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("recurformer.data.preparation.BPE_SAMPLE", 2_000)
    (tmp_path / "in.jsonl").write_bytes(lines([f"{letter * 5} " * 10 for letter in "ab" * 100] + ["zzzzz " * 10] * 100))
    prepare([tmp_path / "in.jsonl"], tmp_path / "out", "train-bpe:262")
    tokenizer = TokenDataset(tmp_path / "out").tokenizer()
    assert tokenizer is not None
    assert len(tokenizer.encode("zzzzz")) < 5  # from the end of the file


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_long_documents_are_cut_where_it_does_not_show(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    document = "".join(f"Word{number},  größer\n\n {number}! " for number in range(3000))
    path = tmp_path / f"in.{kind}"
    path.write_bytes(lines([document]) if kind == "jsonl" else document.encode())
    bpe = train_bpe([document[:3000]], 400)
    whole = [*bpe.encode(document), bpe.eos_id]
    monkeypatch.setattr(sources, "PIECE", 2048)
    pieces = list(find_sources([path])[0].pieces(lambda chunk: None))
    assert len(pieces) > 20
    assert "".join(piece.text for piece in pieces) == document
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(piece.text) <= 2048 for piece in pieces)
    prepare([path], tmp_path / "out", bpe)
    dataset = TokenDataset(tmp_path / "out")
    assert dataset.read(0, 0, dataset.n_tokens).tolist() == whole
    assert list(dataset.documents()) == [(0, 0, len(whole))]


@pytest.mark.parametrize("text", ["x" * 5000, "line\n" * 1000, "   " * 2000, "二つの" * 1500, " x" * 2500])
def test_text_without_good_places_is_cut_all_the_same(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "PIECE", 1024)
    (tmp_path / "a.txt").write_text(text)
    prepare([tmp_path / "a.txt"], tmp_path / "out")
    assert texts(tmp_path / "out") == [text]


@pytest.mark.parametrize("name", ["t5/spiece.model", "gpt2/tokenizer.json"])
def test_real_tokenizers_do_not_see_the_cuts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, book = SHARED / "tokenizers" / name, SHARED / "quickstart" / "quickstart_val.jsonl"
    if not path.exists() or not book.exists():
        pytest.skip(f"{path} or {book} is not here; RECURFORMER_TEST_DATA can name a folder that has both")
    tokenizer = load_tokenizer(path)
    documents = [json.loads(line)["text"] for line in book.read_text().splitlines()]
    monkeypatch.setattr(sources, "PIECE", 4096)
    prepare([book], tmp_path / "out", path)
    dataset = TokenDataset(tmp_path / "out")
    expected = [token for text in documents for token in [*tokenizer.encode(text), tokenizer.eos_id]]
    assert dataset.read(0, 0, dataset.n_tokens).tolist() == expected


# --- whole or not at all ----------------------------------------------------------------------------------------------


def test_an_existing_output_is_kept_unless_replaced(tmp_path: Path):
    (tmp_path / "a.txt").write_text("old")
    prepare([tmp_path / "a.txt"], tmp_path / "out")
    (tmp_path / "a.txt").write_text("new")
    with pytest.raises(ValueError, match="out exists; choose another --out, or replace it with --overwrite"):
        prepare([tmp_path / "a.txt"], tmp_path / "out")
    assert texts(tmp_path / "out") == ["old"]
    prepare([tmp_path / "a.txt"], tmp_path / "out", overwrite=True)
    assert texts(tmp_path / "out") == ["new"]
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", overwrite=True)
    assert texts(tmp_path / "out") == ["new"]
    assert left_behind(tmp_path) == ["a.txt", "out"]


def test_overwrite_touches_nothing_but_prepared_folders(tmp_path: Path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for out in (tmp_path / "mine", tmp_path / "a.txt"):
        with pytest.raises(ValueError, match="is not a prepared folder, so --overwrite does not touch it"):
            prepare([tmp_path / "a.txt"], out, overwrite=True)
    assert left_behind(tmp_path / "mine") == ["thesis.tex"]


@pytest.mark.parametrize(
    ("number", "code", "workers"), [(signal.SIGINT, 130, 2), (signal.SIGTERM, 143, 1), (signal.SIGKILL, -9, 1)]
)
def test_an_interrupted_run_leaves_nothing_under_the_final_name(
    number: signal.Signals, code: int, workers: int, tmp_path: Path
):
    (tmp_path / "in.jsonl").write_bytes(lines(["The quick brown fox. " * 1000] * 4000))
    train_bpe(["The quick brown fox. "], 260).save(tmp_path / "bpe")
    options = ["--out", "out", "--tokenizer", "bpe", "--workers", str(workers)]
    command = [sys.executable, "-m", "recurformer", "prepare", "in.jsonl", *options]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not any(name.endswith(WORK) for name in left_behind(tmp_path)):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    left = left_behind(tmp_path)
    assert "out" not in left
    if number != signal.SIGKILL:
        assert left == ["bpe", "in.jsonl"]
        assert "Traceback" not in errors


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_stop_that_is_lost_stops_all_the_same(number: signal.Signals, raised: type[BaseException], tmp_path: Path):
    class Deaf(BytesTokenizer):
        """As Python is while it runs a callback of its own: what is raised there is dropped."""

        def encode_array(self, text: str) -> np.ndarray:
            with contextlib.suppress(KeyboardInterrupt, SystemExit):
                signal.raise_signal(number)
            return super().encode_array(text)

    (tmp_path / "a.txt").write_text("one")
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(raised):
        prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=Deaf())
    assert left_behind(tmp_path) == ["a.txt"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_two_at_once_do_not_replace_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The later one fails, whether it starts or ends while the other is at work; with --overwrite, too."""
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text("second")

    class Meanwhile(BytesTokenizer):
        def encode_array(self, text: str) -> np.ndarray:
            for overwrite in (False, True):
                with pytest.raises(ValueError, match=r"another process is writing .*out"):
                    prepare([tmp_path / "b.txt"], tmp_path / "out", overwrite=overwrite)
            return super().encode_array(text)

    prepare([tmp_path / "a.txt"], tmp_path / "out", Meanwhile())
    assert texts(tmp_path / "out") == ["first"]
    assert left_behind(tmp_path) == ["a.txt", "b.txt", "out"]

    class Late(BytesTokenizer):
        """Finds a folder of its name that was not there when it began."""

        def encode_array(self, text: str) -> np.ndarray:
            shutil.copytree(tmp_path / "out", tmp_path / "late")
            return super().encode_array(text)

    with pytest.raises(ValueError, match="late has appeared while it was being written"):
        prepare([tmp_path / "b.txt"], tmp_path / "late", Late())
    assert texts(tmp_path / "late") == ["first"]


@pytest.mark.parametrize("step", ["before", "after"])
def test_a_kill_while_a_folder_is_replaced_leaves_one_under_the_name(step: str, tmp_path: Path):
    """Killed right before or after the system call that exchanges the two."""
    (tmp_path / "a.txt").write_text("old")
    prepare([tmp_path / "a.txt"], tmp_path / "out")
    (tmp_path / "a.txt").write_text("new")
    script = f"""
import os, signal
from recurformer import files
from recurformer.data import prepare
give_name = files._give_name
def killed(*arguments):
    if {step!r} == "after":
        give_name(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
files._give_name = killed
prepare(["a.txt"], "out", overwrite=True)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True)
    assert run.returncode == -signal.SIGKILL
    assert texts(tmp_path / "out") == ["old" if step == "before" else "new"]
    prepare([tmp_path / "a.txt"], tmp_path / "out", overwrite=True)
    assert texts(tmp_path / "out") == ["new"]
    assert left_behind(tmp_path) == ["a.txt", "out"]


# --- texts that a tokenizer refuses -----------------------------------------------------------------------------------


def unit_records(kind: str, documents: list[str], path: Path) -> Path:
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path.with_suffix(".parquet"))
        return path.with_suffix(".parquet")
    path.with_suffix(f".{kind}").write_bytes(lines(documents) if kind == "jsonl" else documents[-1].encode())
    return path.with_suffix(f".{kind}")


@pytest.mark.parametrize(
    ("kind", "place", "workers"),
    [("jsonl", ", line 3", 1), ("jsonl", ", line 3", 2), ("parquet", ", row 3", 1), ("txt", "", 1)],
)
def test_a_nul_cannot_forge_an_end(kind: str, place: str, workers: int, tmp_path: Path):
    path = unit_records(kind, ["fine", "too", "first\0second"], tmp_path / "in")
    with pytest.raises(ValueError, match=rf"{re.escape(path.name)}{place}: character 5 of the text is NUL"):
        prepare([path], tmp_path / "out", workers=workers)
    assert left_behind(tmp_path) == [path.name]


def test_a_learned_vocabulary_keeps_a_nul(tmp_path: Path):
    (tmp_path / "in.jsonl").write_bytes(lines(["first\0second"]))
    prepare([tmp_path / "in.jsonl"], tmp_path / "out", "train-bpe:260")
    assert texts(tmp_path / "out") == ["first\0second"]


def test_errors_in_the_text_stop_the_training_of_a_tokenizer(tmp_path: Path):
    (tmp_path / "in.jsonl").write_bytes(lines(["fine"]) + b'{"text": 3}\n')
    with pytest.raises(ValueError, match=r"in\.jsonl, line 2: the text is a int"):
        prepare([tmp_path / "in.jsonl"], tmp_path / "out", "train-bpe:300")
    assert left_behind(tmp_path) == ["in.jsonl"]


MEASURE = """
import sys
from recurformer.data import prepare

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10

few, many = sys.argv[1:4], sys.argv[4:7]
for path in few:
    prepare([path], path + ".out")
for path in many:
    before = peak()
    prepare([path], path + ".out", shard_tokens=10_000_000)
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_stays_flat(tmp_path: Path):
    """A few MB first, so that what reading and writing always need is there; then fifteen times as much."""
    paths = []
    for name, size in (("few", 4), ("many", 60)):
        documents = [f"{number} größere words in a line\n" * 40 for number in range(size * 750)]
        for kind in ("txt", "jsonl.gz", "parquet"):
            paths.append(tmp_path / f"{name}.{kind}")
            if kind == "txt":
                paths[-1].write_text("".join(documents))
            elif kind == "parquet":
                pyarrow.parquet.write_table(pyarrow.table({"text": documents}), paths[-1], row_group_size=1 << 30)
            else:
                paths[-1].write_bytes(gzip.compress(lines(documents), compresslevel=1))
    run = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=True)
    growth = [int(line) for line in run.stdout.split()]
    assert len(growth) == 3
    assert all(each < 30 << 20 for each in growth), growth
    described = [sidecar(Path(f"{path}.out")) for path in paths[3:]]
    assert all(each["n_bytes"] > 55_000_000 for each in described)
    assert [len(each["shards"]) for each in described] == [1, 6, 6]  # one document is never divided


# --- the command ------------------------------------------------------------------------------------------------------


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code if isinstance(stopped.value.code, int) else 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "in.jsonl").write_bytes(lines(DOCUMENTS, field="body"))
    assert command("prepare", tmp_path / "in.jsonl", "--out", tmp_path / "out", "--text-field", "body") == 0
    shown = capsys.readouterr()
    n_tokens = sum(len(text.encode()) + 1 for text in DOCUMENTS)
    assert f"{n_tokens} tokens of 3 documents ({n_tokens - 3} bytes), vocabulary 256 as uint16, 1 shard\n" in shown.out
    assert shown.err == ""
    arguments = ("--text-field", "body", "--overwrite", "--quiet", "--no-append-eos", "--shard-tokens", 10)
    assert command("prepare", tmp_path / "in.jsonl", "--out", tmp_path / "out", *arguments) == 0
    assert capsys.readouterr().out == ""
    assert len(sidecar(tmp_path / "out")["shards"]) == 3
    assert sidecar(tmp_path / "out")["append_eos"] is False


def test_a_vocabulary_smaller_than_asked_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "in.txt").write_text("the cat")
    options = ("--out", tmp_path / "out", "--tokenizer", "train-bpe:60000")
    assert command("prepare", tmp_path / "in.txt", *options) == 0
    size = TokenDataset(tmp_path / "out").vocab_size
    assert 257 < size < 270
    assert f"the text was enough for a BPE of {size} tokens, not of 60,000\n" in capsys.readouterr().out
    assert command("prepare", tmp_path / "in.txt", "--out", tmp_path / "o", "--tokenizer", f"train-bpe:{size}") == 0
    assert "enough" not in capsys.readouterr().out
    assert command("prepare", tmp_path / "in.txt", *options, "--overwrite", "--quiet") == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in.jsonl", "--out", "out"], "in.jsonl, line 1: no field 'text'"),
        (["none.txt", "--out", "out"], "none.txt does not exist"),
        (["in.jsonl"], "Missing option '--out'"),
        (["--out", "out"], "Missing argument 'INPUT...'"),
        (["in.jsonl", "--out", "in.jsonl"], "in.jsonl exists"),
        (["in.jsonl", "--out", "out", "--tokenizer", "gpt2"], "tokenizer 'gpt2' does not exist"),
        (["in.jsonl", "--out", "out", "--workers", "0"], "--workers"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_bytes(lines(DOCUMENTS, field="body"))
    assert command("prepare", *arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("recurformer: error: ")
    assert message in shown.err
    assert left_behind(tmp_path) == ["in.jsonl"]


def test_help_shows_every_option_with_its_default(capsys: pytest.CaptureFixture[str]):
    assert command("prepare", "--help") == 0
    shown = capsys.readouterr().out
    for option in ("--out", "--tokenizer", "--text-field", "--split", "--append-eos", "--shard-tokens", "--workers"):
        assert option in shown
    assert f"default: {SHARD_TOKENS}" in " ".join(shown.split())
