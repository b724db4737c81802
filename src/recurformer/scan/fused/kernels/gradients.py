# Triton compiles this file; to a type checker it is not Python.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false
"""Kernels of the backward that work on rows: norms, residuals, activations, heads.

Several of them also add up the gradient of a norm's weight on the way, each program into a part of its own; the parts
are summed after the loop. No kernel adds with atomics, so two runs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recurformer.scan.fused.kernels.common import activated, activation_slope, await_kernel, norm_gradient, normalised
from recurformer.scan.fused.kernels.heads import half_masks, halves_at, make_heads_gradient, store_halves, two_halves
from recurformer.scan.fused.kernels.table import (
    GX,
    GZ,
    LENGTH,
    chunk_of,
    input_row,
    kept_inner,
    output_row,
    pointer,
    raw_row,
)


@triton.jit
def norm_row_gradient(
    g_at, total_at, xhat, rstd, weight, mask, width: tl.constexpr, CENTRED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Return the gradient of a norm's input, from that of its output at g_at.

    The kernel ahead writes g_at, so the wait is here. The gradient of the norm's weight is added to the sums at
    total_at, which may be read before the wait because no neighbouring kernel writes them.
    """
    total = tl.load(total_at, mask=mask, other=0.0)
    await_kernel(EARLY)
    g = tl.load(g_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(total_at, total + g * xhat, mask=mask)
    return norm_gradient(g * weight, xhat, rstd, mask, width, CENTRED)


@triton.jit
def pair_gradient(
    table, gkv, raw, bias, k_weight, g_pair, g_key, r, B, eps, L: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    K: tl.constexpr, GB: tl.constexpr, KB: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr,
    ROPE: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the products K h and V h, g_pair, from those of pair r; all buffers are (L, C, B, ...).

    g_key gets this row's part of the gradient of the key norm's weight.
    """
    b, l = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    start, _, active = chunk_of(table, l, L, C, True)
    place = (l * C + r) * B + b
    dtype = g_pair.dtype.element_ty
    p1, p2, m1, m2 = two_halves(gkv + place * (2 * G * K), tl.arange(0, GB), G, K, KB)
    t1, t2, _, _ = two_halves(g_pair + place * (2 * G * K), tl.arange(0, GB), G, K, KB)
    await_kernel(EARLY)
    g1 = tl.load(p1, mask=m1 & active, other=0.0)
    g2 = tl.load(p2, mask=m2 & active, other=0.0)
    k_w = k_weight + l * (G * K if NORM == 2 else K)
    i = tl.where(active, start + r, 0)
    g1, g2, n1, n2 = make_heads_gradient(
        table, raw + place * (G * K), bias + l * (2 * G * K), k_w, g1, g2, b, i, G, K, GB, KB, eps, NORM, CENTRED, ROPE,
        BIAS,
    )  # fmt: skip
    tl.store(t1, g1.to(dtype), mask=m1)
    tl.store(t2, g2.to(dtype), mask=m2)
    if NORM > 0:
        k1, k2, _, _ = two_halves(g_key + place * (G * K), tl.arange(0, GB), G, K, KB)
        tl.store(k1, n1.to(dtype), mask=m1)
        tl.store(k2, n2.to(dtype), mask=m2)
    v1 = tl.load(p1 + G * K, mask=m1 & active, other=0.0)
    v2 = tl.load(p2 + G * K, mask=m2 & active, other=0.0)
    tl.store(t1 + G * K, v1.to(dtype), mask=m1)
    tl.store(t2 + G * K, v2.to(dtype), mask=m2)


@triton.jit
def output_gradient(
    table, ring, g_h, weight, gz, scaled, partial, r, B, s, eps, L: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    DB: tl.constexpr, CENTRED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write gz: the gradient from above, plus that of the pair through the norm of z.

    gz is (L, B, D); scaled, s gz, and g_h are (L, C, B, D). The norm weight's gradient is added to partial (L, B, D).
    """
    b, l = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    start, _, active = chunk_of(table, l, L, C, True)
    c = tl.arange(0, DB)
    mask = c < D
    i, n = start + r, tl.load(table + LENGTH)
    inside = mask & active & (i < n)
    at = ((l * C + r) * B + b) * D + c
    z = tl.load(output_row(table, l, b, i, B, D) + c, mask=inside, other=0.0)
    w = tl.load(weight + l * D + c, mask=mask, other=0.0)
    from_above = tl.load(pointer(table, GZ, tl.float32) + (b * n + i) * D + c, mask=inside & (l == L - 1), other=0.0)
    if L > 1:  # from the layer above, which had this chunk one step ago, or from the caller
        parity = (start // C) % 2
        above = ring + ((((l + 1) * 2 + parity) * C + r) * B + b) * D + c
        from_above += tl.load(above, mask=inside & (l < L - 1), other=0.0)
    xhat, rstd = normalised(z, inside, D, eps, CENTRED)
    total_at = partial + (l * B + b) * D + c
    out = norm_row_gradient(g_h + at, total_at, xhat, rstd, w, inside, D, CENTRED, EARLY) + from_above
    tl.store(gz + (l * B + b) * D + c, out, mask=mask)
    tl.store(scaled + at, (s * out).to(scaled.dtype.element_ty), mask=mask)


@triton.jit
def attended_gradient(
    table, y, g_h, weight, gz, gy, scaled, partial, r, B, s, eps, L: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    DB: tl.constexpr, CENTRED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write gy: gz, plus the gradient of the MLP through the norm of y.

    gz and g_h are (L, B, D); y, gy and scaled, s gy, are (L, C, B, D). The norm weight's gradient is added to partial
    (L, B, D).
    """
    b, l = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    _, _, active = chunk_of(table, l, L, C, True)
    c = tl.arange(0, DB)
    mask = (c < D) & active
    at = ((l * C + r) * B + b) * D + c
    w, from_z = (
        tl.load(weight + l * D + c, mask=c < D, other=0.0),
        tl.load(gz + (l * B + b) * D + c, mask=mask, other=0.0),
    )
    xhat, rstd = normalised(tl.load(y + at, mask=mask, other=0.0), mask, D, eps, CENTRED)
    total_at = partial + (l * B + b) * D + c
    g_at = g_h + (l * B + b) * D + c
    out = norm_row_gradient(g_at, total_at, xhat, rstd, w, mask, D, CENTRED, EARLY) + from_z
    tl.store(gy + at, out, mask=c < D)
    tl.store(scaled + at, (s * out).to(scaled.dtype.element_ty), mask=c < D)


@triton.jit
def activation_gradient(
    table, up, bias, g_inner, g_up, inner, r, B, L: tl.constexpr, C: tl.constexpr, F: tl.constexpr,
    FB: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr, KEPT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the MLP's inner values at position r, g_up, from those behind the activation, g_inner.

    up and g_up are (L, C, B, F or 2 F), g_inner is (L, B, F). The inner values activated go to inner (L, C, B, F), for
    the gradient of down. KEPT: read the inner values where the forward has kept them, not from up.
    """
    b, l = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    _, _, active = chunk_of(table, l, L, C, True)
    c = tl.program_id(1) * FB + tl.arange(0, FB)
    mask = c < F
    width: tl.constexpr = 2 * F if KIND == 2 else F
    at = ((l * C + r) * B + b) * width + c
    if KEPT:
        kept, _ = kept_inner(table, l, r, B, width, L, C, True, g_up.dtype.element_ty)
        up_at = kept + b * width + c
    else:
        up_at = up + at
    u = tl.load(up_at, mask=mask & active, other=0.0).to(tl.float32)
    gate = u
    if KIND == 2:
        gate = tl.load(up_at + F, mask=mask & active, other=0.0).to(tl.float32)
    if BIAS:
        u += tl.load(bias + l * width + c, mask=mask, other=0.0)
        if KIND == 2:
            gate += tl.load(bias + l * width + F + c, mask=mask, other=0.0)
    dtype = inner.dtype.element_ty
    tl.store(inner + ((l * C + r) * B + b) * F + c, activated(u, gate, KIND, dtype).to(dtype), mask=mask)
    await_kernel(EARLY)
    g = tl.load(g_inner + (l * B + b) * F + c, mask=mask & active, other=0.0).to(tl.float32)
    if KIND == 2:
        sigmoid = tl.sigmoid(gate)
        g_gate = g * u * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(g_up + at + F, g_gate.to(g_up.dtype.element_ty), mask=mask)
        g = g * gate * sigmoid
    else:
        g = g * activation_slope(u, KIND)
    tl.store(g_up + at, g.to(g_up.dtype.element_ty), mask=mask)


@triton.jit
def heads_gradient(
    table, gq, g_own, raw, bias, q_weight, k_weight, g_raw, q_partial, k_partial, B, eps, L: tl.constexpr,
    C: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, HB: tl.constexpr, GB: tl.constexpr,
    KB: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr, ROPE: tl.constexpr,
    BIAS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a chunk's products with Q, K and V, g_raw (L, C, B, (H + 2 G) K).

    They are made of the gradients of queries and temporary pairs. The gradients of the QK-norms' weights are added to
    the partials (L, PARTS, width).
    """
    part, l = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, whole, active = chunk_of(table, l, L, C, True)
    dtype = g_raw.dtype.element_ty
    b_at = bias + l * ((H + 2 * G) * K)
    q_w, k_w = q_weight + l * (H * K if NORM == 2 else K), k_weight + l * (G * K if NORM == 2 else K)
    h, g, c = tl.arange(0, HB), tl.arange(0, GB)[:, None], tl.arange(0, KB)[None, :]
    half: tl.constexpr = (K + 1) // 2
    q_m1, q_m2 = half_masks(h, H, K, KB)
    m1, m2 = half_masks(tl.arange(0, GB), G, K, KB)
    q_total1 = tl.zeros([HB, KB], tl.float32)
    k_total1 = tl.zeros([GB, KB], tl.float32)
    q_total2, k_total2 = q_total1, k_total1
    for row in range(part, C * B, PARTS):
        r, b = (row // B).to(tl.int64), (row % B).to(tl.int64)
        place = (l * C + r) * B + b
        i = tl.where(active, start + r, 0)
        at = raw_row(table, raw, l, C, r, b, i, B, whole, (H + 2 * G) * K, KEPT)
        to = g_raw + place * ((H + 2 * G) * K)
        p1, p2 = halves_at(gq + place * (H * K), h, K, KB)
        g1 = tl.load(p1, mask=q_m1 & active, other=0.0).to(tl.float32)
        g2 = tl.load(p2, mask=q_m2 & active, other=0.0).to(tl.float32)
        g1, g2, n1, n2 = make_heads_gradient(
            table, at, b_at, q_w, g1, g2, b, i, H, K, HB, KB, eps, NORM, CENTRED, ROPE, BIAS,
        )  # fmt: skip
        store_halves(to, g1.to(dtype), g2.to(dtype), h, H, K, KB)
        q_total1 += n1
        q_total2 += n2

        # The heads of a group share a pair.
        k1 = tl.zeros([GB, KB], tl.float32)
        k2, v1, v2 = k1, k1, k1
        for head in range(H // G):
            own = g_own + place * (2 * H * K) + (g * (H // G) + head) * K + c
            k1 += tl.load(own, mask=m1 & active, other=0.0).to(tl.float32)
            k2 += tl.load(own + half, mask=m2 & active, other=0.0).to(tl.float32)
            v1 += tl.load(own + H * K, mask=m1 & active, other=0.0).to(tl.float32)
            v2 += tl.load(own + H * K + half, mask=m2 & active, other=0.0).to(tl.float32)
        k1, k2, n1, n2 = make_heads_gradient(
            table, at + H * K, b_at + H * K, k_w, k1, k2, b, i, G, K, GB, KB, eps, NORM, CENTRED, ROPE, BIAS,
        )  # fmt: skip
        store_halves(to + H * K, k1.to(dtype), k2.to(dtype), tl.arange(0, GB), G, K, KB)
        store_halves(to + (H + G) * K, v1.to(dtype), v2.to(dtype), tl.arange(0, GB), G, K, KB)
        k_total1 += n1
        k_total2 += n2
    if NORM > 0:
        q_at = q_partial + (l * PARTS + part) * (H * K if NORM == 2 else K)
        k_at = k_partial + (l * PARTS + part) * (G * K if NORM == 2 else K)
        add_to_norm(q_at, q_total1, q_total2, H, K, HB, KB, NORM)
        add_to_norm(k_at, k_total1, k_total2, G, K, GB, KB, NORM)


@triton.jit
def add_to_norm(
    at, total1, total2, heads: tl.constexpr, K: tl.constexpr, HB: tl.constexpr, KB: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Add both halves of all heads to the gradient of a QK-norm's weight, which heads share unless NORM is 2."""
    if NORM == 1:
        total1, total2 = tl.sum(total1, 0)[None, :], tl.sum(total2, 0)[None, :]
        p1, p2, m1, m2 = two_halves(at, tl.arange(0, 1), 1, K, KB)
    else:
        p1, p2, m1, m2 = two_halves(at, tl.arange(0, HB), heads, K, KB)
    tl.store(p1, tl.load(p1, mask=m1, other=0.0) + total1, mask=m1)
    tl.store(p2, tl.load(p2, mask=m2, other=0.0) + total2, mask=m2)


@triton.jit
def input_gradient(
    table, ring, g_h, weight, gy, partial, B, eps, L: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    DB: tl.constexpr, PARTS: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a chunk's inputs: the first layer's to the caller, others to the ring for the layer below.

    The norm weight's gradient is added to partial (L, PARTS, D).
    """
    part, l = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, _, active = chunk_of(table, l, L, C, True)
    if not active:
        return
    c, n = tl.arange(0, DB), tl.load(table + LENGTH)
    x, gx = input_row(table, l, 0, 0, B, D), pointer(table, GX, tl.float32)
    w = tl.load(weight + l * D + c, mask=c < D, other=0.0)
    total = tl.zeros([DB], tl.float32)
    for row in range(part, C * B, PARTS):
        r, b = (row // B).to(tl.int64), (row % B).to(tl.int64)
        i = start + r
        mask = (c < D) & (i < n)
        at = ((l * C + r) * B + b) * D + c
        xhat, rstd = normalised(tl.load(x + (b * n + i) * D + c, mask=mask, other=0.0), mask, D, eps, CENTRED)
        g = tl.load(g_h + at, mask=mask, other=0.0).to(tl.float32)
        total += g * xhat
        out = norm_gradient(g * w, xhat, rstd, mask, D, CENTRED) + tl.load(gy + at, mask=mask, other=0.0)
        if L > 1:
            parity = (start // C) % 2
            tl.store(ring + (((l * 2 + parity) * C + r) * B + b) * D + c, out, mask=mask & (l > 0))
        tl.store(gx + (b * n + i) * D + c, out, mask=mask & (l == 0))
    to = partial + (l * PARTS + part) * D + c
    tl.store(to, tl.load(to, mask=c < D, other=0.0) + total, mask=c < D)
