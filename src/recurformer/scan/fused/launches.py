"""Launches that the forward and the backward pass share: norms, queries and pairs of some positions of a chunk."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from recurformer.scan.fused import kernels as triton_kernels
from recurformer.scan.fused.products import Products
from recurformer.scan.fused.workspace import Workspace

kernels: Any = triton_kernels  # Triton checks the types of a launch when it compiles


class Pass:
    """One direction of an engine: a step is a chunk of every layer."""

    reverse: bool  # True for the backward, whose chunks come from the last to the first

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.products = workspace, Products(workspace)
        self.shape, self.sizes, self.options = workspace.shape, workspace.sizes, workspace.options
        self.table, self.weights = workspace.table, workspace.weights
        self.eps, self.branch_scale = self.shape.config.norm_eps, self.shape.branch_scale
        self.scale = self.sizes.K**-0.5  # of attention scores

    def norm_rows(self, out: Tensor, first: int, rows: int, outputs: bool) -> None:
        """Write the norm before attention of inputs, or of outputs, at some positions of a chunk.

        Args:
            out: (L, rows, B, D), written.
            first: first position inside the chunk.
            rows: number of positions.
            outputs: whether the layer's outputs are normed, in place of its inputs.
        """
        B, L = self.shape.B, self.shape.L
        kernels.norm_chunk[(B, rows, L)](
            self.table, out, self.weights.attention_norm, first, rows, B, self.eps, **self.options.stack,
            **self.options.row, OUTPUTS=outputs, REVERSE=self.reverse,
        )  # fmt: skip

    def prepare(self, h: Tensor, raw: Tensor, temporary_pairs: Tensor, destination: int, queries: bool) -> None:
        """Make the queries and temporary pairs of a chunk.

        Args:
            h: buffer (L, rows, B, D) for the normed inputs. `rows` positions are handled at a time.
            raw: buffer (L, rows, B, (H + 2 G) K) for their products with Q, K and V.
            temporary_pairs: buffer (L, rows, B, 2 G K), for destination 2.
            destination: where pairs go. 0: nowhere; 1: into their slots; 2: to `temporary_pairs`.
            queries: whether queries are made. They are also made where the forward has kept raw products.
        """
        L, B, C, rows = self.shape.L, self.shape.B, self.shape.C, h.shape[1]
        w, kept = self.weights, self.shape.keeps_raw and self.reverse
        for first in range(0, C, rows):
            self.norm_rows(h, first, rows, outputs=False)
            if not kept:
                self.products.multiply(h.flatten(1, 2), w.qkv, raw.flatten(1, 2))
            kernels.inputs_to_heads[(B, rows, L)](
                self.table, raw, w.q_norm, w.k_norm, w.qkv_bias, temporary_pairs, first, rows, B, self.eps,
                **self.options.stack, **self.options.pair, H=self.sizes.H, HB=self.options.head_block,
                GB=self.options.group_block, WB=triton.next_power_of_2(self.sizes.projections), REVERSE=self.reverse,
                QUERIES=queries or kept, TEMPORARY=destination, KEEP=self.shape.keeps_raw and not self.reverse,
                KEPT=kept,
            )  # fmt: skip

    def store_pairs(self, raw_pairs: Tensor, first: int, rows: int) -> None:
        """Store persistent pairs of some positions of a chunk in their slots.

        Args:
            raw_pairs: (L, rows, B, 2 G K), the products of normed outputs with K and V.
            first: first position inside the chunk.
            rows: number of positions.
        """
        shape = self.shape
        kernels.store_chunk_pairs[(shape.B, rows, shape.L)](
            self.table, raw_pairs, self.weights.k_norm, self.weights.kv_bias, first, rows, shape.B, self.eps,
            **self.options.stack, **self.options.pair, GB=self.options.group_block, REVERSE=self.reverse,
            **self.options.starts_early,
        )  # fmt: skip
