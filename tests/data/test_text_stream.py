"""Text of ids that arrive one by one: the text of all ids, for every kind of decoder, with and without a prompt."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from recurformer.data.tokenizer import (
    REPLACEMENT,
    BytesTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    TextStream,
    Tokenizer,
    train_bpe,
)

LINES = [
    "the cat sat on the mat, wasn't it?  two  spaces",
    "naïve café \U0001f999\U0001f44d\U0001f3fd 日本語 \u0928\u092e\u0938\u094d\u0924\u0947",
    "line\nline\r\n\ttab",
    "a . b ' s n't",
]


def pieces(**options: Any) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 8), model_writer=model, minloglevel=2, character_coverage=0.98, **options
    )
    return SentencePieceTokenizer(model.getvalue())


def from_library(tokenizer: Any, eos_id: int | None = None) -> Tokenizer:
    return JsonTokenizer(tokenizer.to_str().encode(), eos_id, None)


def llama_like() -> Tokenizer:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for piece in ("▁", "▁the", "▁cat", "a", "b", "c", "▁a", ".", "▁▁", "é"):
        vocab[piece] = len(vocab)
    tokenizer = Library(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return from_library(tokenizer, 2)


def metaspace() -> Tokenizer:
    words = [("<unk>", 0.0), ("▁the", -1.0), ("▁cat", -1.0), ("▁sat", -1.0), ("s", -2.0), ("▁", -3.0)]
    tokenizer = Library(models.Unigram(words, unk_id=0))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return from_library(tokenizer)


def word_pieces() -> Tokenizer:
    tokenizer = Library(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(LINES * 8, trainer=trainer)
    return from_library(tokenizer)


KINDS = {
    "bytes": BytesTokenizer,
    "byte BPE": lambda: train_bpe(LINES * 8, 320),
    "unigram": lambda: pieces(vocab_size=70, hard_vocab_limit=False),
    "bytes of pieces": lambda: pieces(byte_fallback=True, model_type="bpe", vocab_size=330),
    "no dummy prefix": lambda: pieces(
        byte_fallback=True, model_type="bpe", vocab_size=330, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=False,
    ),
    "Llama": llama_like,
    "Metaspace": metaspace,
    "WordPiece": word_pieces,
}  # fmt: skip


@pytest.fixture(scope="module", params=list(KINDS.values()), ids=list(KINDS))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.param()


def test_random_ids_stream_as_the_text_of_all_ids(tokenizer: Tokenizer):
    rng = random.Random(0)
    for _ in range(400):
        ids = [rng.randrange(tokenizer.vocab_size + 1) for _ in range(rng.randrange(1, 14))]
        assert tokenizer.decode_after([], ids) == tokenizer.decode(ids), ids


def test_a_prompt_and_the_text_behind_it_are_the_text_of_all_ids(tokenizer: Tokenizer):
    for line in LINES:
        ids = tokenizer.encode(line)
        for cut in range(1, len(ids)):
            prompt, text = tokenizer.decode(ids[:cut]), tokenizer.decode_after(ids[:cut], ids[cut:])
            if not prompt.endswith(REPLACEMENT):  # a prompt that ends within a character has no text of its own
                assert prompt + text == tokenizer.decode(ids), (line, cut)


def test_a_long_prompt_counts_by_its_end(tokenizer: Tokenizer):
    prompt, more = tokenizer.encode("the cat " * 200), tokenizer.encode("the cat sat")
    assert tokenizer.decode(prompt) + tokenizer.decode_after(prompt, more) == tokenizer.decode(prompt + more)


def test_a_prompt_without_text_leaves_the_start_of_a_text():
    tokenizer = llama_like()
    assert tokenizer.decode_after([1], tokenizer.encode("the cat")) == "the cat"
    assert tokenizer.decode_after([], tokenizer.encode("the cat")) == "the cat"
    assert tokenizer.decode_after(tokenizer.encode("the"), tokenizer.encode("the cat")) == " the cat"
    assert tokenizer.decode_after(tokenizer.encode("the"), []) == ""


def test_a_broken_byte_leaves_the_characters_before_it():
    tokenizer = llama_like()
    byte = {value: 3 + value for value in range(256)}
    assert tokenizer.decode([byte[0x3A], byte[0xC0]]) == ":" + REPLACEMENT
    assert tokenizer.decode([byte[0xC3], byte[0xA9], 2, byte[0xC3]]) == "é" + REPLACEMENT  # </s> has no text
    assert tokenizer.decode([*(byte[value] for value in "é🦊".encode()), *tokenizer.encode("the")]) == "é🦊 the"


@pytest.mark.parametrize("ids", [[5] * 600, [300] * 600, [5, 300] * 300], ids=["bytes", "unknown", "both"])
def test_text_without_a_whole_character_is_shown_in_bounded_work(ids: list[int]):
    decoded: list[int] = []

    def decode(some: list[int]) -> str:
        decoded.append(len(some))
        return REPLACEMENT * len(some)

    stream = TextStream(decode)
    shown = [stream.feed(token) for token in ids]
    assert "".join(shown) + stream.finish() == REPLACEMENT * 600
    assert sum(map(len, shown)) == 597
    assert max(decoded) <= TextStream.WINDOW + 1


def test_special_tokens_are_named_and_have_no_text():
    llama, control = llama_like(), pieces(vocab_size=70, hard_vocab_limit=False)
    assert llama.special_tokens() == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert control.special_tokens() == {"<s>": 1, "</s>": 2}
    assert BytesTokenizer().special_tokens() == {}
    for each in (llama, control):
        assert each.decode(list(each.special_tokens().values())[-2:]) == ""
