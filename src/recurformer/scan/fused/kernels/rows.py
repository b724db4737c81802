# Triton compiles this file; to a type checker it is not Python.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false
"""Kernels of the forward that work on rows: norms, residuals, and heads made of products.

Each program handles one row, which is one position of one sequence in one layer. Buffers that live for a chunk are
(L, C, B, ...) or, for some of its positions, (L, rows, B, ...).
"""

from __future__ import annotations

import triton
import triton.language as tl

from recurformer.scan.fused.kernels.common import await_kernel, normalised
from recurformer.scan.fused.kernels.heads import make_heads, pair_halves, store_halves, two_halves
from recurformer.scan.fused.kernels.table import (
    KV,
    LENGTH,
    LSE,
    PAST,
    A,
    Q,
    chunk_of,
    input_row,
    output_row,
    pointer,
    raw_row,
)


@triton.jit
def norm_chunk(
    table, out, weight, r0, rows, B, eps, L: tl.constexpr, C: tl.constexpr, D: tl.constexpr, DB: tl.constexpr,
    CENTRED: tl.constexpr, OUTPUTS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Write the norm before attention to out (L, rows, B, D), for positions r0, r0 + 1, ... of a chunk.

    The norm is that of the layer's inputs, or of its outputs (OUTPUTS), of which persistent pairs are made.
    """
    b, r, l = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, _, active = chunk_of(table, l, L, C, REVERSE)
    i = start + r0 + r
    c = tl.arange(0, DB)
    mask = (c < D) & active & (i < tl.load(table + LENGTH))
    if OUTPUTS:
        row = output_row(table, l, b, i, B, D)
    else:
        row = input_row(table, l, b, i, B, D)
    x, _ = normalised(tl.load(row + c, mask=mask, other=0.0), mask, D, eps, CENTRED)
    h = x * tl.load(weight + l * D + c, mask=c < D, other=0.0)
    tl.store(out + ((l * rows + r) * B + b) * D + c, h.to(out.dtype.element_ty), mask=c < D)


@triton.jit
def inputs_to_heads(
    table, raw, q_weight, k_weight, bias, tmp, r0, rows, B, eps, L: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
    G: tl.constexpr, K: tl.constexpr, HB: tl.constexpr, GB: tl.constexpr, KB: tl.constexpr, WB: tl.constexpr,
    NORM: tl.constexpr, CENTRED: tl.constexpr, ROPE: tl.constexpr, BIAS: tl.constexpr, REVERSE: tl.constexpr,
    QUERIES: tl.constexpr, TEMPORARY: tl.constexpr, KEEP: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Make queries (QUERIES) and temporary pairs of positions r0, r0 + 1, ... of a chunk.

    They are made of raw (L, rows, B, (H + 2 G) K). TEMPORARY: where pairs go, 0 nowhere, 1 into their slots, 2 into
    tmp (L, rows, B, 2 G K). KEEP: copy raw to where the backward finds it. KEPT: read raw from there.
    """
    b, r, l = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, whole, active = chunk_of(table, l, L, C, REVERSE)
    if not active:
        return
    i = start + r0 + r
    dtype = raw.dtype.element_ty
    width: tl.constexpr = (H + 2 * G) * K
    at = raw_row(table, raw, l, rows, r, b, i, B, whole, width, KEPT)
    if KEEP:
        c = tl.arange(0, WB)
        to = raw_row(table, raw, l, rows, r, b, i, B, whole, width, True)
        tl.store(to + c, tl.load(at + c, mask=c < width, other=0.0), mask=c < width)
    b_at = bias + l * width
    if QUERIES:
        q_w = q_weight + l * (H * K if NORM == 2 else K)
        h = tl.arange(0, HB)
        u1, u2, m1, m2 = make_heads(table, at, b_at, q_w, b, i, h, H, K, KB, eps, NORM, CENTRED, ROPE, BIAS, 0)
        p1, p2, _, _ = two_halves(pointer(table, Q, dtype) + ((l * whole + i) * B + b) * (H * K), h, H, K, KB)
        tl.store(p1, u1.to(dtype), mask=m1)
        tl.store(p2, u2.to(dtype), mask=m2)
    if TEMPORARY > 0:
        if TEMPORARY == 1:
            past = tl.load(table + PAST)
            to = pointer(table, KV, dtype) + ((l * (past + whole) + past + i) * B + b) * (2 * G * K)
        else:
            to = tmp + ((l * rows + r) * B + b) * (2 * G * K)
        k_w = k_weight + l * (G * K if NORM == 2 else K)
        g = tl.arange(0, GB)
        k1, k2, v1, v2 = pair_halves(table, at + H * K, b_at + H * K, k_w, b, i, g, eps, G, K, KB, NORM, CENTRED, ROPE,
                                     BIAS, 0)  # fmt: skip
        store_halves(to, k1, k2, g, G, K, KB)
        store_halves(to + G * K, v1, v2, g, G, K, KB)


@triton.jit
def store_chunk_pairs(
    table, raw, k_weight, bias, r0, rows, B, eps, L: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    K: tl.constexpr, GB: tl.constexpr, KB: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr,
    ROPE: tl.constexpr, BIAS: tl.constexpr, REVERSE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Make persistent pairs of positions r0, r0 + 1, ... of raw (L, rows, B, 2 G K), and store them in their slots."""
    b, r, l = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, whole, active = chunk_of(table, l, L, C, REVERSE)
    if not active:
        return
    i, past = start + r0 + r, tl.load(table + PAST)
    to = pointer(table, KV, raw.dtype.element_ty) + ((l * (past + whole) + past + i) * B + b) * (2 * G * K)
    at = raw + ((l * rows + r) * B + b) * (2 * G * K)
    k_w = k_weight + l * (G * K if NORM == 2 else K)
    b_at = bias + l * (2 * G * K)
    await_kernel(EARLY)
    g = tl.arange(0, GB)
    k1, k2, v1, v2 = pair_halves(table, at, b_at, k_w, b, i, g, eps, G, K, KB, NORM, CENTRED, ROPE, BIAS, 0)
    store_halves(to, k1, k2, g, G, K, KB)
    store_halves(to + G * K, v1, v2, g, G, K, KB)


@triton.jit
def keep_chunk(
    table, a, lse, B, L: tl.constexpr, C: tl.constexpr, H: tl.constexpr, HB: tl.constexpr, W: tl.constexpr,
    WB: tl.constexpr,
):  # fmt: skip
    """Copy a chunk's attention outputs and log-sum-exps to where the backward finds them."""
    b, r, l = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, whole, active = chunk_of(table, l, L, C, False)
    if not active:
        return
    here, there = (l * C + r) * B + b, (l * whole + start + r) * B + b
    c, h = tl.arange(0, WB), tl.arange(0, HB)
    kept = tl.load(a + here * W + c, mask=c < W, other=0.0)
    tl.store(pointer(table, A, a.dtype.element_ty) + there * W + c, kept, mask=c < W)
    tl.store(pointer(table, LSE, tl.float32) + there * H + h, tl.load(lse + here * H + h, mask=h < H), mask=h < H)


@triton.jit
def load_attended(table, out, B, L: tl.constexpr, C: tl.constexpr, W: tl.constexpr, WB: tl.constexpr):
    """Copy a chunk of the kept attention outputs to out (L, C, B, H K), where products read it."""
    b, r, l = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, whole, active = chunk_of(table, l, L, C, True)
    c = tl.arange(0, WB)
    at = pointer(table, A, out.dtype.element_ty) + ((l * whole + start + r) * B + b) * W + c
    a = tl.load(at, mask=(c < W) & active, other=0.0)
    tl.store(out + ((l * C + r) * B + b) * W + c, a, mask=c < W)


@triton.jit
def attended_rows(
    table, branch, bias, weight, y, h, r0, rows, B, s, eps, L: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    DB: tl.constexpr, CENTRED: tl.constexpr, BIAS: tl.constexpr, REVERSE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write y = x + s (branch + bias) and its norm h, (L, rows, B, D), for positions r0, r0 + 1, ... of the chunk."""
    b, r, l = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, _, active = chunk_of(table, l, L, C, REVERSE)
    c = tl.arange(0, DB)
    mask = c < D
    at = ((l * rows + r) * B + b) * D + c
    if not active:
        if REVERSE:  # a NaN that an earlier call left would reach the sums of weight gradients, as 0 times NaN
            tl.store(y + at, tl.zeros([DB], tl.float32), mask=mask)
            tl.store(h + at, tl.zeros([DB], h.dtype.element_ty), mask=mask)
        return
    i = start + r0 + r
    x = tl.load(input_row(table, l, b, i, B, D) + c, mask=mask & (i < tl.load(table + LENGTH)), other=0.0)
    w = tl.load(weight + l * D + c, mask=mask, other=0.0)
    await_kernel(EARLY)
    o = tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        o += tl.load(bias + l * D + c, mask=mask, other=0.0)
    x += s * o
    tl.store(y + at, x, mask=mask)
    xhat, _ = normalised(x, mask, D, eps, CENTRED)
    tl.store(h + at, (xhat * w).to(h.dtype.element_ty), mask=mask)


@triton.jit
def finished_rows(
    table, branch, bias, weight, y, h, r, B, s, eps, L: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    DB: tl.constexpr, CENTRED: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Store z = y + s (branch + bias) as the layer's output, and write its norm h; buffers are (L, B, D)."""
    b, l = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    start, _, active = chunk_of(table, l, L, C, False)
    if not active:
        return
    i = start + r
    c = tl.arange(0, DB)
    mask = c < D
    at, row = (l * B + b) * D + c, output_row(table, l, b, i, B, D)
    inside, w = i < tl.load(table + LENGTH), tl.load(weight + l * D + c, mask=mask, other=0.0)
    before = tl.load(y + at, mask=mask, other=0.0)
    await_kernel(EARLY)
    z = tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        z += tl.load(bias + l * D + c, mask=mask, other=0.0)
    z = before + s * z
    tl.store(row + c, z, mask=mask & inside)
    xhat, _ = normalised(z, mask, D, eps, CENTRED)
    tl.store(h + at, (xhat * w).to(h.dtype.element_ty), mask=mask)
