"""One rule for data and models: the ids of the data are ids of the model, and they mean the same."""

from __future__ import annotations

import hashlib
import os

from recurformer.data.dataset import TokenDataset
from recurformer.data.sources import printable
from recurformer.data.tokenizer import Tokenizer
from recurformer.settings import shown


def check_vocabulary(
    dataset: TokenDataset,
    vocab_size: int,
    tokenizer: Tokenizer | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> None:
    """Raise ValueError when a model cannot read the ids of a dataset, or reads other text in them.

    A model may have more ids than the data: embeddings are often padded. Where both tokenizers are known, every id
    that both of them have must stand for the same piece of text.

    Args:
        dataset: the tokens. Raw shards have no tokenizer, so only the number of ids is checked.
        vocab_size: number of ids of the model.
        tokenizer: the model's; None: unknown.
        folder: where the model's tokenizer lies, for the message.
    """
    name = printable(dataset.folder or dataset.shards[0].path)
    remedy = "prepare the text again with the model's tokenizer"
    if folder is not None:
        remedy += f", --tokenizer {printable(folder)}"
    if dataset.vocab_size > vocab_size:
        raise ValueError(
            f"the vocabulary of the data {name} has {dataset.vocab_size} ids, the model's {vocab_size}; {remedy}"
        )
    info = dataset.tokenizer_info
    if tokenizer is None or info is None or (info.kind, info.sha256) == (tokenizer.kind, contents_hash(tokenizer)):
        return
    of_data = dataset.tokenizer()
    assert of_data is not None
    ours, theirs = of_data.pieces(), tokenizer.pieces()
    different = next((id for id in sorted(ours) if theirs.get(id, ours[id]) != ours[id]), None)
    if different is not None:
        place = "the model" if folder is None else printable(folder)
        raise ValueError(
            f"the data {name} was prepared with the tokenizer {shown(info.requested)} ({_words(of_data)}), but {place} "
            f"has another tokenizer ({_words(tokenizer)}): id {different} is {shown(ours[different])} in the first and "
            f"{shown(theirs[different])} in the second; {remedy}"
        )


def contents_hash(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of a tokenizer's file, as `dataset.json` records it."""
    return hashlib.sha256(tokenizer.contents()).hexdigest()


def _words(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.kind}, {tokenizer.vocab_size} ids, sha256 {contents_hash(tokenizer)[:12]}"
