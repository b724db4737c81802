"""Tokens on disk: widths, sizes, offsets, and what a damaged or foreign folder says."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from recurformer.data import TokenDataset, TrainingWindows, evaluation_batches, prepare
from recurformer.data.sidecar import Sidecar, token_dtype


def words(folder: Path, vocab_size: int) -> Path:
    """A tokenizer.json in which the word "w7" is token 7."""
    vocabulary = {f"w{number}": number for number in range(vocab_size - 1)} | {"</s>": vocab_size - 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))  # pyright: ignore[reportCallIssue]
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    path = folder / f"{vocab_size}.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of bytes."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("first", "two", "Grüße")))
    prepare([tmp_path / "in.jsonl"], tmp_path / "out", shard_tokens=8)
    return tmp_path / "out"


def damage_sidecar(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(content | changes))


# --- widths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(1, "uint16"), (65535, "uint16"), (65536, "uint16"), (65537, "uint32"), (2**32, "uint32")]
)
def test_the_narrowest_width_that_holds_every_id(vocab_size: int, dtype: str):
    assert token_dtype(vocab_size) == dtype


@pytest.mark.parametrize("vocab_size", [0, 2**32 + 1])
def test_no_width_for_an_impossible_vocabulary(vocab_size: int):
    with pytest.raises(ValueError, match=rf"a vocabulary of {vocab_size} tokens cannot be stored; .* from 1 to 2\^32"):
        token_dtype(vocab_size)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32"), (70001, "uint32")])
def test_ids_around_the_limits_come_back(vocab_size: int, dtype: str, tmp_path: Path):
    ids = [token for token in (1, 65533, 65534, 65535, 65536, 69999, 70000) if token < vocab_size - 1]
    (tmp_path / "in.txt").write_text(" ".join(f"w{token}" for token in ids))
    summary = prepare([tmp_path / "in.txt"], tmp_path / "out", words(tmp_path, vocab_size))
    assert (summary.vocab_size, summary.dtype, summary.eos_id) == (vocab_size, dtype, vocab_size - 1)
    dataset = TokenDataset(tmp_path / "out")
    assert dataset.dtype == dtype
    assert dataset.read(0, 0, dataset.n_tokens).tolist() == [*ids, vocab_size - 1]
    tokenizer = dataset.tokenizer()
    assert tokenizer is not None
    assert tokenizer.decode(ids) == " ".join(f"w{token}" for token in ids)
    wrong = "uint16" if dtype == "uint32" else "uint32"
    with pytest.raises(ValueError, match=f"dtype '{wrong}' was asked for, but .* holds '{dtype}'"):
        TokenDataset(tmp_path / "out", dtype=wrong)


def test_a_falsified_dtype_shows_in_the_size(folder: Path):
    damage_sidecar(folder, dtype="uint32")
    with pytest.raises(ValueError, match=r"tokens-00000.bin has 20 bytes; 10 values of uint32 take 40"):
        TokenDataset(folder)


@pytest.mark.parametrize("dtype", ["int16", "uint8", "unit16", ""])
def test_unknown_widths_are_refused(dtype: str, tmp_path: Path):
    np.arange(4, dtype="<u2").tofile(tmp_path / "a.npy")
    with pytest.raises(ValueError, match=f"dtype is '{dtype}'; it must be one of uint16, uint32"):
        TokenDataset(tmp_path / "a.npy", vocab_size=10, dtype=dtype)


@pytest.mark.parametrize("token", [10, 65535])
def test_ids_outside_the_vocabulary_are_refused_where_they_are_read(token: int, tmp_path: Path):
    np.array([1, 2, 3, token, 4, 5, 6], dtype="<u2").tofile(tmp_path / "a.npy")
    windows = TrainingWindows(TokenDataset(tmp_path / "a.npy", vocab_size=10), 3, seed=0)
    with pytest.raises(ValueError, match=rf"a\.npy holds id {token} at token 3, outside the vocabulary of 10"):
        windows.batch(0, 2)


def test_files_beyond_4_gb_are_indexed_exactly(tmp_path: Path):
    path = tmp_path / "sparse.npy"
    n_tokens = 2_500_000_000  # 5 GB of uint16, of which the disk holds the last window
    tail = np.arange(1, 1026, dtype="<u2")
    with path.open("wb") as file:
        file.truncate(2 * n_tokens)
        file.seek(2 * (n_tokens - len(tail)))
        file.write(tail.tobytes())
    dataset = TokenDataset(path, vocab_size=2000)
    assert dataset.n_tokens == n_tokens
    windows = TrainingWindows(dataset, 1024, seed=0)
    assert len(windows) == (n_tokens - 1) // 1024
    assert dataset.read(0, n_tokens - 5, 5).tolist() == [1021, 1022, 1023, 1024, 1025]
    last = len(windows) - 1
    index = next(i for i in range(0, len(windows), 1 << 16) if last in windows._window_ids(i, 1 << 16))
    index += windows._window_ids(index, 1 << 16).tolist().index(last)
    batch = windows.batch(index, 1)
    assert batch.window_ids.tolist() == [last]
    shift = n_tokens - 1025 - last * 1024
    expected = np.concatenate([np.zeros(max(0, shift)), tail])[:1024] if shift >= 0 else tail[-shift:]
    assert np.array_equal(batch.tokens[0].numpy()[: len(expected)], expected)


# --- prepared folders -------------------------------------------------------------------------------------------------


def test_what_a_prepared_folder_knows(folder: Path):
    dataset = TokenDataset(folder)
    assert (dataset.vocab_size, dataset.eos_id, dataset.dtype) == (256, 0, "uint16")
    assert [shard.n_tokens for shard in dataset.shards] == [10, 8]
    assert (dataset.n_tokens, dataset.n_documents, dataset.n_bytes) == (18, 3, 15)
    assert list(dataset.documents()) == [(0, 0, 6), (0, 6, 10), (1, 0, 8)]
    tokenizer = dataset.tokenizer()
    assert tokenizer is not None
    assert tokenizer.decode(dataset.read(1, 0, 7)) == "Grüße"
    assert dataset.document_starts(0, 0, 10).tolist() == [6]
    assert dataset.document_starts(0, 6, 10).tolist() == []  # strictly inside
    assert dataset.document_starts(0, 5, 6).tolist() == []
    assert dataset.document_starts(0, 5, 7).tolist() == [6]
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.read(0, 0, 10).tolist() == dataset.read(0, 0, 10).tolist()
    dataset.verify()


def test_options_that_disagree_with_the_folder_are_refused(folder: Path):
    assert TokenDataset(folder, vocab_size=256, eos_id=0, dtype="uint16").n_tokens == 18
    with pytest.raises(ValueError, match=r"vocab_size 257 was asked for, but .* holds 256"):
        TokenDataset(folder, vocab_size=257)
    with pytest.raises(ValueError, match=r"eos_id 1 was asked for, but .* holds 0"):
        TokenDataset(folder, eos_id=1)


def test_the_fingerprint_follows_the_tokens_and_not_their_origin(folder: Path, tmp_path: Path):
    fingerprint = TokenDataset(folder).fingerprint
    shutil.copy(tmp_path / "in.jsonl", tmp_path / "moved.jsonl")
    prepare([tmp_path / "moved.jsonl"], tmp_path / "same", shard_tokens=8)
    assert TokenDataset(tmp_path / "same").fingerprint == fingerprint
    prepare([tmp_path / "moved.jsonl"], tmp_path / "other", shard_tokens=9)
    assert TokenDataset(tmp_path / "other").fingerprint == fingerprint  # the same cuts all the same
    prepare([tmp_path / "moved.jsonl"], tmp_path / "one", shard_tokens=100)
    assert TokenDataset(tmp_path / "one").fingerprint != fingerprint
    prepare([tmp_path / "moved.jsonl"], tmp_path / "open", shard_tokens=8, append_eos=False)
    assert TokenDataset(tmp_path / "open").fingerprint != fingerprint


@pytest.mark.parametrize("name", ["tokens-00001.bin", "documents-00000.bin"])
def test_truncated_and_missing_files_are_found_on_opening(name: str, folder: Path):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-1])
    with pytest.raises(
        ValueError, match=f"{name} has {len(whole) - 1} bytes; .* take {len(whole)}: the folder is incompl"
    ):
        TokenDataset(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        TokenDataset(folder)


def test_changed_bytes_are_found_by_verification(folder: Path):
    dataset = TokenDataset(folder)
    (folder / "tokens-00000.bin").write_bytes(b"\1\0" * 10)
    with pytest.raises(ValueError, match=r"tokens-00000\.bin does not match its recorded hash"):
        dataset.verify()


def test_a_file_truncated_while_open_is_an_error_and_no_crash(folder: Path):
    dataset = TokenDataset(folder)
    os.truncate(folder / "tokens-00000.bin", 6)
    with pytest.raises(ValueError, match="ends before token 8; it was changed"):
        dataset.read(0, 2, 6)


@pytest.mark.parametrize(
    ("changes", "place"),
    [({"format": "other"}, "format"), ({"format_version": 2}, "format_version"), ({"n_tokens": "9"}, "n_tokens"),
     ({"dtype": "int16"}, "dtype"), ({"more": 1}, "more")],
)  # fmt: skip
def test_foreign_sidecars_are_refused(changes: dict[str, object], place: str, folder: Path):
    damage_sidecar(folder, **changes)
    with pytest.raises(ValueError, match=rf"dataset.json is damaged or of another version: {place}: "):
        TokenDataset(folder)


def test_a_sidecar_that_is_no_json_is_refused(folder: Path):
    (folder / "dataset.json").write_text('{"format"')
    with pytest.raises(ValueError, match=r"dataset.json is damaged or of another version: the file: "):
        TokenDataset(folder)
    (folder / "dataset.json").unlink()
    with pytest.raises(ValueError, match=r"holds no dataset.json; make it with `recurformer prepare`"):
        Sidecar.read(folder)


# --- other data under the same name -----------------------------------------------------------------------------------


def test_data_replaced_while_in_use_are_noticed(folder: Path, tmp_path: Path):
    """A run must not go on with other tokens of the same size."""
    dataset = TokenDataset(folder)
    stream = TrainingWindows(dataset, 4, seed=0, packing="documents").iterate(0, 1, num_workers=1)
    evaluation = evaluation_batches(dataset, 4, 1)
    assert len(next(stream).tokens) == len(next(evaluation).tokens) == 1
    (tmp_path / "in.jsonl").write_text((tmp_path / "in.jsonl").read_text().replace("first", "FIRST"))
    prepare([tmp_path / "in.jsonl"], folder, shard_tokens=8, overwrite=True)
    message = r"out/(tokens|documents)-0000\d\.bin was replaced or changed after it was opened"
    for use in (stream, evaluation):
        with pytest.raises(ValueError, match=message):
            deque(itertools.islice(use, 40), maxlen=0)
    with pytest.raises(ValueError, match=message):
        dataset.document_starts(0, 0, 10)
    with pytest.raises(ValueError, match=message):
        pickle.loads(pickle.dumps(dataset)).read(0, 0, 1)
    assert TokenDataset(folder).read(0, 0, 5).tolist() == list(b"FIRST")


def test_a_raw_shard_that_grows_while_in_use_is_noticed(tmp_path: Path):
    np.arange(50, dtype="<u2").tofile(tmp_path / "a.npy")
    dataset = TokenDataset(tmp_path, vocab_size=50)
    with (tmp_path / "a.npy").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(ValueError, match=r"a\.npy was replaced or changed"):
        dataset.read(0, 0, 5)


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../secret.bin", "sub/tokens.bin", "..", ".", "", "a\\b", "C:x", ".x"]
)
@pytest.mark.parametrize("field", ["tokens", "documents"])
def test_shards_lie_in_the_folder_itself(field: str, name: str, folder: Path, tmp_path: Path):
    (tmp_path / "secret.bin").write_bytes(b"\0" * 20)
    shards = json.loads((folder / "dataset.json").read_text())["shards"]
    shards[0][field] = name
    damage_sidecar(folder, shards=shards)
    with pytest.raises(ValueError, match=rf"dataset.json is damaged or of another version: shards.0.{field}: "):
        TokenDataset(folder)


@pytest.mark.parametrize("target", ["/dev/zero", "pipe"])
def test_shards_and_sidecars_that_are_no_files_are_refused(target: str, folder: Path):
    if target == "pipe":
        target = str(folder / "pipe")
        os.mkfifo(target)
    for name, message in (("tokens-00000.bin", "tokens-00000.bin is missing"), ("dataset.json", "raw shards|neither")):
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        with pytest.raises(ValueError, match=message):
            TokenDataset(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_tokens": 19}, "n_tokens is 19, but the shards have 18"),
        ({"n_bytes": 1 << 70}, "n_bytes: "),
        ({"n_documents": -1}, "n_documents: "),
        ({"vocab_size": 0}, "vocab_size: "),
        ({"vocab_size": 1e30}, "vocab_size: "),
        ({"vocab_size": 1 << 40}, "vocab_size: "),
        ({"eos_id": 256}, "eos_id is 256, outside the vocabulary of 256"),
        ({"dtype": "x" * 100_000}, "dtype: "),
        ({"k" * 100_000: 1}, "Extra inputs"),
    ],
)
def test_sidecars_with_impossible_values_are_refused(changes: dict[str, object], message: str, folder: Path):
    damage_sidecar(folder, **changes)
    with pytest.raises(ValueError, match=message) as found:
        TokenDataset(folder)
    assert len(str(found.value)) < 1000


def test_deeply_nested_sidecars_are_refused(folder: Path):
    (folder / "dataset.json").write_text("[" * 1_000_000)
    with pytest.raises(ValueError, match=r"dataset\.json is damaged or of another version"):
        TokenDataset(folder)


def test_starts_that_do_not_ascend_are_refused(folder: Path):
    np.array([5, 5], dtype="<i8").tofile(folder / "documents-00000.bin")
    with pytest.raises(ValueError, match=r"documents-00000\.bin holds places that do not ascend"):
        TokenDataset(folder).document_starts(0, 0, 10)


# --- raw shards -------------------------------------------------------------------------------------------------------


def test_raw_shards_in_the_order_given(tmp_path: Path):
    np.arange(5, dtype="<u2").tofile(tmp_path / "b.npy")
    np.arange(5, 8, dtype="<u2").tofile(tmp_path / "a.npy")
    one = TokenDataset(str(tmp_path / "b.npy"), vocab_size=100)
    assert (one.n_tokens, one.n_bytes, one.n_documents, one.tokenizer()) == (5, None, None, None)
    folder = TokenDataset(tmp_path, vocab_size=100, eos_id=6)
    assert [shard.path.name for shard in folder.shards] == ["a.npy", "b.npy"]
    assert list(folder.documents()) == [(0, 0, 2), (0, 2, 3), (1, 0, 5)]
    listed = TokenDataset([tmp_path / "b.npy", tmp_path / "a.npy"], vocab_size=100, eos_id=6)
    assert listed.n_tokens == folder.n_tokens == 8
    assert len({one.fingerprint, folder.fingerprint, listed.fingerprint}) == 3
    with pytest.raises(ValueError, match="raw shards record no hashes"):
        one.verify()


def test_raw_uint32(tmp_path: Path):
    np.array([70000, 3], dtype="<u4").tofile(tmp_path / "a.npy")
    dataset = TokenDataset(tmp_path, vocab_size=70001)
    assert dataset.dtype == "uint32"
    assert dataset.read(0, 0, 2).tolist() == [70000, 3]
    with pytest.raises(ValueError, match="outside the vocabulary"):  # read as the narrower type
        TokenDataset(tmp_path, vocab_size=4, dtype="uint16").read(0, 0, 4)


def test_raw_shards_that_cannot_be_opened(tmp_path: Path):
    with pytest.raises(ValueError, match="does not exist"):
        TokenDataset(tmp_path / "none.npy", vocab_size=10)
    with pytest.raises(ValueError, match=r"holds neither dataset.json nor .npy shards"):
        TokenDataset(tmp_path, vocab_size=10)
    with pytest.raises(ValueError, match="no shard; give"):
        TokenDataset([], vocab_size=10)
    (tmp_path / "odd.npy").write_bytes(b"123")
    with pytest.raises(ValueError, match="has 3 bytes, which is no whole number of uint16 tokens"):
        TokenDataset(tmp_path / "odd.npy", vocab_size=10)
    (tmp_path / "odd.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="has 0 bytes"):
        TokenDataset(tmp_path / "odd.npy", vocab_size=10)
    np.save(tmp_path / "odd.npy", np.arange(4, dtype=np.uint16))
    with pytest.raises(ValueError, match="has a NumPy header; raw shards have none"):
        TokenDataset(tmp_path / "odd.npy", vocab_size=10)
    np.arange(4, dtype="<u2").tofile(tmp_path / "odd.npy")
    with pytest.raises(ValueError, match="raw shards, which do not say what they hold; give vocab_size"):
        TokenDataset(tmp_path / "odd.npy")
    with pytest.raises(ValueError, match="eos_id 10 is outside the vocabulary; it must be from 0 to 9"):
        TokenDataset(tmp_path / "odd.npy", vocab_size=10, eos_id=10)


# --- imports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "absent"),
    [
        ("import recurformer.data.preparation, recurformer.data.dataset", ("torch", "transformers", "tokenizers")),
        ("import recurformer.data.windows", ("recurformer.model", "recurformer.scan", "transformers")),
    ],
)
def test_data_needs_no_model_and_text_needs_no_torch(script: str, absent: tuple[str, ...]):
    check = f"{script}\nimport sys\nprint([name for name in {absent!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
