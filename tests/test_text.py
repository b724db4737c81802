"""Prompts in, text out: spaces behind a prompt, stops that are special tokens, models whose logits are no numbers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from helpers import random_tokens, tiny
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

import recurformer
from recurformer import LanguageModel, ModelConfig, cli
from recurformer.data.tokenizer import JsonTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from recurformer.generation import generate_rows, pad_prompts, prompt
from recurformer.generation.rows import NonFiniteLogitsError
from recurformer.text import complete
from recurformer.training.config import SampleConfig, TrainConfig
from recurformer.training.distributed import OneProcess
from recurformer.training.validation import sample_text

SENTENCE = "the cat sat on"


def pieces() -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a dog ran to the cat"] * 20), model_writer=model,
        model_type="word", pad_id=0, eos_id=1, unk_id=2, bos_id=3, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return SentencePieceTokenizer(model.getvalue())


def words() -> Tokenizer:
    """Whole words, with the special tokens of a chat."""
    vocab = {"<unk>": 0, **{f"▁{word}": n for n, word in enumerate(SENTENCE.split(), 1)}}
    tokenizer = Library(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    return JsonTokenizer(tokenizer.to_str().encode(), tokenizer.token_to_id("<|endoftext|>"), None)


def chain(tokenizer: Tokenizer, *ids: int) -> LanguageModel:
    """A model that says these different ids one after the other, over and over; each follows from the one before."""
    assert len(set(ids)) == len(ids)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, d_model=64, n_layers=1, n_heads=1, layers="standard")
    model = LanguageModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.embedding.weight.copy_(torch.eye(64)[: tokenizer.vocab_size])
        for one, following in zip(ids, [*ids[1:], ids[0]], strict=True):
            model.head.weight[following, one] = 1.0
    return model


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


# --- the space behind a prompt ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [pieces, words])
def test_prompt_and_text_are_the_text_of_all_ids(make: Any):
    tokenizer = make()
    ids = tokenizer.encode(SENTENCE)
    model, given = chain(tokenizer, *ids), "the cat"
    new = len(ids) - len(tokenizer.encode(given))
    shown: list[str] = []
    (made,) = complete(model, tokenizer, [given], new, temperature=0, show=shown.append)
    assert (made.text, "".join(shown)) == (" sat on", " sat on")
    several = complete(model, tokenizer, [given, "the", given], new, samples=2, temperature=0)
    assert [one.prompt + one.text for one in several][0::2] == ["the cat sat on", "the cat sat", "the cat sat on"]


def test_a_stop_with_a_space_is_found_at_the_first_new_token():
    tokenizer = words()
    ids = tokenizer.encode(SENTENCE)
    model, given = chain(tokenizer, *ids), tokenizer.encode("the cat")
    options: dict[str, Any] = {"temperature": 0, "stop": " sat", "tokenizer": tokenizer}
    out = generate_rows(model, torch.tensor([given]), 3, **options)
    assert (out.lengths, out.ended) == ([1], [True])
    tokens, mask = pad_prompts([given, given[:1]], pad_id=ids[-1])
    out = generate_rows(model, tokens, 3, attention_mask=mask, num_samples=2, **options)
    assert (out.lengths, out.ended) == ([1, 1, 2, 2], [True] * 4)
    (made,) = complete(model, tokenizer, ["the cat"], 3, temperature=0, stops=[" sat"])
    assert (made.text, made.tokens, made.ended) == ("", 1, True)


def test_stops_of_any_tokenizer_count_behind_the_prompt():
    """A tokenizer of another library: `decode` is all that it has."""

    class Foreign:
        def decode(self, ids: list[int]) -> str:
            return " ".join(SENTENCE.split()[token - 1] for token in ids)

    model = chain(words(), 1, 2, 3, 4)
    out = generate_rows(model, torch.tensor([[1, 2]]), 3, temperature=0, stop=" sat on", tokenizer=Foreign())
    assert (out.lengths, out.ended) == ([2], [True])


@pytest.mark.parametrize("make", [pieces, words])
def test_the_command_prints_the_space(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tokenizer = make()
    ids = tokenizer.encode(SENTENCE)
    recurformer.save(chain(tokenizer, *ids), tmp_path, tokenizer)
    new = len(ids) - len(tokenizer.encode("the cat"))
    run = ("generate", tmp_path, "--prompt", "the cat", "--temperature", 0, "--max-new-tokens", new)
    assert command(capsys, *run) == (0, "the cat sat on\n", "")
    assert json.loads(command(capsys, *run, "--json")[1])["text"] == " sat on"
    assert command(capsys, *run, "--samples", 2)[1] == "--- 1 ---\nthe cat sat on\n--- 2 ---\nthe cat sat on\n"
    assert command(capsys, *run, "--stop", " on")[1] == "the cat sat\n"


def test_samples_of_training_keep_the_space():
    tokenizer = words()
    model = chain(tokenizer, *tokenizer.encode(SENTENCE))
    config = training_config(tokens=2, prompt="the cat")
    text = sample_text(model, tokenizer, config, torch.device("cpu"), OneProcess())
    assert text == " sat on"


def training_config(**sample: Any) -> TrainConfig:
    return TrainConfig(model=ModelConfig(), sample=SampleConfig(temperature=0.0, seed=0, **sample))


# --- stops that are special tokens -----------------------------------------------------------------------------------


def test_a_special_token_is_a_stop():
    tokenizer = words()
    end = tokenizer.special_tokens()["<|im_end|>"]
    model, shown = chain(tokenizer, 1, 2, end, 3), []
    (made,) = complete(model, tokenizer, ["the"], 8, temperature=0, stops=["<|im_end|>"], show=shown.append)
    assert (made.text, made.tokens, made.ended, "".join(shown)) == (" cat", 2, True, " cat")
    out = generate_rows(model, torch.tensor([[1], [3]]), 8, temperature=0, stop="<|im_end|>", tokenizer=tokenizer)
    assert (out.lengths, out.ended) == ([2, 3], [True, True])
    assert out.tokens[0, 1:3].tolist() == [2, end]  # the token itself is kept, as an end id is
    free = complete(model, tokenizer, ["the"], 3, temperature=0, stops=["nowhere"])[0]
    assert (free.text, free.ended) == (" cat sat", False)


def test_a_control_piece_is_a_stop_and_text_held_for_another_is_shown():
    tokenizer = pieces()
    begin = tokenizer.special_tokens()["<s>"]
    ids = tokenizer.encode("the cat")
    model, shown = chain(tokenizer, *ids, begin), []
    found = complete(model, tokenizer, ["the"], 9, temperature=0, stops=["t dog", "<s>"], show=shown.append)[0]
    assert found.prompt + found.text == "the cat"  # its last letter may have begun "t dog"
    assert ("".join(shown), found.ended) == (found.text, True)


def test_a_stop_that_no_text_can_match_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tokenizer = words()
    model = chain(tokenizer, 1, 2, 3)
    message = r"stop is '\\n<\|im_end\|>', which holds the special token '<\|im_end\|>'"
    with pytest.raises(ValueError, match=message):
        generate_rows(model, random_tokens(1, 2, vocabulary=4), 3, stop="\n<|im_end|>", tokenizer=tokenizer)
    with pytest.raises(ValueError, match=message):
        complete(model, tokenizer, ["the"], 3, stops=["\n<|im_end|>"])
    recurformer.save(model, tmp_path, tokenizer)
    code, out, err = command(capsys, "generate", tmp_path, "--stop", "\\n<|im_end|>")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert (
        command(capsys, "generate", tmp_path, "--prompt", "the", "--stop", "<|im_end|>", "--max-new-tokens", 2)[0] == 0
    )


# --- logits that are no numbers --------------------------------------------------------------------------------------


def broken(value: float = float("nan"), **options: Any) -> LanguageModel:
    model = tiny(vocab_size=256, **options)
    with torch.no_grad():
        model.embedding.weight[65] = value  # the letter A
    return model


@pytest.mark.parametrize("step", ["plain", "model"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {"repetition_penalty": 1.5}],
    ids=str,
)
def test_logits_that_are_no_numbers_are_one_error(options: dict[str, Any], value: float, step: str):
    model, tokens = broken(value), torch.tensor([[66, 67], [67, 65]])
    with pytest.raises(NonFiniteLogitsError, match=r"the logits of new token 1 are not finite numbers; .* earlier"):
        model.generate(tokens, 5, step=step, seed=0, **options)
    assert model.generate(tokens[:1], 1, step=step, seed=0, **options).shape == (1, 3)


def test_a_token_in_the_middle_may_break_the_logits_and_is_the_last_that_is_shown():
    made = chain(words(), 1, 2, 3, 4)
    with torch.no_grad():
        made.embedding.weight[3] = float("nan")
    seen: list[int] = []
    with pytest.raises(NonFiniteLogitsError, match="new token 3 "):
        made.generate(torch.tensor([[1]]), 9, temperature=0, stream=lambda ids: seen.append(int(ids)))
    assert seen == [2, 3]


def test_the_command_says_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recurformer.save(broken(), tmp_path, load_tokenizer("bytes"))
    for more in ((), ("--temperature", 0), ("--json",), ("--samples", 2)):
        code, out, err = command(capsys, "generate", tmp_path, "--prompt", "BA", *more)
        assert (code, out, err.count("\n")) == (2, "", 1), more
        assert "the logits of new token 1 are not finite numbers" in err


def test_a_sample_of_training_says_so_and_lets_the_run_go_on():
    text = sample_text(
        broken(), load_tokenizer("bytes"), training_config(tokens=3, prompt="BA"), torch.device("cpu"), OneProcess()
    )
    assert text is not None
    assert "the logits of new token 1 are not finite numbers" in text


# --- prompts in chunks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["recurrent", "first:1", "standard"])
def test_long_prompts_are_read_in_chunks_without_being_asked(layers: str, monkeypatch: pytest.MonkeyPatch):
    model, tokens = tiny(layers=layers, dtype=torch.float64), random_tokens(2, 300)
    whole = model.generate(tokens, 4, temperature=0, prefill_chunk=300)
    lengths: list[int] = []
    hidden = LanguageModel.hidden

    def counted(self: LanguageModel, tokens: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        lengths.append(tokens.shape[1])
        return hidden(self, tokens, *args, **options)

    monkeypatch.setattr(LanguageModel, "hidden", counted)
    monkeypatch.setattr(prompt, "CHUNK_ELEMENTS", 200 * model.config.mlp_width)
    assert torch.equal(model.generate(tokens, 4, temperature=0), whole)
    assert lengths == [100, 100, 100]


def test_the_command_takes_a_chunk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    recurformer.save(tiny(vocab_size=256, layers="first:1"), tmp_path, load_tokenizer("bytes"))
    lengths: list[int] = []
    hidden = LanguageModel.hidden

    def counted(self: LanguageModel, tokens: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        lengths.append(tokens.shape[1])
        return hidden(self, tokens, *args, **options)

    monkeypatch.setattr(LanguageModel, "hidden", counted)
    run = ("generate", tmp_path, "--prompt", "abcdefghij", "--max-new-tokens", 2, "--seed", 1)
    expected = command(capsys, *run)
    lengths.clear()
    assert command(capsys, *run, "--prompt-chunk", 4) == expected
    assert lengths[:3] == [4, 4, 2]
    code, _, err = command(capsys, *run, "--prompt-chunk", 0)
    assert code == 2
    assert "--prompt-chunk" in err
