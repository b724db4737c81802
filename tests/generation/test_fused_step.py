"""The fused decoding step against the model's own cached path: in Triton's interpreter, and on a GPU if there is one.

Blocks are made tiny in the interpreter, so that a few positions and rows meet every loop: several parts of the memory,
several blocks of each, programs that take turns.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LAYER_OPTIONS, random_tokens, relative_rms, tiny
from torch import Tensor

from recurformer import KVCache, LanguageModel, ModelConfig
from recurformer.generation.fused.make import make_step
from recurformer.generation.fused.tuning import Tuning
from recurformer.generation.state import DecodeState
from recurformer.hardware import step_obstacle

interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="needs Triton, and a machine without a GPU, where its interpreter takes the place of the compiler",
)
TINY = Tuning(thread_bytes=16, block=16, attention_warps=(1, 1), spread=1, parts=16, gathered=64, multiprocessors=1)
HYBRID: dict[str, Any] = {"layers": "first:1"}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def left_padded(batch: int, length: int) -> Tensor:
    """A mask (B, N) of prompts of different lengths, the longest without pads."""
    pads = torch.arange(batch) % max(1, min(4, length))
    return torch.arange(length) >= pads[:, None]


def compare(
    model: LanguageModel,
    limit: float,
    *,
    batch: int = 1,
    context: int = 5,
    steps: int = 3,
    padded: bool = False,
    defer: bool = True,
    dtype: torch.dtype = torch.float32,
    tuning: Tuning | None = TINY,
    graph: bool = False,
) -> None:
    """Logits of every step and all pairs at the end are the cached path's in float32, within `limit`, relative.

    Slots that the context does not fill hold NaN, as does what the step is to write.
    """
    config, device = model.config, model.embedding.weight.device
    tokens = random_tokens(batch, context + steps).to(device)
    mask = left_padded(batch, context).to(device) if padded else None
    cache = KVCache(config, batch, device=device)
    state = DecodeState.empty(config, batch, context + steps + 3, dtype, device, padded)
    with torch.no_grad():
        # From a filled cache on nothing is compiled anew, on a GPU, for this context alone.
        for part in (slice(0, min(1, context)), slice(1, context)):
            if part.start < part.stop:
                model(tokens[:, part], attention_mask=None if mask is None else mask[:, part], cache=cache)
        state.load(cache)
        for buffer in (state.keys, state.values):
            buffer[:, :, :, context:] = float("nan")
    step = make_step(model, state, defer=defer, tuning=tuning)

    def logits_now() -> Tensor:
        state.logits.fill_(float("nan"))
        if recorded is None:
            step()
        else:
            recorded.replay()
        return state.logits

    recorded = None
    if graph:
        side, recorded = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        state.tokens.copy_(tokens[:, context])
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            step()  # writes what the first replay writes again
        torch.cuda.synchronize()
        with torch.cuda.graph(recorded, stream=side):
            step()
    for i in range(context, context + steps):
        state.tokens.copy_(tokens[:, i])
        with torch.no_grad():
            expected = model(tokens[:, i : i + 1], cache=cache).logits
        assert expected is not None
        assert relative_rms(logits_now(), expected[:, 0]) <= limit, f"logits at slot {i}"
        state.advance()
    step.flush()
    end = context + steps
    real = cache.valid[:, None, :end, None]
    for layer in range(config.n_layers):
        for mine, theirs in zip((state.keys, state.values), cache.past(layer), strict=True):
            assert relative_rms(torch.where(real, mine[layer, :, :, :end], 0), torch.where(real, theirs, 0)) <= limit
        assert state.keys[layer, :, :, end:].isnan().all()  # nothing was written behind


# --- in the interpreter ----------------------------------------------------------------------------------------------


@interpreter
@pytest.mark.parametrize("options", LAYER_OPTIONS.values(), ids=LAYER_OPTIONS.keys())
def test_every_option(interpreted: None, options: dict[str, Any]) -> None:
    compare(tiny(**HYBRID, **options), 1e-4, context=3, steps=2)


@interpreter
@pytest.mark.parametrize("name", ["defaults", "rope-full-grouped", "swiglu-biases-layer", "no-qk-norm"])
def test_options_of_several_rows(interpreted: None, name: str) -> None:
    compare(tiny(**HYBRID, **LAYER_OPTIONS[name]), 1e-4, batch=2, context=3, steps=2)


@interpreter
@pytest.mark.parametrize("defer", [True, False], ids=["deferred", "at once"])
@pytest.mark.parametrize(
    ("layers", "batch"), [("recurrent", 1), ("standard", 1), (("standard", "recurrent"), 1), ("recurrent", 2)], ids=str
)
def test_every_kind(interpreted: None, layers: Any, batch: int, defer: bool) -> None:
    compare(tiny(layers=layers), 1e-4, batch=batch, context=2, defer=defer, steps=2)


@interpreter
@pytest.mark.parametrize(
    ("batch", "context", "padded"),
    [
        (1, 0, False), (1, 1, False), (1, 63, True), (1, 64, False), (1, 200, False), (2, 0, False), (3, 63, True),
        (17, 5, True), (33, 1, False),
    ],
)  # fmt: skip
def test_batches_and_contexts(interpreted: None, batch: int, context: int, padded: bool) -> None:
    model = tiny(d_model=8, n_heads=1, d_mlp=12, n_layers=1)
    compare(model, 1e-4, batch=batch, context=context, steps=2, padded=padded)


@interpreter
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"position": "rope", "qk_norm": "full", "n_kv_heads": 2},
        {"n_kv_heads": 1, "norm": "layer"},
        {"position": "none", "head_dim": 5, "n_heads": 3},
        {"d_model": 18, "n_heads": 3, "head_dim": 20, "d_mlp": 7, "activation": "swiglu"},
        {"tie_embeddings": True, "vocab_multiple": 64},
    ],
    ids=["rope, shared heads", "one key-value head", "width 5", "odd widths", "tied, padded vocabulary"],
)
def test_pads_and_odd_widths(interpreted: None, options: dict[str, Any], batch: int) -> None:
    compare(tiny(**HYBRID, **options), 1e-4, batch=batch, context=17, steps=2, padded=True)


@interpreter
@pytest.mark.parametrize("batch", [1, 3, 17])
def test_half_precision(interpreted: None, batch: int) -> None:
    """float16, for the interpreter multiplies bfloat16 matrices wrongly; the weights are cast from float32."""
    model = tiny(**HYBRID, norm="layer", qk_norm="full", n_kv_heads=2)
    compare(model, 2e-2, batch=batch, steps=2, dtype=torch.float16)


@interpreter
@pytest.mark.parametrize("batch", [1, 2])
def test_default_blocks(interpreted: None, batch: int) -> None:
    compare(tiny(**HYBRID), 1e-4, batch=batch, context=70, steps=2, tuning=None)


@interpreter
def test_steps_without_logits_and_roll_back(interpreted: None) -> None:
    """A step without logits leaves them; a state cut back goes on as if what was cut had never been."""
    model, context = tiny(**HYBRID), 4
    tokens = random_tokens(1, 9)
    cache = KVCache(model.config, 1)
    with torch.no_grad():
        model(tokens[:, :context], cache=cache)
    state = DecodeState.empty(model.config, 1, 16, torch.float32, "cpu")
    state.load(cache)
    step = make_step(model, state, defer=True, tuning=TINY)
    for token in (1, 2):
        state.tokens.fill_(token)
        step(logits=False)
        state.advance()
    assert not state.logits.any()
    state.place(context)  # without a flush
    for i in range(context, 7):
        state.tokens.copy_(tokens[:, i])
        step()
        state.advance()
        with torch.no_grad():
            expected = model(tokens[:, i : i + 1], cache=cache).logits
        assert relative_rms(state.logits, expected[:, 0]) <= 1e-4


@interpreter
def test_changed_weights_are_taken_over(interpreted: None) -> None:
    model = tiny(**HYBRID)
    state = DecodeState.empty(model.config, 2, 4, torch.float32, "cpu")
    step = make_step(model, state, tuning=TINY)
    step()
    before = state.logits.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        expected = model(state.tokens[:, None]).logits
    step.refresh()
    step()
    assert relative_rms(state.logits, expected[:, 0]) <= 1e-4
    assert relative_rms(before, expected[:, 0]) > 1e-2
    model.layers[0].o_proj.weight.data = model.layers[0].o_proj.weight.data.clone()  # pyright: ignore
    with pytest.raises(ValueError, match=r"layers\.0\.o has moved .* make a new engine"):
        step.refresh()


@interpreter
def test_equal_states_give_equal_bits(interpreted: None) -> None:
    model = tiny(**HYBRID)
    outcomes = []
    for _ in range(2):
        state = DecodeState.empty(model.config, 1, 40, torch.float32, "cpu")
        step = make_step(model, state, defer=True, tuning=TINY)
        for token in random_tokens(6):
            state.tokens.fill_(int(token))
            step()
            state.advance()
        outcomes.append(state.logits.clone())
    assert torch.equal(*outcomes)


# --- what can't run says so ------------------------------------------------------------------------------------------


def test_obstacles_name_what_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, config = torch.device("cpu"), ModelConfig()
    if importlib.util.find_spec("triton") is None:
        assert "triton is not installed" in str(step_obstacle(config, cpu, torch.float32, 1))
        return
    assert "the device is cpu" in str(step_obstacle(config, cpu, torch.float32, 1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert step_obstacle(config, cpu, torch.float32, 1) is None
    assert "float64" in str(step_obstacle(config, cpu, torch.float64, 1))
    assert "at most 256" not in str(step_obstacle(config, cpu, torch.float32, 1))
    wide = ModelConfig(d_model=8, n_heads=1, head_dim=300)
    reason = str(step_obstacle(wide, cpu, torch.float32, 1))
    assert "the head width is 300; it must be 1 to 256, the plain step runs anywhere" in reason
    state = DecodeState.empty(config, 1, 4, torch.float64, "cpu")
    with pytest.raises(ValueError, match=r"the fused step can't run: the compute dtype is torch\.float64"):
        make_step(LanguageModel(config), state)


# --- compiled for an H100, which need not be there -------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_stream_their_weights() -> None:
    """No spills; what no kernel of the step writes is asked for, 16 bytes at a time, before a kernel waits."""
    script = Path(__file__).with_name("compile_step.py")
    cases = ["300m-24:recurrent:1", "300m-6:recurrent:1", "300m-24:standard:64"]
    done = subprocess.run([sys.executable, script, *cases], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made: dict[str, dict[str, int]] = json.loads(done.stdout)
    assert {title.split()[1] for title in made} == {
        "embed", "normed_product", "attend", "residual_product", "remember", "add_and_norm", "activate",
    }  # fmt: skip
    for title, found in made.items():
        assert found["spills"] == 0, title
        if "product" in title:
            assert found["before"] >= 4, title
            assert found["narrow"] == 0, title
        elif "attend" in title:
            assert found["narrow"] <= 8, title  # one row's worth
            if found["before"] >= 0:
                assert found["before"] >= 4, title


# --- on a GPU --------------------------------------------------------------------------------------------------------

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

GPU_OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "official": {"norm": "layer", "qk_norm": "full", "residual_scale": "none"},
    "rope-grouped-biases": {"position": "rope", "n_kv_heads": 2, "attention_bias": True, "mlp_bias": True},
    "swiglu-full-tied": {"activation": "swiglu", "qk_norm": "full", "tie_embeddings": True, "position": "rope"},
    "odd-widths": {"d_model": 36, "n_heads": 3, "head_dim": 20, "d_mlp": 50, "qk_norm": "none"},
}


@pytest.mark.parametrize(("batch", "padded"), [(1, False), (1, True), (33, True)], ids=["1", "1, pads", "33, pads"])
@pytest.mark.parametrize("options", GPU_OPTIONS.values(), ids=GPU_OPTIONS.keys())
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
class TestOnAGPU:
    pytestmark = on_gpu

    def test_a_recorded_step(
        self, dtype: torch.dtype, limit: float, options: dict[str, Any], batch: int, padded: bool
    ) -> None:
        model = self.model(**options)
        compare(model, limit, batch=batch, context=200, padded=padded, dtype=dtype, tuning=None, graph=True)

    @staticmethod
    def model(**options: Any) -> LanguageModel:
        torch.manual_seed(0)
        config = ModelConfig(**{"vocab_size": 97, "d_model": 64, "n_layers": 2, "n_heads": 4, **HYBRID, **options})
        return LanguageModel(config).cuda().eval()


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", ["recurrent", "standard"])
@pytest.mark.parametrize("preset", ["300m-24", "300m-6"])
class TestPresetsOnAGPU:
    pytestmark = on_gpu

    def test_long_contexts(self, preset: str, kind: str, batch: int) -> None:
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = LanguageModel(ModelConfig.preset(preset, layers=kind)).eval()
        for context in (1, 1000, 3000):
            compare(model, 2e-2, batch=batch, context=context, dtype=torch.bfloat16, tuning=None, graph=batch == 1)
