# Triton compiles this; to a type checker it is no Python.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""Triton kernels of one decoding step: what one new token a row needs of a layer.

For a single row (B = 1) a layer is five kernels: `normed_product` (queries, keys, values), `attend`,
`residual_product` (attention outputs), `normed_product` (up), `residual_product` (down), each bound by reading its
weights or pairs once. Under PDL (programmatic dependent launch) a kernel starts while those before it still run: it
fetches weights and old pairs, which no kernel of the step writes, into registers, and only then waits for its inputs.
*Nothing that a kernel of the same step writes may be read, and nothing at all written, before `wait`.*
For more rows the products are the library's, or the fused scan's thin ones, with row-wise kernels between them.

Buffers: x, y, z (B, D) float32; raw (B, (H + 2 G) K), queries, keys and values as the product leaves them, followed by
as many rows whose keys and values belong to the slot before (DEFER); partials of attention over S parts of the memory,
(B, S, H K) and log2-sum-exps (B, S, H), float32. Norm statistics, softmax and sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recurformer.scan.fused.kernels import NOTHING, activated, normalised

LOG2E = tl.constexpr(1.4426950408889634)


# --- shared pieces ---------------------------------------------------------------------------------------------------


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel start."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Until the kernels before have finished and what they wrote can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()


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
    wait(PDL)
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
    wait(PDL)
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
        if DEFER:
            if row >= N1:
                u = dots(w, old)
                if BIAS:
                    u += added
                tl.store(out + N + row + n, u.to(dtype), mask=inside)
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
    c, s = tl.arange(0, WB)[None, :], tl.arange(0, SB)[:, None]
    highest = tl.full([WB], NOTHING, tl.float32)
    total, a = tl.zeros([WB], tl.float32), tl.zeros([WB], tl.float32)
    for s0 in range(0, parts, SB):
        mask = (s0 + s < parts) & (c < W)
        e = tl.load(lse + (s0 + s) * H + c // K, mask=mask, other=NOTHING)
        u = tl.load(partial + (s0 + s) * (H * K) + c, mask=mask, other=0.0, cache_modifier=".cg")
        top = tl.maximum(highest, tl.max(e, 0))
        p = tl.where(mask, tl.exp2(e - top[None, :]), 0.0)
        change = tl.exp2(highest - top)
        total = total * change + tl.sum(p, 0)
        a = a * change + tl.sum(p * u, 0)
        highest = top
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
        wait(PDL)
        h = combined(a, lse, keys, H, K, H * K, WB, S, SB, LEAST, BLOCK).to(dtype).to(tl.float32)
    else:
        wait(PDL)
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
def shaped(
    row, first, on, weight, cos, sin, position, eps, HEADS: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    RB: tl.constexpr, KB: tl.constexpr, WB: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr,
    ROPE: tl.constexpr,
):  # fmt: skip
    """Heads first ... first + R of a row (HEADS K) as the layer makes them: QK-norm (0 none, 1 each head, 2 the whole
    row), rotation by `position`; (RB, KB) float32, zeros outside and where not `on`."""
    r, c = tl.arange(0, RB)[:, None], tl.arange(0, KB)[None, :]
    half: tl.constexpr = K // 2
    other = tl.where(c < half, c + half, c - half)  # what RoPE pairs with c
    mask = (r < R) & (c < K) & on
    at = row + (first + r) * K
    u = tl.load(at + c, mask=mask, other=0.0).to(tl.float32)
    if ROPE:
        v = tl.load(at + other, mask=mask, other=0.0).to(tl.float32)
    if NORM > 0:
        w_at = weight + tl.zeros_like(r)
        if NORM == 2:
            w_at += (first + r) * K
            i = tl.arange(0, WB)
            inside = (i < HEADS * K) & on
            d = tl.load(row + i, mask=inside, other=0.0).to(tl.float32)
            mean = 0.0
            if CENTRED:
                mean = tl.sum(d, 0) / (HEADS * K)
                d = tl.where(inside, d - mean, 0.0)
            rstd = tl.rsqrt(tl.sum(d * d, 0) / (HEADS * K) + eps)
        else:
            mean = tl.zeros([RB, 1], tl.float32)
            if CENTRED:
                mean = (tl.sum(u, 1) / K)[:, None]
            d = tl.where(mask, u - mean, 0.0)
            rstd = tl.rsqrt(tl.sum(d * d, 1) / K + eps)[:, None]
        u = (u - mean) * rstd * tl.load(w_at + c, mask=mask, other=0.0).to(tl.float32)
        if ROPE:
            v = (v - mean) * rstd * tl.load(w_at + other, mask=mask, other=0.0).to(tl.float32)
    if ROPE:
        angle = position * half + tl.where(c < half, c, other)
        cosine = tl.load(cos + angle, mask=c < K, other=1.0)
        sine = tl.load(sin + angle, mask=c < K, other=0.0)
        u = u * cosine + tl.where(c < half, -v, v) * sine
    return tl.where(mask, u, 0.0)


@triton.jit
def add_pair(m, l, acc, q, k, v, shift, seen):
    """The state of softmax (rows) with one more pair k, v (1, K), its score shifted by `shift`."""
    s = tl.sum(q * k, 1) + shift
    s = tl.where(seen, s, float("-inf"))
    top = tl.maximum(m, s)
    change, p = tl.exp2(m - top), tl.exp2(s - top)
    return top, l * change + p, acc * change[:, None] + p[:, None] * v


@triton.jit
def attend(
    raw, keys, values, q_weight, k_weight, slopes, cos, sin, slot, positions, valid, key_positions, pending_slot,
    pending_positions, partial, lse, out, B, capacity, eps, scale, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr, RB: tl.constexpr, KB: tl.constexpr, QB: tl.constexpr, GB: tl.constexpr, BN: tl.constexpr,
    S: tl.constexpr, LEAST: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr, ROPE: tl.constexpr,
    ALIBI: tl.constexpr, PADS: tl.constexpr, STORE: tl.constexpr, DEFER: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of the new token's queries that share a key-value head, over one part of the memory (B, G, capacity, K).

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

    wait(PDL)
    position = tl.load(positions + b)
    row = raw + b * ((H + 2 * G) * K)
    q = shaped(row, g * R, True, q_weight, cos, sin, position, eps, H, K, R, RB, KB, QB, NORM, CENTRED, ROPE)
    q = q.to(dtype)
    # Asked for now, needed after the loop.
    row += H * K
    own = shaped(row, g, is_first, k_weight, cos, sin, position, eps, G, K, 1, 1, KB, GB, NORM, CENTRED, ROPE).to(dtype)
    c1 = c[None, :]
    own_v = tl.load(row + (G + g) * K + c1, mask=(c1 < K) & is_first, other=0.0)
    if DEFER:
        row += B * ((H + 2 * G) * K)
        old &= is_first
        old_position = tl.load(pending_positions + b)
        old_k = shaped(row, g, old, k_weight, cos, sin, old_position, eps, G, K, 1, 1, KB, GB, NORM, CENTRED, ROPE)
        old_k = old_k.to(dtype)
        old_v = tl.load(row + (G + g) * K + c1, mask=(c1 < K) & old, other=0.0)

    factor = scale * LOG2E
    r = tl.arange(0, RB)
    slope = tl.zeros([RB], tl.float32)
    if ALIBI:
        slope = tl.load(slopes + g * R + r, mask=r < R, other=0.0) * LOG2E
    if R == 1:
        q1 = tl.sum(q.to(tl.float32), 0) * factor
        slope1 = tl.sum(slope, 0)
        m = tl.full([BN], NOTHING, tl.float32)
        l = tl.zeros([BN], tl.float32)
        acc = tl.zeros([BN, KB], tl.float32)
    else:
        m = tl.full([RB], NOTHING, tl.float32)
        l = tl.zeros([RB], tl.float32)
        acc = tl.zeros([RB, KB], tl.float32)
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

    q = q.to(tl.float32) * factor
    nothing = tl.zeros([RB], tl.float32)
    m, l, acc = add_pair(m, l, acc, q, own.to(tl.float32), own_v.to(tl.float32), nothing, is_first)
    if STORE:
        at = n.to(tl.int64) * K + c1
        tl.store(keys + at, own, mask=(c1 < K) & is_first)
        tl.store(values + at, own_v, mask=(c1 < K) & is_first)
    if DEFER:
        seen = old
        distance = 1.0
        if PADS:
            at = b * capacity + n - 1
            seen &= tl.load(valid + at, mask=old, other=0) != 0
            distance = (position - tl.load(key_positions + at, mask=old, other=0)).to(tl.float32)
        shift = -slope * distance
        m, l, acc = add_pair(m, l, acc, q, old_k.to(tl.float32), old_v.to(tl.float32), shift, seen)
        at = (n - 1).to(tl.int64) * K + c1
        tl.store(keys + at, old_k, mask=(c1 < K) & old)
        tl.store(values + at, old_v, mask=(c1 < K) & old)

    acc = acc / tl.where(l > 0.0, l, 1.0)[:, None]
    mask = (r < R)[:, None] & (c < K)[None, :]
    at = (g * R + r)[:, None] * K + c[None, :]
    if PARTS:
        to = b * S + part
        tl.store(partial + to * (H * K) + at, acc, mask=mask)
        tl.store(lse + to * H + g * R + r, tl.where(l > 0.0, m + tl.log2(l), NOTHING), mask=r < R)
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
    weight = k_weight + layer * W
    k = shaped(row, g, True, weight, cos, sin, position, eps, G, K, 1, 1, KB, GB, NORM, CENTRED, ROPE)
    c = tl.arange(0, KB)[None, :]
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
    wait(PDL)
    tl.store(pending_slot, n)
    tl.store(pending_positions + b, position, mask=b < B)


# --- several rows, between the library's products --------------------------------------------------------------------


@triton.jit
def add_and_norm(
    x, branch, weight, out, h, pending, B, scale, eps, D: tl.constexpr, DB: tl.constexpr, CENTRED: tl.constexpr,
    BRANCH: tl.constexpr,
):  # fmt: skip
    """Rows y = x + scale branch (BRANCH: written to out; else y = x) and h = norm(y); rows B ... of h: norm(pending)."""
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
