"""Text to token ids and back: raw bytes, any `tokenizer.json`, any SentencePiece `.model`, or a BPE trained here."""

from __future__ import annotations

import abc
import codecs
import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from recurformer.data.extras import require
from recurformer.files import replacing
from recurformer.reading import LARGEST_LIST, read_table
from recurformer.settings import SHOWN, Natural, check, shown

MARKER = "recurformer_tokenizer.json"
"""File in every folder that `Tokenizer.save` writes. It names the kind, so that loading never guesses."""

REPLACEMENT = "\ufffd"

EOS_NAMES = ("</s>", "<|endoftext|>", "<eos>", "<|end_of_text|>", "<|eos|>", "[EOS]", "<|im_end|>")
PAD_NAMES = ("<pad>", "<|padding|>", "<|pad|>", "[PAD]")

HF_SWITCHES: dict[str, Any] = {
    "add_bos_token": False,
    "add_eos_token": False,
    "split_special_tokens": True,  # text that spells a special token stays ordinary text
    "clean_up_tokenization_spaces": False,
    "padding_side": "left",
}
"""Options of a Hugging Face tokenizer that encodes as ours do: it adds nothing to a text and drops nothing from it."""


class Tokenizer(abc.ABC):
    """Base of the tokenizers. Instances can be pickled.

    Attributes:
        vocab_size: number of ids; they run from 0 to vocab_size - 1.
        eos_id: id that ends a document; None when the vocabulary has no such token.
        pad_id: id that fills rows; None when the vocabulary has no such token.
    """

    kind: ClassVar[str]
    file: ClassVar[str | None] = None
    """Name of the vocabulary's file in a saved folder; None when the kind has no file."""

    vocab_size: int
    eos_id: int | None
    pad_id: int | None

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. Nothing is added at either end.

        Text that spells a special token stays ordinary text.

        Raises:
            ValueError: the text cannot be encoded without its end token, or is no valid Unicode.
        """

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Return the text of ids that are all inside the vocabulary."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids. U+FFFD stands for a broken UTF-8 sequence and for an id outside the vocabulary.

        A model has ids outside the vocabulary when its embedding is padded.
        """
        runs = itertools.groupby(map(int, ids), key=lambda token: 0 <= token < self.vocab_size)
        return "".join(self._decode(list(run)) if known else REPLACEMENT * len(list(run)) for known, run in runs)

    def encode_array(self, text: str) -> np.ndarray:
        """Return the ids of a text as an integer array (n,)."""
        return np.array(self.encode(text), dtype=np.int64)

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        """Return a decoder for ids that arrive one by one, as in generation, behind the ids of a context."""
        return TextStream(self.decode, context)

    def decode_after(self, context: Sequence[int], ids: Iterable[int]) -> str:
        """Return the text that ids add to a context: "the cat" and then "sat" is "the cat sat", so " sat"."""
        stream = self.stream(context)
        return "".join(map(stream.feed, ids)) + stream.finish()

    def special_tokens(self) -> dict[str, int]:
        """Return the ids of special tokens by their spelling; `decode` gives them no text."""
        return {}

    def contents(self) -> bytes:
        """Return the bytes of the vocabulary's file; none when the kind has no file."""
        return b""

    def pieces(self) -> dict[int, str]:
        """Return the piece of text that each id stands for, in the spelling of the vocabulary."""
        return {id: self._decode([id]) for id in range(self.vocab_size)}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer's files into a folder, which is made when it is missing. `load_tokenizer` reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.file is not None:
            with replacing(folder / self.file) as temporary:
                temporary.write_bytes(self.contents())
        marker = {"kind": self.kind, "file": self.file, "vocab_size": self.vocab_size}
        marker |= {"eos_id": self.eos_id, "pad_id": self.pad_id}
        with replacing(folder / MARKER) as temporary:
            temporary.write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


class TextStream:
    """Turns successive ids into text without ever showing half a character.

    The texts that `feed` and `finish` return, joined, are the decoded text of all ids. Behind a context they are the
    text that the ids add to it.

    Args:
        decode: returns the text of a list of ids.
        context: ids before the first one, such as a prompt. Decoders look at neighbours to place spaces.
    """

    UNDECIDED = 3
    """U+FFFD at the end of the text that are held back: a character's first bytes, of which UTF-8 has at most three."""
    WINDOW, KEPT = 256, 64
    """Ids that are decoded at once, and those that stay of them, where no character has been complete for so long."""

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = self._end_with_text([int(token) for token in context])
        self._shown = self._decided(self._decode(self._ids)) if self._ids else 0  # characters
        self._complete = len(self._ids)  # ids whose text was shown completely
        self._fed = False

    def feed(self, token: int) -> str:
        """Return the text that a token completes; empty while a character is unfinished."""
        self._ids.append(int(token))
        self._fed = True
        text = self._decode(self._ids)
        end = self._decided(text)
        new, self._shown = text[self._shown : end], max(self._shown, end)
        if new and end == len(text):
            # Decoders drop a space at the start of a text, so ids are forgotten only where visible text follows them.
            recent = self._ids[self._complete :]
            kept = self._decode(recent)
            if kept.strip():
                self._ids, self._shown = recent, len(kept)
            self._complete = len(self._ids)
        if len(self._ids) > self.WINDOW:
            self._ids = self._ids[-self.KEPT :]
            self._shown, self._complete = self._decided(self._decode(self._ids)), 0
        return new

    def finish(self) -> str:
        """Return the text that is still held back. The stream can then start anew, without a context."""
        text = self._decode(self._ids)[self._shown :] if self._fed else ""
        self._ids, self._shown, self._complete, self._fed = [], 0, 0, False
        return text

    def _decided(self, text: str) -> int:
        """Return how many characters of a text stay as they are, whatever ids come."""
        return len(text) - min(self.UNDECIDED, len(text) - len(text.rstrip(REPLACEMENT)))

    def _end_with_text(self, ids: list[int]) -> list[int]:
        """Return the last ids of a context, so many that they hold visible text; all where none do."""
        count = 8
        while count < len(ids) and not self._decode(ids[-count:]).strip(f"{REPLACEMENT} \n\t"):
            count *= 2
        return ids[-count:]


# --- the kinds --------------------------------------------------------------------------------------------------------


class BytesTokenizer(Tokenizer):
    """The UTF-8 bytes of the text, vocabulary 256. NUL (0) ends a document, so no text may contain it."""

    kind = "bytes"
    vocab_size = 256
    eos_id = 0
    pad_id = None

    def encode(self, text: str) -> list[int]:
        return list(self._bytes(text))

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(self._bytes(text), dtype=np.uint8)

    def _bytes(self, text: str) -> bytes:
        if (at := text.find("\0")) >= 0:
            raise ValueError(
                f"character {at} of the text is NUL (U+0000), which ends a document for the tokenizer 'bytes'; "
                "remove it from the text, or use another tokenizer"
            )
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise _invalid_text(error) from error

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def pieces(self) -> dict[int, str]:
        return {byte: f"<0x{byte:02X}>" for byte in range(self.vocab_size)}

    def stream(self, context: Sequence[int] = ()) -> TextStream:
        return _ByteStream(context)


class _ByteStream(TextStream):
    """Exact for any bytes, well formed or not: the standard library's incremental decoder."""

    def __init__(self, context: Sequence[int] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in context[-self.UNDECIDED :]:  # a character may have begun there
            self.feed(token)

    def feed(self, token: int) -> str:
        if not 0 <= token < BytesTokenizer.vocab_size:
            return self.finish() + REPLACEMENT
        return self._decoder.decode(bytes((token,)))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library, with truncation, padding and post-processing switched off.

    They are also off in the file that `save` writes, so that other programs find the same ids in it.

    Args:
        raw: the file's content.
        eos_id: id that ends a document, or None.
        pad_id: id that fills rows, or None.

    Raises:
        ValueError: the library cannot read the content, or fails on ordinary text with it.
    """

    kind = "tokenizers"
    file = "tokenizer.json"

    def __init__(self, raw: bytes, eos_id: int | None, pad_id: int | None):
        library = require("tokenizers", "a tokenizer.json")
        with _one_sentence("not a tokenizer.json that the tokenizers library can read"), _silent_panics():
            self._tokenizer = library.Tokenizer.from_str(raw.decode())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Otherwise a text that happens to spell "<|endoftext|>" would forge the end of a document.
        self._tokenizer.encode_special_tokens = True
        self._raw, self._cut = raw, ""
        self.vocab_size = max(self._tokenizer.get_vocab().values(), default=-1) + 1  # ids may have gaps
        with _one_sentence("a tokenizer.json that fails on ordinary text; mend or replace it"), _silent_panics():
            self._tokenizer.decode(self._tokenizer.encode(PROBE, add_special_tokens=False).ids)
        self._set_ids(eos_id, pad_id)

    @classmethod
    def from_file(cls, path: Path) -> JsonTokenizer:
        """Return the tokenizer of a file.

        The end and padding tokens are those that `tokenizer_config.json` or `special_tokens_map.json` beside the file
        names, else the first added tokens with a usual name.
        """
        tokenizer = cls(path.read_bytes(), eos_id=None, pad_id=None)
        added = {token.content: id for id, token in tokenizer._tokenizer.get_added_tokens_decoder().items()}
        named = _special_names(path.parent)
        eos_id = _first(added, [named["eos_token"], *EOS_NAMES])
        tokenizer._set_ids(eos_id, _first(added, [named["pad_token"], *PAD_NAMES]))
        return tokenizer

    def _set_ids(self, eos_id: int | None, pad_id: int | None) -> None:
        for name, id in {"eos_id": eos_id, "pad_id": pad_id}.items():
            if id is not None and id >= self.vocab_size:
                raise ValueError(f"{name} is {id}; the vocabulary has the ids 0 to {self.vocab_size - 1}")
        self.eos_id, self.pad_id = eos_id, pad_id
        if eos_id is None:
            return
        spelling = self._tokenizer.id_to_token(eos_id)
        if spelling and eos_id in self._tokenizer.encode(f"{spelling} {spelling}", add_special_tokens=False).ids:
            self._cut = cut_inside([spelling], self._tokenizer.get_vocab())
            cut_before_model(self._tokenizer, self._cut)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._raw, self.eos_id, self.pad_id)

    def contents(self) -> bytes:
        return _written(self._raw, self._cut)

    def encode(self, text: str) -> list[int]:
        with _one_sentence("the tokenizer cannot encode this text", text):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if self.eos_id is not None and self.eos_id in ids:
            raise ValueError(_end_in_text(text, self._tokenizer.id_to_token(self.eos_id)))
        return ids

    def special_tokens(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {token.content: id for id, token in added if token.special}

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return self._decode_bytes(ids) if REPLACEMENT in text and self._byte_ids else text

    def _decode_bytes(self, ids: list[int]) -> str:
        """Return the text of ids among which bytes are no UTF-8.

        The library would replace every byte of a run that ends in a broken character, whole characters included. Their
        text would then depend on later ids, and could never be streamed.
        """
        special = set(self.special_tokens().values())
        pieces: list[str] = []
        for is_byte, run in itertools.groupby((id for id in ids if id not in special), self._byte_ids.__contains__):
            if is_byte:
                pieces.append(bytes(self._byte_ids[id] for id in run).decode(errors="replace"))
            else:
                pieces += [piece for id in run if (piece := self._tokenizer.id_to_token(id)) is not None]
        return self._tokenizer.decoder.decode(pieces)

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        """The byte of every id that spells one, for a decoder with a fallback to bytes."""
        if b'"ByteFallback"' not in self._raw:
            return {}
        spelled = {f"<0x{byte:02X}>": byte for byte in range(256)}
        return {id: spelled[piece] for piece, id in self._tokenizer.get_vocab().items() if piece in spelled}

    def pieces(self) -> dict[int, str]:
        return {id: piece for piece, id in self._tokenizer.get_vocab().items()}


def _written(raw: bytes, cut: str) -> bytes:
    """Return a `tokenizer.json` that truncates, pads and adds nothing, and cuts text as `cut_before_model` does.

    A file that needs no change stays as it is.
    """
    content = json.loads(raw)
    off = [name for name in ("truncation", "padding", "post_processor") if content.get(name) is not None]
    if "post_processor" in off and content["post_processor"].get("type") == "ByteLevel":
        off.remove("post_processor")  # it moves offsets and adds no token
    changes: dict[str, Any] = dict.fromkeys(off)
    if cut:
        split = {"type": "Split", "pattern": {"Regex": cut}, "behavior": "MergedWithPrevious", "invert": False}
        steps = [step for step in (content.get("pre_tokenizer"), split) if step is not None]
        changes["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    return json.dumps(content | changes, ensure_ascii=False).encode() if changes else raw


def cut_inside(spellings: Iterable[str], pieces: Container[str]) -> str:
    """Return a pattern that ends inside every one of some spellings, so that no cut text holds one.

    The end is beside a character that is a piece of its own, where there is one. Other characters become one unknown
    token together, and a cut between them would make two.
    """
    cuts: list[str] = []
    for spelling in spellings:
        places = range(1, len(spelling))
        at = next((at for at in places if spelling[at] in pieces or spelling[at - 1] in pieces), 1)
        cuts.append(f"{re.escape(spelling[:at])}(?={re.escape(spelling[at:])})")
    return "|".join(cuts)


def cut_before_model(tokenizer: Any, pattern: str) -> None:
    """Cut every text after the matches of a pattern before the model of a `tokenizers.Tokenizer` sees it.

    Some vocabularies, as T5's, hold special tokens as ordinary pieces, which the model would find in a text.
    """
    library = require("tokenizers", "a tokenizer.json")
    split = library.pre_tokenizers.Split(library.Regex(pattern), behavior="merged_with_previous")
    steps = [step for step in (tokenizer.pre_tokenizer, split) if step is not None]
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence(steps)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`, as T5 has one, with the model's own end and padding ids.

    Args:
        raw: the file's content.

    Raises:
        ValueError: the content is no SentencePiece model.
    """

    kind = "sentencepiece"
    file = "spiece.model"

    def __init__(self, raw: bytes):
        self._pieces = require("sentencepiece", "a SentencePiece .model").SentencePieceProcessor()
        try:
            readable = bool(raw) and self._pieces.LoadFromSerializedProto(raw)
        except RuntimeError:
            readable = False
        if not readable:
            raise ValueError("not a SentencePiece model")
        self._raw = raw
        self.vocab_size = self._pieces.vocab_size()
        self.eos_id, self.pad_id = (id if id >= 0 else None for id in (self._pieces.eos_id(), self._pieces.pad_id()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._raw,)

    def contents(self) -> bytes:
        return self._raw

    def encode(self, text: str) -> list[int]:
        with _one_sentence("the tokenizer cannot encode this text", text):
            ids = self._pieces.encode(text, out_type=int, add_bos=False, add_eos=False)
        if self.eos_id is not None and self.eos_id in ids:
            raise ValueError(_end_in_text(text, self._pieces.id_to_piece(self.eos_id)))
        return ids

    def special_tokens(self) -> dict[str, int]:
        pieces = self._pieces
        return {pieces.id_to_piece(id): id for id in range(self.vocab_size) if pieces.is_control(id)}

    def _decode(self, ids: list[int]) -> str:
        return self._pieces.decode(ids)

    def pieces(self) -> dict[int, str]:
        return dict(enumerate(self._pieces.id_to_piece(list(range(self.vocab_size)))))


# --- errors of libraries ----------------------------------------------------------------------------------------------

PROBE = "Probe 12, é二🦊\t\n  (a) " + 60 * "a" + "! " + 60 * "x" + "-" + 60 * " " + "."
"""Text that finds a missing unknown token, a broken normalizer, and a pattern that takes exponential time."""


@contextlib.contextmanager
def _one_sentence(problem: str, text: str | None = None) -> Iterator[None]:
    """Turn every error of a library into a ValueError. A panic of the tokenizers library is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        if text is not None:
            try:
                text.encode()
            except UnicodeEncodeError as found:
                raise _invalid_text(found) from error
        raise ValueError(f"{problem} ({str(error)[:SHOWN]})") from error


@contextlib.contextmanager
def _silent_panics() -> Iterator[None]:
    """Close stderr to the library, which writes its panics there, for the time of one call."""
    try:
        kept = os.dup(2)
    except OSError:  # stderr is closed already
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


def _invalid_text(error: UnicodeEncodeError) -> ValueError:
    return ValueError(
        f"character {error.start} of the text is half a surrogate pair, which no Unicode text can hold; give text in "
        "UTF-8, and run in a UTF-8 locale"
    )


def _end_in_text(text: str, spelling: str) -> str:
    place = (
        f"character {text.find(spelling)} of the text begins" if spelling in text else "the text holds a spelling of"
    )
    return (
        f"{place} {shown(spelling)}, which the tokenizer takes for its end token; remove it from the text, or use "
        "another tokenizer"
    )


# --- load and train ---------------------------------------------------------------------------------------------------


def load_tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """Return the tokenizer that a name means. `recurformer.load_tokenizer` also takes the folder of a run.

    Args:
        source: "bytes", a `tokenizer.json`, a SentencePiece `.model`, or a folder: one that `Tokenizer.save` has
            written, or one with a `tokenizer.json` or a single `.model`.

    Raises:
        ValueError: the source is none of these, cannot be read, or needs a library that is not installed.
    """
    if source == "bytes":
        return BytesTokenizer()
    path = Path(source)
    try:
        if path.is_dir():
            return _load_folder(path)
        if path.is_file() and path.suffix == ".json":
            return JsonTokenizer.from_file(path)
        if path.is_file() and path.suffix == ".model":
            return SentencePieceTokenizer(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"tokenizer {source}: {error}") from error
    problem = "is neither a .json nor a .model file" if path.is_file() else "does not exist"
    raise ValueError(f"tokenizer {str(source)!r} {problem}; give 'bytes', a tokenizer.json, a .model or a saved folder")


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a file that `load_tokenizer` would read."""
    folder = Path(folder)
    return any((folder / name).is_file() for name in (MARKER, "tokenizer.json")) or any(folder.glob("*.model"))


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Return a byte-level BPE learned from texts. It is lossless, and id 0 is `<|endoftext|>`.

    Args:
        texts: any number of texts.
        vocab_size: number of ids wanted. A small text may give fewer.

    Raises:
        ValueError: `vocab_size` is below 257, the 256 bytes and the end of a document.
    """
    if vocab_size < 257:
        raise ValueError(f"a BPE vocabulary of {vocab_size} is too small; it needs 257: 256 bytes and the end token")
    library = require("tokenizers", "training a BPE")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return JsonTokenizer(tokenizer.to_str().encode(), eos_id=0, pad_id=None)


def _load_folder(folder: Path) -> Tokenizer:
    if (folder / MARKER).is_file():
        return _load_saved(folder)
    if (folder / "tokenizer.json").is_file():
        return JsonTokenizer.from_file(folder / "tokenizer.json")
    models = sorted(folder.glob("*.model"))
    if len(models) == 1:
        return SentencePieceTokenizer(models[0].read_bytes())
    raise ValueError(f"the folder holds no {MARKER}, no tokenizer.json and {len(models)} .model files")


def _load_saved(folder: Path) -> Tokenizer:
    try:
        marker = read_table(folder / MARKER)
        kind, eos_id, pad_id = marker["kind"], marker["eos_id"], marker["pad_id"]
        for name, id in {"eos_id": eos_id, "pad_id": pad_id}.items():
            check(name, id, Natural | None)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{MARKER} is damaged ({error})") from error
    kinds = {each.kind: each for each in (BytesTokenizer, JsonTokenizer, SentencePieceTokenizer)}
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{MARKER} names the kind {shown(kind)}; known are {', '.join(kinds)}")
    file = kinds[kind].file
    if file is None:
        return BytesTokenizer()
    if not (folder / file).is_file():
        raise ValueError(f"{file} is missing beside {MARKER}")
    raw = (folder / file).read_bytes()
    return JsonTokenizer(raw, eos_id, pad_id) if kind == JsonTokenizer.kind else SentencePieceTokenizer(raw)


def _special_names(folder: Path) -> dict[str, str | None]:
    """Return the end and padding tokens that the files beside a `tokenizer.json` name."""
    names: dict[str, str | None] = {"eos_token": None, "pad_token": None}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / file).is_file():
            continue
        entries = read_table(folder / file, LARGEST_LIST)
        for name in names:
            entry = entries.get(name)
            content = entry.get("content") if isinstance(entry, dict) else entry
            names[name] = content if isinstance(content, str) else names[name]
    return names


def _first(ids: dict[str, int], names: Sequence[str | None]) -> int | None:
    found: Iterator[int] = (ids[name] for name in names if name in ids)
    return next(found, None)
