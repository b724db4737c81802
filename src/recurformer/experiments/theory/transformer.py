"""A Recurrent Transformer that computes what a given Transformer computes (paper section 3), norms included.

There are two obstacles. A recurrent layer makes its persistent pairs from its *outputs*, and a Transformer layer makes
them from its inputs: a layer must therefore leave unchanged the part of the stream that it reads. The stream with this
extra width also passes through the same norms, which would mix it with the rest. This stream, D' wide, solves both:

    A      (D)          the Transformer's residual stream x, then y, then the next layer's x: changed in place
    N_l    (D each)     for each layer l, its normalised input x / rms(x), times the small number 1 / large
    e      (1 or 2)     the large coordinate: `large` at each layer's input and output, 0 between the two branches

While e is large, every norm divides by a constant (to a relative |x|^2 / large^2): the layer reads N_l linearly, and
N_l is the same in its input and its output, so temporary and persistent pairs agree. The bias of the attention output
takes e away, so that before the MLP the norm is that of A alone (the N_l weigh 1 / large^2) and the MLP reads
y / rms(y). Its bias puts e back. A layer in front of each Transformer layer but the first does nothing but this, with
an MLP that copies x / rms(x) into N_l. A last such layer takes e away for good, and the final norm is that of x.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from recurformer.config import Activation
from recurformer.model import LanguageModel, Layer
from recurformer.modules import Norm


@torch.no_grad()
def emulate_transformer(transformer: LanguageModel, *, large: float = 1e6) -> LanguageModel:
    """Recurrent Transformer weights that reproduce a Transformer's outputs at every position (paper section 3).

    Args:
        transformer: any model all of whose layers are standard; every option of `ModelConfig` is covered.
        large: the large coordinate. The error falls as |x|^2 / large^2, x being the Transformer's residual stream,
            until rounding takes over; it must exceed the stream's norm by far.

    Returns:
        LanguageModel: all layers recurrent, on the same device and in the same dtype. 2 L layers of width
        (L + 1) D + 1 (+ 2 with layer norm) with biases, the same heads, positions, activation, norm and QK-norm. Masks,
        packed documents and caches work as with any model.

    Raises:
        ValueError: for a model with a recurrent layer, or a `large` that is not finite and above 1.

    The assumptions are: width grows L + 1 times and depth twice; projections have biases (a constant coordinate read
    through the norm would do instead, at the cost of exact cancellation); the residual stream is bounded.
    """
    old = transformer.config
    if "recurrent" in old.layer_kinds:
        raise ValueError(f"layers is {old.layers!r}; only a model of standard layers can be emulated")
    if not 1 < large < math.inf:
        raise ValueError(f"large is {large}; it must be a finite number above 1")
    D, L, K = old.d_model, old.n_layers, old.head_width
    centred = old.norm == "layer"  # then e is a pair (large, -large), and every block sums to 0
    width = (L + 1) * D + (2 if centred else 1)
    config = dataclasses.replace(
        old, layers="recurrent", n_layers=2 * L, d_model=width, head_dim=K, n_kv_heads=old.kv_heads,
        d_mlp=max(old.mlp_width, len(linear_units(old.activation)) * D), norm_eps=old.norm_eps * D / width,
        residual_scale="none", tie_embeddings=False, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    weight = transformer.embedding.weight
    with torch.device("meta"):
        model = LanguageModel(config)
    model = model.to_empty(device=weight.device).to(weight.dtype)
    model.scan = transformer.scan
    builder = _Builder(transformer, D, width, large, centred)
    builder.fill_outside(model)
    for l, layer in enumerate(transformer.layers):
        assert isinstance(layer, Layer)
        real, between = model.layers[2 * l], model.layers[2 * l + 1]
        assert isinstance(real, Layer)
        assert isinstance(between, Layer)
        builder.fill_layer(real, layer, l)
        builder.fill_between(between, l + 1 if l + 1 < L else None)
    return model.train(transformer.training)


def linear_units(activation: Activation) -> list[tuple[float, float]]:
    """(factor in, factor out) of the hidden units through which an MLP passes a number unchanged.

    gelu(t) - gelu(-t) = t holds exactly, for the tanh form too. With swiglu one unit does: its gate must be silu(1).
    """
    return [(1.0, 1.0), (-1.0, -1.0)] if activation != "swiglu" else [(1.0, 1.0 + math.exp(-1.0))]


class _Builder:
    """Fills the emulating model's parameters; shapes and letters as in the module's docstring."""

    def __init__(self, transformer: LanguageModel, D: int, width: int, large: float, centred: bool) -> None:
        self.old, self.config, self.D, self.width = transformer, transformer.config, D, width
        self.large, self.small = large, 1.0 / large
        eye = torch.eye(D, dtype=torch.float64, device=transformer.embedding.weight.device)
        # A layer norm sees the stream only up to a shift, so that A may hold x minus its mean: then RMS does the rest.
        self.centre = eye - 1.0 / D if centred else eye
        self.e = slice(width - (2 if centred else 1), width)
        sign = torch.tensor([1.0, -1.0] if centred else [1.0], dtype=torch.float64, device=eye.device)
        self.e_value = large * sign
        # Factor of a norm: on N_l while e is there, on A while it is not.
        self.gain_large = math.sqrt(width) / (large * math.sqrt(len(sign))) * self.small
        self.gain_free = math.sqrt(width / D)

    def block(self, l: int | None) -> slice:
        """Coordinates of N_l; None: of A."""
        start = 0 if l is None else (l + 1) * self.D
        return slice(start, start + self.D)

    def read(self, matrix: Tensor, norm: Tensor) -> Tensor:
        """`matrix` after a norm of the given weight, as a matrix that reads the block's normalised contents."""
        return matrix.double() * norm.double() @ self.centre

    def fill_outside(self, model: LanguageModel) -> None:
        """Embedding, with the first layer's normalised input, which depends on the token alone; and the output."""
        x = self.old.embedding.weight.double() @ self.centre
        table = torch.zeros(x.shape[0], self.width, dtype=x.dtype, device=x.device)
        table[:, self.block(None)] = x
        rms = (x.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt()
        table[:, self.block(0)] = x / rms * self.small
        table[:, self.e] = self.e_value
        model.embedding.weight.copy_(table)
        model.norm.weight.fill_(1.0)
        head = self.old.embedding if self.config.tie_embeddings else self.old.head
        model.head.weight.zero_()
        model.head.weight[:, self.block(None)] = self._like(
            self.read(head.weight, self.old.norm.weight) / self.gain_free
        )

    def fill_layer(self, new: Layer, layer: Layer, l: int) -> None:
        """One Transformer layer: attention reads N_l and writes A, the MLP reads and writes A."""
        self._clear(new)
        scale = self.config.branch_scale
        for name in ("q_proj", "k_proj", "v_proj"):
            matrix, bias = getattr(layer, name), getattr(new, name).bias
            # The QK-norm's eps is the residual norms' times D / D' there: shrink what it norms likewise.
            normed = self.config.qk_norm != "none" and name != "v_proj"
            factor = math.sqrt(self.D / self.width) if normed else 1.0
            made = self.read(matrix.weight, layer.attention_norm.weight) * (factor / self.gain_large)
            getattr(new, name).weight[:, self.block(l)] = self._like(made)
            if matrix.bias is not None:
                bias.copy_(matrix.bias.double() * factor)
        if self.config.qk_norm != "none":
            new.q_norm.weight.copy_(layer.q_norm.weight)
            new.k_norm.weight.copy_(layer.k_norm.weight)
        for name in ("o_proj", "down_proj"):
            matrix, made = getattr(layer, name), getattr(new, name)
            columns = slice(0, matrix.in_features)
            made.weight[self.block(None), columns] = self._like(scale * self.centre @ matrix.weight.double())
            if matrix.bias is not None:
                made.bias[self.block(None)] = self._like(scale * self.centre @ matrix.bias.double())
        for name in ("up_proj", "gate_proj") if self.config.activation == "swiglu" else ("up_proj",):
            matrix, made = getattr(layer, name), getattr(new, name)
            rows = slice(0, matrix.out_features)
            made.weight[rows, self.block(None)] = self._like(
                self.read(matrix.weight, layer.mlp_norm.weight) / self.gain_free
            )
            if matrix.bias is not None:
                made.bias[rows] = matrix.bias
        self._switch(new, back=True)

    def fill_between(self, new: Layer, l: int | None) -> None:
        """The layer before Transformer layer l, which writes N_l; None: the last one, which leaves e away."""
        self._clear(new)
        if l is not None:
            for n, (inward, outward) in enumerate(linear_units(self.config.activation)):
                rows = slice(n * self.D, (n + 1) * self.D)
                new.up_proj.weight[rows, self.block(None)] = self._like(self.centre * (inward / self.gain_free))
                new.down_proj.weight[self.block(l), rows] = self._like(self.centre * (outward * self.small))
                if self.config.activation == "swiglu":
                    new.gate_proj.bias[rows] = 1.0
        self._switch(new, back=l is not None)

    def _clear(self, layer: Layer) -> None:
        for module in layer.children():
            for parameter in module.parameters():
                nn.init.constant_(parameter, 1.0 if isinstance(module, Norm) else 0.0)

    def _switch(self, layer: Layer, back: bool) -> None:
        """e away after attention, and back after the MLP."""
        layer.o_proj.bias[self.e] = self._like(-self.e_value)
        if back:
            layer.down_proj.bias[self.e] = self._like(self.e_value)

    def _like(self, made: Tensor) -> Tensor:
        return made.to(self.old.embedding.weight.dtype)
