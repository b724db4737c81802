# Triton compiles this; to a type checker it is no Python.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false
"""Triton kernels of the fused scan: attention between blocks, and everything between two matrix products.

They work on L stacked layers, of which layer l handles chunk w - l at step w (backward: the mirror image); one layer by
itself is L = 1. What a call owns, inputs, outputs and N-long tensors, is reached through `table`, addresses and sizes
in device memory, so that one CUDA graph of a chunk serves every chunk, every call and every N. What lives for a chunk
lies in fixed buffers, (L, C, B, ...), r naming a position inside the chunk.

Rows of activations are (position, batch): q, a and ga (L, N, B, H K), pairs (L, P + N, B, 2 G K) with keys first, what
Q, K and V make of the inputs and the MLP's inner values where they are kept, (L, N, B, (H + 2 G) K) and (L, N, B, U), x
and z (B, N, D) float32. The slot of a pair holds its temporary pair until the position is reached. Norm statistics,
softmax and sums are float32, offsets 64 bits.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Slots of the table.
STEP, LENGTH, PAST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # w, N, P
X, Z, Q, KV, A, LSE = (tl.constexpr(slot) for slot in range(3, 9))
POSITIONS, QUERY_SEGMENTS, KEY_SEGMENTS, FIRST, LAST = (tl.constexpr(slot) for slot in range(9, 14))
COS, SIN, ROTATION_STRIDE = tl.constexpr(14), tl.constexpr(15), tl.constexpr(16)
GZ, GX, GA, DELTA, UP, RAW = (tl.constexpr(slot) for slot in range(17, 23))
SLOTS = 23

COMPILED = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")  # the interpreter knows no instructions of the GPU
NOTHING = tl.constexpr(-1e30)  # maximum of no scores: finite, so that the state of nothing makes no NaN


# --- shared pieces ---------------------------------------------------------------------------------------------------


@triton.jit
def await_kernel(EARLY: tl.constexpr):
    """What follows may read what the kernel before writes. EARLY: this one was started before that one had ended.

    Ahead of it, weights are read, and what kernels before that one have written. The next one may start from here on.
    That those have ended follows from each kernel's waiting: programs that return early don't, so that of every kernel
    some must not return. Nothing is written ahead of it.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def pointer(table, slot, dtype: tl.constexpr):
    """What a slot points to; that it is aligned has to be said of the pointer for loads to be wide."""
    return tl.multiple_of(tl.load(table + slot).to(tl.pointer_type(dtype)), 16)


@triton.jit
def chunk_of(table, l, L: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr):
    """The first position of the chunk that layer l works on, N rounded up to chunks, and whether there is work."""
    w, n = tl.load(table + STEP), tl.load(table + LENGTH)
    chunks = (n + C - 1) // C
    if REVERSE:
        c = chunks - 1 - (w - (L - 1 - l))
    else:
        c = w - l
    return c * C, chunks * C, (c >= 0) & (c < chunks)


@triton.jit
def input_row(table, l, b, i, B, D: tl.constexpr):
    """Address of layer l's input at (b, i): x, or the outputs of the layer below."""
    n = tl.load(table + LENGTH)
    x, z = pointer(table, X, tl.float32), pointer(table, Z, tl.float32)
    return tl.where(l == 0, x, z + (l - 1) * (n * B) * D) + (b * n + i) * D


@triton.jit
def output_row(table, l, b, i, B, D: tl.constexpr):
    n = tl.load(table + LENGTH)
    return pointer(table, Z, tl.float32) + (((l * B + b) * n + i) * D)


@triton.jit
def normalised(x, mask, width: tl.constexpr, eps, CENTRED: tl.constexpr):
    """A masked row and its 1 / rms, or 1 / standard deviation of the centred row."""
    if CENTRED:
        x = tl.where(mask, x - tl.sum(x, 0) / width, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    return x * rstd, rstd


@triton.jit
def norm_gradient(g, xhat, rstd, mask, width: tl.constexpr, CENTRED: tl.constexpr):
    """Gradient of a norm's input, g being that of its output times the norm's weight."""
    gx = g - xhat * (tl.sum(g * xhat, 0) / width)
    if CENTRED:
        gx = tl.where(mask, gx - tl.sum(g, 0) / width, 0.0)
    return gx * rstd


@triton.jit
def norm_row_gradient(
    g_at, total_at, xhat, rstd, weight, mask, width: tl.constexpr, CENTRED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Gradient of a norm's input from that of its output at g_at, which the kernel ahead writes.

    That of its weight is added to the sums at total_at, which no kernel near writes.
    """
    total = tl.load(total_at, mask=mask, other=0.0)
    await_kernel(EARLY)
    g = tl.load(g_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(total_at, total + g * xhat, mask=mask)
    return norm_gradient(g * weight, xhat, rstd, mask, width, CENTRED)


@triton.jit
def exp(x):
    """In two instructions: the compiler's own takes five, to make numbers below 2^-126, which are 0 here."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp(x)


@triton.jit
def reciprocal(x):
    """1 / x in one instruction, for x that is neither huge nor tiny."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def normal(u):
    """P(X > |u|) of the standard normal, and exp(-u^2 / 2): one exponential, the formula's error below 1e-7.

    Abramowitz and Stegun, formula 7.1.26, halved; the built-in erf costs several times as much.
    """
    e = exp(-0.5 * (u * u))
    t = reciprocal(1.0 + 0.231641888 * tl.abs(u))
    poly = 0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
    return t * poly * e, e


@triton.jit
def tanh(u):
    return 2.0 * tl.sigmoid(2.0 * u) - 1.0


@triton.jit
def activated(u, gate, KIND: tl.constexpr, dtype: tl.constexpr):
    """KIND 0 GELU, 1 GELU in the tanh form, 2 SiLU(gate) u, rounded where the definition rounds."""
    if KIND == 0:
        tail, _ = normal(u)
        return tl.maximum(u, 0.0) - tl.minimum(tl.abs(u), 64.0) * tail  # the tail of 64 is 0, and so it is of infinity
    elif KIND == 1:
        return 0.5 * u * (1.0 + tanh(0.7978845608028654 * (u + 0.044715 * u * u * u)))
    else:
        return u * (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)


@triton.jit
def activation_slope(u, KIND: tl.constexpr):
    """Derivative of GELU."""
    if KIND == 0:
        tail, e = normal(u)
        return tl.where(u > 0, 1.0 - tail, tail) + (0.3989422804014327 * u) * e
    else:
        t = tanh(0.7978845608028654 * (u + 0.044715 * u * u * u))
        return 0.5 * (1.0 + t) + 0.5 * u * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 3 * 0.044715 * u * u)


@triton.jit
def halves_at(row, heads, K: tl.constexpr, KB: tl.constexpr):
    """Addresses of both halves of every head of a row (heads, K): what RoPE pairs is side by side."""
    first = row + heads[:, None] * K + tl.arange(0, KB)[None, :]
    return first, first + (K + 1) // 2


@triton.jit
def half_masks(h, heads: tl.constexpr, K: tl.constexpr, KB: tl.constexpr):
    """Which of the heads h, of `heads` there are, and which columns of their halves exist."""
    c = tl.arange(0, KB)[None, :]
    half: tl.constexpr = (K + 1) // 2
    return (h < heads)[:, None] & (c < half), (h < heads)[:, None] & (c + half < K)


@triton.jit
def two_halves(row, h, heads: tl.constexpr, K: tl.constexpr, KB: tl.constexpr):
    """Addresses and masks of both halves of the heads h of a row."""
    first, second = halves_at(row, h, K, KB)
    in_first, in_second = half_masks(h, heads, K, KB)
    return first, second, in_first, in_second


@triton.jit
def head_sums(u1, u2, FULL: tl.constexpr):
    """Sums over a head's width, or over the whole row, to be broadcast."""
    s = tl.sum(u1, 1) + tl.sum(u2, 1)
    if FULL:
        s = tl.zeros_like(s) + tl.sum(s, 0)
    return s[:, None]


@triton.jit
def normalised_heads(u1, u2, m1, m2, width: tl.constexpr, eps, FULL: tl.constexpr, CENTRED: tl.constexpr):
    if CENTRED:
        mean = head_sums(u1, u2, FULL) / width
        u1, u2 = tl.where(m1, u1 - mean, 0.0), tl.where(m2, u2 - mean, 0.0)
    rstd = tl.rsqrt(head_sums(u1 * u1, u2 * u2, FULL) / width + eps)
    return u1 * rstd, u2 * rstd, rstd


@triton.jit
def head_weights(weight, h, heads: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, FULL: tl.constexpr):
    """A QK-norm's weight as two halves: of width heads K, or K and shared by the heads."""
    p1, p2, m1, m2 = two_halves(weight, h if FULL else h * 0, heads, K, KB)
    in_heads = (h < heads)[:, None]
    return tl.load(p1, mask=m1 & in_heads, other=0.0), tl.load(p2, mask=m2 & in_heads, other=0.0)


@triton.jit
def row_statistics(row, bias, width: tl.constexpr, WB: tl.constexpr, eps, CENTRED: tl.constexpr, BIAS: tl.constexpr):
    """Mean (0 unless CENTRED) and 1 / rms of the centred row."""
    c = tl.arange(0, WB)
    mask = c < width
    u = tl.load(row + c, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        u += tl.load(bias + c, mask=mask, other=0.0)
    mean = tl.sum(u, 0) / width if CENTRED else 0.0
    _, rstd = normalised(u, mask, width, eps, CENTRED)
    return mean, rstd


@triton.jit
def angles(table, b, i, K: tl.constexpr, KB: tl.constexpr):
    """Cosines and sines of a position, (1, K / 2); those behind the last position are not read."""
    n, stride = tl.load(table + LENGTH), tl.load(table + ROTATION_STRIDE)
    c = tl.arange(0, KB)[None, :]
    inside = (c < K // 2) & (i < n)
    offset = b * stride + i * (K // 2) + c
    cos = tl.load(pointer(table, COS, tl.float32) + offset, mask=inside, other=1.0)
    return cos, tl.load(pointer(table, SIN, tl.float32) + offset, mask=inside, other=0.0)


@triton.jit
def shaped(
    table, raw, bias, weight, b, i, h, heads: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, eps,
    NORM: tl.constexpr, CENTRED: tl.constexpr, ROPE: tl.constexpr, BIAS: tl.constexpr, WB: tl.constexpr,
):  # fmt: skip
    """Heads h of a row as the layer makes them: bias, QK-norm (0 none, 1 each head, 2 the whole row), rotation.

    WB: 0 when these are all heads of the row; else its width as a power of two, for a norm of the whole row.
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
def shaped_gradient(
    table, raw, bias, weight, g1, g2, b, i, heads: tl.constexpr, K: tl.constexpr, HB: tl.constexpr, KB: tl.constexpr,
    eps, NORM: tl.constexpr, CENTRED: tl.constexpr, ROPE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Back through `shaped`: gradients of the raw heads, and this row's part of those of the norm's weight."""
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
def biased(s, table, b, i, j, past, slope, B, ALIBI: tl.constexpr, SEGMENTS: tl.constexpr, inside_i, inside_j):
    """Scores of queries i (broadcast against slots j) with ALiBi, and -inf where a key is not seen.

    Without segments the distance is that of the slots. Queries are positions, keys slots: position i has slot P + i.
    """
    if SEGMENTS:
        m = past + tl.load(table + LENGTH)  # the rows of these arrays
        row = b * m
        q_seg = tl.load(pointer(table, QUERY_SEGMENTS, tl.int32) + row + past + i, mask=inside_i, other=0)
        k_seg = tl.load(pointer(table, KEY_SEGMENTS, tl.int32) + row + j, mask=inside_j, other=-1)
        if ALIBI:
            positions = pointer(table, POSITIONS, tl.int32) + row
            p_i = tl.load(positions + past + i, mask=inside_i, other=0)
            s -= slope * (p_i.to(tl.float32) - tl.load(positions + j, mask=inside_j, other=0).to(tl.float32))
        s = tl.where((q_seg == k_seg) | (j == past + i), s, float("-inf"))
    else:
        if ALIBI:
            s -= slope * ((past + i).to(tl.float32) - j.to(tl.float32))  # of vectors, exact up to 2^24 positions
    return s


# --- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def norm_chunk(
    table, out, weight, r0, rows, B, eps, L: tl.constexpr, C: tl.constexpr, D: tl.constexpr, DB: tl.constexpr,
    CENTRED: tl.constexpr, OUTPUTS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The norm before attention of inputs, or of outputs (what persistent pairs are made of), out (L, rows, B, D).

    Of positions r0 ... of a chunk.
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
def raw_row(table, raw, l, rows, r, b, i, B, whole, width: tl.constexpr, KEPT: tl.constexpr):
    """Address of what Q, K and V make of an input: in a buffer (L, rows, B, width), or where it has been kept."""
    if KEPT:
        return pointer(table, RAW, raw.dtype.element_ty) + ((l * whole + i) * B + b) * width
    return raw + ((l * rows + r) * B + b) * width


@triton.jit
def inputs_to_heads(
    table, raw, q_weight, k_weight, bias, tmp, r0, rows, B, eps, L: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
    G: tl.constexpr, K: tl.constexpr, HB: tl.constexpr, GB: tl.constexpr, KB: tl.constexpr, WB: tl.constexpr,
    NORM: tl.constexpr, CENTRED: tl.constexpr, ROPE: tl.constexpr, BIAS: tl.constexpr, REVERSE: tl.constexpr,
    QUERIES: tl.constexpr, TEMPORARY: tl.constexpr, KEEP: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Queries (QUERIES) and temporary pairs of positions r0 ... of a chunk from raw (L, rows, B, (H + 2 G) K).

    TEMPORARY: where the pairs go, 0 nowhere, 1 into their slots, 2 into tmp (L, rows, B, 2 G K). KEEP: raw is also kept
    for the backward; KEPT: it has been, and is read there.
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
        u1, u2, m1, m2 = shaped(table, at, b_at, q_w, b, i, h, H, K, KB, eps, NORM, CENTRED, ROPE, BIAS, 0)
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
def pair_halves(
    table, raw, bias, weight, b, i, g, eps, G: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, NORM: tl.constexpr,
    CENTRED: tl.constexpr, ROPE: tl.constexpr, BIAS: tl.constexpr, WB: tl.constexpr,
):  # fmt: skip
    """Both halves of one pair's keys and values g in raw's dtype, from raw (2 G K); WB as for `shaped`."""
    dtype = raw.dtype.element_ty
    k1, k2, _, _ = shaped(table, raw, bias, weight, b, i, g, G, K, KB, eps, NORM, CENTRED, ROPE, BIAS, WB)
    v1, v2, _, _ = shaped(table, raw + G * K, bias + G * K, weight, b, i, g, G, K, KB, eps, 0, CENTRED, False, BIAS, 0)
    return k1.to(dtype), k2.to(dtype), v1.to(dtype), v2.to(dtype)


@triton.jit
def store_halves(row, u1, u2, h, heads: tl.constexpr, K: tl.constexpr, KB: tl.constexpr):
    p1, p2, m1, m2 = two_halves(row, h, heads, K, KB)
    tl.store(p1, u1, mask=m1)
    tl.store(p2, u2, mask=m2)


@triton.jit
def store_pairs(
    table, raw, k_weight, bias, r0, rows, B, eps, L: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    K: tl.constexpr, GB: tl.constexpr, KB: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr,
    ROPE: tl.constexpr, BIAS: tl.constexpr, REVERSE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Persistent pairs of positions r0 ... of the chunk, from raw (L, rows, B, 2 G K), into their slots."""
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
def absorb(
    table, m_state, l_state, acc_state, slopes, q0, queries, k0, keys, B, scale, L: tl.constexpr, C: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PULL: tl.constexpr, ALIBI: tl.constexpr, SEGMENTS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Merge keys into the running softmax of a chunk's queries q0 ...

    PULL: all keys before the chunk, the past included, into states that start here; else keys k0 ... of the chunk.
    """
    b, h, l = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H, tl.program_id(2).to(tl.int64)
    start, whole, active = chunk_of(table, l, L, C, False)
    if not active:
        return
    past = tl.load(table + PAST)
    n = tl.load(table + LENGTH)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    r = q0 + row
    in_q = row < queries
    i = start + r
    c = tl.arange(0, KB)
    q_at = pointer(table, Q, DT) + ((l * whole + i)[:, None] * B + b) * (H * K) + h * K + c[None, :]
    q = tl.load(q_at, mask=in_q[:, None] & (c < K)[None, :], other=0.0)
    slope = tl.load(slopes + h) if ALIBI else 0.0
    state = ((l * C + r) * B + b) * H + h
    acc_at = acc_state + state[:, None] * K + c[None, :]
    acc_mask = in_q[:, None] & (c < K)[None, :]
    await_kernel(EARLY)
    if PULL:
        first, last = past * 0, past + start
        if SEGMENTS:
            chunks = whole // C
            first = tl.load(pointer(table, FIRST, tl.int32) + b * chunks + start // C).to(tl.int64)
        m = tl.zeros([BM], tl.float32) + NOTHING
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, KB], tl.float32)
    else:
        first, last = past + start + k0, past + start + k0 + keys
        m = tl.load(m_state + state, mask=in_q, other=NOTHING)
        total = tl.load(l_state + state, mask=in_q, other=0.0)
        acc = tl.load(acc_at, mask=acc_mask, other=0.0)
    kv = pointer(table, KV, DT) + (l * (past + whole) * B + b) * (2 * G * K) + (h // (H // G)) * K
    for j0 in range(first.to(tl.int32), last.to(tl.int32), BN):
        j = j0 + tl.arange(0, BN)
        in_k = j < last
        at = kv + j.to(tl.int64)[:, None] * B * (2 * G * K) + c[None, :]
        mask = in_k[:, None] & (c < K)[None, :]
        k = tl.load(at, mask=mask, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = biased(s, table, b, i[:, None], j[None, :], past, slope, B, ALIBI, SEGMENTS, (i < n)[:, None],
                   (j < past + n)[None, :])  # fmt: skip
        s = tl.where(in_k[None, :], s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1))
        p = exp(s - new[:, None])
        decay = exp(m - new)
        v = tl.load(at + G * K, mask=mask, other=0.0)
        acc = acc * decay[:, None] + tl.dot(p.to(DT), v, input_precision=PRECISION)
        total = total * decay + tl.sum(p, 1)
        m = new
    tl.store(m_state + state, m, mask=in_q)
    tl.store(l_state + state, total, mask=in_q)
    tl.store(acc_at, acc, mask=acc_mask)


@triton.jit
def attend(
    table, raw, k_weight, bias, m_state, l_state, acc_state, slopes, out, lse_out, r, B, scale, eps, L: tl.constexpr,
    C: tl.constexpr, S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, KB: tl.constexpr,
    HP: tl.constexpr, WB: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr, ROPE: tl.constexpr,
    BIAS: tl.constexpr, NEW: tl.constexpr, KEEP: tl.constexpr, ALIBI: tl.constexpr, SEGMENTS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Attention output of position r: its state, its temporary pair in its own slot, and the pairs of its own leaf.

    NEW: position r - 1 belongs to the leaf. Its pair is made here, of the products raw (L, B, 2 G K), and stored.
    out (L, C, B, H K), lse_out (L, C, B, H). A program has HP key-value heads of one sequence.
    """
    parts: tl.constexpr = (G + HP - 1) // HP
    b, l = tl.program_id(0).to(tl.int64) // parts, tl.program_id(1).to(tl.int64)
    start, whole, active = chunk_of(table, l, L, C, False)
    if not active:
        return
    dtype = out.dtype.element_ty
    past, n, i = tl.load(table + PAST), tl.load(table + LENGTH), start + r
    q_at = pointer(table, Q, dtype) + ((l * whole + i) * B + b) * (H * K)
    kv = pointer(table, KV, dtype) + ((l * (past + whole) + past + start) * B + b) * (2 * G * K)
    g, rows = (tl.program_id(0) % parts) * HP + tl.arange(0, HP), r - r % S + tl.arange(0, S).to(tl.int64)
    m1, m2 = half_masks(g, G, K, KB)
    seen = ((rows <= r) & (rows != r - 1))[:, None]
    s1, s2 = m1[None] & seen[:, :, None], m2[None] & seen[:, :, None]
    if not NEW:
        await_kernel(EARLY)
    for head in range(H // G):
        h = g * (H // G) + head
        at1, at2 = halves_at(0, h, K, KB)
        state = ((l * C + r) * B + b) * H + h
        acc_at = acc_state + ((l * C + r) * B + b) * (H * K)
        m = tl.load(m_state + state, mask=g < G, other=0.0)
        total = tl.load(l_state + state, mask=g < G, other=1.0)
        a1, a2 = tl.load(acc_at + at1, mask=m1, other=0.0), tl.load(acc_at + at2, mask=m2, other=0.0)
        q1 = tl.load(q_at + at1, mask=m1, other=0.0).to(tl.float32) * scale
        q2 = tl.load(q_at + at2, mask=m2, other=0.0).to(tl.float32) * scale
        slope = tl.load(slopes + h, mask=g < G, other=0.0) if ALIBI else 0.0
        # The leaf is one tile, so that its loads need not wait for each other.
        p1, p2 = halves_at(kv + (rows * B)[:, None, None] * (2 * G * K), g, K, KB)
        k1, k2 = tl.load(p1, mask=s1, other=0.0), tl.load(p2, mask=s2, other=0.0)
        v1, v2 = tl.load(p1 + G * K, mask=s1, other=0.0), tl.load(p2 + G * K, mask=s2, other=0.0)
        s = tl.sum(q1[None] * k1.to(tl.float32), 2) + tl.sum(q2[None] * k2.to(tl.float32), 2)
        j = (past + start + rows)[:, None]
        s = biased(s, table, b, i, j, past, slope, B, ALIBI, SEGMENTS, i < n, seen & (j < past + n))
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 0))
        p, decay = exp(s - new[None]), exp(m - new)
        m, total = new, total * decay + tl.sum(p, 0)
        a1 = a1 * decay[:, None] + tl.sum(p[:, :, None] * v1.to(tl.float32), 0)
        a2 = a2 * decay[:, None] + tl.sum(p[:, :, None] * v2.to(tl.float32), 0)
        if NEW:
            if head == 0:
                await_kernel(EARLY)
            at, b_at = raw + (l * B + b) * (2 * G * K), bias + l * (2 * G * K)
            k_w = k_weight + l * (G * K if NORM == 2 else K)
            n1, n2, w1, w2 = pair_halves(table, at, b_at, k_w, b, i - 1, g, eps, G, K, KB, NORM, CENTRED, ROPE, BIAS,
                                         WB if parts > 1 else 0)  # fmt: skip
            if head == 0:
                to = kv + (i - 1 - start) * B * (2 * G * K)
                store_halves(to, n1, n2, g, G, K, KB)
                store_halves(to + G * K, w1, w2, g, G, K, KB)
            s = tl.sum(q1 * n1.to(tl.float32), 1) + tl.sum(q2 * n2.to(tl.float32), 1)
            s = biased(s, table, b, i, past + i - 1, past, slope, B, ALIBI, SEGMENTS, i < n, i - 1 < n)
            new = tl.maximum(m, s)
            p, decay = exp(s - new), exp(m - new)
            m, total = new, total * decay + p
            a1 = a1 * decay[:, None] + p[:, None] * w1.to(tl.float32)
            a2 = a2 * decay[:, None] + p[:, None] * w2.to(tl.float32)
        to_a = out + ((l * C + r) * B + b) * (H * K)
        tl.store(to_a + at1, (a1 / total[:, None]).to(dtype), mask=m1)
        tl.store(to_a + at2, (a2 / total[:, None]).to(dtype), mask=m2)
        if KEEP:
            tl.store(lse_out + state, m + tl.log(total), mask=g < G)


@triton.jit
def keep_chunk(
    table, a, lse, B, L: tl.constexpr, C: tl.constexpr, H: tl.constexpr, HB: tl.constexpr, W: tl.constexpr,
    WB: tl.constexpr,
):  # fmt: skip
    """A chunk's attention outputs and log-sum-exps to where the backward will find them."""
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
def attended_rows(
    table, branch, bias, weight, y, h, r0, rows, B, s, eps, L: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    DB: tl.constexpr, CENTRED: tl.constexpr, BIAS: tl.constexpr, REVERSE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y = x + s (branch + bias) and h, its norm, at positions r0 ... of the chunk; rows of buffers (L, rows, B, D)."""
    b, r, l = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, _, active = chunk_of(table, l, L, C, REVERSE)
    c = tl.arange(0, DB)
    mask = c < D
    at = ((l * rows + r) * B + b) * D + c
    if not active:
        if REVERSE:  # what an earlier call left would reach the sums of weight gradients, if as 0 times NaN
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
    """z = y + s (branch + bias), stored as the layer's output, and h, its norm; buffers (L, B, D)."""
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


@triton.jit
def kept_inner(table, l, r, B, width, L: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr, dtype: tl.constexpr):
    """Where the MLP's inner values from position r of the chunk on are kept, and whether the layer works."""
    start, whole, active = chunk_of(table, l, L, C, REVERSE)
    return pointer(table, UP, dtype) + (l * whole + start + r) * B * width, active


@triton.jit
def activate_rows(
    table, up, bias, inner, r, rows, up_stride, inner_stride, B, L: tl.constexpr, C: tl.constexpr, F: tl.constexpr,
    FB: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """inner (rows, F) from up (rows, F), or (rows, 2 F) with the gate second; strides are those between layers.

    KEEP: up is also kept, as that from position r on.
    """
    row, l = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * FB + tl.arange(0, FB)
    mask = c < F
    width: tl.constexpr = 2 * F if KIND == 2 else F
    dtype = inner.dtype.element_ty
    at = up + l * up_stride + row * width + c
    await_kernel(EARLY)
    u = tl.load(at, mask=mask, other=0.0)
    gate = u
    if KIND == 2:
        gate = tl.load(at + F, mask=mask, other=0.0)
    if KEEP:
        to, active = kept_inner(table, l, r, B, width, L, C, False, dtype)
        tl.store(to + row * width + c, u, mask=mask & active)
        if KIND == 2:
            tl.store(to + row * width + F + c, gate, mask=mask & active)
    u, gate = u.to(tl.float32), gate.to(tl.float32)
    if BIAS:
        u += tl.load(bias + l * width + c, mask=mask, other=0.0)
        if KIND == 2:
            gate += tl.load(bias + l * width + F + c, mask=mask, other=0.0)
    out = activated(u, gate, KIND, dtype)
    tl.store(inner + l * inner_stride + row * F + c, out.to(dtype), mask=mask)


@triton.jit
def product_tiled(
    table, a, weight, rest, out, bias, up, inner, r, B, out_stride, up_stride, inner_stride, L: tl.constexpr,
    C: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, BACKWARD: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A product, and what follows it, in one: out (L, B, OUT) = a W^T, or BACKWARD, a W.

    KIND as for `activated`, or -1 for nothing: GELU(a W^T + bias), or BACKWARD, GELU'(up + bias) * (a W), and GELU(up +
    bias) to inner; up and inner (L, B, OUT). KEEP: what GELU is taken of is kept, as that of position r, or BACKWARD,
    has been, and is read there, not from up. a (L, B, IN) and the weight, (L, OUT, IN) or BACKWARD (L, IN, OUT), are
    descriptors of tensors with blocks (1, BM, BK) and (1, BN, BK) or (1, BK, BN): beyond their edges they read zeros.
    Strides are those between layers.

    A program makes BN columns and, of `rest`, the weight again with blocks of BR columns, BR more (0: none): sizes are
    powers of two, and three quarters of one may fill the GPU better.
    """
    row, column, layer = tl.program_id(1) * BM, tl.program_id(0) * (BN + BR), tl.program_id(2)
    m, l = row + tl.arange(0, BM), layer.to(tl.int64)
    acc = tl.zeros([BM, BN], tl.float32)
    more = tl.zeros([BM, BR if BR > 0 else 1], tl.float32)
    await_kernel(EARLY)
    for k in range(0, IN, BK):
        left = a.load([layer, row, k]).reshape(BM, BK)
        if BACKWARD:
            acc = tl.dot(left, weight.load([layer, k, column]).reshape(BK, BN), acc)
            if BR > 0:
                more = tl.dot(left, rest.load([layer, k, column + BN]).reshape(BK, BR), more)
        else:
            acc = tl.dot(left, weight.load([layer, column, k]).reshape(BN, BK).T, acc)
            if BR > 0:
                more = tl.dot(left, rest.load([layer, column + BN, k]).reshape(BR, BK).T, more)
    f = column + tl.arange(0, BN)
    product_finished(
        table, acc, m, f, l, out, bias, up, inner, r, B, out_stride, up_stride, inner_stride, L, C, OUT, KIND, BIAS,
        KEEP, BACKWARD,
    )  # fmt: skip
    if BR > 0:
        f = column + BN + tl.arange(0, BR)
        product_finished(
            table, more, m, f, l, out, bias, up, inner, r, B, out_stride, up_stride, inner_stride, L, C, OUT, KIND,
            BIAS, KEEP, BACKWARD,
        )  # fmt: skip


@triton.jit
def product_finished(
    table, acc, m, f, l, out, bias, up, inner, r, B, out_stride, up_stride, inner_stride, L: tl.constexpr,
    C: tl.constexpr, OUT: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """What follows the product in `product_tiled`, of rows m and columns f."""
    mask = (m < B)[:, None] & (f < OUT)[None, :]
    dtype = out.dtype.element_ty
    at = m.to(tl.int64)[:, None] * OUT + f[None, :]
    if KIND >= 0:
        acc = acc.to(dtype).to(tl.float32)
        u = acc
        if KEEP:
            kept, active = kept_inner(table, l, r, B, OUT, L, C, BACKWARD, dtype)
            if BACKWARD:
                u = tl.load(kept + at, mask=mask & active, other=0.0).to(tl.float32)
            else:
                tl.store(kept + at, acc.to(dtype), mask=mask & active)
        elif BACKWARD:
            u = tl.load(up + l * up_stride + at, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            u += tl.load(bias + l * OUT + f, mask=f < OUT, other=0.0)[None, :]
        if BACKWARD:
            tl.store(inner + l * inner_stride + at, activated(u, u, KIND, dtype).to(dtype), mask=mask)
            acc = acc * activation_slope(u, KIND)
        else:
            acc = activated(u, u, KIND, dtype)
    tl.store(out + l * out_stride + at, acc.to(dtype), mask=mask)


@triton.jit
def product_thin(
    a, weight, out, rows, a_stride, w_stride, out_stride, IN: tl.constexpr, OUT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out (rows, OUT) = a (rows, IN) weight^T for a handful of rows: the weights go by at full memory bandwidth."""
    column, l = tl.program_id(0) * BN, tl.program_id(1).to(tl.int64)
    m, f, c = tl.arange(0, BM), column + tl.arange(0, BN), tl.arange(0, BK)
    a_at = a + l * a_stride + m[None, :] * IN + c[:, None]
    w_at = weight + l * w_stride + f.to(tl.int64)[:, None] * IN + c[None, :]
    acc = tl.zeros([BN, BM], tl.float32)
    for k in range(0, IN, BK):
        inside = k + c < IN
        w = tl.load(w_at, mask=inside[None, :] & (f < OUT)[:, None], other=0.0)
        acc = tl.dot(w, tl.load(a_at, mask=inside[:, None] & (m < rows)[None, :], other=0.0), acc)
        a_at += BK
        w_at += BK
    at = out + l * out_stride + m[None, :] * OUT + f[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(m < rows)[None, :] & (f < OUT)[:, None])


# --- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def load_attended(table, out, B, L: tl.constexpr, C: tl.constexpr, W: tl.constexpr, WB: tl.constexpr):
    """A chunk of the kept attention outputs, where the products can find it: (L, C, B, H K)."""
    b, r, l = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start, whole, active = chunk_of(table, l, L, C, True)
    c = tl.arange(0, WB)
    at = pointer(table, A, out.dtype.element_ty) + ((l * whole + start + r) * B + b) * W + c
    a = tl.load(at, mask=(c < W) & active, other=0.0)
    tl.store(out + ((l * C + r) * B + b) * W + c, a, mask=c < W)


@triton.jit
def keys_receive(
    table, ga, gkv, slopes, q0, queries, k0, keys, B, scale, L: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
    G: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PULL: tl.constexpr,
    ALIBI: tl.constexpr, SEGMENTS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients that queries send to the pairs k0 ... of the chunk, into gkv (L, C, B, 2 G K), float32.

    PULL: all queries behind the chunk, and gkv starts here; else queries q0 ... of the chunk, whose ga is in the
    chunk's buffer and whose delta is made here.
    """
    b, g, l = tl.program_id(0).to(tl.int64) // G, tl.program_id(0) % G, tl.program_id(2).to(tl.int64)
    start, whole, active = chunk_of(table, l, L, C, True)
    if not active:
        return
    past, n = tl.load(table + PAST), tl.load(table + LENGTH)
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    in_k = row < keys
    r = k0 + row
    j = past + start + r
    c = tl.arange(0, KB)
    mask_k = in_k[:, None] & (c < K)[None, :]
    at = pointer(table, KV, DT) + ((l * (past + whole) + j)[:, None] * B + b) * (2 * G * K) + g * K + c[None, :]
    k = tl.load(at, mask=mask_k, other=0.0)
    v = tl.load(at + G * K, mask=mask_k, other=0.0)
    to = gkv + ((l * C + r)[:, None] * B + b) * (2 * G * K) + g * K + c[None, :]
    if PULL:
        first, last = start + C, n
        if SEGMENTS:
            chunks = whole // C
            last = tl.load(pointer(table, LAST, tl.int32) + b * chunks + start // C).to(tl.int64)
        gk = tl.zeros([BN, KB], tl.float32)
        gv = tl.zeros([BN, KB], tl.float32)
    else:
        first, last = start + q0, start + q0 + queries
        gk = tl.load(to, mask=mask_k, other=0.0)
        gv = tl.load(to + G * K, mask=mask_k, other=0.0)
    # Addresses are read before the loop: one that waits for another load can't be fetched ahead.
    q_at, lse_at = pointer(table, Q, DT), pointer(table, LSE, tl.float32)
    if PULL:
        ga_at, delta_at = pointer(table, GA, DT), pointer(table, DELTA, tl.float32)
    else:
        a_at = pointer(table, A, DT)
    for i0 in range(first.to(tl.int32), last.to(tl.int32), BM):
        i = i0 + tl.arange(0, BM)
        in_q = i < last
        mask_q = in_q[:, None] & (c < K)[None, :]
        for head in tl.static_range(H // G):  # unrolled: the loop around it is then fetched ahead
            h = g * (H // G) + head
            slope = tl.load(slopes + h) if ALIBI else 0.0
            place = (l * whole + i) * B + b
            q = tl.load(q_at + place[:, None] * (H * K) + h * K + c[None, :], mask=mask_q, other=0.0)
            lse = tl.load(lse_at + place * H + h, mask=in_q, other=0.0)
            if PULL:
                ga_i = tl.load(ga_at + place[:, None] * (H * K) + h * K + c[None, :], mask=mask_q, other=0.0)
                delta = tl.load(delta_at + place * H + h, mask=in_q, other=0.0)
            else:
                here = (l * C + i - start) * B + b
                ga_i = tl.load(ga + here[:, None] * (H * K) + h * K + c[None, :], mask=mask_q, other=0.0)
                a = tl.load(a_at + place[:, None] * (H * K) + h * K + c[None, :], mask=mask_q, other=0.0)
                delta = tl.sum(ga_i.to(tl.float32) * a.to(tl.float32), 1)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
            s = biased(s, table, b, i[None, :], j[:, None], past, slope, B, ALIBI, SEGMENTS, (i < n)[None, :],
                       (j < past + n)[:, None])  # fmt: skip
            p = tl.where(in_q[None, :], exp(s - lse[None, :]), 0.0)
            dp = tl.dot(v, tl.trans(ga_i), input_precision=PRECISION)
            ds = p * (dp - delta[None, :]) * scale
            gv += tl.dot(p.to(DT), ga_i, input_precision=PRECISION)
            gk += tl.dot(ds.to(DT), q, input_precision=PRECISION)
    tl.store(to, gk, mask=mask_k)
    tl.store(to + G * K, gv, mask=mask_k)


@triton.jit
def leaf_receives(
    table, ga, delta_chunk, gkv, slopes, r, B, scale, L: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, HP: tl.constexpr, RB: tl.constexpr,
    ALIBI: tl.constexpr, SEGMENTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """What the later queries of its own leaf send to pair r, whose gradient is complete with it.

    Query r + 1 is new: its delta is made and kept in delta_chunk (L, C, B, H) for the pairs before. A program has HP
    key-value heads of one sequence and takes RB queries at a time.
    """
    parts: tl.constexpr = (G + HP - 1) // HP
    b, l = tl.program_id(0).to(tl.int64) // parts, tl.program_id(1).to(tl.int64)
    start, whole, active = chunk_of(table, l, L, C, True)
    if not active:
        return
    dtype = ga.dtype.element_ty
    past, n = tl.load(table + PAST), tl.load(table + LENGTH)
    g, c = (tl.program_id(0) % parts) * HP + tl.arange(0, HP), tl.arange(0, KB)
    j, end = past + start + r, r - r % S + S
    in_heads = (g < G)[:, None] & (c < K)[None, :]
    own = g[:, None] * K + c[None, :]
    at = pointer(table, KV, dtype) + ((l * (past + whole) + j) * B + b) * (2 * G * K) + own
    k = tl.load(at, mask=in_heads, other=0.0).to(tl.float32) * scale
    v = tl.load(at + G * K, mask=in_heads, other=0.0).to(tl.float32)
    to = gkv + ((l * C + r) * B + b) * (2 * G * K) + own
    gk = tl.load(to, mask=in_heads, other=0.0)
    gv = tl.load(to + G * K, mask=in_heads, other=0.0)
    q_at, a_at = pointer(table, Q, dtype), pointer(table, A, dtype)
    lse_at = pointer(table, LSE, tl.float32)
    await_kernel(EARLY)
    for head in range(H // G):
        h = g * (H // G) + head
        columns = (h[:, None] * K + c[None, :])[None, :, :]
        slope = tl.load(slopes + h, mask=g < G, other=0.0)[None, :] if ALIBI else 0.0
        for first in range(r + 1, end, RB):
            row = first + tl.arange(0, RB)
            reads, new, i = row < end, row == r + 1, start + row
            mask, known = reads[:, None, None] & in_heads[None, :, :], reads[:, None] & (g < G)[None, :]
            place, here = (l * whole + i) * B + b, (l * C + row) * B + b
            q = tl.load(q_at + place[:, None, None] * (H * K) + columns, mask=mask, other=0.0).to(tl.float32)
            ga_i = tl.load(ga + here[:, None, None] * (H * K) + columns, mask=mask, other=0.0).to(tl.float32)
            lse = tl.load(lse_at + place[:, None] * H + h[None, :], mask=known, other=0.0)
            delta_at = delta_chunk + here[:, None] * H + h[None, :]
            delta = tl.load(delta_at, mask=known & (row > r + 1)[:, None], other=0.0)
            if first == r + 1:
                a_mask = mask & new[:, None, None]
                a = tl.load(a_at + place[:, None, None] * (H * K) + columns, mask=a_mask, other=0.0).to(tl.float32)
                made = tl.sum(ga_i * a, 2)
                tl.store(delta_at, made, mask=known & new[:, None])
                delta = tl.where(new[:, None], made, delta)
            s = tl.sum(q * k[None, :, :], 2)
            s = biased(s, table, b, i[:, None], j, past, slope, B, ALIBI, SEGMENTS, (i < n)[:, None], j < past + n)
            p = tl.where(reads[:, None], exp(s - lse), 0.0)
            ds = p * (tl.sum(ga_i * v[None, :, :], 2) - delta) * scale
            gk += tl.sum(ds[:, :, None] * q, 0)
            gv += tl.sum(p[:, :, None] * ga_i, 0)
    tl.store(to, gk, mask=in_heads)
    tl.store(to + G * K, gv, mask=in_heads)


@triton.jit
def pair_gradient(
    table, gkv, raw, bias, k_weight, g_pair, g_key, r, B, eps, L: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    K: tl.constexpr, GB: tl.constexpr, KB: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr,
    ROPE: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """From the gradients of pair r back to those of the products K h and V h; all buffers (L, C, B, ...).

    g_key holds this row's part of the gradient of the key norm's weight.
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
    g1, g2, n1, n2 = shaped_gradient(table, raw + place * (G * K), bias + l * (2 * G * K), k_w, g1, g2, b, i, G, K, GB,
                                     KB, eps, NORM, CENTRED, ROPE, BIAS)  # fmt: skip
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
    """gz: what comes from above plus what the pair sends through the norm of z; gz (L, B, D), others (L, C, B, D).

    The norm weight's gradient is added to partial (L, B, D) on the way.
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
    if L > 1:  # from the layer above, which was here one step ago, or from outside
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
    """gy = gz plus what the MLP sends through the norm of y; gz and g_h (L, B, D), others (L, C, B, D).

    The norm weight's gradient is added to partial (L, B, D) on the way.
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
    """Gradients of the MLP's inner values at position r: up and g_up (L, C, B, F or 2 F), g_inner (L, B, F).

    Also those values activated, inner (L, C, B, F), for the gradient of down. KEPT: the inner values are read where the
    forward has kept them, not from up.
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
def query_gradient(
    table, ga, tmp, slopes, gq, g_own, B, scale, L: tl.constexpr, C: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    K: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ALIBI: tl.constexpr,
    SEGMENTS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's queries, gq (L, C, B, H K), and of their own temporary pairs, head by head.

    g_own (L, C, B, 2, H K): what each query head sends to the temporary key, then to the temporary value. ga and delta
    go to where the chunks before will look for them.
    """
    b, h, l = tl.program_id(0).to(tl.int64) // H, tl.program_id(0) % H, tl.program_id(2).to(tl.int64)
    start, whole, active = chunk_of(table, l, L, C, True)
    if not active:
        return
    past, n = tl.load(table + PAST), tl.load(table + LENGTH)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    in_q = row < C
    i = start + row
    c = tl.arange(0, KB)
    mask = in_q[:, None] & (c < K)[None, :]
    place, here = (l * whole + i) * B + b, (l * C + row) * B + b
    columns = h * K + c[None, :]
    q = tl.load(pointer(table, Q, DT) + place[:, None] * (H * K) + columns, mask=mask, other=0.0)
    a = tl.load(pointer(table, A, DT) + place[:, None] * (H * K) + columns, mask=mask, other=0.0).to(tl.float32)
    ga_i = tl.load(ga + here[:, None] * (H * K) + columns, mask=mask, other=0.0)
    lse = tl.load(pointer(table, LSE, tl.float32) + place * H + h, mask=in_q, other=0.0)
    delta = tl.sum(ga_i.to(tl.float32) * a, 1)
    tl.store(pointer(table, GA, DT) + place[:, None] * (H * K) + columns, ga_i, mask=mask)
    tl.store(pointer(table, DELTA, tl.float32) + place * H + h, delta, mask=in_q)

    # The own temporary pair: a query is at no distance from itself.
    group = (h // (H // G)) * K + c[None, :]
    own = tmp + here[:, None] * (2 * G * K) + group
    k = tl.load(own, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(own + G * K, mask=mask, other=0.0).to(tl.float32)
    q32, ga32 = q.to(tl.float32), ga_i.to(tl.float32)
    p_own = exp(tl.sum(q32 * k, 1) * scale - lse)
    ds_own = p_own * (tl.sum(ga32 * v, 1) - delta) * scale
    to = g_own + here[:, None] * (2 * H * K) + columns
    tl.store(to, (ds_own[:, None] * q32).to(DT), mask=mask)
    tl.store(to + H * K, (p_own[:, None] * ga32).to(DT), mask=mask)
    out = ds_own[:, None] * k

    slope = tl.load(slopes + h) if ALIBI else 0.0
    first, last = past * 0, tl.minimum(past + start + (tl.program_id(1) + 1) * BM, past + start + C)
    if SEGMENTS:
        first = tl.load(pointer(table, FIRST, tl.int32) + b * (whole // C) + start // C).to(tl.int64)
    kv = pointer(table, KV, DT) + (l * (past + whole) * B + b) * (2 * G * K)
    for j0 in range(first.to(tl.int32), last.to(tl.int32), BN):
        j = j0 + tl.arange(0, BN)
        in_k = j < last
        at = kv + j.to(tl.int64)[:, None] * B * (2 * G * K) + group
        mask_k = in_k[:, None] & (c < K)[None, :]
        k_j = tl.load(at, mask=mask_k, other=0.0)
        v_j = tl.load(at + G * K, mask=mask_k, other=0.0)
        s = tl.dot(q, tl.trans(k_j), input_precision=PRECISION) * scale
        s = biased(s, table, b, i[:, None], j[None, :], past, slope, B, ALIBI, SEGMENTS, (i < n)[:, None],
                   (j < past + n)[None, :])  # fmt: skip
        behind = (j - past - start).to(tl.int32)  # of the chunk's positions, as rows are
        earlier = in_k[None, :] & (behind[None, :] < row[:, None])
        p = tl.where(earlier, exp(s - lse[:, None]), 0.0)
        dp = tl.dot(ga_i, tl.trans(v_j), input_precision=PRECISION)
        ds = p * (dp - delta[:, None]) * scale
        out += tl.dot(ds.to(DT), k_j, input_precision=PRECISION)
    tl.store(gq + here[:, None] * (H * K) + columns, out.to(DT), mask=mask)


@triton.jit
def heads_gradient(
    table, gq, g_own, raw, bias, q_weight, k_weight, g_raw, q_partial, k_partial, B, eps, L: tl.constexpr,
    C: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, HB: tl.constexpr, GB: tl.constexpr,
    KB: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr, ROPE: tl.constexpr,
    BIAS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """From gradients of a chunk's queries and temporary pairs back to those of the products; (L, C, B, (H + 2 G) K).

    Those of the QK-norms' weights are added to partials (L, PARTS, width) on the way.
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
        g1, g2, n1, n2 = shaped_gradient(table, at, b_at, q_w, g1, g2, b, i, H, K, HB, KB, eps, NORM, CENTRED, ROPE,
                                         BIAS)  # fmt: skip
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
        k1, k2, n1, n2 = shaped_gradient(table, at + H * K, b_at + H * K, k_w, k1, k2, b, i, G, K, GB, KB, eps, NORM,
                                         CENTRED, ROPE, BIAS)  # fmt: skip
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
    """Add both halves of all heads to the gradient of a QK-norm's weight, which the heads share unless NORM is 2."""
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
    """Gradient of a chunk's inputs: to the caller from the first layer, else to the ring that the layer below reads.

    The norm weight's gradient is added to partial (L, PARTS, D) on the way.
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
