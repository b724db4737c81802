"""Compressed files as people have them, and as an attacker makes them."""

from __future__ import annotations

import gzip
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from recurformer.data import TokenDataset, prepare
from recurformer.data.sources import CHUNK
from recurformer.data.unpacking import UnreadableError, unpack_gzip, unpack_zstd

LINE = b'{"text": "some words"}\n'
FRAME = zstandard.ZstdCompressor().compress(LINE)
SKIPPED = struct.pack("<II", 0x184D2A5E, 4) + b"abcd"  # a frame without content, as pzstd and seekable files have


def with_window(log: int) -> bytes:
    """A frame with a window of 2^log bytes and one block, as `zstd --long` writes it."""
    return b"\x28\xb5\x2f\xfd\x00" + bytes([log - 10 << 3]) + struct.pack("<I", len(LINE) << 3 | 1)[:3] + LINE


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        (FRAME * 2, 2), (FRAME + SKIPPED, 1), (SKIPPED + FRAME, 1), (FRAME + SKIPPED + FRAME, 2),
        (FRAME + zstandard.compress(b"") + FRAME, 2), (with_window(27), 1), (with_window(28), 1), (with_window(31), 1),
    ],
)  # fmt: skip
def test_zstandard_frames(content: bytes, documents: int, tmp_path: Path):
    (tmp_path / "in.jsonl.zst").write_bytes(content)
    assert prepare([tmp_path / "in.jsonl.zst"], tmp_path / "out", progress=False).n_documents == documents


def test_a_window_that_no_library_reads_is_named(tmp_path: Path):
    (tmp_path / "in.jsonl.zst").write_bytes(with_window(33))
    with pytest.raises(ValueError, match=r"line 1: its window is larger than 2\^31 bytes, .* smaller `zstd --long`"):
        prepare([tmp_path / "in.jsonl.zst"], tmp_path / "out")


def chunks(content: bytes) -> Iterator[bytes]:
    return (content[start : start + CHUNK] for start in range(0, len(content), CHUNK))


BLANK = b" " * (256 << 20)


def test_a_bomb_is_unpacked_step_by_step():
    """256 MiB of blanks, in 8 KiB and 260 KiB."""
    bomb = zstandard.ZstdCompressor().compress(BLANK)
    assert len(bomb) < 10_000
    sizes = [len(part) for part in unpack_zstd(chunks(bomb), "bomb")]
    assert sum(sizes) == len(BLANK)
    assert max(sizes) <= 64 << 20
    bomb = gzip.compress(BLANK, compresslevel=1)
    sizes = [len(part) for part in unpack_gzip(chunks(bomb))]
    assert sum(sizes) == len(BLANK)
    assert max(sizes) <= 16 << 20


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_line_that_grows_too_long_stops_the_unpacking(packing: str, tmp_path: Path):
    pack = {".gz": lambda text: gzip.compress(text, compresslevel=1), ".zst": zstandard.compress}[packing]
    path = tmp_path / f"bomb.jsonl{packing}"
    path.write_bytes(pack(BLANK))
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"line 1: longer than 1,000,000 bytes; .*max-document-bytes"):
        prepare([path], tmp_path / "out", max_document_bytes=1_000_000)
    assert time.monotonic() - began < 10


def test_frames_cut_anywhere_are_errors():
    """At every byte, with every split of the input that could fall on a border."""
    content = FRAME + FRAME
    for cut in range(1, len(content)):
        if cut == len(FRAME):
            continue
        with pytest.raises(UnreadableError, match=r"cut short|damaged"):
            list(unpack_zstd([content[:cut]], "x"))
        with pytest.raises(UnreadableError, match=r"cut short|damaged"):
            list(unpack_zstd((content[at : at + 1] for at in range(cut)), "x"))
    assert b"".join(unpack_zstd((content[at : at + 1] for at in range(len(content))), "x")) == LINE * 2


# --- parquet ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "field"),
    [
        (["text", "text.lang"], "text"), (["text.lang", "text"], "text"), (["meta.text", "text"], "meta.text"),
        (["text.b", "text.a"], "text.a"), (["text.text", "text"], "text.text"),
    ],
)  # fmt: skip
def test_columns_with_dots_in_their_names(names: list[str], field: str, tmp_path: Path):
    """As pandas.json_normalize makes them."""
    pyarrow.parquet.write_table(pyarrow.table({name: [f"<{name}>"] for name in names}), tmp_path / "in.parquet")
    prepare([tmp_path / "in.parquet"], tmp_path / "out", text_field=field, append_eos=False, progress=False)
    dataset = TokenDataset(tmp_path / "out")
    assert bytes(dataset.read(0, 0, dataset.n_tokens).tolist()).decode() == f"<{field}>"


def test_columns_of_one_name_and_rows_too_long_are_refused(tmp_path: Path):
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match=r"twice\.parquet: the column 'text' is there more than once; rename one"):
        prepare([tmp_path / "twice.parquet"], tmp_path / "out")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", "y" * 1001]}), tmp_path / "long.parquet")
    with pytest.raises(ValueError, match=r"long\.parquet, row 2: longer than 1,000 bytes; .*max-document-bytes"):
        prepare([tmp_path / "long.parquet"], tmp_path / "out", max_document_bytes=1000)
