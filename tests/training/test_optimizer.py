"""Parameter groups, the schedule as a function of the step, optimizer state by name."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from recurformer import LanguageModel, ModelConfig
from recurformer.training.config import OptimizerConfig, ScheduleConfig
from recurformer.training.optimizer import (
    clip_gradients,
    learning_rate,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_rates,
)


def small(**overrides) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(vocab_size=11, d_model=8, n_heads=2, n_layers=2, **overrides))


def test_schedule():
    schedule = ScheduleConfig(steps=101, warmup_steps=20, start_fraction=0.1, final_fraction=0.2)
    rates = [learning_rate(step, 2.0, schedule) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[10] == pytest.approx((0.2 + 2.0) / 2)
    assert rates[20] == 2.0
    assert rates[60] == pytest.approx((2.0 + 0.4) / 2)
    assert rates[100] == pytest.approx(0.4)
    assert learning_rate(1000, 2.0, schedule) == rates[100]
    assert all(a < b for a, b in itertools.pairwise(rates[:21]))
    assert all(a > b for a, b in itertools.pairwise(rates[20:]))
    assert rates[40] == pytest.approx(2.0 * (0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2))


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_schedule_of_very_short_runs(steps, warmup):
    schedule = ScheduleConfig(steps=steps, warmup_fraction=warmup)
    assert all(0 < learning_rate(step, 1.0, schedule) <= 1.0 for step in range(steps))


def test_matrices_decay_embedding_norms_and_biases_do_not():
    model = small(attention_bias=True, mlp_bias=True)
    optimizer = make_optimizer(model, OptimizerConfig())
    set_rates(optimizer, 0, OptimizerConfig(weight_decay=0.3), ScheduleConfig())
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() == 2 and name != "embedding.weight"
        assert decay[id(parameter)] == (0.3 if matrix else 0.0), name
    assert len(decay) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out():
    model = small()
    model.embedding.requires_grad_(False)
    optimizer = make_optimizer(model, OptimizerConfig())
    assert all(p.requires_grad for group in optimizer.param_groups for p in group["params"])


def test_the_update_is_adamw_by_the_book():
    model = small().double()
    config, schedule = OptimizerConfig(lr=0.01, weight_decay=0.5), ScheduleConfig(steps=2, warmup_steps=0)
    optimizer = make_optimizer(model, config)
    weight = model.head.weight
    before, gradient = weight.detach().clone(), torch.randn_like(weight)
    weight.grad = gradient.clone()
    rate = set_rates(optimizer, 0, config, schedule)
    optimizer.step()
    # after one step the bias-corrected moments are the gradient and its square
    expected = before * (1 - rate * 0.5) - rate * gradient / (gradient.abs() + 1e-8)
    assert rate == 0.01
    assert (weight - expected).abs().max() < 1e-12


def test_clipping_scales_the_whole_gradient():
    model = small()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm = math.sqrt(sum(p.numel() for p in model.parameters()))
    assert clip_gradients(model.parameters(), None).item() == pytest.approx(norm)
    assert clip_gradients(model.parameters(), 2.0).item() == pytest.approx(norm)
    assert clip_gradients(model.parameters(), None).item() == pytest.approx(2.0, rel=1e-4)


def step(model: LanguageModel, optimizer: torch.optim.AdamW, number: int) -> None:
    tokens = torch.arange(6)[None] + number % 3
    optimizer.zero_grad()
    model(tokens, targets=tokens + 1).loss.backward()
    set_rates(optimizer, number, OptimizerConfig(), ScheduleConfig(steps=10))
    optimizer.step()


def test_state_is_saved_by_name_and_continues_exactly():
    one = small()
    optimizer = make_optimizer(one, OptimizerConfig())
    for number in range(3):
        step(one, optimizer, number)
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, one).items()}
    assert saved.keys() == {
        f"{kind}/{n}" for n, _ in one.named_parameters() for kind in ("step", "exp_avg", "exp_avg_sq")
    }

    two = small()
    two.load_state_dict(one.state_dict())
    other = make_optimizer(two, OptimizerConfig(lr=9.0, weight_decay=9.0))
    load_optimizer_tensors(other, two, dict(reversed(saved.items())))
    for number in range(3, 6):
        step(one, optimizer, number)
        step(two, other, number)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_state_of_another_model_is_refused():
    model = small()
    optimizer = make_optimizer(model, OptimizerConfig())
    step(model, optimizer, 0)
    saved = optimizer_tensors(optimizer, model)
    with pytest.raises(ValueError, match="fits no parameter"):
        load_optimizer_tensors(optimizer, model, {**saved, "exp_avg/elsewhere": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"fits no parameter.*|shape"):
        load_optimizer_tensors(optimizer, model, {**saved, "exp_avg/head.weight": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match=r"lacks head\.weight"):
        load_optimizer_tensors(optimizer, model, {k: v for k, v in saved.items() if "head" not in k})
