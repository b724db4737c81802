"""PEFT's LoRA on the projections of a layer.

A layer multiplies by the matrices of its projections and never calls their modules. An adapter therefore enters as a
matrix, W + scaling B A, computed once a call. Gradients reach A and B through it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from recurformer.modules import plain_weight, refuse_hooks


def adapted_weight(module: nn.Module, name: str) -> Tensor:
    """Return the matrix of a projection or of the output layer, active LoRA adapters included.

    Args:
        module: the linear module, or the adapter that wraps it.
        name: of the module, for messages.

    Raises:
        ValueError: for an adapter that is no sum of W and a product or that has dropout in training, and for hooks.
    """
    if isinstance(module, nn.Linear):
        return plain_weight(module, name)
    refuse_hooks(module, name)
    wrapper: Any = module
    if hasattr(wrapper, "original_module"):  # PEFT's modules_to_save: a copy that is trained as a whole
        return wrapper.weight
    if not (hasattr(wrapper, "lora_A") and hasattr(wrapper, "get_delta_weight") and hasattr(wrapper, "base_layer")):
        raise ValueError(f"{type(module).__name__} wraps a projection in a way that has no matrix; use plain LoRA")
    weight = plain_weight(wrapper.base_layer, name)
    if wrapper.merged or wrapper.disable_adapters:
        return weight
    for adapter in wrapper.active_adapters:
        if adapter not in wrapper.lora_A:
            continue
        if adapter in wrapper.lora_variant or wrapper.lora_bias.get(adapter):
            raise ValueError(f"the LoRA adapter {adapter!r} is of a special kind (DoRA, bias, ...); use plain LoRA")
        dropout = getattr(wrapper.lora_dropout[adapter], "p", 0.0)
        if dropout and module.training:
            raise ValueError(f"lora_dropout is {dropout}; it must be 0, for our layers have no dropout")
        weight = weight + wrapper.get_delta_weight(adapter)
    return weight
