"""The backward pass: which kernel and which product when, for one chunk of every layer.

A step has three parts. First it makes values of the forward again, for all positions of the chunk in parallel. Then it
goes from the last position to the first, with data gradients alone. Last it computes the gradients of queries,
temporary pairs, inputs and all weights, in parallel again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from recurformer.scan.fused import kernels as triton_kernels
from recurformer.scan.fused.launches import Pass
from recurformer.scan.fused.weights import GradientSums
from recurformer.scan.fused.workspace import Workspace
from recurformer.scan.schedule import Block, Schedule

kernels: Any = triton_kernels  # Triton checks the types of a launch when it compiles

LEAF_HEADS, LEAF_WARPS, LEAF_ROWS = 2, 1, 2  # heads, warps, and queries at a time of a program of `leaf_gradient`
PULL_QUERIES, PULL_WARPS = 64, 4  # queries at a time and warps of a pull
QUERY_KEYS, QUERY_WARPS = 64, 4  # keys at a time and warps of `query_gradient`


@dataclass
class BackwardBuffers:
    """Buffers of the backward for a chunk. gX is the gradient of X.

    Their shape is (L, C, B, width), and D is the width, unless a comment names another.
    """

    # Values of the forward.
    h_x: Tensor  # normed inputs
    h_z: Tensor  # normed outputs
    h_y: Tensor  # normed y
    raw: Tensor  # (H + 2 G) K: products with Q, K and V; empty where they are kept
    raw_keys: Tensor  # G K: products of h_z with K
    temporary_pairs: Tensor  # 2 G K
    a: Tensor  # H K
    branch: Tensor  # the product with O
    y: Tensor  # float32
    up: Tensor  # F or 2 F: inner values of the MLP; empty where they are kept
    inner: Tensor  # F: the same activated
    # Gradients made position by position.
    g_pairs: Tensor  # 2 G K, float32
    g_raw_pairs: Tensor  # 2 G K: of the products with K and V
    key_norm_parts: Tensor  # G K: each row's part of the gradient of the key norm's weight
    g_hz: Tensor
    gz: Tensor  # (L, B, D), float32
    scaled_gz: Tensor  # gz times the branch scale
    g_inner: Tensor  # (L, B, F)
    g_up: Tensor  # F or 2 F
    g_hy: Tensor  # (L, B, D)
    gy: Tensor  # float32
    scaled_gy: Tensor  # gy times the branch scale
    ga: Tensor  # H K
    delta: Tensor  # H, float32
    # Gradients made of those in parallel.
    gq: Tensor  # H K
    g_temporary: Tensor  # 2 H K: each query head's part for its temporary key, then value
    g_raw: Tensor  # (H + 2 G) K: of the products with Q, K and V
    g_hx: Tensor
    ring: Tensor  # (L, 2, C, B, D), float32: gradients of inputs, for the layer below; empty without one

    @classmethod
    def empty(cls, workspace: Workspace) -> BackwardBuffers:
        """Return new buffers."""
        shape, s, f32 = workspace.shape, workspace.sizes, torch.float32
        L, B, C, new = shape.L, shape.B, shape.C, workspace.new_buffer

        def chunk(width: int, dtype: torch.dtype | None = None) -> Tensor:
            return new(L, C, B, width, dtype=dtype)

        return cls(
            h_x=chunk(s.D),
            h_z=chunk(s.D),
            h_y=chunk(s.D),
            raw=new(L, 0 if shape.keeps_raw else C, B, s.projections),
            raw_keys=chunk(s.keys),
            temporary_pairs=chunk(s.pairs),
            a=chunk(s.queries),
            branch=chunk(s.D),
            y=chunk(s.D, f32),
            up=new(L, 0 if shape.keeps_inner else C, B, s.inner),
            inner=chunk(s.F),
            g_pairs=chunk(s.pairs, f32),
            g_raw_pairs=chunk(s.pairs),
            key_norm_parts=chunk(s.keys),
            g_hz=chunk(s.D),
            gz=new(L, B, s.D, dtype=f32),
            scaled_gz=chunk(s.D),
            g_inner=new(L, B, s.F),
            g_up=chunk(s.inner),
            g_hy=new(L, B, s.D),
            gy=chunk(s.D, f32),
            scaled_gy=chunk(s.D),
            ga=chunk(s.queries),
            delta=chunk(s.H, f32),
            gq=chunk(s.queries),
            g_temporary=chunk(2 * s.queries),
            g_raw=chunk(s.projections),
            g_hx=chunk(s.D),
            ring=new(L if L > 1 else 0, 2, C, B, s.D, dtype=f32),
        )


class BackwardPass(Pass):
    """The backward pass of one shape."""

    reverse = True

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace)
        self.schedule = Schedule(self.shape.C, 0, None, self.shape.leaf_backward)
        self.buffers = BackwardBuffers.empty(workspace)
        self.gradients = GradientSums(self.shape, self.weights, workspace.parts, workspace.new_buffer)

    def restore(self) -> None:
        """Make a chunk's queries and persistent pairs again, from x and z, ahead of the whole backward."""
        b = self.buffers
        self.prepare(b.h_x, b.raw, b.raw, destination=0, queries=True)
        self.norm_rows(b.h_z, 0, self.shape.C, outputs=True)
        self.products.multiply(b.h_z.flatten(1, 2), self.weights.kv, b.g_raw_pairs.flatten(1, 2))
        self.store_pairs(b.g_raw_pairs, 0, self.shape.C)

    def step(self) -> None:
        """Compute the gradients of a chunk of every layer."""
        self.repeat_forward()
        self.pull()
        for r in reversed(range(self.shape.C)):
            push = self.schedule.push(r, slice(0, self.shape.C))
            if push is not None:
                self.push(push)
            self.position(r)
        self.inputs_and_queries()
        self.weight_gradients()

    def repeat_forward(self) -> None:
        """Make the values again that the forward had for the chunk and did not keep."""
        b, w, shape, options, products = self.buffers, self.weights, self.shape, self.options, self.products
        L, B, C, width = shape.L, shape.B, shape.C, self.sizes.queries
        self.prepare(b.h_x, b.raw, b.temporary_pairs, destination=2, queries=False)
        self.norm_rows(b.h_z, 0, C, outputs=True)
        if self.workspace.normed_heads:
            products.multiply(b.h_z.flatten(1, 2), w.kv[:, : self.sizes.keys], b.raw_keys.flatten(1, 2))
        kernels.load_attended[(B, C, L)](
            self.table, b.a, B, **options.stack, W=width, WB=triton.next_power_of_2(width), num_warps=4
        )
        products.multiply(b.a.flatten(1, 2), w.o, b.branch.flatten(1, 2))
        kernels.attended_rows[(B, C, L)](
            self.table, b.branch, w.o_bias, w.mlp_norm, b.y, b.h_y, 0, C, B, self.branch_scale, self.eps,
            **options.stack, **options.row, BIAS=shape.config.attention_bias, REVERSE=True, **options.starts_after,
        )  # fmt: skip
        if not shape.keeps_inner:
            products.multiply(b.h_y.flatten(1, 2), w.up, b.up.flatten(1, 2))

    def pull(self) -> None:
        """Start the gradients of the chunk's pairs with those from all queries of later chunks."""
        self._gather(slice(0, 0), slice(0, self.shape.C), PULL_QUERIES, PULL_WARPS, PULL=True)

    def push(self, block: Block) -> None:
        """Add the gradients from a tile's queries to its pairs."""
        queries = block.queries.stop - block.queries.start
        tile_queries, warps = min(32, max(16, queries)), 1 if queries <= 8 else 4
        self._gather(block.queries, block.keys, tile_queries, warps, PULL=False)

    def _gather(self, queries: slice, keys: slice, tile_queries: int, warps: int, **options: Any) -> None:
        b, shape = self.buffers, self.shape
        many = keys.stop - keys.start
        tile_keys = min(64, max(16, triton.next_power_of_2(many)))
        kernels.merged_keys_gradient[(shape.B * self.sizes.G, triton.cdiv(many, tile_keys), shape.L)](
            self.table, b.ga, b.g_pairs, self.weights.slopes, queries.start, queries.stop - queries.start, keys.start,
            many, shape.B, self.scale, **self.options.stack, **self.options.attention, **self.options.matrix,
            BM=tile_queries, BN=tile_keys, num_warps=warps, **options,
        )  # fmt: skip

    def position(self, r: int) -> None:
        """Send the gradient of position r's pair back through its MLP and to its attention output."""
        b, w, options, products = self.buffers, self.weights, self.options, self.products
        L, B, sums = self.shape.L, self.shape.B, self.gradients
        if r % self.shape.leaf_backward < self.shape.leaf_backward - 1:
            self.leaf(r)
        kernels.pair_gradient[(B, L)](
            self.table, b.g_pairs, b.raw_keys, w.kv_bias, w.k_norm, b.g_raw_pairs, b.key_norm_parts, r, B, self.eps,
            **options.stack, **options.pair, GB=options.group_block, **options.starts_early,
        )  # fmt: skip
        products.multiply(b.g_raw_pairs[:, r], w.kv, b.g_hz[:, r], transposed=False)
        kernels.output_gradient[(B, L)](
            self.table, b.ring, b.g_hz, w.attention_norm, b.gz, b.scaled_gz, sums["attention_norm_of_outputs"], r, B,
            self.branch_scale, self.eps, **options.stack, **options.row, **options.starts_early,
        )  # fmt: skip
        if products.fuses_activation:
            up = None if self.shape.keeps_inner else b.up[:, r]
            products.multiply_tiled(
                b.scaled_gz[:, r], w.down, b.g_up[:, r], False, self.workspace.activation, up, b.inner[:, r], r
            )
        else:
            products.multiply(b.scaled_gz[:, r], w.down, b.g_inner, transposed=False)
            self.activation(r)
        products.multiply(b.g_up[:, r], w.up, b.g_hy, transposed=False)
        kernels.attended_gradient[(B, L)](
            self.table, b.y, b.g_hy, w.mlp_norm, b.gz, b.gy, b.scaled_gy, sums["mlp_norm"], r, B, self.branch_scale,
            self.eps, **options.stack, **options.row, **options.starts_early,
        )  # fmt: skip
        products.multiply(b.scaled_gy[:, r], w.o, b.ga[:, r], transposed=False)

    def leaf(self, r: int) -> None:
        """Add the gradients from later queries of the same leaf to pair r."""
        b, shape = self.buffers, self.shape
        heads = min(LEAF_HEADS, self.options.group_block)
        kernels.leaf_gradient[(shape.B * triton.cdiv(self.sizes.G, heads), shape.L)](
            self.table, b.ga, b.delta, b.g_pairs, self.weights.slopes, r, shape.B, self.scale, **self.options.stack,
            **self.options.attention, S=shape.leaf_backward, HP=heads, RB=min(LEAF_ROWS, shape.leaf_backward),
            num_warps=LEAF_WARPS, **self.options.starts_early,
        )  # fmt: skip

    def activation(self, r: int) -> None:
        """Multiply the gradient of position r's inner values by the activation's slope."""
        b, F, B = self.buffers, self.sizes.F, self.shape.B
        block = min(2048, triton.next_power_of_2(F))
        kernels.activation_gradient[(B, triton.cdiv(F, block), self.shape.L)](
            self.table, b.up, self.weights.up_bias, b.g_inner, b.g_up, b.inner, r, B, **self.options.stack, F=F,
            FB=block, KIND=self.workspace.activation, BIAS=self.shape.config.mlp_bias, KEPT=self.shape.keeps_inner,
            num_warps=8 if block > 1024 else 4, **self.options.starts_early,
        )  # fmt: skip

    def inputs_and_queries(self) -> None:
        """Compute the gradients of the chunk's queries, temporary pairs and inputs."""
        b, w, shape, options, sums = self.buffers, self.weights, self.shape, self.options, self.gradients
        L, B, parts, s = shape.L, shape.B, self.workspace.parts, self.sizes
        tile_queries = min(64, max(16, shape.C))
        kernels.query_gradient[(B * s.H, triton.cdiv(shape.C, tile_queries), L)](
            self.table, b.ga, b.temporary_pairs, w.slopes, b.gq, b.g_temporary, B, self.scale, **options.stack,
            **options.attention, **options.matrix, BM=tile_queries, BN=QUERY_KEYS, num_warps=QUERY_WARPS,
        )  # fmt: skip
        # Without QK-norms the kernel adds to no sums; it gets any tensor in their place.
        q_sums, k_sums = (sums[name if name in sums else "attention_norm"] for name in ("q_norm", "k_norm"))
        kernels.heads_gradient[(parts, L)](
            self.table, b.gq, b.g_temporary, b.raw, w.qkv_bias, w.q_norm, w.k_norm, b.g_raw, q_sums, k_sums, B,
            self.eps, **options.stack, **options.pair, H=s.H, HB=options.head_block, GB=options.group_block,
            PARTS=parts, KEPT=shape.keeps_raw,
        )  # fmt: skip
        self.products.multiply(b.g_raw.flatten(1, 2), w.qkv, b.g_hx.flatten(1, 2), transposed=False)
        kernels.input_gradient[(parts, L)](
            self.table, b.ring, b.g_hx, w.attention_norm, b.gy, sums["attention_norm"], B, self.eps, **options.stack,
            **options.row, PARTS=parts,
        )  # fmt: skip

    def weight_gradients(self) -> None:
        """Add the chunk's part to the gradients of matrices, biases and the key norm's weight."""
        b, sums = self.buffers, self.gradients
        for name, g, inputs in (
            ("qkv", b.g_raw, b.h_x), ("kv", b.g_raw_pairs, b.h_z), ("o", b.scaled_gy, b.a), ("up", b.g_up, b.h_y),
            ("down", b.scaled_gz, b.inner),
        ):  # fmt: skip
            self.products.accumulate(sums[name], g.flatten(1, 2), inputs.flatten(1, 2))
            if f"{name}_bias" in sums:
                sums[f"{name}_bias"].add_(g.flatten(1, 2).sum(1, dtype=torch.float32))
        if self.workspace.normed_heads:
            # The heads share a weight, or have one each: the width of the sum says which.
            total = sums["k_norm_of_outputs"]
            total += b.key_norm_parts.view(self.shape.L, -1, total.shape[1]).sum(1, dtype=torch.float32)
