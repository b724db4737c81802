"""Weights of a model as the kernels of a decode step read them: the model's own tensors, or copies of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recurformer.layer import LayerMaths

if TYPE_CHECKING:
    from recurformer.model import LanguageModel

MATRICES = ("attention_norm", "mlp_norm", "q_norm", "k_norm", "q", "k", "v", "o", "up", "gate", "down")
BIASES = ("qkv", "o", "up", "gate", "down")


@dataclass
class LayerWeights:
    """One layer's weights. Matrices are the model's own tensors where dtype and layout allow."""

    maths: LayerMaths
    qkv_bias: Tensor  # ((H + 2 G) K,) float32
    o_bias: Tensor
    up_bias: Tensor
    gate_bias: Tensor
    down_bias: Tensor
    qkv: Tensor | None  # ((H + 2 G) K, D), a copy, for several rows


class StepWeights:
    """All weights that a fused step reads.

    Args:
        model: its tensors are read where they are, as far as they have the dtype.
        dtype: of the products.
        stacked: also keep the matrices of queries, keys and values as one.

    Attributes:
        layers: one `LayerWeights` a layer.
        k_norms: (L, width) float32, weights of the key norms; None without QK-norm.
        norm, embedding, head: the last norm, the embedding (V, D), the output layer (V, D).
    """

    def __init__(self, model: LanguageModel, dtype: torch.dtype, stacked: bool) -> None:
        self._model, self._dtype, self._stacked = model, dtype, stacked
        with torch.inference_mode(False):
            self._packed = self._collect()
        self.layers = [self._layer(l) for l in range(model.config.n_layers)]
        self.k_norms = self._get("k_norms")
        self.norm, self.embedding, self.head = (self._packed[name][0] for name in ("norm", "embedding", "head"))

    def refresh(self) -> None:
        """Copy anew the weights that are kept as copies, after weights changed in place.

        Raises:
            ValueError: when a weight has moved. CUDA graphs that hold its address would read freed memory.
        """
        with torch.inference_mode(False):
            found = self._collect()
        for name, (tensor, copied) in found.items():
            old, _ = self._packed[name]
            if copied:
                old.copy_(tensor)
            elif old.data_ptr() != tensor.data_ptr():
                raise ValueError(f"the model's {name} has moved since the decode engine was made; make a new engine")

    def _collect(self) -> dict[str, tuple[Tensor, bool]]:
        """Return every weight by name, and whether it is a copy."""
        model, dtype, config = self._model, self._dtype, self._model.config
        own = {p.data_ptr() for p in model.parameters()}
        found: dict[str, tuple[Tensor, bool]] = {}

        def enter(name: str, tensor: Tensor) -> None:
            tensor = tensor.detach().contiguous()
            found[name] = (tensor, tensor.data_ptr() not in own or tensor.device.type == "meta")

        zero = torch.zeros(1, dtype=torch.float32, device=model.embedding.weight.device)
        for l, layer in enumerate(model.layers):
            maths: LayerMaths = layer.maths(dtype)  # pyright: ignore[reportCallIssue]
            for name in MATRICES:
                tensor = getattr(maths, name)
                if tensor is not None:
                    enter(f"layers.{l}.{name}", tensor)
            if self._stacked:
                enter(f"layers.{l}.qkv", torch.cat([maths.q, maths.k, maths.v]))
            biases = {name: getattr(maths, f"{name}_bias") for name in BIASES[1:]}
            if maths.q_bias is not None and maths.k_bias is not None and maths.v_bias is not None:
                biases["qkv"] = torch.cat([maths.q_bias, maths.k_bias, maths.v_bias])
            for name in BIASES:
                bias = biases.get(name)
                enter(f"layers.{l}.{name}_bias", (zero if bias is None else bias.float()).clone())
        if config.qk_norm != "none":
            k_norms = [found[f"layers.{l}.k_norm"][0].float() for l in range(config.n_layers)]
            enter("k_norms", torch.stack(k_norms))
        enter("norm", model.norm.weight)
        enter("embedding", model.embedding.weight)
        enter("head", model.output_weight().to(dtype))
        return found

    def _get(self, name: str) -> Tensor | None:
        return self._packed[name][0] if name in self._packed else None

    def _layer(self, l: int) -> LayerWeights:
        matrices = {name: self._get(f"layers.{l}.{name}") for name in MATRICES}
        maths = LayerMaths(self._model.config, **matrices)  # pyright: ignore[reportArgumentType]
        biases = {f"{name}_bias": self._packed[f"layers.{l}.{name}_bias"][0] for name in BIASES}
        return LayerWeights(maths, qkv=self._get(f"layers.{l}.qkv"), **biases)
