"""Generation: what each option means, and that batching, padding and the cache change nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import V, assert_close, every_scan, logits_of, random_tokens, tiny
from torch import Tensor

from recurformer import LanguageModel
from recurformer.generation import generate, pad_prompts
from recurformer.generation.sampling import Sampling, keep_min_p, keep_top_k, keep_top_p, penalise

MODELS: dict[str, dict[str, Any]] = {
    "alibi": {},
    "rope": {"position": "rope", "n_kv_heads": 2},
    "hybrid": {"layers": ("standard", "recurrent", "standard"), "n_layers": 3},
    "standard": {"layers": "standard"},
}
every_model = pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())


def greedy(model: LanguageModel, tokens: Tensor, steps: int) -> Tensor:
    """The greedy continuation by a full forward over everything at each step."""
    with torch.no_grad():
        for _ in range(steps):
            tokens = torch.cat([tokens, logits_of(model, tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


def assert_greedy(model: LanguageModel, prompt: Tensor, new: Tensor) -> None:
    """Each new token is the most probable one after everything before it, in one full forward of the row alone."""
    with torch.no_grad():
        best = logits_of(model, torch.cat([prompt, new])[None])[0].argmax(-1)
    assert torch.equal(best[len(prompt) - 1 : -1], new)


def scripted(model: LanguageModel, monkeypatch: pytest.MonkeyPatch, script: dict[int, list[int]]) -> None:
    """Make row r produce script[r][step], whatever the model thinks; rows without a script produce 7."""
    step = 0

    def logits(x: Tensor) -> Tensor:
        nonlocal step
        out = torch.zeros(x.shape[0], V)
        for row in range(x.shape[0]):
            ids = script.get(row, [])
            out[row, ids[step] if step < len(ids) else 7] = 50.0
        step += 1
        return out

    monkeypatch.setattr(model, "logits", logits)


def count_forwards(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the tokens that go through the layers, as they come."""
    calls: list[tuple[int, ...]] = []
    hidden = model.hidden

    def counted(tokens: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append(tuple(tokens.shape))
        return hidden(tokens, *args, **options)

    monkeypatch.setattr(model, "hidden", counted)
    return calls


# --- the loop --------------------------------------------------------------------------------------------------------


@every_scan
@every_model
def test_greedy_tokens_are_those_of_full_forwards_without_a_cache(options: dict[str, Any], scan: str):
    model, prompt = tiny(scan=scan, dtype=torch.float64, **options), random_tokens(2, 6)
    assert torch.equal(model.generate(prompt, 20, temperature=0), greedy(model, prompt, 20))


@every_scan
@every_model
@pytest.mark.parametrize("side", ["left", "right", "interior"])
def test_ragged_prompts_continue_as_each_alone(side: str, options: dict[str, Any], scan: str):
    model, lengths = tiny(scan=scan, dtype=torch.float64, **options), (1, 4, 7)
    prompts = [random_tokens(length, seed=length) for length in lengths]
    places = {
        "left": lambda n: range(7 - n, 7),
        "right": lambda n: range(n),
        "interior": lambda n: [0, 2, 3, 6][:n] if n < 7 else range(7),
    }[side]
    tokens, mask = torch.full((3, 7), 96), torch.zeros(3, 7)
    for row, prompt in enumerate(prompts):
        tokens[row, list(places(len(prompt)))] = prompt
        mask[row, list(places(len(prompt)))] = 1
    out = model.generate(tokens, 16, temperature=0, attention_mask=mask)
    assert torch.equal(out[:, :7], tokens)
    for row, prompt in enumerate(prompts):
        assert_greedy(model, prompt, out[row, 7:])


def test_padding_prompts_is_on_the_left():
    tokens, mask = pad_prompts([[5], [1, 2, 3]], pad_id=9)
    assert tokens.tolist() == [[9, 9, 5], [1, 2, 3]]
    assert mask.tolist() == [[False, False, True], [True, True, True]]
    assert tokens.dtype == torch.int64
    for prompts, message in (([], "no prompts"), ([[1], []], "prompt 1 is empty")):
        with pytest.raises(ValueError, match=message):
            pad_prompts(prompts)


def test_the_prompt_is_read_once_and_the_last_token_costs_nothing(monkeypatch: pytest.MonkeyPatch):
    model = tiny()
    calls = count_forwards(model, monkeypatch)
    model.generate(random_tokens(2, 6), 4, num_samples=3, seed=0)
    assert calls == [(2, 6), (6, 1), (6, 1), (6, 1)]


@pytest.mark.parametrize("samples", [1, 2])
def test_no_new_tokens_returns_the_prompt(samples: int, monkeypatch: pytest.MonkeyPatch):
    model, prompt = tiny(), random_tokens(2, 6)
    calls = count_forwards(model, monkeypatch)
    out = model.generate(prompt.int(), 0, num_samples=samples)
    assert torch.equal(out, prompt.repeat_interleave(samples, 0))
    assert out.dtype == torch.int64
    assert calls == []


@every_model
def test_a_second_turn_on_a_returned_cache_equals_one_long_sequence(options: dict[str, Any]):
    model, first, second = tiny(dtype=torch.float64, **options), random_tokens(1, 6), random_tokens(1, 4, seed=8)
    with torch.no_grad():
        reply = model.generate(first, 5, temperature=0)
        cache = model(reply[:, :-1], use_cache=True).cache  # the last token has not been read yet
        kept = cache.clone()
        logits = logits_of(model, torch.cat([reply[:, -1:], second], dim=1), cache=cache)
        whole = torch.cat([reply, second], dim=1)
        assert_close(logits, logits_of(model, whole)[:, -5:])
        turn = [logits[:, -1].argmax(-1, keepdim=True)]
        for _ in range(7):
            turn.append(logits_of(model, turn[-1], cache=cache)[:, -1].argmax(-1, keepdim=True))
    assert torch.equal(torch.cat([whole, *turn], dim=1), model.generate(whole, 8, temperature=0))
    assert (kept.length, cache.length) == (10, 22)


def test_calls_leave_no_trace():
    model, prompt = tiny().train(), random_tokens(1, 5)
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    inside: list[bool] = []
    one = model.generate(prompt, 5, seed=3, stream=lambda _: inside.append(model.training))
    assert not any(inside)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.generate(prompt, 5, seed=3), one)
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()

    def broken(_: Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(prompt, 5, stream=broken)
    assert [module.training for module in model.modules()] == modes


def test_bfloat16_models_and_autocast_generate():
    prompt = random_tokens(2, 5)
    assert tiny(dtype=torch.bfloat16).generate(prompt, 6, seed=0).shape == (2, 11)
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny().generate(prompt, 6, seed=0, top_p=0.9).shape == (2, 11)


# --- the end of rows -------------------------------------------------------------------------------------------------


def test_a_finished_row_holds_its_eos_and_then_pads(monkeypatch: pytest.MonkeyPatch):
    model = tiny()
    scripted(model, monkeypatch, {0: [3], 1: [5, 5, 5, 5, 3]})
    calls = count_forwards(model, monkeypatch)
    steps: list[list[int]] = []
    out = model.generate(
        random_tokens(2, 4),
        50,
        temperature=0,
        eos_token_id=3,
        pad_token_id=0,
        stream=lambda ids: steps.append(ids.tolist()),
    )
    assert out[:, 4:].tolist() == [[3, 0, 0, 0, 0], [5, 5, 5, 5, 3]]  # stops when all have ended
    assert steps == [[3, 5], [0, 5], [0, 5], [0, 5], [0, 3]]
    assert len(calls) == 5


@pytest.mark.parametrize("pad", [None, 96, -1, 10**6])
def test_pads_are_the_eos_unless_told_and_need_not_be_tokens(pad: int | None, monkeypatch: pytest.MonkeyPatch):
    model = tiny()
    scripted(model, monkeypatch, {0: [11]})
    out = model.generate(
        random_tokens(2, 4), 3, temperature=0, eos_token_id=[11, 12], pad_token_id=pad, repetition_penalty=1.1
    )
    assert out[0, 4:].tolist() == [11] + [11 if pad is None else pad] * 2
    assert out[1, 4:].tolist() == [7, 7, 7]


def test_any_of_several_ids_ends_a_row(monkeypatch: pytest.MonkeyPatch):
    model = tiny()
    scripted(model, monkeypatch, {0: [5, 9, 5], 1: [4, 5, 5], 2: [5, 5, 9]})
    out = model.generate(random_tokens(3, 2), 9, temperature=0, eos_token_id=[9, 4], pad_token_id=1)
    assert out[:, 2:].tolist() == [[5, 9, 1], [4, 1, 1], [5, 5, 9]]


def test_an_end_token_in_the_prompt_does_not_count(monkeypatch: pytest.MonkeyPatch):
    model = tiny()
    scripted(model, monkeypatch, {})
    out = model.generate(torch.tensor([[3, 3, 3]]), 4, temperature=0, eos_token_id=3)
    assert out.tolist() == [[3, 3, 3, 7, 7, 7, 7]]


@pytest.mark.parametrize("eos", [None, []], ids=["none", "empty-list"])
def test_without_an_end_token_rows_never_end(eos: Any):
    assert tiny().generate(random_tokens(2, 3), 30, eos_token_id=eos, seed=0).shape == (2, 33)


def test_a_finished_row_does_not_change_the_others():
    model, prompt = tiny(dtype=torch.float64), random_tokens(3, 4)
    free = model.generate(prompt, 12, temperature=0)
    stopped = model.generate(prompt, 12, temperature=0, eos_token_id=int(free[0, 5]), pad_token_id=-1)
    ended = [row for row in range(3) if (stopped[row] == -1).any()]
    assert 0 in ended
    for row in range(3):
        kept = stopped[row] != -1
        assert torch.equal(stopped[row, kept], free[row, : stopped.shape[1]][kept])
    assert len(ended) < 3


# --- samples, seeds, streams -----------------------------------------------------------------------------------------


def test_samples_of_a_prompt_are_neighbours_and_differ():
    model, prompt = tiny(), random_tokens(2, 5)
    out = model.generate(prompt, 12, num_samples=3, seed=0)
    assert torch.equal(out[:, :5], prompt.repeat_interleave(3, 0))
    assert len({tuple(row) for row in out.tolist()}) == 6
    same = model.generate(prompt, 12, num_samples=3, temperature=0)
    assert torch.equal(same, greedy(model, prompt, 12).repeat_interleave(3, 0))


def test_samples_of_ragged_prompts_keep_their_masks():
    model = tiny(dtype=torch.float64)
    tokens, mask = pad_prompts([[4, 8], [1, 2, 3, 4, 5]])
    out = model.generate(tokens, 6, num_samples=2, temperature=0, attention_mask=mask)
    assert_greedy(model, torch.tensor([4, 8]), out[0, 5:])
    assert_greedy(model, tokens[1], out[2, 5:])
    assert torch.equal(out[0::2], out[1::2])


def test_the_seed_decides():
    model, prompt = tiny(), random_tokens(2, 5)
    one, again, other = (model.generate(prompt, 12, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    torch.manual_seed(5)
    free, different = model.generate(prompt, 12), model.generate(prompt, 12)
    assert not torch.equal(free, different)
    torch.manual_seed(5)
    assert torch.equal(model.generate(prompt, 12), free)
    assert model.generate(prompt, 1, seed=-1).shape == (2, 6)


def test_the_stream_is_the_new_tokens():
    steps: list[Tensor] = []
    out = generate(tiny(), random_tokens(2, 5), 7, num_samples=2, seed=0, stream=steps.append)
    assert all(ids.shape == (4,) for ids in steps)
    assert torch.equal(torch.stack(steps, dim=1), out[:, 5:])


# --- the distribution ------------------------------------------------------------------------------------------------


def frequencies(sampling: Sampling, logits: list[float], draws: int = 20000) -> Tensor:
    """How often each token is drawn."""
    generator = torch.Generator().manual_seed(0)
    drawn, _ = sampling.draw(torch.tensor(logits).expand(draws, -1), None, generator)
    return torch.bincount(drawn, minlength=len(logits)) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax_at_a_temperature(temperature: float):
    logits = [2.0, 1.0, 0.0, -1.0, -30.0]
    expected = (torch.tensor(logits) / temperature).softmax(0)
    assert_close(frequencies(Sampling(temperature=temperature), logits), expected, 0.012)


def test_draws_within_a_kept_set_are_renormalised():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    assert_close(frequencies(Sampling(top_k=2), logits), torch.tensor([4 / 7, 3 / 7, 0, 0]), 0.012)
    assert_close(frequencies(Sampling(top_p=0.8), logits), torch.tensor([4 / 9, 3 / 9, 2 / 9, 0]), 0.012)
    assert_close(frequencies(Sampling(min_p=0.7), logits), torch.tensor([4 / 7, 3 / 7, 0, 0]), 0.012)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0}, {"temperature": 0.0}, {"temperature": 1e-8}, {"temperature": 1e-4}, {"top_p": 0},
        {"top_p": 0.0}, {"top_k": 1}, {"min_p": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_ways_to_ask_for_the_most_probable_token(options: dict[str, Any]):
    model, prompt = tiny(dtype=torch.float64), random_tokens(2, 6)
    assert torch.equal(model.generate(prompt, 10, seed=0, **options), greedy(model, prompt, 10))


@pytest.mark.parametrize(
    "options", [{"top_k": V}, {"top_k": V + 1}, {"top_k": 10**9}, {"top_k": 0}, {"top_p": 1}, {"min_p": 0}], ids=str
)
def test_ways_to_exclude_nothing(options: dict[str, Any]):
    model, prompt = tiny(), random_tokens(2, 6)
    assert torch.equal(model.generate(prompt, 10, seed=0, **options), model.generate(prompt, 10, seed=0))


def finite(logits: Tensor) -> list[list[int]]:
    """Which tokens of each row are left."""
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_top_k_keeps_exactly_k():
    logits = torch.tensor([[1.0, 5.0, 3.0, 4.0], [2.0, 2.0, 2.0, 2.0]])
    kept = keep_top_k(logits, 2)
    assert finite(kept)[0] == [1, 3]
    assert len(finite(kept)[1]) == 2
    assert torch.equal(kept[0, [1, 3]], logits[0, [1, 3]])


@pytest.mark.parametrize(
    ("p", "kept"), [(0.0, [2]), (0.49, [2]), (0.51, [0, 2]), (0.79, [0, 2]), (0.81, [0, 2, 3]), (0.9999, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float, kept: list[int]):
    logits = torch.tensor([[0.3, 0.05, 0.5, 0.15]]).log()
    assert finite(keep_top_p(logits, p)) == [kept]


def test_top_p_of_a_tie_keeps_one():
    assert finite(keep_top_p(torch.zeros(1, 4), 0.0)) == [[0]]


def test_min_p_is_relative_to_the_largest():
    logits = torch.tensor([[0.5, 0.24, 0.16, 0.1], [0.25, 0.25, 0.25, 0.25]]).log()
    assert finite(keep_min_p(logits, 0.3)) == [[0, 1, 2], [0, 1, 2, 3]]
    assert finite(keep_min_p(logits, 1.0)) == [[0], [0, 1, 2, 3]]


def test_filters_apply_in_their_order():
    """Temperature first, then top-k, then top-p of what top-k left, then min-p."""
    probabilities = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    assert finite(Sampling(top_k=2, top_p=0.5).warp(probabilities.log())) == [[0]]  # 4/7 reaches one half
    assert finite(Sampling(top_p=0.5).warp(probabilities.log())) == [[0, 1]]
    assert finite(Sampling(temperature=0.25, top_p=0.7).warp(probabilities.log())) == [[0]]  # p^4: 0.72 alone
    assert finite(Sampling(temperature=4.0, min_p=0.7).warp(probabilities.log())) == [[0, 1, 2, 3]]
    assert finite(Sampling(min_p=0.7).warp(probabilities.log())) == [[0, 1]]


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.tensor([[2.0, -2.0, 0.0, 3.0]])
    seen = torch.tensor([[True, True, True, False]])
    assert penalise(logits, seen, 4.0).tolist() == [[0.5, -8.0, 0.0, 3.0]]


def test_the_repetition_penalty_counts_the_prompt_and_the_new_tokens_but_no_pads():
    model = tiny(dtype=torch.float64)
    tokens, mask = pad_prompts([[4, 8], [1, 2, 3, 4, 5]], pad_id=11)
    out = model.generate(tokens, 12, temperature=0, attention_mask=mask, repetition_penalty=1.7)
    for row, prompt in enumerate(([4, 8], [1, 2, 3, 4, 5])):
        ids = list(prompt)
        for _ in range(12):
            logits = logits_of(model, torch.tensor([ids]))[0, -1].detach()
            for token in set(ids):
                logits[token] = logits[token] / 1.7 if logits[token] > 0 else logits[token] * 1.7
            ids.append(int(logits.argmax()))
        assert out[row, 5:].tolist() == ids[len(prompt) :]
    assert not torch.equal(out, model.generate(tokens, 12, temperature=0, attention_mask=mask))


def test_a_huge_penalty_never_repeats():
    out = tiny().generate(random_tokens(2, 5), 20, temperature=0, repetition_penalty=1e30)
    for row in out.tolist():
        assert len(set(row[5:])) == 20
        assert not set(row[:5]) & set(row[5:])


def test_padded_vocabulary_is_never_sampled():
    model = tiny(n_layers=1, d_model=16, vocab_multiple=128)
    with torch.no_grad():
        model.head.weight[V:] += 10 * model.head.weight[:V].abs().max()  # tempting
    out = model.generate(random_tokens(1, 3), 10, temperature=5.0, num_samples=1000, seed=0)
    assert out.shape == (1000, 13)
    assert out.min() >= 0
    assert out.max() < V
    assert len(out[:, 3:].unique()) == V


# --- what bad input gets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be a finite number of at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_k": -1}, "top_k is -1; it must be a whole number of at least 0"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_k": True}, "top_k is True"),
        ({"top_p": 1.1}, "top_p is 1.1; it must be a number of at least 0 and at most 1"),
        ({"top_p": -0.1}, "top_p is -0.1"),
        ({"min_p": 1.1}, "min_p is 1.1; it must be a number of at least 0 and at most 1"),
        ({"min_p": None}, "min_p is None"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be a finite number above 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0"),
        ({"num_samples": 0}, "num_samples is 0; it must be a whole number of at least 1"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1; it must be a whole number of at least 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0"),
        ({"eos_token_id": V}, "eos_token_id is 97; it must be a whole number of at least 0 and at most 96"),
        ({"eos_token_id": [1, -1]}, "eos_token_id is -1"),
        ({"eos_token_id": [None]}, "eos_token_id is None"),
        ({"pad_token_id": 0.5}, "pad_token_id is 0.5"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask has shape \(2, 4\)"),
        ({"attention_mask": torch.tensor([[1] * 5, [0] * 5])}, "prompt 1 is all padding; a prompt needs at least one"),
        ({"tokens": torch.zeros(2, 0).long()}, r"tokens have shape \(2, 0\)"),
        ({"tokens": torch.zeros(0, 2).long()}, r"tokens have shape \(0, 2\)"),
        ({"tokens": torch.full((1, 2), V)}, "token id 97 is outside the vocabulary"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_options_are_refused_before_any_work(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
):
    model = tiny()
    calls = count_forwards(model, monkeypatch)
    with pytest.raises(ValueError, match=message):
        model.generate(**{"tokens": random_tokens(2, 5), "max_new_tokens": 3, **options})
    assert calls == []


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="max_tokens"):
        tiny().generate(random_tokens(1, 2), 3, max_tokens=4)


def test_long_generations_outgrow_the_first_buffers():
    model, prompt = tiny(dtype=torch.float64, n_layers=1, d_model=16), random_tokens(1, 3)
    assert_greedy(model, prompt[0], model.generate(prompt, 140, temperature=0)[0, 3:])
