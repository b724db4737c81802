"""The tokenizer of a converted folder gives the ids that the model knows, whichever program opens it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import torch
from helpers import tiny

import recurformer
from recurformer.data.tokenizer import JsonTokenizer, SentencePieceTokenizer, load_tokenizer, train_bpe
from recurformer.interop import convert

transformers = pytest.importorskip("transformers")

LLAMA: dict[str, Any] = {"layers": "standard", "activation": "swiglu", "position": "rope", "qk_norm": "none"}
TEXT = "the cat</s> sat <pad>"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama's folder whose tokenizer begins every text, by its post-processor and by its configuration."""
    folder = tmp_path_factory.mktemp("llama")
    pieces = {"<s>": 0, "</s>": 1, "<unk>": 2, "<pad>": 3, "the": 4, "cat": 5, "sat": 6}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, unk_token="<unk>"))  # pyright: ignore[reportCallIssue]
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.add_special_tokens(["<s>", "</s>", "<unk>", "<pad>"])
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    library.save(str(folder / "tokenizer.json"))
    options = {
        "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
        "unk_token": "<unk>", "sep_token": "<new>", "additional_special_tokens": ["<pad>", "<newer>"],
        "tokenizer_class": "LlamaTokenizerFast", "model_max_length": 77, "chat_template": "{{ messages[0].content }}",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    options = transformers.LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(options).save_pretrained(folder)
    assert transformers.AutoTokenizer.from_pretrained(folder)("the cat")["input_ids"][0] == 0
    return folder


@pytest.mark.parametrize("target", ["hf", "llama", "recurformer"])
def test_nothing_is_added_on_the_other_side(target: str, llama: Path, tmp_path: Path):
    source, expected = llama, load_tokenizer(llama).encode(TEXT)
    convert(source, tmp_path / "out", target)  # pyright: ignore[reportArgumentType]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(TEXT)["input_ids"] == recurformer.load_tokenizer(tmp_path / "out").encode(TEXT) == expected
    assert expected[0] == 4
    assert len(theirs) == 7  # a token outside the vocabulary would get an id that the model may not have
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 3)
    assert theirs.model_max_length == 77
    assert theirs.apply_chat_template([{"role": "user", "content": "cat"}], tokenize=False) == "cat"


def test_our_own_tokenizer_survives_as_a_llama(tmp_path: Path):
    """Without a configuration, transformers builds a Llama's tokenizer from the vocabulary."""
    words = train_bpe(["the cat sat on the mat"] * 3, 270)
    recurformer.save(tiny(vocab_size=270, **LLAMA), tmp_path / "run", words)
    convert(tmp_path / "run", tmp_path / "llama", "llama")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert theirs("the cat, naïve")["input_ids"] == words.encode("the cat, naïve")


def test_a_sentencepiece_run_converts_with_its_tokenizer(tmp_path: Path):
    raw = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 20), model_writer=raw, vocab_size=14, minloglevel=2
    )
    words = SentencePieceTokenizer(raw.getvalue())
    model = tiny(vocab_size=words.vocab_size)
    recurformer.save(model, tmp_path / "run", words)
    convert(tmp_path / "run", tmp_path / "hf", "hf")
    pipe = transformers.pipeline("text-generation", str(tmp_path / "hf"), device="cpu")
    found = pipe("the cat", max_new_tokens=5, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    prompt = torch.tensor([words.encode("the cat")])
    assert found == model.generate(prompt, 5, temperature=0.0, eos_token_id=words.eos_id)[0].tolist()
    again = recurformer.load_tokenizer(tmp_path / "hf")
    assert again.encode("the mat") == words.encode("the mat")


def test_an_end_that_the_vocabulary_spells_is_no_end_on_either_side(tmp_path: Path):
    """T5's unigram vocabulary finds "</s>" in a text."""
    library = tokenizers.Tokenizer(
        tokenizers.models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("s", -2.0)], unk_id=0)
    )
    library.add_special_tokens(["</s>"])
    words = JsonTokenizer(library.to_str().encode(), eos_id=1, pad_id=None)
    recurformer.save(tiny(vocab_size=4), tmp_path / "run", words)
    convert(tmp_path / "run", tmp_path / "hf", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("a</s>a")["input_ids"] == words.encode("a</s>a")
    assert 1 not in words.encode("a</s>a")
