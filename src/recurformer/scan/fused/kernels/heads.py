# Triton compiles this file; to a type checker it is not Python.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false
"""Heads of one row: from the products with Q, K and V to queries, keys and values, and the way back of gradients.

A row of heads is (heads, K). RoPE pairs the first half of a head with its second half, so every function here handles
the two halves as two tiles (heads, K / 2). A head of odd width has a first half that is one column longer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recurformer.scan.fused.kernels.common import normalised
from recurformer.scan.fused.kernels.table import angles


@triton.jit
def halves_at(row, heads, K: tl.constexpr, KB: tl.constexpr):
    """Return the addresses of both halves of every head of a row (heads, K)."""
    first = row + heads[:, None] * K + tl.arange(0, KB)[None, :]
    return first, first + (K + 1) // 2


@triton.jit
def half_masks(h, heads: tl.constexpr, K: tl.constexpr, KB: tl.constexpr):
    """Return the masks of both halves: heads h below the number of heads, and columns that exist."""
    c = tl.arange(0, KB)[None, :]
    half: tl.constexpr = (K + 1) // 2
    return (h < heads)[:, None] & (c < half), (h < heads)[:, None] & (c + half < K)


@triton.jit
def two_halves(row, h, heads: tl.constexpr, K: tl.constexpr, KB: tl.constexpr):
    """Return the addresses and masks of both halves of the heads h of a row."""
    first, second = halves_at(row, h, K, KB)
    in_first, in_second = half_masks(h, heads, K, KB)
    return first, second, in_first, in_second


@triton.jit
def store_halves(row, u1, u2, h, heads: tl.constexpr, K: tl.constexpr, KB: tl.constexpr):
    """Store both halves of the heads h of a row."""
    p1, p2, m1, m2 = two_halves(row, h, heads, K, KB)
    tl.store(p1, u1, mask=m1)
    tl.store(p2, u2, mask=m2)


@triton.jit
def head_sums(u1, u2, FULL: tl.constexpr):
    """Return sums over the width of each head, or over the whole row (FULL), (heads, 1)."""
    s = tl.sum(u1, 1) + tl.sum(u2, 1)
    if FULL:
        s = tl.zeros_like(s) + tl.sum(s, 0)
    return s[:, None]


@triton.jit
def normalised_heads(u1, u2, m1, m2, width: tl.constexpr, eps, FULL: tl.constexpr, CENTRED: tl.constexpr):
    """Return the heads normed, each by itself or the whole row (FULL), and 1 / rms."""
    if CENTRED:
        mean = head_sums(u1, u2, FULL) / width
        u1, u2 = tl.where(m1, u1 - mean, 0.0), tl.where(m2, u2 - mean, 0.0)
    rstd = tl.rsqrt(head_sums(u1 * u1, u2 * u2, FULL) / width + eps)
    return u1 * rstd, u2 * rstd, rstd


@triton.jit
def head_weights(weight, h, heads: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, FULL: tl.constexpr):
    """Return a QK-norm's weight as two halves: of width heads K (FULL), or of width K and shared by the heads."""
    p1, p2, m1, m2 = two_halves(weight, h if FULL else h * 0, heads, K, KB)
    in_heads = (h < heads)[:, None]
    return tl.load(p1, mask=m1 & in_heads, other=0.0), tl.load(p2, mask=m2 & in_heads, other=0.0)


@triton.jit
def row_statistics(row, bias, width: tl.constexpr, WB: tl.constexpr, eps, CENTRED: tl.constexpr, BIAS: tl.constexpr):
    """Return a row's mean (0 unless CENTRED), and 1 / rms of the row less this mean."""
    c = tl.arange(0, WB)
    mask = c < width
    u = tl.load(row + c, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        u += tl.load(bias + c, mask=mask, other=0.0)
    mean = tl.sum(u, 0) / width if CENTRED else 0.0
    _, rstd = normalised(u, mask, width, eps, CENTRED)
    return mean, rstd


@triton.jit
def make_heads(
    table, raw, bias, weight, b, i, h, heads: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, eps,
    NORM: tl.constexpr, CENTRED: tl.constexpr, ROPE: tl.constexpr, BIAS: tl.constexpr, WB: tl.constexpr,
):  # fmt: skip
    """Return both halves of heads h, made of a row of raw products: bias, QK-norm and rotation; and their masks.

    NORM: 0 none, 1 each head, 2 the whole row. WB: 0 where h holds all heads of the row; else the row's width as a
    power of two, with which a norm of the whole row reads the row.
    """
    p1, p2, m1, m2 = two_halves(raw, h, heads, K, KB)
    u1 = tl.load(p1, mask=m1, other=0.0).to(tl.float32)
    u2 = tl.load(p2, mask=m2, other=0.0).to(tl.float32)
    if BIAS:
        b1, b2, _, _ = two_halves(bias, h, heads, K, KB)
        u1 += tl.load(b1, mask=m1, other=0.0)
        u2 += tl.load(b2, mask=m2, other=0.0)
    if NORM > 0:
        width: tl.constexpr = heads * K if NORM == 2 else K
        if NORM == 2 and WB > 0:
            mean, rstd = row_statistics(raw, bias, width, WB, eps, CENTRED, BIAS)
            u1, u2 = (u1 - mean) * rstd, (u2 - mean) * rstd
        else:
            u1, u2, _ = normalised_heads(u1, u2, m1, m2, width, eps, NORM == 2, CENTRED)
        w1, w2 = head_weights(weight, h, heads, K, KB, NORM == 2)
        u1, u2 = u1 * w1, u2 * w2
    if ROPE:
        cos, sin = angles(table, b, i, K, KB)
        u1, u2 = u1 * cos - u2 * sin, u2 * cos + u1 * sin
    return u1, u2, m1, m2


@triton.jit
def make_heads_gradient(
    table, raw, bias, weight, g1, g2, b, i, heads: tl.constexpr, K: tl.constexpr, HB: tl.constexpr, KB: tl.constexpr,
    eps, NORM: tl.constexpr, CENTRED: tl.constexpr, ROPE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Return the gradients of the raw products of `make_heads`, and this row's part of the norm weight's gradient."""
    if ROPE:
        cos, sin = angles(table, b, i, K, KB)
        g1, g2 = g1 * cos + g2 * sin, g2 * cos - g1 * sin
    n1, n2 = g1, g2
    if NORM > 0:
        h = tl.arange(0, HB)
        p1, p2, m1, m2 = two_halves(raw, h, heads, K, KB)
        u1 = tl.load(p1, mask=m1, other=0.0).to(tl.float32)
        u2 = tl.load(p2, mask=m2, other=0.0).to(tl.float32)
        if BIAS:
            b1, b2, _, _ = two_halves(bias, h, heads, K, KB)
            u1 += tl.load(b1, mask=m1, other=0.0)
            u2 += tl.load(b2, mask=m2, other=0.0)
        width: tl.constexpr = heads * K if NORM == 2 else K
        u1, u2, rstd = normalised_heads(u1, u2, m1, m2, width, eps, NORM == 2, CENTRED)
        w1, w2 = head_weights(weight, h, heads, K, KB, NORM == 2)
        n1, n2 = g1 * u1, g2 * u2
        g1, g2 = g1 * w1, g2 * w2
        along = head_sums(g1 * u1, g2 * u2, NORM == 2) / width
        mean = head_sums(g1, g2, NORM == 2) / width
        g1, g2 = g1 - u1 * along, g2 - u2 * along
        if CENTRED:
            g1, g2 = tl.where(m1, g1 - mean, 0.0), tl.where(m2, g2 - mean, 0.0)
        g1, g2 = g1 * rstd, g2 * rstd
    return g1, g2, n1, n2


@triton.jit
def pair_halves(
    table, raw, bias, weight, b, i, g, eps, G: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, NORM: tl.constexpr,
    CENTRED: tl.constexpr, ROPE: tl.constexpr, BIAS: tl.constexpr, WB: tl.constexpr,
):  # fmt: skip
    """Return both halves of keys and of values g in raw's dtype, made of raw (2 G K). WB is that of `make_heads`."""
    dtype = raw.dtype.element_ty
    k1, k2, _, _ = make_heads(table, raw, bias, weight, b, i, g, G, K, KB, eps, NORM, CENTRED, ROPE, BIAS, WB)
    v1, v2, _, _ = make_heads(
        table, raw + G * K, bias + G * K, weight, b, i, g, G, K, KB, eps, 0, CENTRED, False, BIAS, 0
    )
    return k1.to(dtype), k2.to(dtype), v1.to(dtype), v2.to(dtype)
