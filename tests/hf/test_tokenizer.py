"""Tokenizers for Hugging Face: the same ids as ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny

import recurformer
from recurformer.data.tokenizer import BytesTokenizer, train_bpe

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


def test_sentencepiece_is_refused(tmp_path: Path):
    import io

    import sentencepiece

    raw = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 20), model_writer=raw, vocab_size=14, minloglevel=2
    )
    (tmp_path / "spiece.model").write_bytes(raw.getvalue())
    with pytest.raises(ValueError, match="sentencepiece tokenizer, which can't be converted"):
        load_tokenizer(tmp_path)
