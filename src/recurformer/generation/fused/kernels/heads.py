# Triton compiles this file, so a type checker cannot read it.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportAssignmentType=false, reportReturnType=false
"""Queries and keys as a layer makes them from the rows of a product: QK-norm and rotation; and stored pairs.

`HEADS` is a `launch.Heads`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head_tile(row, first, on, STRIDE: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, PARTNER: tl.constexpr,
              HEADS: tl.constexpr):  # fmt: skip
    """Return R heads of a row from head `first` on, (RB, KB) float32; zeros outside, and everywhere unless `on`.

    PARTNER: instead of each coordinate, return the one that RoPE pairs with it.
    """
    r, c = tl.arange(0, RB)[:, None], tl.arange(0, HEADS.KB)[None, :]
    half: tl.constexpr = HEADS.K // 2
    at = row + (first + r) * STRIDE + c
    if PARTNER:
        at += tl.where(c < half, half, -half)
    return tl.load(at, mask=(r < R) & (c < HEADS.K) & on, other=0.0).to(tl.float32)


@triton.jit
def angle_row(table, position, HEADS: tl.constexpr):
    """Return cosines or sines of a position, (1, KB), from a table (capacity, K / 2)."""
    c = tl.arange(0, HEADS.KB)[None, :]
    half: tl.constexpr = HEADS.K // 2
    return tl.load(table + position * half + tl.where(c < half, c, c - half), mask=c < HEADS.K, other=0.0)


@triton.jit
def statistics(d, inside, length, eps, CENTRED: tl.constexpr):
    """Return mean (0 unless CENTRED) and 1 / rms or 1 / standard deviation of rows, each (rows, 1)."""
    mean = tl.zeros_like(tl.sum(d, 1))[:, None]
    if CENTRED:
        mean = tl.sum(d, 1)[:, None] / length
        d = tl.where(inside, d - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(d * d, 1)[:, None] / length + eps)


@triton.jit
def norm_weights(weight, first, R: tl.constexpr, RB: tl.constexpr, HEADS: tl.constexpr):
    """Return the QK-norm's weights of R heads from `first` on, and those of the coordinates that RoPE pairs with."""
    w, w_partner = 1.0, 1.0
    if HEADS.NORM > 0:
        each_head: tl.constexpr = HEADS.K if HEADS.NORM == 2 else 0
        w = head_tile(weight, first, True, each_head, R, RB, False, HEADS)
        if HEADS.ROPE:
            w_partner = head_tile(weight, first, True, each_head, R, RB, True, HEADS)
    return w, w_partner


@triton.jit
def angles(cos, sin, position, HEADS: tl.constexpr):
    """Return cosines and sines of a position; 1 and 0 without RoPE."""
    cosine, sine = 1.0, 0.0
    if HEADS.ROPE:
        cosine, sine = angle_row(cos, position, HEADS), angle_row(sin, position, HEADS)
    return cosine, sine


@triton.jit
def shaped(u, partner, weights, row, angle, eps, R: tl.constexpr, RB: tl.constexpr, HEADS: tl.constexpr):
    """Return heads (RB, KB) after QK-norm and rotation.

    u are the coordinates, `partner` those that RoPE pairs with them. `weights` comes from `norm_weights`, `angle` from
    `angles`; `row` is mean and 1 / rms of the whole row, for NORM == 2.
    """
    c = tl.arange(0, HEADS.KB)[None, :]
    mean, rstd = row
    if HEADS.NORM == 1:
        mean, rstd = statistics(u, (tl.arange(0, RB)[:, None] < R) & (c < HEADS.K), HEADS.K, eps, HEADS.CENTRED)
    if HEADS.NORM > 0:
        u = (u - mean) * rstd * weights[0]
    if HEADS.ROPE:
        if HEADS.NORM > 0:
            partner = (partner - mean) * rstd * weights[1]
        u = u * angle[0] + tl.where(c < HEADS.K // 2, -partner, partner) * angle[1]
    return u


@triton.jit
def store_pairs(raw, layers, keys, values, k_weight, cos, sin, slot, positions, B, capacity, eps, W: tl.constexpr,
                GB: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """Store pairs of several layers, from raw (layers, B, 2 G K), in `slot` of keys and values (L, B, G, capacity, K).

    layers holds the numbers of the layers. W is the width of a key norm's weight, GB a power of two of at least G K. A
    negative slot means that there is nothing to store.
    """
    G: tl.constexpr = HEADS.G
    K: tl.constexpr = HEADS.K
    b, g, i = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G, tl.program_id(1).to(tl.int64)
    n = tl.load(slot)
    if n < 0:
        return
    layer = tl.load(layers + i).to(tl.int64)
    row = raw + (i * B + b) * (2 * G * K)
    position = tl.load(positions + b)
    c = tl.arange(0, HEADS.KB)[None, :]
    u, u2 = head_tile(row, g, True, K, 1, 1, False, HEADS), 0.0
    if HEADS.ROPE:
        u2 = head_tile(row, g, True, K, 1, 1, True, HEADS)
    angle = angles(cos, sin, position, HEADS)
    weights = norm_weights(k_weight + layer * W, g, 1, 1, HEADS)
    mean, rstd = 0.0, 1.0
    if HEADS.NORM == 2:
        column = tl.arange(0, GB)[None, :]
        inside = column < G * K
        d = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
        mean, rstd = statistics(d, inside, G * K, eps, HEADS.CENTRED)
    k = shaped(u, u2, weights, (mean, rstd), angle, eps, 1, 1, HEADS)
    v = tl.load(row + (G + g) * K + c, mask=c < K, other=0.0)
    at = (((layer * B + b) * G + g) * capacity + n) * K + c
    tl.store(keys + at, k.to(keys.dtype.element_ty), mask=c < K)
    tl.store(values + at, v, mask=c < K)
