"""Makes the data of runs/results: `python runs/results/prepare.py CORPUS TOKENIZER [--out data/results]`.

CORPUS holds train-*.jsonl.zst and validation.jsonl.zst, one {"text", "source", ...} a line; TOKENIZER is T5's
tokenizer.json. Folders that exist already are left as they are. It makes four folders:

    train           all training text, in three shards
    lr              the first of these shards by itself, for the short runs that choose learning rates
    validation      all validation text
    validation-c4   its records from C4, the only ones that are from the paper's corpus
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import zstandard

from recurformer.data import prepare
from recurformer.data.sidecar import SIDECAR, TOKENIZER_FOLDER, Sidecar

SHARD_TOKENS = 23_900_000


def main() -> None:
    """Prepare what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--out", type=Path, default=Path("data/results"))
    given = parser.parse_args()
    out: Path = given.out
    if not (out / "train").exists():
        files = sorted(given.corpus.glob("train-*.jsonl.zst"))
        prepare(files, out / "train", given.tokenizer, shard_tokens=SHARD_TOKENS)
    if not (out / "lr").exists():
        first_shard(out / "train", out / "lr")
    held_out = given.corpus / "validation.jsonl.zst"
    if not (out / "validation").exists():
        prepare([held_out], out / "validation", given.tokenizer)
    if not (out / "validation-c4").exists():
        with TemporaryDirectory() as temporary:
            part = Path(temporary) / "c4.jsonl"
            part.write_text("".join(of_source(held_out, "c4")), encoding="utf-8")
            prepare([part], out / "validation-c4", given.tokenizer)
    for name in ("train", "lr", "validation", "validation-c4"):
        sidecar = Sidecar.read(out / name)
        print(f"{out / name}: {sidecar.n_tokens:,} tokens of {sidecar.n_documents:,} documents")


def of_source(file: Path, source: str) -> list[str]:
    """The lines of one source."""
    with file.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as unpacked:
        return [line for line in io.TextIOWrapper(unpacked, encoding="utf-8") if json.loads(line)["source"] == source]


def first_shard(folder: Path, out: Path) -> None:
    """A prepared folder's first shard as a prepared folder. Its tokens are the same file under a second name."""
    sidecar = Sidecar.read(folder)
    first = sidecar.shards[0]
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder / TOKENIZER_FOLDER, partial / TOKENIZER_FOLDER)
    for name in (first.tokens, first.documents):
        os.link(folder / name, partial / name)
    counts = {name: getattr(first, name) for name in ("n_tokens", "n_documents", "n_bytes")}
    sidecar.model_copy(update={"shards": (first,), **counts}).write(partial)
    assert (partial / SIDECAR).is_file()
    partial.rename(out)


if __name__ == "__main__":
    main()
