"""The decode engine makes the logits of full forwards, whatever its buffers have been through."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import LAYER_OPTIONS, V, assert_close, layer_of, logits_of, random_tokens, relative_rms, tiny
from torch import Tensor

from recurformer import KVCache, LanguageModel, ModelConfig
from recurformer.choose import choose_step
from recurformer.generation import engine, prompt
from recurformer.generation.engine import DecodeEngine
from recurformer.generation.engine import engine_obstacle as obstacle
from recurformer.generation.prompt import read_prompt, reads_by_steps
from recurformer.generation.state import DecodeState

KINDS: dict[str, dict[str, Any]] = {
    "recurrent": {},
    "standard": {"layers": "standard", "n_kv_heads": 1},
    "hybrid": {"layers": ("standard", "recurrent", "standard"), "n_layers": 3, "position": "rope"},
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
every_option = pytest.mark.parametrize("option", LAYER_OPTIONS.values(), ids=LAYER_OPTIONS.keys())


def exact(**options: Any) -> LanguageModel:
    return tiny(dtype=torch.float64, **options)


def full(model: LanguageModel, tokens: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return logits_of(model, tokens, **options)


def stepped(made: DecodeEngine, tokens: Tensor) -> Tensor:
    """Logits (B, n, V) of tokens (B, n) fed one by one."""
    return torch.stack([made.step(column).clone() for column in tokens.t()], dim=1)


def by_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let prompts go through the step, as the fused one's do."""
    monkeypatch.setattr(engine, "reads_by_steps", lambda *_: (True, "a test"))


# --- a step is a forward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["recurrent", "standard"])
@every_option
def test_steps_equal_the_full_forward_with_every_option(option: dict[str, Any], layers: str):
    model, tokens = exact(layers=layers, **option), random_tokens(2, 20)
    made = DecodeEngine(model, 2)
    first = made.prefill(tokens[:, :6]).clone()
    found = torch.cat([first[:, None], stepped(made, tokens[:, 6:])], dim=1)
    assert_close(found, full(model, tokens)[:, 5:])


@every_kind
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 31, 64])
def test_from_nothing_and_bit_for_bit_again(length: int, kind: dict[str, Any]):
    model, tokens = tiny(**kind), random_tokens(2, length)
    made = DecodeEngine(model, 2)
    found = stepped(made, tokens)
    assert_close(found, full(model, tokens))
    assert (made.length, int(made.state.slot)) == (length, length)
    assert made.state.positions.tolist() == [length, length]
    assert torch.equal(stepped(DecodeEngine(model, 2), tokens), found)
    made.reset()
    assert torch.equal(stepped(made, tokens), found)


@pytest.mark.parametrize("options", [{"tie_embeddings": True}, {"vocab_multiple": 64}], ids=str)
def test_the_output_layer(options: dict[str, Any]):
    model, tokens = exact(**options), random_tokens(1, 9)
    found = stepped(DecodeEngine(model, 1), tokens)
    assert found.shape[-1] == V
    assert_close(found, full(model, tokens))


def test_decoding_sees_the_slopes():
    model, flat, tokens = exact(), exact(position="none"), random_tokens(1, 12)
    flat.load_state_dict(model.state_dict())
    made, other = DecodeEngine(model, 1), DecodeEngine(flat, 1)
    made.prefill(tokens[:, :8])
    cache = made.cache().clone()
    cache.config = flat.config
    other.load(cache)  # the same pairs, so that this step alone differs
    assert (made.step(tokens[:, 8]) - other.step(tokens[:, 8])).abs().max() > 1e-3


def test_low_precision_does_not_drift():
    """bfloat16 over 600 steps: the error against float64 is that of a bfloat16 forward and does not grow."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=V, d_model=64, n_layers=2, n_heads=4)).eval()
    tokens = random_tokens(1, 600)
    expected = full(copy.deepcopy(model).double(), tokens)
    low = copy.deepcopy(model).bfloat16()
    found, forward = stepped(DecodeEngine(low, 1), tokens).double(), full(low, tokens).double()
    early, late = (relative_rms(found[:, part], expected[:, part]) for part in (slice(0, 100), slice(500, 600)))
    assert early <= 2e-2
    assert late <= 2e-2
    assert relative_rms(found, expected) <= 1.2 * relative_rms(forward, expected)


def test_autocast_decides_the_dtype_and_the_weights_stay():
    model, tokens = tiny(), random_tokens(2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        made = DecodeEngine(model, 2)
        found = stepped(made, tokens)
        expected = full(model, tokens)
    assert (made.dtype, found.dtype, expected.dtype) == (torch.bfloat16,) * 3
    assert relative_rms(found.float(), expected.float()) <= 2e-2
    assert DecodeEngine(model, 2).dtype == model.embedding.weight.dtype == torch.float32


# --- prompts ---------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("chunk", [1, 3, 4, 11, 12, 50])
def test_a_prompt_in_chunks_is_a_prompt(chunk: int, kind: dict[str, Any]):
    model, tokens = exact(**kind), random_tokens(2, 12)
    made = DecodeEngine(model, 2)
    assert_close(made.prefill(tokens, chunk=chunk), full(model, tokens)[:, -1])
    assert_same(made, whole(model, tokens))


def whole(model: LanguageModel, tokens: Tensor, mask: Tensor | None = None) -> KVCache:
    """The cache of one forward over everything."""
    with torch.no_grad():
        cache = model(tokens, attention_mask=mask, use_cache=True).cache
    assert cache is not None
    return cache


def assert_same(made: DecodeEngine, cache: KVCache) -> None:
    mine = made.cache()
    assert mine.length == cache.length
    assert torch.equal(mine.valid[:, : mine.length], cache.valid[:, : mine.length])
    real = mine.valid[:, None, : mine.length, None]
    for layer in range(len(mine.keys)):
        for a, b in zip(mine.past(layer), cache.past(layer), strict=True):
            assert_close(a * real, b * real)


@every_kind
def test_prompts_after_tokens_after_prompts(kind: dict[str, Any]):
    model, tokens = exact(**kind), random_tokens(2, 20)
    made = DecodeEngine(model, 2, 4)
    made.prefill(tokens[:, :5])
    stepped(made, tokens[:, 5:9])
    assert_close(made.prefill(tokens[:, 9:16]), full(model, tokens[:, :16])[:, -1])
    assert_close(stepped(made, tokens[:, 16:]), full(model, tokens)[:, 16:])


SIDES = {
    "left": [[False] * 6 + [True], [False] * 3 + [True] * 4, [True] * 7],
    "right": [[True] + [False] * 6, [True] * 4 + [False] * 3, [True] * 7],
    "interior": [[True, False] * 3 + [True], [False, True, True, False, False, True, False], [True] * 7],
}


@pytest.mark.parametrize("chunk", [None, 2])
@every_kind
@pytest.mark.parametrize("side", SIDES)
def test_ragged_prompts_continue_as_each_alone(side: str, kind: dict[str, Any], chunk: int | None):
    model, mask = exact(**kind), torch.tensor(SIDES[side])
    tokens, more = random_tokens(3, 7), random_tokens(3, 8, seed=5)
    made = DecodeEngine(model, 3, 4)
    found = torch.cat([made.prefill(tokens, mask, chunk=chunk)[:, None].clone(), stepped(made, more)], dim=1)
    assert_same_rows(model, tokens, mask, more, found)


def assert_same_rows(model: LanguageModel, tokens: Tensor, mask: Tensor, more: Tensor, found: Tensor) -> None:
    for row, real in enumerate(mask):
        alone = torch.cat([tokens[row, real], more[row]])[None]
        assert_close(found[row], full(model, alone)[0, int(real.sum()) - 1 :])


@every_kind
def test_left_padded_prompts_token_by_token(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    by_steps(monkeypatch)
    model, mask = exact(**kind), torch.tensor(SIDES["left"])
    tokens, more = random_tokens(3, 7).where(mask, 50), random_tokens(3, 8, seed=5)
    with torch.no_grad():
        model.embedding.weight[50] = float("nan")  # of what stands at pads
    calls: list[int] = []
    monkeypatch.setattr(engine, "read_prompt", lambda *_: calls.append(1))
    made = DecodeEngine(model, 3, 4)
    more = more.where(more != 50, 51)
    tokens = tokens.where((tokens != 50) | ~mask, 51)
    found = torch.cat([made.prefill(tokens, mask)[:, None].clone(), stepped(made, more)], dim=1)
    assert_same_rows(model, tokens, mask, more, found)
    assert calls == []


@pytest.mark.parametrize("way", ["scan", "steps"])
@every_kind
def test_what_stands_at_pads_is_never_seen(kind: dict[str, Any], way: str, monkeypatch: pytest.MonkeyPatch):
    if way == "steps":
        by_steps(monkeypatch)
    model, mask = tiny(**kind), torch.tensor(SIDES["left"])
    found = []
    for pad in (0, 96, -1):
        made = DecodeEngine(model, 3)
        made.prefill(random_tokens(3, 7).masked_fill(~mask, pad), mask)
        found.append(stepped(made, random_tokens(3, 8, seed=5)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_later_prompt_may_have_pads():
    model, tokens = exact(), random_tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 5:8] = False
    made = DecodeEngine(model, 2, 4)
    made.prefill(tokens[:, :5])
    assert made.state.valid is None
    made.prefill(tokens[:, 5:], mask[:, 5:])
    assert_same(made, whole(model, tokens, mask))
    more = random_tokens(2, 3, seed=4)
    assert_same_rows(model, tokens, mask, more, torch.cat([made.state.logits[:, None].clone(), stepped(made, more)], 1))


@pytest.mark.parametrize("way", ["scan", "steps"])
@pytest.mark.parametrize("padded", [False, True])
@every_kind
def test_a_fork_into_samples(kind: dict[str, Any], padded: bool, way: str, monkeypatch: pytest.MonkeyPatch):
    if way == "steps":
        by_steps(monkeypatch)
    model, tokens = exact(**kind), random_tokens(2, 7)
    mask = torch.tensor(SIDES["left"])[:2] if padded else torch.ones(2, 7, dtype=torch.bool)
    made = DecodeEngine(model, 6, 2)
    more = random_tokens(6, 5, seed=9)
    first = made.prefill(tokens, mask, samples=3)[:, None].clone()
    assert_same_rows(
        model, tokens.repeat_interleave(3, 0), mask.repeat_interleave(3, 0), more,
        torch.cat([first, stepped(made, more)], 1),
    )  # fmt: skip


def test_chunks_of_a_prompt_bound_memory(monkeypatch: pytest.MonkeyPatch):
    wide, nano = ModelConfig.preset("300m-6"), ModelConfig.preset("nano", layers="first:1")
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert prompt.chunk_length(wide, cuda, 4) == prompt.CHUNK_TOKENS // 4
    assert prompt.chunk_length(wide, cuda, 10**6) == prompt.SHORTEST
    assert prompt.chunk_length(wide, cpu, 1) == prompt.CHUNK_ELEMENTS // wide.mlp_width == 512
    assert prompt.chunk_length(nano, cpu, 2) == 4096
    lengths: list[int] = []
    model, tokens = tiny(), random_tokens(2, 11)
    hidden = model.hidden

    def counted(tokens: Tensor, *args: Any, **options: Any) -> Tensor:
        lengths.append(tokens.shape[1])
        return hidden(tokens, *args, **options)

    monkeypatch.setattr(model, "hidden", counted)
    with torch.no_grad():
        x = read_prompt(model, KVCache(model.config, 2), tokens, None, 4)
    assert lengths == [4, 4, 3]
    assert x.shape == (2, 32)


def test_the_rule_for_reading_by_steps():
    model = tiny(scan="auto")
    assert reads_by_steps(model, "fused", 4, 256)[0]
    for step, rows, length, other in (
        ("plain", 1, 9, model),
        ("fused", 5, 9, model),
        ("fused", 1, 257, model),
        ("fused", 1, 9, tiny(scan="auto", layers="first:1")),
        ("fused", 1, 9, tiny(scan="tiled")),
    ):
        verdict, why = reads_by_steps(other, step, rows, length)
        assert not verdict
        assert why


# --- buffers ---------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("padded", [False, True])
def test_growth_loses_nothing(padded: bool, kind: dict[str, Any], poisoned_memory: None):
    model, tokens = tiny(**kind), random_tokens(2, 40)
    mask = torch.tensor([[False, False, True], [True, True, True]]) if padded else None
    found, capacities = [], []
    for capacity in (1, 3, 64):
        made = DecodeEngine(model, 2, capacity)
        first = made.prefill(tokens[:, :3], mask).clone()
        found.append(torch.cat([first[:, None], stepped(made, tokens[:, 3:])], dim=1))
        capacities.append(made.capacity)
    assert capacities == [64, 48, 64]
    assert torch.isfinite(found[0]).all()
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])


@every_kind
@pytest.mark.parametrize("kept", [0, 3, 8, 9, 11, 12])
def test_cropping_equals_a_fresh_run_on_what_was_kept(kept: int, kind: dict[str, Any]):
    model, tokens, other = exact(**kind), random_tokens(2, 12), random_tokens(2, 5, seed=7)
    made = DecodeEngine(model, 2, 4)
    made.prefill(tokens[:, :8])
    stepped(made, tokens[:, 8:])
    made.crop(kept)
    assert (made.length, int(made.state.slot)) == (kept, kept)
    assert_close(stepped(made, other), full(model, torch.cat([tokens[:, :kept], other], 1))[:, kept:])


def test_cropping_forgets_the_mask_of_what_was_dropped_and_keeps_the_rest():
    model, tokens = exact(), random_tokens(2, 7)
    mask = torch.tensor([[False, True, True, False, False, True, True], [True] * 7])
    more = random_tokens(2, 4, seed=3)
    made = DecodeEngine(model, 2)
    made.prefill(tokens, mask)
    made.crop(4)
    found = stepped(made, more)
    for row in range(2):
        alone = torch.cat([tokens[row, :4][mask[row, :4]], more[row]])[None]
        assert_close(found[row], full(model, alone)[0, -4:])
    for n in (-1, 9):
        with pytest.raises(ValueError, match=f"can't crop to {n} slots; the engine holds 8"):
            made.crop(n)


@every_kind
def test_forks_and_selected_rows_are_independent(kind: dict[str, Any]):
    model, tokens = exact(**kind), random_tokens(3, 9)
    mask = torch.tensor(SIDES["left"])
    made = DecodeEngine(model, 3, 4)
    made.prefill(tokens[:, :7], mask)
    fork, chosen = made.clone(), made.select([2, 0, 0, 1])
    assert torch.equal(fork.state.logits, made.state.logits)
    assert torch.equal(chosen.state.logits, made.state.logits[[2, 0, 0, 1]])
    a = stepped(made, tokens[:, 7:])
    b = stepped(fork, random_tokens(3, 2, seed=6))
    c = stepped(chosen, random_tokens(4, 2, seed=7))
    assert_same_rows(model, tokens[:, :7], mask, tokens[:, 7:], torch.cat([made_first(model, tokens, mask), a], 1))
    assert_same_rows(
        model, tokens[:, :7], mask, random_tokens(3, 2, seed=6), torch.cat([made_first(model, tokens, mask), b], 1)
    )
    rows = [2, 0, 0, 1]
    first = made_first(model, tokens, mask)[rows]
    assert_same_rows(model, tokens[rows, :7], mask[rows], random_tokens(4, 2, seed=7), torch.cat([first, c], 1))
    with pytest.raises(ValueError, match="reach outside the engine's 3 rows"):
        made.select([3])
    nothings: list[Any] = [[], [[0]], [0.5]]
    for nothing in nothings:
        with pytest.raises(ValueError, match="non-empty list of row numbers"):
            made.select(nothing)


def made_first(model: LanguageModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """Logits (B, 1, V) after each prompt, by full forwards of each row alone."""
    return torch.stack([full(model, t[:7][m][None])[0, -1:] for t, m in zip(tokens, mask, strict=True)])


# --- the public cache ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@every_kind
def test_the_engine_and_the_cache_hold_the_same(kind: dict[str, Any], padded: bool):
    model, tokens = exact(**kind), random_tokens(3, 12)
    mask = torch.tensor(SIDES["left"]) if padded else None
    made = DecodeEngine(model, 3, 4)
    made.prefill(tokens[:, :7], mask)
    view = made.cache()
    assert view.keys[0].data_ptr() == made.state.keys[0].data_ptr()
    assert (view.capacity, view.padded) == (made.capacity, padded)
    kept = view.clone()
    after = stepped(made, tokens[:, 7:])
    assert_close(full(model, tokens[:, 7:], cache=kept), after)  # the model continues what the engine began

    cache = whole(model, tokens[:, :7], mask)
    other = DecodeEngine(model, 3, 2)
    other.load(cache)  # and the engine what the model began
    assert_close(stepped(other, tokens[:, 7:]), after)
    other = DecodeEngine(model, 2, 2)
    other.load(cache, [2, 0])
    assert_close(stepped(other, tokens[[2, 0], 7:]), after[[2, 0]])
    assert cache.length == 7


def test_a_cache_that_does_not_fit_is_refused():
    made = DecodeEngine(tiny(), 2)
    with pytest.raises(ValueError, match="the cache has 3 rows"):
        made.load(KVCache(made.config, 3))
    with pytest.raises(ValueError, match="another model"):
        made.load(KVCache(tiny(n_layers=1).config, 2))
    for rows in ([0], [0, 3], [-1, 0]):
        with pytest.raises(ValueError, match="give 2 numbers from 0 to 2"):
            made.load(KVCache(made.config, 3), rows)


def test_the_state_is_what_the_steps_agreed_on():
    config = tiny(n_kv_heads=2).config
    state = DecodeState.empty(config, 3, 10, torch.bfloat16, "cpu", padded=True)
    assert state.keys.shape == state.values.shape == (2, 3, 2, 10, 8)
    assert (state.keys.dtype, state.logits.dtype, state.logits.shape) == (torch.bfloat16, torch.bfloat16, (3, V))
    assert state.valid is not None
    assert state.key_positions is not None
    state.valid[0, 1:3] = False
    state.place(4)
    assert state.key_positions[0].tolist() == [0, 1, 1, 1, 2, 3, 4, 5, 6, 7]
    assert (state.slot.tolist(), state.slot.shape, state.positions.tolist()) == (4, (), [2, 4, 4])
    before = {name: tensor.data_ptr() for name, tensor in vars(state).items()}
    for _ in range(6):
        state.advance()
    assert (state.slot.tolist(), state.positions.tolist()) == (10, [7, 9, 9])  # full: the last slot's, unused
    assert {name: tensor.data_ptr() for name, tensor in vars(state).items()} == before
    assert {name: str(t.dtype) for name, t in vars(state).items() if "int" in str(t.dtype)} == {
        "tokens": "torch.int64", "slot": "torch.int32", "positions": "torch.int32", "key_positions": "torch.int32",
    }  # fmt: skip
    assert state.nbytes == 2 * 3 * 10 * config.kv_bytes_per_token(2) // 2


def test_bytes_of_a_token_follow_depth_and_width():
    """The paper's shapes at 16 bits: half and 0.69 of the deep Transformer's cache."""
    deep = ModelConfig.preset("300m-24", layers="standard").kv_bytes_per_token(2)
    assert deep == 2 * 24 * 1024 * 2
    assert ModelConfig.preset("300m-6").kv_bytes_per_token(2) / deep == 0.5
    assert ModelConfig.preset("300m-12").kv_bytes_per_token(2) / deep == 0.6875  # 0.69
    for name in ("300m-6", "300m-12", "300m-24"):
        config = ModelConfig.preset(name)
        state = DecodeState.empty(config, 2, 5, torch.bfloat16, "meta")
        assert state.nbytes == 2 * 5 * config.kv_bytes_per_token(2)


# --- what can't be ---------------------------------------------------------------------------------------------------


def test_what_is_refused():
    model = tiny()
    for sizes, message in (((0, 4), "batch_size is 0"), ((1, 0), "capacity is 0")):
        with pytest.raises(ValueError, match=message):
            DecodeEngine(model, *sizes)
    with pytest.raises(ValueError, match="step is 'fast'; choose one of 'auto', 'plain', 'fused'"):
        DecodeEngine(model, 1, step="fast")
    made = DecodeEngine(model, 2, step="plain")
    with pytest.raises(ValueError, match="the engine has 2 rows"):
        made.prefill(random_tokens(3, 4))
    with pytest.raises(ValueError, match="valid has shape"):
        made.prefill(random_tokens(2, 4), torch.ones(2, 3, dtype=torch.bool))
    made.prefill(random_tokens(2, 4))
    with pytest.raises(ValueError, match="4 slots are filled"):
        made.prefill(random_tokens(1, 4), samples=2)


def test_the_choice_of_a_step():
    config, cpu = tiny().config, torch.device("cpu")
    name, why = choose_step("plain", config, cpu, torch.float32, 1)
    assert (name, why) == ("plain", "as requested")
    if "fused" not in choose_step("auto", config, torch.device("cuda"), torch.float64, 1)[0]:
        with pytest.raises(ValueError, match="step is 'fused', which can't run: "):
            choose_step("fused", config, torch.device("cuda"), torch.float64, 1)
    assert choose_step("auto", config, cpu, torch.float32, 1)[0] == "plain"


def test_a_model_that_is_more_than_its_layers_is_left_to_itself(monkeypatch: pytest.MonkeyPatch):
    model = tiny()
    assert obstacle(model) is None
    hook = layer_of(model, 1).register_forward_hook(lambda *_: None)
    assert "layer 1" in (obstacle(model) or "")
    with pytest.raises(ValueError, match="layer 1 is more than a layer"):
        DecodeEngine(model, 1)
    hook.remove()
    assert obstacle(model) is None
    monkeypatch.setattr(model, "logits", lambda x: x)
    assert "step='model'" in (obstacle(model) or "")


def test_an_engine_serves_while_the_weights_are_what_they_were():
    model = tiny()
    made = DecodeEngine(model, 2)
    assert made.serves(model, 2, "auto")
    assert not made.serves(model, 3, "auto")
    assert not made.serves(model, 2, "plain")
    assert not made.serves(tiny(), 2, "auto")
    with torch.autocast("cpu", torch.bfloat16):
        assert not made.serves(model, 2, "auto")
    with torch.no_grad():
        layer_of(model, 0).q_proj.weight.mul_(2)
    assert not made.serves(model, 2, "auto")


def test_copies_of_a_model_have_no_engine():
    model = tiny()
    model.kept_engine = DecodeEngine(model, 1)
    assert copy.deepcopy(model).kept_engine is None
    assert pickle.loads(pickle.dumps(model)).kept_engine is None
    assert model.state_dict().keys() == tiny().state_dict().keys()
