"""The fused step of several rows: library products or the fused scan's thin ones, and kernels of ours between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recurformer.generation.fused.step import FusedStep
from recurformer.generation.fused.tuning import Tuning, power_of_two
from recurformer.generation.state import DecodeState
from recurformer.hardware import THIN_ROWS
from recurformer.model import LanguageModel

WIDE_PRODUCT = 2**15  # outputs above which a thin product takes blocks of 64 instead of 32


class SeveralRowsStep(FusedStep):
    """One token of each of several rows."""

    single = False

    def __init__(self, model: LanguageModel, state: DecodeState, *, defer: bool, tuning: Tuning) -> None:
        super().__init__(model, state, defer=defer, tuning=tuning)
        gated = self.config.activation == "swiglu"
        with torch.inference_mode(False):
            self.h, self.branch = self.fresh(self.rows, self.D), self.fresh(self.B, self.D)
            self.up, self.gate = self.fresh(self.B, self.F), self.fresh(self.B, self.F if gated else 0)
            self.logits = self.fresh(self.B, self.config.vocab_size)

    def run_layers(self) -> None:
        for l in range(self.config.n_layers):
            self._project(l)
            self.attend(l)
            self._finish_layer(l)
        self._add_and_norm(self.y, self.branch, self.weights.norm, self.z[-1], self.B)

    def _project(self, l: int) -> None:
        """Enqueue the end of layer l - 1, and norm and product of the inputs of layer l and of its pending outputs."""
        w = self.weights.layers[l]
        pending = self.z[l] if self.waits(l) else None
        rows = self.B if pending is None else 2 * self.B
        x, branch = (self.x, None) if l == 0 else (self.y, self.branch)
        self._add_and_norm(x, branch, w.maths.attention_norm, self.layer_input(l), rows, pending)
        assert w.qkv is not None
        self._product(self.h[:rows], w.qkv, self.raw[:rows], w.qkv_bias if self.config.attention_bias else None)

    def _finish_layer(self, l: int) -> None:
        """Enqueue a layer from the attention outputs to the MLP's output, which is added to y later."""
        w, B, F, config = self.weights.layers[l], self.B, self.F, self.config
        m = w.maths
        if self.splits:
            SB = min(8, power_of_two(self.parts.S))
            self.launch(
                self.kernels.combine, (B, self.heads.H), self.partial, self.lse, self.state.slot, self.a, SB=SB,
                HEADS=self.heads, PARTS=self.parts, num_warps=1,
            )  # fmt: skip
        self._product(self.a, m.o, self.branch, w.o_bias if config.attention_bias else None)
        self._add_and_norm(self.layer_input(l), self.branch, m.mlp_norm, self.y, B)
        self._product(self.h[:B], m.up, self.up, w.up_bias if config.mlp_bias else None)
        if m.gate is not None:
            self._product(self.h[:B], m.gate, self.gate, w.gate_bias if config.mlp_bias else None)
        FB = min(1024, power_of_two(F))
        self.launch(
            self.kernels.activate, (B, -(-F // FB)), self.up, self.gate if m.gate is not None else self.up, self.inner,
            F=F, FB=FB, KIND=self.activation,
        )  # fmt: skip
        self._product(self.inner, m.down, self.branch, w.down_bias if config.mlp_bias else None)

    def write_logits(self) -> None:
        logits, head = self.state.logits, self.weights.head[: self.config.vocab_size]
        if logits.dtype == self.dtype:
            self._product(self.h[: self.B], head, logits, None)
        else:
            self._product(self.h[: self.B], head, self.logits, None)
            logits.copy_(self.logits)

    def pair_product(self, l: int, out: Tensor, first: bool) -> None:
        w, queries = self.weights.layers[l], self.heads.H * self.heads.K
        assert w.qkv is not None
        self._add_and_norm(self.z[l], None, w.maths.attention_norm, self.z[l], self.B)
        bias = w.qkv_bias[queries:] if self.config.attention_bias else None
        self._product(self.h[: self.B], w.qkv[queries:], out, bias)

    def _product(self, a: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None) -> None:
        """Enqueue out = a W^T + bias, for rows a."""
        rows, width = a.shape[0], weight.shape[0]
        if bias is None and rows <= THIN_ROWS and self.dtype.itemsize == 2:
            from recurformer.scan.fused import kernels as scan_kernels

            kernel: Any = scan_kernels.product_thin
            bn = 32 if width <= WIDE_PRODUCT else 64
            kernel[(-(-width // bn), 1)](
                a, weight, out, rows, 0, 0, 0, IN=a.shape[1], OUT=width, BM=16, BN=bn, BK=128, num_warps=4,
                num_stages=4,
            )  # fmt: skip
        elif bias is None:
            torch.mm(a, weight.t(), out=out)
        else:
            torch.addmm(bias.to(self.dtype), a, weight.t(), out=out)

    def _add_and_norm(
        self, x: Tensor, branch: Tensor | None, norm: Tensor, out: Tensor, rows: int, pending: Tensor | None = None
    ) -> None:
        """Enqueue out = x + s branch and h = norm(out); rows of h from B on are norm(pending)."""
        self.launch(
            self.kernels.add_and_norm, (rows,), x, self.or_nothing(branch), norm, out, self.h,
            self.or_nothing(pending), self.B, self.config.branch_scale, self.config.norm_eps, D=self.D,
            DB=power_of_two(self.D), CENTRED=self.centred, BRANCH=branch is not None, num_warps=self.row_warps,
        )  # fmt: skip
