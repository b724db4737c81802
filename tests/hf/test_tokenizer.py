"""Tokenizers for Hugging Face: the same ids as ours."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import torch
from helpers import tiny

import recurformer
from recurformer.data.tokenizer import BytesTokenizer, SentencePieceTokenizer, train_bpe

transformers = pytest.importorskip("transformers")
from recurformer.hf import RecurformerForCausalLM, load_tokenizer  # noqa: E402

TEXTS = ["It was ", "naïve — Ā Ġ 猫\n\n\t a", "  two  spaces ", "<|endoftext|> spelled out", ""]


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 0, 0)
    batch = tokenizer(["a", "abc"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[0, 0, 97], [97, 98, 99]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


def test_a_learned_vocabulary(tmp_path: Path):
    ours = train_bpe(["the cat sat on the mat and the dog"] * 3, 280)
    recurformer.save(tiny(vocab_size=ours.vocab_size), tmp_path, tokenizer=ours)
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == ours.encode(text)
        assert tokenizer.decode(ours.encode(text)) == text
    assert tokenizer.eos_token_id == ours.eos_id


def test_the_auto_class_reads_what_was_saved(tmp_path: Path):
    load_tokenizer("bytes").save_pretrained(tmp_path)
    RecurformerForCausalLM.from_model(tiny(vocab_size=256)).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.padding_side == "left"


def test_the_text_generation_pipeline():
    model = tiny(vocab_size=256)
    pipe = transformers.pipeline(
        "text-generation", RecurformerForCausalLM.from_model(model), tokenizer=load_tokenizer("bytes"), device="cpu"
    )
    out = pipe(["It was ", "A"], max_new_tokens=8, do_sample=False, batch_size=2, return_full_text=False)
    for prompt, found in zip(["It was ", "A"], out, strict=True):
        ids = model.generate(torch.tensor([list(prompt.encode())]), 8, temperature=0.0, eos_token_id=0)
        assert found[0]["generated_text"] == BytesTokenizer().decode(i for i in ids[0, len(prompt) :].tolist() if i)


def pieces(**options: Any) -> SentencePieceTokenizer:
    raw = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat, naïve and spelled", "over a dog"] * 20), model_writer=raw,
        minloglevel=2, hard_vocab_limit=False, **options,
    )  # fmt: skip
    return SentencePieceTokenizer(raw.getvalue())


@pytest.mark.parametrize(
    "options",
    [
        {"vocab_size": 30, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},  # as T5
        {"vocab_size": 320, "model_type": "bpe", "byte_fallback": True},  # as Llama 2
        {"vocab_size": 30, "normalization_rule_name": "identity", "add_dummy_prefix": False,
         "remove_extra_whitespaces": False},
    ],
    ids=["unigram", "bpe", "identity"],
)  # fmt: skip
def test_sentencepiece_is_converted_exactly(options: dict, tmp_path: Path):
    ours = pieces(**options)
    ours.save(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path / "hf")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in [*TEXTS, "a </s> b", "<unk><s>", "\u2581x", "e\u0301 \u00a0\r\n"]:
        assert tokenizer(text)["input_ids"] == again(text)["input_ids"] == ours.encode(text)
        assert tokenizer.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    assert tokenizer.eos_token_id == ours.eos_id


def test_sentencepiece_without_an_exact_form_is_refused(tmp_path: Path):
    pieces(vocab_size=12, model_type="word").save(tmp_path)
    with pytest.raises(ValueError, match=r"can't be converted exactly: .* would have other ids; give a tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("template", ["$A </s>", "</s> $A"], ids=["end as T5", "beginning as Llama"])
def test_what_a_post_processor_adds_is_left_out(template: str, tmp_path: Path):
    library = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"</s>": 0, "<unk>": 1, "the": 2, "cat": 3}, unk_token="<unk>")  # pyright: ignore[reportCallIssue]
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.add_special_tokens(["</s>", "<unk>"])
    library.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=[("</s>", 0)])
    library.enable_truncation(3)
    library.save(str(tmp_path / "tokenizer.json"))
    ours = recurformer.load_tokenizer(tmp_path / "tokenizer.json")
    recurformer.save(tiny(vocab_size=4), tmp_path / "model", tokenizer=ours)
    text = "the cat the cat </s>"
    expected = ours.encode(text)
    assert expected[:4] == [2, 3, 2, 3]
    assert 0 not in expected
    assert load_tokenizer(tmp_path / "model")(text)["input_ids"] == expected
    load_tokenizer(tmp_path / "model").save_pretrained(tmp_path / "hf")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")(text)["input_ids"] == expected
    plain = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "model" / "tokenizer.json"))
    assert plain("the cat")["input_ids"] == [2, 3]  # also without the switches of tokenizer_config.json
