"""Generation through the engine: what it says is what calls of the model, Hugging Face and full forwards say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import V, layer_of, logits_of, random_tokens, tiny
from torch import Tensor

from recurformer import LanguageModel
from recurformer.data.tokenizer import load_tokenizer
from recurformer.generation import decoder, generate, generate_rows, pad_prompts, rows
from recurformer.generation.engine import DecodeEngine
from recurformer.generation.stopping import StopFinder

KINDS: dict[str, dict[str, Any]] = {
    "recurrent": {},
    "standard": {"layers": "standard"},
    "hybrid": {"layers": "first:1", "position": "rope", "n_kv_heads": 2},
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def ragged(*lengths: int) -> tuple[Tensor, Tensor]:
    return pad_prompts([random_tokens(n, seed=n).tolist() for n in lengths])


def engines(monkeypatch: pytest.MonkeyPatch) -> list[DecodeEngine]:
    """The engines that generation makes from here on."""
    made: list[DecodeEngine] = []
    real = decoder.DecodeEngine

    class Noted(real):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(decoder, "DecodeEngine", Noted)
    return made


# --- the same tokens by every way ------------------------------------------------------------------------------------


@every_kind
def test_200_greedy_tokens_agree_exactly_with_hugging_face_and_with_a_forward_a_token(kind: dict[str, Any]):
    transformers = pytest.importorskip("transformers")
    from recurformer.hf import RecurformerForCausalLM

    transformers.logging.set_verbosity_error()
    model, (tokens, mask) = tiny(scan="auto", **kind), ragged(3, 7)
    ours = model.generate(tokens, 200, attention_mask=mask, temperature=0, step="plain")
    assert torch.equal(ours, model.generate(tokens, 200, attention_mask=mask, temperature=0, step="model"))
    wrapped: Any = RecurformerForCausalLM.from_model(model)
    theirs = wrapped.generate(tokens, attention_mask=mask, max_new_tokens=200, do_sample=False, pad_token_id=0)
    assert torch.equal(ours, theirs)
    so_far = tokens[:1, 4:]  # the one with pads, without them
    with torch.no_grad():
        for _ in range(200):
            so_far = torch.cat([so_far, logits_of(model, so_far)[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(so_far[0], ours[0, 4:])
        # A causal model says all of it in one forward, too.
        assert torch.equal(logits_of(model, ours[1:2, :-1])[0, 6:].argmax(-1), ours[1, 7:])


SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {},
    "filters": {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    "penalty": {"repetition_penalty": 1.3},
    "samples": {"num_samples": 3},
    "ends": {"eos_token_id": list(range(8)), "pad_token_id": -1, "num_samples": 2},
    "chunks": {"prefill_chunk": 2},
}


@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING.keys())
@every_kind
def test_seeded_samples_are_those_of_calls_of_the_model(kind: dict[str, Any], options: dict[str, Any]):
    model, (tokens, mask) = tiny(dtype=torch.float64, **kind), ragged(2, 6, 1)
    found = [
        model.generate(tokens, 40, attention_mask=mask, seed=5, step=step, **options) for step in ("plain", "model")
    ]
    assert torch.equal(*found)
    again = model.generate(tokens, 40, attention_mask=mask, seed=5, step="plain", **options)
    assert torch.equal(again, found[0])


def test_looking_for_the_end_late_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    model, (tokens, mask) = tiny(dtype=torch.float64), ragged(2, 6, 1)
    options = {"attention_mask": mask, "eos_token_id": [3, 4, 5, 6], "pad_token_id": -1, "num_samples": 2}
    for limit in (1, 17, 200):
        found, steps = [], []
        for every in (1, 5, 16, 1000):
            monkeypatch.setattr(rows, "LOOK_EVERY", {"cpu": every})
            calls = engines(monkeypatch)
            found.append(generate_rows(model, tokens, limit, seed=1, **options))
            steps.append(calls[-1].length)
        for other in found[1:]:
            assert torch.equal(other.tokens, found[0].tokens)
            assert (other.lengths, other.ended) == (found[0].lengths, found[0].ended)
        assert steps == sorted(steps)
    assert all(found[0].ended)
    assert max(found[0].lengths) == found[0].tokens.shape[1] - 6 < 200
    assert steps[1] > steps[0]


def test_growth_in_the_middle_of_a_generation(monkeypatch: pytest.MonkeyPatch):
    model, (tokens, mask) = tiny(dtype=torch.float64), ragged(4, 9)
    expected = model.generate(tokens, 50, attention_mask=mask, temperature=0, step="model")
    monkeypatch.setattr(decoder, "ROOM", 4)
    monkeypatch.setattr(decoder, "ROOM_MULTIPLE", 1)
    made = engines(monkeypatch)
    assert torch.equal(model.generate(tokens, 50, attention_mask=mask, temperature=0), expected)
    assert made[0].capacity == 104  # 13, doubled


def test_padded_rows_of_the_vocabulary_are_never_sampled():
    model = tiny(vocab_multiple=128)
    out = model.generate(random_tokens(100, 3), 100, temperature=5.0, seed=0, step="plain")
    assert out.shape == (100, 103)
    assert int(out.max()) < V
    assert set(range(V)) == set(out.unique().tolist())


def test_finished_rows_fall_silent_and_end_the_call():
    model, prompt = tiny(dtype=torch.float64), random_tokens(2, 4)
    free = model.generate(prompt, 12, temperature=0, step="plain")[:, 4:]
    ends = [int(free[0, 1]), int(free[1, 5])]
    first = [next(n for n, token in enumerate(row.tolist()) if token in ends) for row in free]
    steps: list[list[int]] = []
    out = generate_rows(
        model, prompt, 12, temperature=0, eos_token_id=ends, pad_token_id=0, stream=lambda t: steps.append(t.tolist())
    )
    assert out.lengths == [n + 1 for n in first]
    assert out.ended == [True, True]
    new = out.tokens[:, 4:]
    assert new.shape[1] == max(out.lengths) == len(steps)
    for row, length in enumerate(out.lengths):
        assert torch.equal(new[row, :length], free[row, :length])
        assert (new[row, length:] == 0).all()
    assert torch.tensor(steps).t().tolist() == new.tolist()


def test_a_prompt_is_read_with_the_models_own_scan(monkeypatch: pytest.MonkeyPatch):
    made, model = engines(monkeypatch), tiny()
    calls: list[int] = []
    monkeypatch.setattr(DecodeEngine, "prefill", noted(DecodeEngine.prefill, calls))
    model.generate(random_tokens(2, 6), 4, num_samples=3, seed=0)
    assert calls == [6]
    assert [(one.length, one.batch_size) for one in made] == [(9, 6)]  # the last token is not fed


def noted(function: Any, lengths: list[int]) -> Any:
    def wrapper(self: Any, tokens: Tensor, *arguments: Any, **options: Any) -> Tensor:
        lengths.append(tokens.shape[1])
        return function(self, tokens, *arguments, **options)

    return wrapper


def test_models_that_are_more_decode_by_their_own_calls(monkeypatch: pytest.MonkeyPatch):
    made, model = engines(monkeypatch), tiny(dtype=torch.float64)
    expected = model.generate(random_tokens(2, 6), 5, temperature=0)
    assert len(made) == 1
    seen: list[int] = []
    layer_of(model, 0).register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(model.generate(random_tokens(2, 6), 5, temperature=0), expected)
    assert (len(made), len(seen)) == (1, 5)
    with pytest.raises(ValueError, match="layer 0 is more than a layer"):
        model.generate(random_tokens(2, 6), 5, step="plain")


def test_engines_are_kept_only_on_gpus():
    model = tiny()
    model.generate(random_tokens(1, 4), 3)
    assert model.kept_engine is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": "fast"}, "step is 'fast'; choose one of 'auto', 'model'"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"stop": "x"}, "stop is 'x', but the tokenizer is None"),
        ({"stop": ["x", ""]}, "stop holds ''"),
        ({"stop": [3]}, "stop holds 3"),
    ],
    ids=str,
)
def test_what_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        tiny().generate(random_tokens(1, 4), 3, **options)


# --- stop texts ------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of pieces: token n is the n-th; 0 ends a text."""

    eos_token_id = 0

    def __init__(self, *pieces: str) -> None:
        self.pieces = ("", *pieces)

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[token] if token < len(self.pieces) else "?" for token in ids)


def after(stops: list[str], *pieces: str) -> tuple[list[str], str, bool]:
    """What a finder shows as pieces of text arrive and at the end, its text, and whether it found a stop."""
    finder = StopFinder(stops, Letters(*pieces))
    shown = [finder.feed(n) for n in range(1, len(pieces) + 1)]
    return [*shown, finder.finish()], finder.text, finder.found


def test_stops_are_found_across_tokens_and_nothing_of_them_is_shown():
    assert after(["END"], "so E", "N", "D on") == (["so ", "", "", ""], "so ", True)
    assert after(["END"], "so E", "N", "d") == (["so ", "", "ENd", ""], "so ENd", False)
    assert after(["END"], "so", " EN") == (["so", " ", "EN"], "so EN", False)
    assert after(["aab"], "a", "a", "a", "b", "c") == (["", "", "a", "", "", ""], "a", True)
    assert after(["b", "abc"], "xa", "b", "c") == (["x", "a", "", ""], "xa", True)  # the first that is complete
    assert after(["bc", "abc"], "xabc") == (["x", ""], "x", True)  # of those complete at once, the first to begin
    assert after([], "a", "b") == (["a", "b", ""], "ab", False)
    assert after(["x"], "x") == (["", ""], "", True)


def test_any_cut_into_tokens_finds_the_same():
    text, stops = "one two\n\nthree END", ["\n\n", "END"]
    for size in range(1, len(text)):
        pieces = [text[n : n + size] for n in range(0, len(text), size)]
        shown, found, ended = after(stops, *pieces)
        assert ("".join(shown), found, ended) == ("one two", "one two", True)


def test_stops_of_several_bytes_and_broken_ones():
    tokenizer = load_tokenizer("bytes")
    finder = StopFinder(["é!"], tokenizer)
    shown = [finder.feed(byte) for byte in "aé?é!b".encode()]
    assert shown == ["a", "", "", "é?", "", "", "", ""]
    assert (finder.text, finder.found) == ("aé?", True)
    finder = StopFinder(["é!"], tokenizer)
    for byte in "aé".encode()[:-1]:
        finder.feed(byte)
    assert (finder.finish(), finder.text, finder.found) == ("\ufffd", "a\ufffd", False)


def scripted(model: LanguageModel, monkeypatch: pytest.MonkeyPatch, script: list[list[int]]) -> None:
    """Make row r produce script[r][step], whatever the model thinks."""
    step = 0

    def logits(x: Tensor) -> Tensor:
        nonlocal step
        out = torch.full((x.shape[0], V), -50.0)
        for row, ids in enumerate(script):
            out[row, ids[min(step, len(ids) - 1)]] = 50.0
        step += 1
        return out

    monkeypatch.setattr(model, "logits", logits)


@pytest.mark.parametrize("every", [1, 3, 16])
def test_rows_end_at_the_token_that_completes_a_stop(every: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "LOOK_EVERY", {"cpu": every})
    model, tokenizer = tiny(), Letters("a", "E", "ND", "D", "N", ".")
    scripted(model, monkeypatch, [[1, 2, 3, 1, 1], [2, 5, 4, 6, 1], [6, 6, 6, 6, 6, 6, 2, 5, 1, 6], [1, 0, 6]])
    out = generate_rows(
        model, random_tokens(4, 2), 9, temperature=0, stop=["END", "Q"], tokenizer=tokenizer, eos_token_id=0,
        pad_token_id=96,
    )  # fmt: skip
    assert out.lengths == [3, 3, 9, 2]
    assert out.ended == [True, True, False, True]
    assert out.tokens[:, 2:].tolist() == [
        [1, 2, 3] + [96] * 6, [2, 5, 4] + [96] * 6, [6, 6, 6, 6, 6, 6, 2, 5, 1], [1, 0] + [96] * 7,
    ]  # fmt: skip


def test_the_stop_alone_ends_a_call_and_the_tokenizers_end_fills_up(monkeypatch: pytest.MonkeyPatch):
    model = tiny()
    scripted(model, monkeypatch, [[1, 2, 1], [1, 1, 1, 2]])
    out = generate(model, random_tokens(2, 3), 50, temperature=0, stop="b", tokenizer=Letters("a", "b"))
    assert out[:, 3:].tolist() == [[1, 2, 0, 0], [1, 1, 1, 2]]


def test_a_stop_in_the_prompt_does_not_count(monkeypatch: pytest.MonkeyPatch):
    model = tiny()
    scripted(model, monkeypatch, [[1]])
    out = generate(model, torch.tensor([[2, 2]]), 3, temperature=0, stop="b", tokenizer=Letters("a", "b"))
    assert out.tolist() == [[2, 2, 1, 1, 1]]


def test_stops_end_the_rows_that_the_engine_makes():
    """Bytes; the stop is two neighbours of a free run."""
    model, prompt = tiny(vocab_size=256, dtype=torch.float64), random_tokens(1, 4)
    tokenizer = load_tokenizer("bytes")
    free = model.generate(prompt, 40, temperature=0)[0, 4:].tolist()
    text = tokenizer.decode(free)
    characters = [c for c in text if c.isascii() and c.isprintable()]
    assert characters
    out = generate_rows(model, prompt, 40, temperature=0, stop=characters[-1], tokenizer=tokenizer)
    assert out.ended == [True]
    assert out.tokens[0, 4:].tolist() == free[: out.lengths[0]]
    assert tokenizer.decode(out.tokens[0, 4:].tolist()).endswith(characters[-1])
