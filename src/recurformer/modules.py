"""Weights of submodules, read as matrices: the model multiplies by them and never calls its projections.

A hook on a module that is never called would have no effect. The functions here refuse such hooks by name. Parametrised
weights (`torch.nn.utils.parametrize`) need no care: reading the weight evaluates the parametrisation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

WeightReader = Callable[[nn.Module, str], Tensor]  # (module, its name) to the matrix (out, in) that it multiplies by


class Norm(nn.Module):
    """The weight of a norm. `recurformer.layer.normalise` computes the norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


def calls_more_than_forward(module: nn.Module) -> bool:
    """Return whether a call of the module does more than its class's `forward`: hooks, or a `forward` of its own."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
    )


def refuse_hooks(module: nn.Module, name: str) -> None:
    """Raise ValueError when something on the module acts only when the module is called, which never happens."""
    if calls_more_than_forward(module):
        raise ValueError(
            f"{name} has {what_acts_on_calls(module)}, which would have no effect: the model reads its weight and "
            "never calls it; put hooks on the layer, the embedding or the output layer, or use "
            "torch.nn.utils.parametrize (torch.nn.utils.prune: call prune.remove first)"
        )


def what_acts_on_calls(module: nn.Module) -> str:
    """Return the names of a module's hooks, or its replaced `forward`, in words."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    found = [getattr(hook, "__qualname__", type(hook).__name__) for group in hooks for hook in group.values()]
    return f"the hook {', '.join(found)}" if found else "a forward of its own"


def norm_weight(module: Norm, name: str) -> Tensor:
    """Return the weight of a norm.

    Raises:
        ValueError: when the module has hooks.
    """
    refuse_hooks(module, name)
    return module.weight


def plain_weight(module: nn.Module, name: str) -> Tensor:
    """Return the matrix of a linear module.

    Raises:
        TypeError: when the module is another one, such as an adapter, whose part the matrix would lack.
        ValueError: when the module has hooks.
    """
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise TypeError(
            f"{name} is a {type(module).__name__}, where a linear module was; recurformer.hf takes adapters"
        )
    refuse_hooks(module, name)
    return module.weight
