"""On an NVIDIA GPU: a recorded step is the step, every option once; generation as on the CPU."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from helpers import LAYER_OPTIONS, relative_rms, tiny

from recurformer import KVCache, LanguageModel, ModelConfig
from recurformer.choose import choose_step
from recurformer.generation.engine import DecodeEngine
from recurformer.generation.plain_step import PlainStep
from recurformer.generation.rows import LOOK_EVERY
from recurformer.hardware import step_obstacle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

KINDS = {"recurrent": "recurrent", "standard": "standard", "hybrid": "first:1"}
every_kind = pytest.mark.parametrize("layers", KINDS.values(), ids=KINDS.keys())
every_step = pytest.mark.parametrize("step", ["plain", "fused"])


def possible(step: str, config: ModelConfig, dtype: torch.dtype, rows: int) -> None:
    """Skip where the fused step can't run."""
    if step == "fused" and (reason := step_obstacle(config, torch.device("cuda"), dtype, rows)):
        pytest.skip(reason)


def stepped(made: DecodeEngine, tokens: torch.Tensor) -> torch.Tensor:
    return torch.stack([made.step(column).clone() for column in tokens.t()], dim=1)


def case(rows: int, length: int, padded: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens, and a mask of their left half: pads on the left of all rows but the last."""
    tokens = torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(length // 2) >= torch.arange(rows).flip(0)[:, None]
    return tokens.cuda(), mask.cuda() if padded else None


# The fused step meets every option in tests of its own.
CASES = [("plain", name) for name in LAYER_OPTIONS]
CASES += [("fused", name) for name in ("defaults", "rope-full-grouped", "layer-norm-full", "swiglu-biases-layer")]


@pytest.mark.parametrize(("bf16", "padded"), [(False, False), (True, True)], ids=["fp32", "bf16-pads"])
@pytest.mark.parametrize("layers", ["recurrent", "standard"])
@pytest.mark.parametrize(("step", "option"), CASES)
def test_recorded_steps_equal_the_model(step: str, option: str, layers: str, padded: bool, bf16: bool) -> None:
    """Against float64 on the CPU: prompt through the scan, then steps, over a growth of the buffers."""
    model = tiny(layers=layers, **LAYER_OPTIONS[option])
    model.scan = "auto"
    dtype = torch.bfloat16 if bf16 else torch.float32
    possible(step, model.config, dtype, 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # 0.3 makes bf16 chaotic over 30 recurrent steps
            parameter.copy_(1 + (parameter - 1) / 3 if "norm" in name else parameter / 2)
    tokens, mask = case(3, 40, padded)
    whole = None if mask is None else torch.cat([mask, torch.ones(3, 20, device="cuda", dtype=torch.bool)], 1).cpu()
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(tokens.cpu(), attention_mask=whole).logits[:, 19:]
        own = model.to("cuda", dtype)(tokens, attention_mask=None if whole is None else whole.cuda()).logits[:, 19:]
    made = DecodeEngine(model, 3, 24, step=step)
    first = made.prefill(tokens[:, :20], mask).clone()
    found = torch.cat([first[:, None], stepped(made, tokens[:, 20:])], dim=1)
    assert made.capacity == 48
    error, known = relative_rms(found.cpu(), expected), relative_rms(own.cpu(), expected)
    assert error <= (max(2e-2, 1.5 * known) if bf16 else 1e-4), f"off by {error:.2g}, the model by {known:.2g}"


@every_step
@every_kind
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_a_recorded_step_is_the_same_step_run_eagerly(rows: int, layers: str, step: str) -> None:
    model = tiny(layers=layers).cuda()
    possible(step, model.config, torch.float32, rows)
    tokens, _ = case(rows, 30, False)
    recorded, eager = DecodeEngine(model, rows, 64, step=step), DecodeEngine(model, rows, 64, step=step)
    for column in tokens.t():
        found = recorded.step(column)
        eager.state.tokens.copy_(column)
        eager._set_visible()
        eager._step(True)
        eager.state.advance()
        eager.length += 1
        assert relative_rms(found, eager.state.logits) <= 1e-5
    one, other = recorded.cache(), eager.cache()
    for layer in range(2):
        for a, b in zip(one.past(layer), other.past(layer), strict=True):
            assert relative_rms(a, b) <= 1e-5


@every_step
def test_two_runs_are_bit_identical(step: str) -> None:
    model = tiny().cuda()
    possible(step, model.config, torch.float32, 2)
    tokens, _ = case(2, 20, False)
    first, second = (stepped(DecodeEngine(model, 2, step=step), tokens) for _ in range(2))
    assert torch.equal(first, second)


def test_the_plain_step_records_a_graph_a_doubling() -> None:
    model = tiny(layers="first:1").cuda()
    made = DecodeEngine(model, 1, 2048, step="plain")
    for column in case(1, 1100, False)[0].t():
        made.step(column)
    assert sorted(visible for _, visible in made.graphs) == [256, 512, 1024, 2048]
    assert isinstance(made._step, PlainStep)


@every_step
@every_kind
def test_crop_clone_select_and_the_cache(layers: str, step: str) -> None:
    model = tiny(layers=layers).cuda()
    possible(step, model.config, torch.float32, 2)
    tokens, _ = case(2, 24, False)
    with torch.no_grad():
        full = model(tokens).logits
    made = DecodeEngine(model, 2, 8, step=step)
    stepped(made, tokens[:, :16])
    fork, swapped = made.clone(), made.select([1, 0])
    kept = made.cache().clone()
    assert relative_rms(stepped(made, tokens[:, 16:]), full[:, 16:]) <= 1e-4
    assert relative_rms(stepped(fork, tokens[:, 16:]), full[:, 16:]) <= 1e-4
    assert relative_rms(stepped(swapped, tokens.flip(0)[:, 16:]), full.flip(0)[:, 16:]) <= 1e-4
    made.crop(9)
    assert relative_rms(stepped(made, tokens[:, 9:]), full[:, 9:]) <= 1e-4
    with torch.no_grad():
        assert relative_rms(model(tokens[:, 16:], cache=kept).logits, full[:, 16:]) <= 1e-4
    loaded = DecodeEngine(model, 2, 8, step=step)
    cache = KVCache(model.config, 2, device="cuda")
    with torch.no_grad():
        model(tokens[:, :16], cache=cache)
    loaded.load(cache)
    assert relative_rms(stepped(loaded, tokens[:, 16:]), full[:, 16:]) <= 1e-4


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "pads"])
@pytest.mark.parametrize("samples", [1, 2])
def test_a_prompt_read_by_steps_is_the_prompt(samples: int, padded: bool) -> None:
    model = tiny().cuda()
    model.scan = "auto"
    possible("fused", model.config, torch.float32, 2 * samples)
    tokens, mask = case(2, 24, padded)
    made, other = DecodeEngine(model, 2 * samples, 8), DecodeEngine(model, 2 * samples, 8, step="plain")
    prompts, valid = tokens[:, :12], mask
    assert made.step_name == "fused"
    first = made.prefill(prompts, valid, samples=samples).clone()
    assert relative_rms(first, other.prefill(prompts, valid, samples=samples)) <= 1e-4
    more = tokens[:, 12:].repeat_interleave(samples, 0)
    assert relative_rms(stepped(made, more), stepped(other, more)) <= 1e-4


@every_kind
def test_greedy_tokens_agree_with_hugging_face_and_with_a_forward_a_token(layers: str) -> None:
    pytest.importorskip("transformers")
    from recurformer.hf import RecurformerForCausalLM

    model = tiny(layers=layers).cuda()
    model.scan = "auto"
    tokens = torch.randint(0, 97, (2, 7), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, :4] = False
    ours = model.generate(tokens, 200, attention_mask=mask, temperature=0)
    wrapped: Any = RecurformerForCausalLM.from_model(model)
    theirs = wrapped.generate(tokens, attention_mask=mask, max_new_tokens=200, do_sample=False, pad_token_id=0)
    assert torch.equal(ours, theirs)
    for row, start in ((0, 4), (1, 0)):
        with torch.no_grad():
            best = model(ours[row : row + 1, start:]).logits[0].argmax(-1)
        assert torch.equal(best[6 - start : -1], ours[row, 7:])


def test_generation_waits_for_the_gpu_only_to_look_at_ends() -> None:
    model = tiny().cuda()
    model.scan = "auto"
    prompt = torch.randint(0, 97, (2, 5), device="cuda")

    def waits(count: int, **options: Any) -> int:
        model.generate(prompt, count, seed=0, **options)  # kernels, graphs
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # which warns that it is a prototype
            try:
                model.generate(prompt, count, seed=0, **options)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(warning.message) for warning in seen)

    free = waits(64)
    assert waits(128) == free  # none of them is a token's
    looks = 128 // LOOK_EVERY["cuda"]
    assert waits(128, eos_token_id=96, pad_token_id=0) <= free + looks + 2


def test_ends_are_those_of_the_cpu() -> None:
    model = tiny()
    model.scan = "auto"
    prompt = torch.randint(0, 97, (3, 5), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"temperature": 0, "eos_token_id": list(range(10)), "pad_token_id": -1}
    expected = model.generate(prompt, 100, **options)
    found = model.cuda().generate(prompt.cuda(), 100, **options)
    assert torch.equal(found.cpu(), expected)


def test_a_model_keeps_its_engine_while_the_weights_stay() -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=97, d_model=48, n_layers=2)).cuda()
    prompt = torch.randint(0, 97, (2, 5), device="cuda")
    first = model.generate(prompt, 12, seed=3)
    kept = model.kept_engine
    assert torch.equal(model.generate(prompt, 12, seed=3), first)
    assert model.kept_engine is kept
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    changed = model.generate(prompt, 12, seed=3)
    assert model.kept_engine is not kept
    assert torch.equal(changed, copy.deepcopy(model).generate(prompt, 12, seed=3))


def test_the_choice_on_this_gpu() -> None:
    config = ModelConfig.preset("300m-6")
    name, why = choose_step("auto", config, torch.device("cuda"), torch.bfloat16, 1)
    reason = step_obstacle(config, torch.device("cuda"), torch.bfloat16, 1)
    assert name == ("fused" if reason is None else "plain")
    assert reason is None or reason in why
