"""The tokenizer of a folder as a Hugging Face tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from recurformer.data.tokenizer import BytesTokenizer, JsonTokenizer
from recurformer.store import folders


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved beside a model, or one named as `recurformer.load_tokenizer` takes it, e.g. "bytes".

    Same ids as ours, nothing added at either end, padding on the left; the end of text also pads when there is no
    padding token. Text that spells a special token stays ordinary text.

    Raises:
        ValueError: for a SentencePiece model, which has no faithful counterpart here.
    """
    ours = folders.load_tokenizer(folder)
    if isinstance(ours, BytesTokenizer):
        tokenizer = byte_tokenizer()
    elif isinstance(ours, JsonTokenizer):
        tokenizer = Tokenizer.from_str(ours.contents().decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
    else:
        raise ValueError(f"{folder} has a {ours.kind} tokenizer, which can't be converted; use the one it came from")
    options: dict[str, Any] = {"padding_side": "left", "split_special_tokens": True}
    pad = ours.eos_id if ours.pad_id is None else ours.pad_id
    for name, token in (("eos_token", ours.eos_id), ("pad_token", pad)):
        if token is not None:
            options[name] = tokenizer.id_to_token(token)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **options)


def byte_tokenizer() -> Tokenizer:
    """The UTF-8 bytes as a byte-level BPE without merges: id = byte."""
    tokenizer = Tokenizer(models.BPE({char: byte for byte, char in bytes_to_unicode().items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
