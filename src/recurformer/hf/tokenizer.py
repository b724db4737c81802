"""Tokenizers in Hugging Face's form, with the same ids as ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SpmConverter, bytes_to_unicode

from recurformer.data.extras import require
from recurformer.data.tokenizer import (
    HF_SWITCHES,
    PROBE,
    BytesTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    cut_before_model,
    cut_inside,
)
from recurformer.data.tokenizer import Tokenizer as OurTokenizer
from recurformer.settings import shown
from recurformer.store import folders


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Return what `recurformer.load_tokenizer` loads, in Hugging Face's form; see `hf_tokenizer`.

    Args:
        folder: a model's or a run's folder, or a tokenizer as `recurformer.load_tokenizer` takes it, such as "bytes".

    Raises:
        ValueError: there is no tokenizer, or it has no exact counterpart.
    """
    try:
        return hf_tokenizer(folders.load_tokenizer(folder))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def hf_tokenizer(ours: OurTokenizer, **options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer in Hugging Face's form.

    Its ids are those of ours. It adds nothing at either end and pads on the left. The end token also pads when there
    is no padding token. Text that spells a special token stays ordinary text.

    Args:
        ours: the tokenizer.
        options: further options of `PreTrainedTokenizerFast`.

    Raises:
        ValueError: the tokenizer has no exact counterpart.
    """
    if isinstance(ours, BytesTokenizer):
        tokenizer = byte_tokenizer()
    elif isinstance(ours, JsonTokenizer):
        tokenizer = Tokenizer.from_str(ours.contents().decode())
    elif isinstance(ours, SentencePieceTokenizer):
        tokenizer = sentencepiece_tokenizer(ours)
    else:
        raise ValueError(f"a {ours.kind} tokenizer can't be converted; use the one it came from")
    pad = ours.eos_id if ours.pad_id is None else ours.pad_id
    for name, token in (("eos_token", ours.eos_id), ("pad_token", pad)):
        if token is not None:
            options[name] = tokenizer.id_to_token(token)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options, **HF_SWITCHES)


def byte_tokenizer() -> Tokenizer:
    """Return the UTF-8 bytes as a byte-level BPE without merges: each byte is its own id."""
    tokenizer = Tokenizer(models.BPE({char: byte for byte, char in bytes_to_unicode().items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_tokenizer(ours: SentencePieceTokenizer) -> Tokenizer:
    """Return a SentencePiece model in the form of the `tokenizers` library.

    Raises:
        ValueError: the library has no form that gives the same ids.
    """
    form = require("sentencepiece.sentencepiece_model_pb2", "the conversion of a SentencePiece .model").ModelProto()
    form.ParseFromString(ours.contents())
    pieces: Any = [(piece.piece, piece.score) for piece in form.pieces]
    if form.trainer_spec.model_type == form.trainer_spec.BPE:
        pieces = {piece: id for id, (piece, _) in enumerate(pieces)}
    try:
        tokenizer: Tokenizer = SpmConverter.build_tokenizer_from_spm_proto(form, pieces)
    except (AttributeError, TypeError) as error:
        raise ValueError("converting a SentencePiece .model needs transformers 5.24 or newer") from error
    unknown, control = 2, 3  # types of pieces that SentencePiece never finds in a text
    spelled = [piece.piece for piece in form.pieces if piece.type in (unknown, control) and len(piece.piece) > 1]
    if spelled:
        cut_before_model(tokenizer, cut_inside(spelled, {piece.piece for piece in form.pieces}))
    surface = decoders.Replace(form.trainer_spec.unk_piece, form.trainer_spec.unk_surface)
    tokenizer.decoder = decoders.Sequence([surface, tokenizer.decoder])
    for text in (PROBE, "  Two  spaces, \u00a0 and\r\nlines ", *spelled, " ".join(spelled), "\u2581x \u2581", ""):
        if tokenizer.encode(text, add_special_tokens=False).ids != ours.encode(text):
            raise ValueError(
                f"a SentencePiece model of this kind can't be converted exactly: {shown(text)} would have other "
                "ids; give a tokenizer.json with --tokenizer"
            )
    return tokenizer
