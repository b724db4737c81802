# Triton compiles this file, so a type checker cannot read it.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportAssignmentType=false, reportReturnType=false
"""Kernels that work row by row: the embedding, the norms between the products of several rows, the activation."""

from __future__ import annotations

import triton
import triton.language as tl

from recurformer.generation.fused.kernels.parts import begin
from recurformer.scan.fused.kernels.common import activated, await_kernel, normalised


@triton.jit
def embed(tokens, slot, valid, table, x, capacity, D: tl.constexpr, DB: tl.constexpr, PADS: tl.constexpr,
          PDL: tl.constexpr):  # fmt: skip
    """Write the embedding of the tokens to x; zeros at pads, whose ids may be anything."""
    begin(PDL)
    b = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, DB)
    real = True
    if PADS:
        real = tl.load(valid + b * capacity + tl.load(slot)) != 0
    row = tl.load(tokens + b)
    value = tl.load(table + row * D + c, mask=(c < D) & real, other=0.0).to(tl.float32)
    await_kernel(PDL)
    tl.store(x + b * D + c, value, mask=c < D)


@triton.jit
def remember(slot, positions, pending_slot, pending_positions, B, BB: tl.constexpr, PDL: tl.constexpr):
    """Note the slot whose pairs the next step has to make."""
    begin(PDL)
    b = tl.arange(0, BB)
    n, position = tl.load(slot), tl.load(positions + b, mask=b < B, other=0)
    await_kernel(PDL)
    tl.store(pending_slot, n)
    tl.store(pending_positions + b, position, mask=b < B)


@triton.jit
def add_and_norm(
    x, branch, weight, out, h, pending, B, scale, eps, D: tl.constexpr, DB: tl.constexpr, CENTRED: tl.constexpr,
    BRANCH: tl.constexpr,
):  # fmt: skip
    """Write y = x + scale branch to out (BRANCH; otherwise y = x) and norm(y) to h.

    Rows of h from B on are norm(pending).
    """
    b = tl.program_id(0).to(tl.int64)
    new = b < B
    c = tl.arange(0, DB)
    y = tl.load(tl.where(new, x + b * D, pending + (b - B) * D) + c, mask=c < D, other=0.0)
    if BRANCH:
        y += scale * tl.load(branch + b * D + c, mask=(c < D) & new, other=0.0).to(tl.float32)
        tl.store(out + b * D + c, y, mask=(c < D) & new)
    y, _ = normalised(y, c < D, D, eps, CENTRED)
    y *= tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)
    tl.store(h + b * D + c, y.to(h.dtype.element_ty), mask=c < D)


@triton.jit
def activate(up, gate, out, F: tl.constexpr, FB: tl.constexpr, KIND: tl.constexpr):
    """Write the MLP's activation of rows (B, F)."""
    b, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * FB + tl.arange(0, FB)
    u = tl.load(up + b * F + c, mask=c < F, other=0.0).to(tl.float32)
    opened = tl.load(gate + b * F + c, mask=c < F, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    tl.store(out + b * F + c, activated(u, opened, KIND, dtype).to(dtype), mask=c < F)
