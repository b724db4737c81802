# Triton compiles this; to a type checker it is no Python.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportAssignmentType=false
"""Triton kernels of one decoding step: what one new token a row needs of a layer.

For a single row (B = 1) a layer is five kernels: `normed_product` (queries, keys, values), `attend`,
`residual_product` (attention outputs), `normed_product` (up), `residual_product` (down), each bound by reading its
weights or pairs once. Under PDL (programmatic dependent launch) a kernel starts while those before it still run: it
fetches weights and old pairs, which no kernel of the step writes, into registers, and only then waits for its inputs.
*Nothing that a kernel of the same step writes may be read, and nothing at all written, before `await_kernel`.*
For more rows the products are the library's, or the fused scan's thin ones, with row-wise kernels between them.

Buffers: x, y, z (B, D) float32; raw (B, (H + 2 G) K), queries, keys and values as the product leaves them, followed by
as many rows whose keys and values belong to the slot before (DEFER); partials of attention over S parts of the memory,
(B, S, H K) and log2-sum-exps (B, S, H), float32. Norm statistics, softmax and sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recurformer.scan.fused.kernels.common import NOTHING, activated, await_kernel, normalised

LOG2E = tl.constexpr(1.4426950408889634)


# --- shared pieces ---------------------------------------------------------------------------------------------------


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel start."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def load_rows(
    w1, w2, w3, row, N1: tl.constexpr, N2: tl.constexpr, N: tl.constexpr, IN: tl.constexpr, WB: tl.constexpr,
    BN: tl.constexpr, ALIGN: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Rows row ... row + BN of three matrices on top of each other: N1 rows, up to N2, up to N. BN divides N1 and N2.

    CHECKED: rows behind N may be asked for, and are zeros.
    """
    i = row.to(tl.int64)
    at = w1 + i * IN
    if N1 < N:
        at = tl.where(row < N1, at, tl.where(row < N2, w2 + (i - N1) * IN, w3 + (i - N2) * IN))
    at = tl.multiple_of(at, ALIGN)
    n, c = tl.arange(0, BN)[:, None], tl.arange(0, WB)[None, :]
    if WB > IN or CHECKED:
        return tl.load(at + n * IN + c, mask=(c < IN) & (row + n < N), other=0.0)
    else:
        return tl.load(at + n * IN + c)


@triton.jit
def dots(w, h):
    return tl.sum(w.to(tl.float32) * h[None, :], 1)


@triton.jit
def part_of_keys(n, S: tl.constexpr, LEAST: tl.constexpr, BN: tl.constexpr):
    """Keys of each part when n are divided among at most S: whole blocks of BN, at least LEAST of them keys."""
    return tl.maximum(tl.cdiv(tl.cdiv(n, S), BN) * BN, LEAST)


# --- one row ---------------------------------------------------------------------------------------------------------


@triton.jit
def embed(tokens, slot, valid, table, x, capacity, D: tl.constexpr, DB: tl.constexpr, PADS: tl.constexpr,
          PDL: tl.constexpr):  # fmt: skip
    """x = embedding of the tokens; zeros at pads, whose ids may be anything."""
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
def normed_product(
    x, norm_weight, w1, w2, w3, gate, bias, gate_bias, pending, out, eps, N1: tl.constexpr, N2: tl.constexpr,
    N: tl.constexpr, IN: tl.constexpr, WB: tl.constexpr, BN: tl.constexpr, PROGRAMS: tl.constexpr, ALIGN: tl.constexpr,
    KIND: tl.constexpr, CENTRED: tl.constexpr, BIAS: tl.constexpr, DEFER: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (N) = W norm(x), activated as `activated` says for KIND >= 0 (2: with a gate), for one row.

    W is three matrices on top of each other, as `load_rows` has it. DEFER: the rows behind N1 are multiplied with
    norm(pending) too, a vector that the step before wrote, into a second row of out.
    """
    begin(PDL)
    TILES: tl.constexpr = (N + BN - 1) // BN
    CHECKED: tl.constexpr = (N % BN > 0) or (TILES > PROGRAMS)
    dtype = w1.dtype.element_ty
    first = tl.program_id(0)
    c = tl.arange(0, WB)
    w = load_rows(w1, w2, w3, first * BN, N1, N2, N, IN, WB, BN, ALIGN, CHECKED)
    if KIND == 2:
        g = load_rows(gate, gate, gate, first * BN, N, N, N, IN, WB, BN, ALIGN, CHECKED)
    scale = tl.load(norm_weight + c, mask=c < IN, other=0.0).to(tl.float32)
    if DEFER:
        old, _ = normalised(tl.load(pending + c, mask=c < IN, other=0.0), c < IN, IN, eps, CENTRED)
        old = (old * scale).to(dtype).to(tl.float32)
    await_kernel(PDL)
    h, _ = normalised(tl.load(x + c, mask=c < IN, other=0.0, cache_modifier=".cg"), c < IN, IN, eps, CENTRED)
    h = (h * scale).to(dtype).to(tl.float32)
    n = tl.arange(0, BN)
    row = first * BN
    for _ in range(first, TILES, PROGRAMS):
        if TILES > PROGRAMS:  # the next rows are on their way while these are multiplied
            w_next = load_rows(w1, w2, w3, row + PROGRAMS * BN, N1, N2, N, IN, WB, BN, ALIGN, CHECKED)
            if KIND == 2:
                g_next = load_rows(gate, gate, gate, row + PROGRAMS * BN, N, N, N, IN, WB, BN, ALIGN, CHECKED)
        inside = row + n < N
        u = dots(w, h)
        if BIAS:
            added = tl.load(bias + row + n, mask=inside, other=0.0)
            u += added
        u = u.to(dtype)
        if KIND >= 0:
            opened = u.to(tl.float32)
            if KIND == 2:
                opened = dots(g, h)
                if BIAS:
                    opened += tl.load(gate_bias + row + n, mask=inside, other=0.0)
                opened = opened.to(dtype).to(tl.float32)
            u = activated(u.to(tl.float32), opened, KIND, dtype).to(dtype)
        tl.store(out + row + n, u.to(out.dtype.element_ty), mask=inside)
        if DEFER:  # noqa: SIM102 - known when the kernel is compiled, the other when it runs
            if row >= N1:
                again = dots(w, old)
                if BIAS:
                    again += added
                tl.store(out + N + row + n, again.to(dtype), mask=inside)
        if TILES > PROGRAMS:
            w = w_next
            if KIND == 2:
                g = g_next
        row += PROGRAMS * BN


@triton.jit
def combined(
    partial, lse, n, H: tl.constexpr, K: tl.constexpr, W: tl.constexpr, WB: tl.constexpr, S: tl.constexpr,
    SB: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first W attention outputs of a row (H K) from the parts that n keys were divided into, SB at a time."""
    parts = tl.maximum(tl.cdiv(n, part_of_keys(n, S, LEAST, BLOCK)), 1)
    c = tl.arange(0, WB)
    highest = tl.full([WB], NOTHING, tl.float32)
    total, a = tl.zeros([WB], tl.float32), tl.zeros([WB], tl.float32)
    for s0 in range(0, parts, SB):
        top = highest
        for i in tl.static_range(SB):
            there = (c < W) & (s0 + i < parts)
            top = tl.maximum(top, tl.load(lse + (s0 + i) * H + c // K, mask=there, other=NOTHING))
        change = tl.exp2(highest - top)
        total, a, highest = total * change, a * change, top
        for i in tl.static_range(SB):  # nothing between the loads makes one wait for another
            there = (c < W) & (s0 + i < parts)
            e = tl.load(lse + (s0 + i) * H + c // K, mask=there, other=NOTHING)
            u = tl.load(partial + (s0 + i) * (H * K) + c, mask=there, other=0.0, cache_modifier=".cg")
            p = tl.where(there, tl.exp2(e - top), 0.0)
            total += p
            a += p * u
    return a / tl.where(total > 0.0, total, 1.0)


@triton.jit
def residual_product(
    a, lse, slot, weight, bias, x, out, scale, N: tl.constexpr, IN: tl.constexpr, WB: tl.constexpr, BN: tl.constexpr,
    PROGRAMS: tl.constexpr, ALIGN: tl.constexpr, H: tl.constexpr, K: tl.constexpr, S: tl.constexpr, SB: tl.constexpr,
    LEAST: tl.constexpr, BLOCK: tl.constexpr, COMBINE: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out (N) = x + scale (W a), for one row. COMBINE: a is the parts of attention outputs, made one here."""
    begin(PDL)
    TILES: tl.constexpr = (N + BN - 1) // BN
    CHECKED: tl.constexpr = (N % BN > 0) or (TILES > PROGRAMS)
    dtype = weight.dtype.element_ty
    first = tl.program_id(0)
    c = tl.arange(0, WB)
    w = load_rows(weight, weight, weight, first * BN, N, N, N, IN, WB, BN, ALIGN, CHECKED)
    if COMBINE:
        keys = tl.load(slot)
        await_kernel(PDL)
        h = combined(a, lse, keys, H, K, H * K, WB, S, SB, LEAST, BLOCK).to(dtype).to(tl.float32)
    else:
        await_kernel(PDL)
        h = tl.load(a + c, mask=c < IN, other=0.0, cache_modifier=".cg").to(tl.float32)
    n = tl.arange(0, BN)
    row = first * BN
    for _ in range(first, TILES, PROGRAMS):
        if TILES > PROGRAMS:
            w_next = load_rows(weight, weight, weight, row + PROGRAMS * BN, N, N, N, IN, WB, BN, ALIGN, CHECKED)
        inside = row + n < N
        before = tl.load(x + row + n, mask=inside, other=0.0)
        u = dots(w, h)
        if BIAS:
            u += tl.load(bias + row + n, mask=inside, other=0.0)
        tl.store(out + row + n, before + scale * u.to(dtype).to(tl.float32), mask=inside)
        if TILES > PROGRAMS:
            w = w_next
        row += PROGRAMS * BN


# --- attention, for any number of rows -------------------------------------------------------------------------------


@triton.jit
def head_tile(
    row, first, on, STRIDE: tl.constexpr, K: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, KB: tl.constexpr,
    PARTNER: tl.constexpr,
):  # fmt: skip
    """R heads of a row from head `first` on, (RB, KB) float32, zeros outside and where not `on`.

    PARTNER: instead of each coordinate, the one that RoPE pairs with it.
    """
    r, c = tl.arange(0, RB)[:, None], tl.arange(0, KB)[None, :]
    half: tl.constexpr = K // 2
    at = row + (first + r) * STRIDE + c
    if PARTNER:
        at += tl.where(c < half, half, -half)
    return tl.load(at, mask=(r < R) & (c < K) & on, other=0.0).to(tl.float32)


@triton.jit
def angle_row(table, position, K: tl.constexpr, KB: tl.constexpr):
    """Cosines or sines of a position, (1, KB), from a table (capacity, K / 2)."""
    c = tl.arange(0, KB)[None, :]
    half: tl.constexpr = K // 2
    return tl.load(table + position * half + tl.where(c < half, c, c - half), mask=c < K, other=0.0)


@triton.jit
def statistics(d, inside, length, eps, CENTRED: tl.constexpr):
    """Mean (0 unless CENTRED) and 1 / rms or 1 / standard deviation of rows, each (rows, 1)."""
    mean = tl.zeros_like(tl.sum(d, 1))[:, None]
    if CENTRED:
        mean = tl.sum(d, 1)[:, None] / length
        d = tl.where(inside, d - mean, 0.0)
    return mean, tl.rsqrt(tl.sum(d * d, 1)[:, None] / length + eps)


@triton.jit
def shaped(
    u, v, w, w_v, mean, rstd, cos, sin, eps, K: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, KB: tl.constexpr,
    NORM: tl.constexpr, CENTRED: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Heads (RB, KB) as the layer makes them: QK-norm (0 none, 1 each head, 2 by the whole row's statistics), rotation.

    u are the coordinates, v what RoPE pairs with each, w and w_v their weights of the norm.
    """
    c = tl.arange(0, KB)[None, :]
    if NORM == 1:
        mean, rstd = statistics(u, (tl.arange(0, RB)[:, None] < R) & (c < K), K, eps, CENTRED)
    if NORM > 0:
        u = (u - mean) * rstd * w
    if ROPE:
        if NORM > 0:
            v = (v - mean) * rstd * w_v
        u = u * cos + tl.where(c < K // 2, -v, v) * sin
    return u


@triton.jit
def add_three(a, b, c, more_a, more_b, more_c):
    return a + more_a, b + more_b, c + more_c


@triton.jit
def add_pair(m, l, acc, s, v, seen):
    """The state of softmax (rows) with one more pair, of scores s (rows) and value v (1, K)."""
    s = tl.where(seen, s, float("-inf"))
    top = tl.maximum(m, s)
    change, p = tl.exp2(m - top), tl.exp2(s - top)
    return top, l * change + p, acc * change[:, None] + p[:, None] * v


@triton.jit
def attend(
    raw, keys, values, q_weight, k_weight, slopes, cos, sin, slot, positions, valid, key_positions, pending_slot,
    pending_positions, partial, lse, out, B, capacity, eps, scale, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr, RB: tl.constexpr, KB: tl.constexpr, QB: tl.constexpr, BN: tl.constexpr,
    S: tl.constexpr, LEAST: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr, ROPE: tl.constexpr,
    ALIBI: tl.constexpr, PADS: tl.constexpr, STORE: tl.constexpr, DEFER: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of the new token's queries that share a key-value head, over a part of the memory (B, G, capacity, K).

    The slots filled so far are divided evenly among at most S parts. The first part also has the token's own pair,
    which a standard layer stores in its slot (STORE), and the pair of the slot before where that is still to be made
    (DEFER), which it stores too. PARTS: into partial and lse; else there is one part, and `out` (B, H K) is final.
    One query a key-value head: products of vectors, and each row of the block of keys has a softmax of its own until
    the end, so that the loop has no sum over keys. Several: tl.dot.
    """
    begin(PDL)
    b, g, part = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G, tl.program_id(1)
    dtype = keys.dtype.element_ty
    n = tl.load(slot)
    each = part_of_keys(n, S, LEAST, BN)
    start = part * each
    if (part > 0) & (start >= n):
        return
    is_first = part == 0
    old = False
    last = n
    if DEFER:
        old = (tl.load(pending_slot) == n - 1) & (n > 0)
        last = tl.where(old, n - 1, n)
    stop = tl.minimum(start + each, last)
    memory = (b * G + g) * capacity * K
    keys, values = keys + memory, values + memory
    j, c = tl.arange(0, BN), tl.arange(0, KB)
    offsets = j[:, None] * K + c[None, :]
    wide = c[None, :] < K
    here = start.to(tl.int64) * K
    mask = wide & (start + j < stop)[:, None]
    k = tl.load(keys + here + offsets, mask=mask, other=0.0)
    v = tl.load(values + here + offsets, mask=mask, other=0.0)

    # All that the first products need besides them is asked for here as well, before any of it is used.
    position = tl.load(positions + b)
    old_position = position
    if DEFER:
        old_position = tl.load(pending_positions + b)
    each_head: tl.constexpr = K if NORM == 2 else 0
    w_q, w_k, w_q2, w_k2 = 0.0, 0.0, 0.0, 0.0
    if NORM > 0:
        w_q = head_tile(q_weight, g * R, True, each_head, K, R, RB, KB, False)
        w_k = head_tile(k_weight, g, True, each_head, K, 1, 1, KB, False)
        if ROPE:
            w_q2 = head_tile(q_weight, g * R, True, each_head, K, R, RB, KB, True)
            w_k2 = head_tile(k_weight, g, True, each_head, K, 1, 1, KB, True)
    cosine, sine, old_cosine, old_sine = 1.0, 0.0, 1.0, 0.0
    if ROPE:
        cosine, sine = angle_row(cos, position, K, KB), angle_row(sin, position, K, KB)
        if DEFER:
            old_cosine, old_sine = angle_row(cos, old_position, K, KB), angle_row(sin, old_position, K, KB)
    r = tl.arange(0, RB)
    slope = tl.zeros([RB], tl.float32)
    if ALIBI:
        slope = tl.load(slopes + g * R + r, mask=r < R, other=0.0) * LOG2E

    await_kernel(PDL)
    W: tl.constexpr = (H + 2 * G) * K
    row = raw + b * W
    old_row = row + B * W + H * K
    u_q = head_tile(row, g * R, True, K, K, R, RB, KB, False)
    u_k = head_tile(row + H * K, g, is_first, K, K, 1, 1, KB, False)
    c1 = c[None, :]
    own_v = tl.load(row + (H + G + g) * K + c1, mask=(c1 < K) & is_first, other=0.0)
    u_q2, u_k2, u_old, u_old2 = u_q, u_k, u_k, u_k
    if ROPE:
        u_q2 = head_tile(row, g * R, True, K, K, R, RB, KB, True)
        u_k2 = head_tile(row + H * K, g, is_first, K, K, 1, 1, KB, True)
    if DEFER:
        old &= is_first
        u_old = head_tile(old_row, g, old, K, K, 1, 1, KB, False)
        if ROPE:
            u_old2 = head_tile(old_row, g, old, K, K, 1, 1, KB, True)
        old_v = tl.load(old_row + (G + g) * K + c1, mask=(c1 < K) & old, other=0.0)
    mean_q, rstd_q, mean_k, rstd_k, mean_old, rstd_old = 0.0, 1.0, 0.0, 1.0, 0.0, 1.0
    if NORM == 2:  # of queries, keys and the keys of the slot before at once
        column = tl.arange(0, QB)
        in_q, in_k = column < H * K, (column < G * K) & is_first
        d_q = tl.load(row + column, mask=in_q, other=0.0).to(tl.float32)
        d_k = tl.load(row + H * K + column, mask=in_k, other=0.0).to(tl.float32)
        d_old = d_k
        if DEFER:
            d_old = tl.load(old_row + column, mask=(column < G * K) & old, other=0.0).to(tl.float32)
        if CENTRED:
            mean_q, mean_k, mean_old = tl.reduce((d_q, d_k, d_old), 0, add_three)
            mean_q, mean_k, mean_old = mean_q / (H * K), mean_k / (G * K), mean_old / (G * K)
            d_q, d_k = tl.where(in_q, d_q - mean_q, 0.0), tl.where(column < G * K, d_k - mean_k, 0.0)
            d_old = tl.where(column < G * K, d_old - mean_old, 0.0)
        rstd_q, rstd_k, rstd_old = tl.reduce((d_q * d_q, d_k * d_k, d_old * d_old), 0, add_three)
        rstd_q, rstd_k = tl.rsqrt(rstd_q / (H * K) + eps), tl.rsqrt(rstd_k / (G * K) + eps)
        rstd_old = tl.rsqrt(rstd_old / (G * K) + eps)
    q = shaped(u_q, u_q2, w_q, w_q2, mean_q, rstd_q, cosine, sine, eps, K, R, RB, KB, NORM, CENTRED, ROPE).to(dtype)
    own = shaped(u_k, u_k2, w_k, w_k2, mean_k, rstd_k, cosine, sine, eps, K, 1, 1, KB, NORM, CENTRED, ROPE).to(dtype)
    if DEFER:
        old_k = shaped(
            u_old, u_old2, w_k, w_k2, mean_old, rstd_old, old_cosine, old_sine, eps, K, 1, 1, KB, NORM, CENTRED, ROPE
        ).to(dtype)

    factor = scale * LOG2E
    # Softmax starts with the own pair, and the pair of the slot before.
    q_row = q.to(tl.float32) * factor
    s_own = tl.sum(q_row * own.to(tl.float32), 1)
    s_old, has_old = s_own, False
    if DEFER:
        since = 1.0
        has_old = old
        if PADS:
            at = b * capacity + n - 1
            has_old &= tl.load(valid + at, mask=old, other=0) != 0
            since = (position - tl.load(key_positions + at, mask=old, other=0)).to(tl.float32)
        s_old = tl.sum(q_row * old_k.to(tl.float32), 1) - slope * since
    if R == 1:
        q1, slope1 = tl.sum(q_row, 0), tl.sum(slope, 0)
        has_own = (j == 0) & is_first
        m = tl.where(has_own, tl.sum(s_own, 0), NOTHING)
        l = has_own.to(tl.float32)
        acc = tl.where(has_own[:, None], own_v.to(tl.float32), tl.zeros([BN, KB], tl.float32))
        if DEFER:
            has_old &= j == 1
            m = tl.where(has_old, tl.sum(s_old, 0), m)
            l += has_old.to(tl.float32)
            acc = tl.where(has_old[:, None], old_v.to(tl.float32), acc)
    else:
        m, l = tl.full([RB], NOTHING, tl.float32), tl.zeros([RB], tl.float32)
        acc = tl.zeros([RB, KB], tl.float32)
        m, l, acc = add_pair(m, l, acc, s_own, own_v.to(tl.float32), is_first)
        if DEFER:
            m, l, acc = add_pair(m, l, acc, s_old, old_v.to(tl.float32), has_old)
    for j0 in range(start, stop, BN):
        here += BN * K
        mask = wide & (j0 + BN + j < stop)[:, None]
        seen = j0 + j < stop
        distance = (n - (j0 + j)).to(tl.float32)
        if PADS:
            seen &= tl.load(valid + b * capacity + j0 + j, mask=seen, other=0) != 0
            distance = (position - tl.load(key_positions + b * capacity + j0 + j, mask=seen, other=0)).to(tl.float32)
        # The next block of keys is asked for as soon as this one is used, and the values likewise.
        if R == 1:
            s = tl.sum(k.to(tl.float32) * q1[None, :], 1)
            k = tl.load(keys + here + offsets, mask=mask, other=0.0)
            if ALIBI:
                s -= slope1 * distance
            s = tl.where(seen, s, float("-inf"))
            top = tl.maximum(m, s)
            change, p = tl.exp2(m - top), tl.exp2(s - top)
            l = l * change + p
            acc = acc * change[:, None] + p[:, None] * v.to(tl.float32)
        else:
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
            k = tl.load(keys + here + offsets, mask=mask, other=0.0)
            if ALIBI:
                s -= slope[:, None] * distance[None, :]
            s = tl.where(seen[None, :], s, float("-inf"))
            top = tl.maximum(m, tl.max(s, 1))
            change, p = tl.exp2(m - top), tl.exp2(s - top[:, None])
            l = l * change + tl.sum(p, 1)
            acc = acc * change[:, None] + tl.dot(p.to(dtype), v, input_precision=PRECISION)
        m = top
        v = tl.load(values + here + offsets, mask=mask, other=0.0)
    if R == 1:
        top = tl.max(m, 0)
        p = tl.exp2(m - top)
        total, sums = tl.sum(l * p, 0), tl.sum(acc * p[:, None], 0)
        m, l = tl.full([RB], 0.0, tl.float32) + top, tl.zeros([RB], tl.float32) + total
        acc = tl.zeros([RB, KB], tl.float32) + sums[None, :]
    if STORE:
        at = n.to(tl.int64) * K + c1
        tl.store(keys + at, own, mask=(c1 < K) & is_first)
        tl.store(values + at, own_v, mask=(c1 < K) & is_first)
    if DEFER:
        at = (n - 1).to(tl.int64) * K + c1
        tl.store(keys + at, old_k, mask=(c1 < K) & old)
        tl.store(values + at, old_v, mask=(c1 < K) & old)
    acc = acc / tl.where(l > 0.0, l, 1.0)[:, None]
    mask = (r < R)[:, None] & (c < K)[None, :]
    at = (g * R + r)[:, None] * K + c[None, :]
    if PARTS:
        to = b * S + part
        tl.store(partial + to * (H * K) + at, acc, mask=mask)
        tl.store(
            lse + to * H + g * R + r, tl.where(l > 0.0, m + tl.log2(tl.where(l > 0.0, l, 1.0)), NOTHING), mask=r < R
        )
    else:
        tl.store(out + b * (H * K) + at, acc.to(dtype), mask=mask)


@triton.jit
def store_pairs(
    raw, layers, keys, values, k_weight, cos, sin, slot, positions, B, capacity, eps, G: tl.constexpr,
    K: tl.constexpr, KB: tl.constexpr, GB: tl.constexpr, W: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr,
    ROPE: tl.constexpr,
):  # fmt: skip
    """Pairs of several layers from raw (layers, B, 2 G K) into `slot` of keys and values (L, B, G, capacity, K).

    layers: their numbers. W: width of a key norm's weight. A negative slot means that there is nothing to store.
    """
    b, g, i = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G, tl.program_id(1).to(tl.int64)
    n = tl.load(slot)
    if n < 0:
        return
    layer = tl.load(layers + i).to(tl.int64)
    row = raw + (i * B + b) * (2 * G * K)
    position = tl.load(positions + b)
    c = tl.arange(0, KB)[None, :]
    u, u2 = head_tile(row, g, True, K, K, 1, 1, KB, False), 0.0
    w, w2, mean, rstd, cosine, sine = 1.0, 1.0, 0.0, 1.0, 1.0, 0.0
    if ROPE:
        u2 = head_tile(row, g, True, K, K, 1, 1, KB, True)
        cosine, sine = angle_row(cos, position, K, KB), angle_row(sin, position, K, KB)
    if NORM > 0:
        each_head: tl.constexpr = K if NORM == 2 else 0
        w = head_tile(k_weight + layer * W, g, True, each_head, K, 1, 1, KB, False)
        if ROPE:
            w2 = head_tile(k_weight + layer * W, g, True, each_head, K, 1, 1, KB, True)
    if NORM == 2:
        column = tl.arange(0, GB)[None, :]
        inside = column < G * K
        d = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
        mean, rstd = statistics(d, inside, G * K, eps, CENTRED)
    k = shaped(u, u2, w, w2, mean, rstd, cosine, sine, eps, K, 1, 1, KB, NORM, CENTRED, ROPE)
    v = tl.load(row + (G + g) * K + c, mask=c < K, other=0.0)
    at = (((layer * B + b) * G + g) * capacity + n) * K + c
    tl.store(keys + at, k.to(keys.dtype.element_ty), mask=c < K)
    tl.store(values + at, v, mask=c < K)


@triton.jit
def remember(slot, positions, pending_slot, pending_positions, B, BB: tl.constexpr, PDL: tl.constexpr):
    """Which slot the next step has to make the pairs of."""
    begin(PDL)
    b = tl.arange(0, BB)
    n, position = tl.load(slot), tl.load(positions + b, mask=b < B, other=0)
    await_kernel(PDL)
    tl.store(pending_slot, n)
    tl.store(pending_positions + b, position, mask=b < B)


# --- several rows, between the library's products --------------------------------------------------------------------


@triton.jit
def add_and_norm(
    x, branch, weight, out, h, pending, B, scale, eps, D: tl.constexpr, DB: tl.constexpr, CENTRED: tl.constexpr,
    BRANCH: tl.constexpr,
):  # fmt: skip
    """Rows y = x + scale branch (BRANCH: into out; else y = x) and h = norm(y); rows B ... of h: norm(pending)."""
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
def combine(
    partial, lse, slot, out, H: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, S: tl.constexpr, SB: tl.constexpr,
    LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attention outputs (B, H K) from their parts."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts = b * S
    partial, lse = partial + parts * (H * K) + h * K, lse + parts * H + h
    a = combined(partial, lse, tl.load(slot), H, K, K, KB, S, SB, LEAST, BLOCK)
    c = tl.arange(0, KB)
    tl.store(out + (b * H + h) * K + c, a.to(out.dtype.element_ty), mask=c < K)


@triton.jit
def activate(up, gate, out, F: tl.constexpr, FB: tl.constexpr, KIND: tl.constexpr):
    """The MLP's activation of rows (B, F)."""
    b, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * FB + tl.arange(0, FB)
    u = tl.load(up + b * F + c, mask=c < F, other=0.0).to(tl.float32)
    opened = tl.load(gate + b * F + c, mask=c < F, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    tl.store(out + b * F + c, activated(u, opened, KIND, dtype).to(dtype), mask=c < F)
