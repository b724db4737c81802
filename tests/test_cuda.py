"""The same answers on an NVIDIA GPU as the definition gives on the CPU in float64: every scan, decoding, bf16."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import relative_rms

from recurformer import LanguageModel, ModelConfig
from recurformer.scan import SCANS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

OPTIONS = {
    "alibi": {},
    "rope-gqa": {"position": "rope", "n_kv_heads": 2},
    "official": {"norm": "layer", "qk_norm": "full", "residual_scale": "none"},
    "swiglu-hybrid": {"activation": "swiglu", "layers": "first:1"},
    "width-12": {"head_dim": 12, "n_heads": 3},
}


def loss_and_gradients(
    model: LanguageModel, tokens: torch.Tensor, bf16: bool = False, mask: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
        out = model(tokens, targets=tokens.roll(-1, 1), attention_mask=mask)
    assert out.loss is not None
    out.loss.backward()
    found = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach().double().cpu(), **found}


def rms(t: torch.Tensor) -> float:
    return t.square().mean().sqrt().item()


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "pads"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("length", [1, 7, 100])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("scan", SCANS)
def test_outputs_and_gradients_match_the_definition(
    scan: str, options: dict, length: int, bf16: bool, masked: bool
) -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**{"vocab_size": 97, "d_model": 48, "n_layers": 2, "n_heads": 4, **options}))
    tokens = torch.randint(0, 97, (3, length))
    mask = torch.rand(3, length) > 0.3 if masked else None
    model.scan = "reference"
    expected = loss_and_gradients(copy.deepcopy(model).double(), tokens, mask=mask)
    on_gpu = None if mask is None else mask.cuda()
    as_defined = loss_and_gradients(model.cuda(), tokens.cuda(), bf16, on_gpu)
    model.scan = scan
    found = loss_and_gradients(model, tokens.cuda(), bf16, on_gpu)

    real = torch.ones(3, length, dtype=torch.bool) if mask is None else mask
    for outcome in (expected, as_defined, found):
        outcome["logits"] = outcome["logits"][real]
    # A gradient that vanishes (one position has one key) has no relative error: hold it against the largest.
    floor = 1e-2 * max(rms(value) for name, value in expected.items() if name != "logits")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.isfinite().all(), name
        scale = rms(expected[name]) + floor
        error, own = rms(value - expected[name]) / scale, rms(as_defined[name] - expected[name]) / scale
        # Gradients in bf16 are as exact as the definition's in bf16, whose own error may exceed 2e-2.
        limit = 1e-4 if not bf16 else 2e-2 if name == "logits" else max(2e-2, 1.5 * own)
        assert error <= limit, f"{name} is off by {error:.2g}, the definition by {own:.2g}"


@pytest.mark.parametrize("layers", ["recurrent", "standard", "first:1"])
def test_decoding_step_by_step_equals_the_full_forward(layers: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=97, d_model=48, n_layers=2, layers=layers)).cuda().eval()
    tokens = torch.randint(0, 97, (2, 40), device="cuda")
    with torch.no_grad():
        full, cache, steps = model(tokens).logits, None, []
        for position in range(tokens.shape[1]):
            out = model(tokens[:, position : position + 1], cache=cache, use_cache=True)
            cache = out.cache
            steps.append(out.logits)
    assert relative_rms(torch.cat(steps, 1), full) <= 1e-5


@pytest.mark.parametrize("scan", SCANS)
def test_two_runs_are_bit_identical(scan: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=97, d_model=48, n_layers=2)).cuda()
    model.scan = scan
    tokens = torch.randint(0, 97, (2, 50), device="cuda")
    first, second = (loss_and_gradients(model, tokens) for _ in range(2))
    for name, value in first.items():
        # The embedding's gradient is summed by atomic additions outside of the scan.
        assert name == "embedding.weight" or torch.equal(value, second[name]), name


def test_generation_runs_and_repeats_with_its_seed() -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=97, d_model=48, n_layers=2)).cuda()
    prompt = torch.randint(0, 97, (2, 5), device="cuda")
    first, second = (model.generate(prompt, 12, seed=3) for _ in range(2))
    assert first.shape == (2, 17)
    assert torch.equal(first, second)
