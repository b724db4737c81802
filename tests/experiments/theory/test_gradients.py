"""Jacobian norms over distance against autograd's own Jacobian."""

from __future__ import annotations

import pytest
import torch
from helpers import every_scan, random_tokens, tiny
from torch import Tensor

from recurformer.attention import Layout
from recurformer.experiments.theory import jacobian_gains, position_gradients

D = 32


@every_scan
def test_all_directions_give_the_jacobian(scan: str):
    model = tiny(layers="first:1", dtype=torch.float64, scan=scan)
    tokens = random_tokens(1, 7)
    layout: Layout = model.layout(7)

    def layers(x: Tensor) -> Tensor:
        for layer in model.layers:
            x = layer(x, layout, "reference")
        return x

    x = model.embedding.weight[tokens].detach()
    jacobian = torch.autograd.functional.jacobian(layers, x)
    assert isinstance(jacobian, Tensor)
    expected = jacobian[0, :, :, 0].square().sum((1, 3)).div(D).sqrt()  # (j, i)
    found = position_gradients(model, tokens, range(7), probes=None)
    assert torch.allclose(found.gains, expected, rtol=1e-10, atol=0)
    assert torch.equal(found.over_distance(3), found.gains[3, :4].flip(0))
    assert found.gains[2, 3:].abs().max() == 0  # nothing depends on what comes later


def test_random_directions_estimate_it():
    model = tiny(dtype=torch.float64, scan="tiled")
    tokens = random_tokens(4, 9)
    exact = position_gradients(model, tokens, probes=None).over_distance()
    assert exact.shape == (9,)
    estimate = position_gradients(model, tokens, probes=16).over_distance()
    assert torch.allclose(estimate, exact, rtol=0.25)
    assert model.embedding.weight.grad is None


def test_a_linear_map_is_known():
    matrix = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def running_sum(x: Tensor) -> Tensor:
        return x.cumsum(1) @ matrix

    found = jacobian_gains(running_sum, torch.zeros(2, 5, 6, dtype=torch.float64), [4, 0], probes=None)
    norm = matrix.norm().item() / 6**0.5
    assert found.queries == (4, 0)
    assert found.over_distance(0).tolist() == pytest.approx([norm] * 5)
    assert found.over_distance(1).tolist() == pytest.approx([norm])


def test_bad_positions_and_probes_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="query 7 is no position of 7"):
        position_gradients(model, random_tokens(1, 7), [7])
    with pytest.raises(ValueError, match="probes is 0"):
        position_gradients(model, random_tokens(1, 7), probes=0)
    with pytest.raises(ValueError, match="vocab"):
        position_gradients(model, torch.tensor([[500]]))
