"""The forward pass: which kernel and which product when, for one chunk of every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from recurformer.scan.fused import kernels as triton_kernels
from recurformer.scan.fused.launches import Pass
from recurformer.scan.fused.workspace import Workspace
from recurformer.scan.schedule import Block, Schedule

kernels: Any = triton_kernels  # Triton checks the types of a launch when it compiles

LEAF_HEADS, LEAF_WARPS = 2, 1  # key-value heads and warps of a program of `attend_leaf`
PULL_KEYS, PULL_WARPS = 64, 4  # keys at a time and warps of a pull
L2_BYTES = 24 * 2**20  # bytes of queries, temporary pairs and the products behind them that stay in the L2 cache


@dataclass
class ForwardBuffers:
    """Buffers of the forward for a chunk. `some` is the number of positions whose queries are made at a time."""

    h_some: Tensor  # (L, some, B, D), normed inputs
    raw: Tensor  # (L, some, B, (H + 2 G) K), their products with Q, K and V
    maximum: Tensor  # (L, C, B, H), softmax states, float32
    denominator: Tensor  # (L, C, B, H)
    numerator: Tensor  # (L, C, B, H, K)
    a: Tensor  # (L, C, B, H K), attention outputs
    lse: Tensor  # (L, C, B, H), float32
    branch: Tensor  # (L, B, D), the product with O or with down
    y: Tensor  # (L, B, D), float32
    h: Tensor  # (L, B, D), the norm of y, then of z
    up: Tensor  # (L, B, F or 2 F)
    inner: Tensor  # (L, B, F), the same activated
    raw_pairs: Tensor  # (L, B, 2 G K), the products of the normed output with K and V

    @classmethod
    def empty(cls, workspace: Workspace, some: int) -> ForwardBuffers:
        """Return new buffers."""
        L, B, C, f32 = workspace.shape.L, workspace.shape.B, workspace.shape.C, torch.float32
        s, new = workspace.sizes, workspace.new_buffer
        return cls(
            h_some=new(L, some, B, s.D),
            raw=new(L, some, B, s.projections),
            maximum=new(L, C, B, s.H, dtype=f32),
            denominator=new(L, C, B, s.H, dtype=f32),
            numerator=new(L, C, B, s.H, s.K, dtype=f32),
            a=new(L, C, B, s.queries),
            lse=new(L, C, B, s.H, dtype=f32),
            branch=new(L, B, s.D),
            y=new(L, B, s.D, dtype=f32),
            h=new(L, B, s.D),
            up=new(L, B, s.inner),
            inner=new(L, B, s.F),
            raw_pairs=new(L, B, s.pairs),
        )


class ForwardPass(Pass):
    """The forward pass of one shape."""

    reverse = False

    def __init__(self, workspace: Workspace) -> None:
        super().__init__(workspace)
        self.schedule = Schedule(self.shape.C, 0, None, self.shape.leaf)
        self.buffers = ForwardBuffers.empty(workspace, self.positions_at_once)

    @property
    def positions_at_once(self) -> int:
        """Positions whose queries and temporary pairs are made at a time.

        As many as the L2 cache holds with their inputs and products, so that kernels read products from the cache. A
        stack takes the whole chunk, because its products are smaller. docs/gpu.md has the measured gain.
        """
        found, width = self.shape.C, self.sizes.D + self.sizes.projections
        while self.shape.L == 1 and found > 1 and found * self.shape.B * width * self.shape.dtype.itemsize > L2_BYTES:
            found //= 2
        return found

    def step(self) -> None:
        """Evaluate a chunk of every layer."""
        b, shape = self.buffers, self.shape
        self.prepare(b.h_some, b.raw, b.raw, destination=1, queries=True)
        self.pull()
        for r in range(shape.C):
            self.position(r)
            if (r + 1) % shape.leaf == 0:
                self.store_pairs(b.raw_pairs, r, 1)
            push = self.schedule.push(r, slice(0, shape.C))
            if push is not None:
                self.push(push)
        if shape.keeps_attention:
            self.keep_attention()

    def pull(self) -> None:
        """Start the chunk's softmax states with all earlier pairs."""
        queries, keys = slice(0, self.shape.C), slice(0, 0)  # the kernel itself finds the keys
        self._merge_keys(queries, keys, PULL_KEYS, PULL_WARPS, PULL=True, **self.options.starts_after)

    def push(self, block: Block) -> None:
        """Add a tile of finished pairs to the softmax states of later queries of the chunk."""
        keys = block.keys.stop - block.keys.start
        tile_keys, warps = min(64, max(16, keys)), 1 if keys <= 8 else 4
        self._merge_keys(block.queries, block.keys, tile_keys, warps, PULL=False, **self.options.starts_early)

    def _merge_keys(self, queries: slice, keys: slice, tile_keys: int, warps: int, **options: Any) -> None:
        b, shape = self.buffers, self.shape
        many = queries.stop - queries.start
        tile_queries = min(64, max(16, triton.next_power_of_2(many)))
        kernels.merge_keys[(shape.B * self.sizes.H, triton.cdiv(many, tile_queries), shape.L)](
            self.table, b.maximum, b.denominator, b.numerator, self.weights.slopes, queries.start, many, keys.start,
            keys.stop - keys.start, shape.B, self.scale, **self.options.stack, **self.options.attention,
            **self.options.matrix, BM=tile_queries, BN=tile_keys, num_warps=warps, **options,
        )  # fmt: skip

    def position(self, r: int) -> None:
        """Evaluate position r of the chunk: attention, both residual branches, and the products of its pair."""
        b, w, options, L, B = self.buffers, self.weights, self.options, self.shape.L, self.shape.B
        config, products = self.shape.config, self.products
        self.attend(r)
        products.multiply(b.a[:, r], w.o, b.branch)
        kernels.attended_rows[(B, 1, L)](
            self.table, b.branch, w.o_bias, w.mlp_norm, b.y, b.h, r, 1, B, self.branch_scale, self.eps,
            **options.stack, **options.row, BIAS=config.attention_bias, REVERSE=False, **options.starts_early,
        )  # fmt: skip
        if products.fuses_activation:
            products.multiply_tiled(b.h, w.up, b.inner, True, self.workspace.activation, r=r)
        else:
            products.multiply(b.h, w.up, b.up)
            self.activate(r)
        products.multiply(b.inner, w.down, b.branch)
        kernels.finished_rows[(B, L)](
            self.table, b.branch, w.down_bias, w.attention_norm, b.y, b.h, r, B, self.branch_scale, self.eps,
            **options.stack, **options.row, BIAS=config.mlp_bias, **options.starts_early,
        )  # fmt: skip
        products.multiply(b.h, w.kv, b.raw_pairs)

    def attend(self, r: int) -> None:
        """Make the attention output of position r, and store the pair of position r - 1 where they share a leaf."""
        b, w, shape, s = self.buffers, self.weights, self.shape, self.sizes
        heads = min(LEAF_HEADS, self.options.group_block)
        kernels.attend_leaf[(shape.B * triton.cdiv(s.G, heads), shape.L)](
            self.table, b.raw_pairs, w.k_norm, w.kv_bias, b.maximum, b.denominator, b.numerator, w.slopes, b.a, b.lse,
            r, shape.B, self.scale, self.eps, **self.options.stack, **self.options.pair, **self.options.visibility,
            S=shape.leaf, H=s.H, HP=heads, WB=triton.next_power_of_2(s.keys), NEW=r % shape.leaf > 0,
            KEEP=shape.keeps_attention, num_warps=LEAF_WARPS, **self.options.starts_early,
        )  # fmt: skip

    def activate(self, r: int) -> None:
        """Apply the activation to the inner values of position r, and keep them where the backward reads them."""
        b, F, B = self.buffers, self.sizes.F, self.shape.B
        block = min(2048, triton.next_power_of_2(F))
        kernels.activate_rows[(B, triton.cdiv(F, block), self.shape.L)](
            self.table, b.up, self.weights.up_bias, b.inner, r, B, b.up.stride(0), b.inner.stride(0), B,
            **self.options.stack, F=F, FB=block, KIND=self.workspace.activation, BIAS=self.shape.config.mlp_bias,
            KEEP=self.shape.keeps_inner, num_warps=8 if block > 1024 else 4, **self.options.starts_early,
        )  # fmt: skip

    def keep_attention(self) -> None:
        """Store the chunk's attention outputs and log-sum-exps for the backward."""
        b, shape, width = self.buffers, self.shape, self.sizes.queries
        kernels.keep_chunk[(shape.B, shape.C, shape.L)](
            self.table, b.a, b.lse, shape.B, **self.options.stack, H=self.sizes.H, HB=self.options.head_block, W=width,
            WB=triton.next_power_of_2(width),
        )  # fmt: skip
