"""AdamW's parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from recurformer.training.config import OptimizerConfig, ScheduleConfig
from recurformer.training.sharding import like


def learning_rate(step: int, peak: float, schedule: ScheduleConfig) -> float:
    """Return the learning rate of the update from `step` to `step + 1`, counted from 0.

    The rate rises linearly from start_fraction * peak to peak over the warm-up. It then falls along half a cosine to
    final_fraction * peak at the last update, and stays there.
    """
    warmup = schedule.warmup
    if step < warmup:
        return peak * (schedule.start_fraction + (1 - schedule.start_fraction) * step / warmup)
    progress = min(1.0, (step - warmup) / max(1, schedule.steps - 1 - warmup))
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * (1 + math.cos(math.pi * progress)) / 2)


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW with two groups of parameters: those that decay and those that do not.

    Matrices inside the layers and the output layer decay. A norm's scale should stay near 1, and a rare token's row in
    the embedding would shrink without evidence: norms, biases and the embedding do not decay.
    """
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if parameter.dim() >= 2 and not name.startswith("embedding.") else kept).append(parameter)
    groups = [{"params": decayed, "decays": True}, {"params": kept, "decays": False}]
    # The fused update makes one pass over memory, on a CPU, too. `set_rates` sets all numbers before every step.
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=True)


def set_rates(optimizer: torch.optim.AdamW, step: int, config: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Write the rates of the update at `step` into every group, and return the learning rate.

    All numbers are written anew, so none survives from an older step or run.
    """
    rate = learning_rate(step, config.lr, schedule)
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["betas"] = (config.beta1, config.beta2)
        group["eps"] = config.eps
        group["weight_decay"] = config.weight_decay if group["decays"] else 0.0
    return rate


def clip_gradients(parameters: Iterable[Tensor], largest: float | None) -> Tensor:
    """Scale the gradients so that their joint norm is at most `largest`; return the norm before scaling (a scalar)."""
    learned = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in learned if p.grad is not None])
    if hasattr(norm, "full_tensor"):  # the gradients are split over processes
        norm = norm.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
    if largest is not None:
        nn.utils.clip_grads_with_norm_(learned, largest, norm)
    return norm


# --- state by name, so that neither order nor wrappers matter ---------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.AdamW, model: nn.Module) -> dict[str, Tensor]:
    """Return the optimizer's state as {"exp_avg/<parameter name>": tensor, ...}."""
    return {
        f"{kind}/{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.AdamW, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give an optimizer the state that `optimizer_tensors` returned. Rates are no state: `set_rates` computes them.

    Raises:
        ValueError: when the tensors belong to another model.
    """
    parameters = dict(model.named_parameters())
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if name not in parameters or value.shape != (torch.Size([]) if kind == "step" else parameters[name].shape):
            raise ValueError(
                f"the optimizer state {key!r} of shape {tuple(value.shape)} fits no parameter of the model"
            )
        states.setdefault(name, {})[kind] = like(value, parameters[name])
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    for name, state in states.items():
        if state.keys() != {"exp_avg", "exp_avg_sq", "step"}:
            raise ValueError(f"the optimizer state of {name!r} has {', '.join(sorted(state))}; it is damaged")
    if states and states.keys() != trained:
        raise ValueError(f"the optimizer state lacks {', '.join(sorted(trained ^ states.keys()))}")
    saved = optimizer.state_dict()
    numbers = {id(p): n for n, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    saved["state"] = {numbers[id(parameters[name])]: state for name, state in states.items()}
    optimizer.load_state_dict(saved)
