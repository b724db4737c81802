"""The fused step of a single row: every product is a kernel of ours, bound by reading its weights once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from recurformer.config import ModelConfig
from recurformer.generation.fused.launch import Matrices
from recurformer.generation.fused.step import FusedStep
from recurformer.generation.fused.tuning import power_of_two, product_blocks

MAX_ROW_WIDTH = 2**15  # columns of a weight matrix, whose rows a program holds whole
PLAIN = -1  # no activation


def fits_single_row(config: ModelConfig) -> bool:
    """Return whether the kernels of a single row hold every row of the model's matrices."""
    return max(config.d_model, config.mlp_width, config.n_heads * config.head_width) <= MAX_ROW_WIDTH


class SingleRowStep(FusedStep):
    """One token of one row: five kernels a layer."""

    single = True

    def run_layers(self) -> None:
        config = self.config
        for l, w in enumerate(self.weights.layers):
            m, x, z = w.maths, self.layer_input(l), self.z[l]
            bias = w.qkv_bias if config.attention_bias else None
            pending = z if self.waits(l) else None
            self._normed_product(x, m.attention_norm, (m.q, m.k, m.v), self.raw, bias, pending=pending)
            self.attend(l)
            self._residual_product(self.partial, m.o, w.o_bias if config.attention_bias else None, x, self.y, True)
            gate = None if m.gate is None else (m.gate, w.gate_bias)
            bias = w.up_bias if config.mlp_bias else None
            self._normed_product(self.y, m.mlp_norm, (m.up,), self.inner, bias, gate=gate, kind=self.activation)
            self._residual_product(self.inner, m.down, w.down_bias if config.mlp_bias else None, self.y, z, False)

    def write_logits(self) -> None:
        weights, vocab_size = self.weights, self.config.vocab_size
        self._normed_product(self.z[-1], weights.norm, (weights.head,), self.state.logits, None, rows=vocab_size)

    def pair_product(self, l: int, out: Tensor, first: bool) -> None:
        w, queries = self.weights.layers[l], self.heads.H * self.heads.K
        bias = w.qkv_bias[queries:] if self.config.attention_bias else None
        self._normed_product(self.z[l], w.maths.attention_norm, (w.maths.k, w.maths.v), out, bias, early=not first)

    def _normed_product(
        self,
        x: Tensor,
        norm: Tensor,
        matrices: Sequence[Tensor],
        out: Tensor,
        bias: Tensor | None,
        *,
        gate: tuple[Tensor, Tensor] | None = None,
        kind: int = PLAIN,
        pending: Tensor | None = None,
        rows: int | None = None,
        early: bool = True,
    ) -> None:
        """Enqueue out = W norm(x), with an activation for kind >= 0.

        Args:
            matrices: one to three, on top of each other.
            gate: matrix and bias of a gated activation.
            pending: a vector that the matrices after the first are multiplied with too.
            rows: rows of W that count; None: all.
            early: may start while the kernels before it run.
        """
        product, warps = product_blocks(
            self.tuning, matrices, rows=rows, bias=bias is not None, pdl=self.pdl, two_inputs=pending is not None
        )
        gate_matrix, gate_bias = (None, None) if gate is None else gate
        if bias is None:
            gate_bias = None
        self.launch(
            self.kernels.normed_product, (product.PROGRAMS,), x, norm,
            Matrices(matrices[0], matrices[min(1, len(matrices) - 1)], matrices[-1]), self.or_nothing(gate_matrix),
            self.or_nothing(bias), self.or_nothing(gate_bias), self.or_nothing(pending), out, self.config.norm_eps,
            KIND=kind, CENTRED=self.centred, DEFER=pending is not None, PRODUCT=product, num_warps=warps, early=early,
        )  # fmt: skip

    def _residual_product(
        self, a: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, out: Tensor, combines: bool
    ) -> None:
        """Enqueue out = x + s W a; `combines`: a is the parts of attention outputs."""
        product, warps = product_blocks(
            self.tuning, (weight,), bias=bias is not None, pdl=self.pdl, combines=combines
        )  # fmt: skip
        SB = max(1, min(power_of_two(self.parts.S), self.tuning.gathered // product.WB))
        self.launch(
            self.kernels.residual_product, (product.PROGRAMS,), a, self.lse, self.state.slot, weight,
            self.or_nothing(bias), x, out, self.config.branch_scale, H=self.heads.H, K=self.heads.K, SB=SB,
            PARTS=self.parts, COMBINE=combines, PRODUCT=product, num_warps=warps, early=True,
        )  # fmt: skip
