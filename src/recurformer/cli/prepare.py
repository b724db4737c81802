"""`recurformer prepare`: text to tokens."""

from __future__ import annotations

from typing import Any

import click


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--out", required=True, type=click.Path(), metavar="DIR", help="Folder to make.")
@click.option("--tokenizer", default="bytes", metavar="bytes|FILE|train-bpe:N", help="UTF-8 bytes; a tokenizer.json, "
              "a SentencePiece .model or a saved folder; or a BPE of N tokens, learned here.")  # fmt: skip
@click.option(
    "--text-field",
    default="text",
    metavar="NAME",
    help="Field of a JSON line, or column of a table, that holds the text.",
)
@click.option("--split", default="train", metavar="NAME", help="Split of a Hugging Face dataset.")
@click.option(
    "--input-format",
    default="auto",
    type=click.Choice(["auto", "txt", "jsonl", "json", "csv"]),
    help="Format of files that are named one by one; auto: by their names, and text from standard input.",
)
@click.option(
    "--max-document-bytes",
    type=click.IntRange(min=1),
    default=1 << 26,
    metavar="N",
    help="Most bytes of a JSON record or of a row of a table, which is parsed whole.",
)
@click.option("--append-eos/--no-append-eos", default=True, help="End each document with the tokenizer's end token.")
@click.option("--shard-tokens", type=click.IntRange(min=1), default=100_000_000, metavar="N", help="A shard ends with "
              "the first document that brings it to N tokens.")  # fmt: skip
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Processes that tokenize.  [default: one a "
              "core; only one for a small input]")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace DIR when it is a prepared folder.")
@click.option("--quiet", is_flag=True, help="Show nothing but errors.")
def prepare(inputs: tuple[str, ...], out: str, tokenizer: str, quiet: bool, **options: Any) -> None:
    """Tokenize text into DIR, from which runs are trained and evaluated.

    INPUT is a file (.txt, .md, .jsonl, .json, .csv, .tsv, each also .gz or .zst, or .parquet), a folder, a quoted glob,
    - for standard input, or a Hugging Face dataset, hf:NAME or hf:NAME:CONFIGURATION. DIR appears when it is complete,
    and not before.
    """
    from recurformer import data

    made = data.prepare(inputs, out, tokenizer, progress=not quiet, **options)
    if not quiet:
        click.echo(
            f"{made.folder}: {made.n_tokens:,} tokens of {made.n_documents:,} documents ({made.n_bytes:,} bytes), "
            f"vocabulary {made.vocab_size:,} as {made.dtype}, {made.n_shards} shard{'s' if made.n_shards > 1 else ''}"
        )
        name, _, size = tokenizer.partition(":")
        if name == "train-bpe" and int(size) > made.vocab_size:
            click.echo(f"the text was enough for a BPE of {made.vocab_size:,} tokens, not of {int(size):,}")
