"""A norm that only the equations know: every faster algorithm steps aside for it."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, random_tokens, tiny
from torch import Tensor

from recurformer import LanguageModel
from recurformer.choose import choose_scan, choose_step
from recurformer.hardware import scan_obstacle, step_obstacle
from recurformer.layer import NORMS


def mean_norm(x: Tensor, shape: torch.Size, weight: Tensor, eps: float) -> Tensor:
    """x over the mean of its absolute values."""
    return x / (x.abs().mean(-1, keepdim=True) + eps) * weight


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """A model with a norm that was added to the equations alone."""
    monkeypatch.setitem(NORMS, "mean", mean_norm)
    made = tiny(layers="first:1", dtype=torch.float64)
    object.__setattr__(made.config, "norm", "mean")
    made.scan = "auto"
    return made


def test_a_new_norm_runs_on_the_definition_until_faster_scans_know_it(model: LanguageModel):
    config, cpu, gpu = model.config, torch.device("cpu"), torch.device("cuda")
    for device in (cpu, gpu):
        name, why = choose_scan("auto", config, device, batch_size=2, length=200)
        assert (name, "the norm is 'mean'; 'rms' and 'layer' are possible" in why) == ("reference", True)
        assert choose_step("auto", config, device, torch.float32, 1)[0] == "plain"
        assert "triton is not installed" in (reason := str(scan_obstacle(config, gpu))) or "'mean'" in reason
        assert "triton is not installed" in (reason := str(step_obstacle(config, gpu, None, 1))) or "'mean'" in reason
    for scan in ("tiled", "wavefront"):
        with pytest.raises(ValueError, match=rf"scan is '{scan}', which can't run: the norm is 'mean'; .* scan = 'ref"):
            choose_scan(scan, config, cpu)


def test_a_new_norm_changes_the_model_and_decodes_exactly(model: LanguageModel):
    tokens = random_tokens(2, 9)
    usual = tiny(layers="first:1", dtype=torch.float64)
    with torch.no_grad():
        full = model(tokens).logits
        assert (full - usual(tokens).logits).abs().max() > 1e-2
        steps, cache = [], None
        for i in range(9):
            out = model(tokens[:, i : i + 1], cache=cache, use_cache=True)
            steps.append(out.logits)
            cache = out.cache
    assert_close(torch.cat(steps, dim=1), full, 1e-10)
    assert model.generate(tokens, 3, temperature=0.0).shape == (2, 12)
