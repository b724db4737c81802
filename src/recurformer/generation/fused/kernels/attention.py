# Triton compiles this file, so a type checker cannot read it.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportAssignmentType=false, reportReturnType=false
"""Attention of new tokens over the memory, for any number of rows.

The structures of `launch.py` name the arguments: HEADS, PARTS and MODE are constants, `memory`, `norms`, `tables`,
`pending` and `outputs` named tuples. The letters of the softmax state are m (maximum), l (denominator) and acc
(numerator); scores are in units of log 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recurformer.generation.fused.kernels.heads import angles, head_tile, norm_weights, shaped
from recurformer.generation.fused.kernels.parts import begin, combined, part_of_keys
from recurformer.scan.fused.kernels.common import NOTHING, await_kernel

LOG2E = tl.constexpr(1.4426950408889634)


# --- the new pair, and the pair of the slot before -------------------------------------------------------------------


@triton.jit
def add_three(a, b, c, more_a, more_b, more_c):
    return a + more_a, b + more_b, c + more_c


@triton.jit
def row_statistics(row, old_row, is_first, old, eps, HEADS: tl.constexpr, DEFER: tl.constexpr):
    """Return mean and 1 / rms (or 1 / standard deviation) of all queries, all keys, and all keys of the slot before.

    The three are reduced at once, because each reduction waits for all warps.
    """
    QUERIES: tl.constexpr = HEADS.H * HEADS.K
    KEYS: tl.constexpr = HEADS.G * HEADS.K
    mean_q, rstd_q, mean_k, rstd_k, mean_old, rstd_old = 0.0, 1.0, 0.0, 1.0, 0.0, 1.0
    if HEADS.NORM == 2:
        column = tl.arange(0, HEADS.QB)
        in_q, in_k = column < QUERIES, (column < KEYS) & is_first
        d_q = tl.load(row + column, mask=in_q, other=0.0).to(tl.float32)
        d_k = tl.load(row + QUERIES + column, mask=in_k, other=0.0).to(tl.float32)
        d_old = d_k
        if DEFER:
            d_old = tl.load(old_row + column, mask=(column < KEYS) & old, other=0.0).to(tl.float32)
        if HEADS.CENTRED:
            mean_q, mean_k, mean_old = tl.reduce((d_q, d_k, d_old), 0, add_three)
            mean_q, mean_k, mean_old = mean_q / QUERIES, mean_k / KEYS, mean_old / KEYS
            d_q, d_k = tl.where(in_q, d_q - mean_q, 0.0), tl.where(column < KEYS, d_k - mean_k, 0.0)
            d_old = tl.where(column < KEYS, d_old - mean_old, 0.0)
        rstd_q, rstd_k, rstd_old = tl.reduce((d_q * d_q, d_k * d_k, d_old * d_old), 0, add_three)
        rstd_q, rstd_k = tl.rsqrt(rstd_q / QUERIES + eps), tl.rsqrt(rstd_k / KEYS + eps)
        rstd_old = tl.rsqrt(rstd_old / KEYS + eps)
    return (mean_q, rstd_q), (mean_k, rstd_k), (mean_old, rstd_old)


@triton.jit
def new_heads(raw, b, g, B, is_first, old, w_q, w_k, angle, old_angle, eps, dtype, HEADS: tl.constexpr,
              DEFER: tl.constexpr):  # fmt: skip
    """Return the new token's queries (RB, KB), its own pair, and the pair of the slot before, keys and values (1, KB).

    The own pair is zeros unless `is_first`. The pair of the slot before is zeros unless `old`, and the own pair without
    DEFER.
    """
    H: tl.constexpr = HEADS.H
    G: tl.constexpr = HEADS.G
    K: tl.constexpr = HEADS.K
    R: tl.constexpr = HEADS.R
    RB: tl.constexpr = HEADS.RB
    W: tl.constexpr = (H + 2 * G) * K
    row = raw + b * W
    old_row = row + B * W + H * K
    c = tl.arange(0, HEADS.KB)[None, :]
    u_q = head_tile(row, g * R, True, K, R, RB, False, HEADS)
    u_k = head_tile(row + H * K, g, is_first, K, 1, 1, False, HEADS)
    own_v = tl.load(row + (H + G + g) * K + c, mask=(c < K) & is_first, other=0.0)
    u_q2, u_k2, u_old, u_old2, old_v = u_q, u_k, u_k, u_k, own_v
    if HEADS.ROPE:
        u_q2 = head_tile(row, g * R, True, K, R, RB, True, HEADS)
        u_k2 = head_tile(row + H * K, g, is_first, K, 1, 1, True, HEADS)
    if DEFER:
        u_old = head_tile(old_row, g, old, K, 1, 1, False, HEADS)
        if HEADS.ROPE:
            u_old2 = head_tile(old_row, g, old, K, 1, 1, True, HEADS)
        old_v = tl.load(old_row + (G + g) * K + c, mask=(c < K) & old, other=0.0)
    all_q, all_k, all_old = row_statistics(row, old_row, is_first, old, eps, HEADS, DEFER)
    q = shaped(u_q, u_q2, w_q, all_q, angle, eps, R, RB, HEADS).to(dtype)
    own_k = shaped(u_k, u_k2, w_k, all_k, angle, eps, 1, 1, HEADS).to(dtype)
    old_k = own_k
    if DEFER:
        old_k = shaped(u_old, u_old2, w_k, all_old, old_angle, eps, 1, 1, HEADS).to(dtype)
    return q, own_k, own_v, old_k, old_v


# --- the softmax state -----------------------------------------------------------------------------------------------


@triton.jit
def add_pair(m, l, acc, s, v, seen):
    """Return the softmax state (rows) with one more pair, with scores s (rows) and value v (1, K)."""
    s = tl.where(seen, s, float("-inf"))
    top = tl.maximum(m, s)
    change, p = tl.exp2(m - top), tl.exp2(s - top)
    return top, l * change + p, acc * change[:, None] + p[:, None] * v


@triton.jit
def first_state(s_own, own_v, is_first, s_old, old_v, has_old, HEADS: tl.constexpr, BN: tl.constexpr,
                DEFER: tl.constexpr):  # fmt: skip
    """Return the softmax state of the token's own pair, and with DEFER of the pair of the slot before.

    For one query a key-value head the state has BN rows, one for each row of a block of keys.
    """
    RB: tl.constexpr = HEADS.RB
    KB: tl.constexpr = HEADS.KB
    if HEADS.R == 1:
        j = tl.arange(0, BN)
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
    return m, l, acc


@triton.jit
def add_block_of_one(m, l, acc, s, v, seen):
    """Return the softmax state with a block of keys, for one query: each row of the block has a state of its own."""
    s = tl.where(seen, s, float("-inf"))
    top = tl.maximum(m, s)
    change, p = tl.exp2(m - top), tl.exp2(s - top)
    return top, l * change + p, acc * change[:, None] + p[:, None] * v.to(tl.float32)


@triton.jit
def add_block_of_several(m, l, acc, s, v, seen, dtype, MODE: tl.constexpr):
    """Return the softmax state with a block of keys, for several queries."""
    s = tl.where(seen[None, :], s, float("-inf"))
    top = tl.maximum(m, tl.max(s, 1))
    change, p = tl.exp2(m - top), tl.exp2(s - top[:, None])
    l = l * change + tl.sum(p, 1)
    acc = acc * change[:, None] + tl.dot(p.to(dtype), v, input_precision=MODE.PRECISION)
    return top, l, acc


@triton.jit
def merged_rows(m, l, acc, HEADS: tl.constexpr):
    """Return the softmax state of one query from the states of the rows of its blocks."""
    RB: tl.constexpr = HEADS.RB
    KB: tl.constexpr = HEADS.KB
    top = tl.max(m, 0)
    p = tl.exp2(m - top)
    total, sums = tl.sum(l * p, 0), tl.sum(acc * p[:, None], 0)
    m, l = tl.full([RB], 0.0, tl.float32) + top, tl.zeros([RB], tl.float32) + total
    acc = tl.zeros([RB, KB], tl.float32) + sums[None, :]
    return m, l, acc


@triton.jit
def walk_keys(q, slope, position, memory, keys, values, k, v, start, stop, n, b, factor, m, l, acc,
              HEADS: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr):  # fmt: skip
    """Return the softmax state with the keys start ... stop of the memory. k and v are the first block, loaded.

    The next block of keys is asked for as soon as this one is used, and the values likewise.
    """
    K: tl.constexpr = HEADS.K
    j, c = tl.arange(0, BN), tl.arange(0, HEADS.KB)
    offsets = j[:, None] * K + c[None, :]
    wide = c[None, :] < K
    here = start.to(tl.int64) * K
    if HEADS.R == 1:
        q1, slope1 = tl.sum(q.to(tl.float32) * factor, 0), tl.sum(slope, 0)
    for j0 in range(start, stop, BN):
        here += BN * K
        mask = wide & (j0 + BN + j < stop)[:, None]
        seen = j0 + j < stop
        distance = (n - (j0 + j)).to(tl.float32)
        if MODE.PADS:
            at = b * memory.capacity + j0 + j
            seen &= tl.load(memory.valid + at, mask=seen, other=0) != 0
            distance = (position - tl.load(memory.key_positions + at, mask=seen, other=0)).to(tl.float32)
        if HEADS.R == 1:
            s = tl.sum(k.to(tl.float32) * q1[None, :], 1)
            k = tl.load(keys + here + offsets, mask=mask, other=0.0)
            if HEADS.ALIBI:
                s -= slope1 * distance
            m, l, acc = add_block_of_one(m, l, acc, s, v, seen)
        else:
            s = tl.dot(q, tl.trans(k), input_precision=MODE.PRECISION) * factor
            k = tl.load(keys + here + offsets, mask=mask, other=0.0)
            if HEADS.ALIBI:
                s -= slope[:, None] * distance[None, :]
            m, l, acc = add_block_of_several(m, l, acc, s, v, seen, k.dtype, MODE)
        v = tl.load(values + here + offsets, mask=mask, other=0.0)
    return m, l, acc


# --- around the loop -------------------------------------------------------------------------------------------------


@triton.jit
def head_slopes(slopes, g, HEADS: tl.constexpr):
    """Return the ALiBi slopes (RB,) of the queries of a key-value head, in units of log 2; zeros without ALiBi."""
    RB: tl.constexpr = HEADS.RB
    r = tl.arange(0, RB)
    slope = tl.zeros([RB], tl.float32)
    if HEADS.ALIBI:
        slope = tl.load(slopes + g * HEADS.R + r, mask=r < HEADS.R, other=0.0) * LOG2E
    return slope


@triton.jit
def since_slot_before(memory, b, n, position, old, MODE: tl.constexpr):
    """Return the distance to the slot before, and whether its pair counts."""
    since, counts = 1.0, old
    if MODE.PADS:
        at = b * memory.capacity + n - 1
        counts &= tl.load(memory.valid + at, mask=old, other=0) != 0
        since = (position - tl.load(memory.key_positions + at, mask=old, other=0)).to(tl.float32)
    return since, counts


@triton.jit
def store_pair(keys, values, slot, k, v, on, HEADS: tl.constexpr):
    """Store a pair (1, KB) in a slot of a head's memory (capacity, K)."""
    c = tl.arange(0, HEADS.KB)[None, :]
    at = slot.to(tl.int64) * HEADS.K + c
    tl.store(keys + at, k, mask=(c < HEADS.K) & on)
    tl.store(values + at, v, mask=(c < HEADS.K) & on)


@triton.jit
def store_outputs(outputs, m, l, acc, b, g, part, dtype, HEADS: tl.constexpr, PARTS: tl.constexpr,
                  SPLIT: tl.constexpr):  # fmt: skip
    """Store what the softmax state stands for: a partial output with its log2-sum-exp, or the output itself."""
    H: tl.constexpr = HEADS.H
    K: tl.constexpr = HEADS.K
    R: tl.constexpr = HEADS.R
    r, c = tl.arange(0, HEADS.RB), tl.arange(0, HEADS.KB)
    acc = acc / tl.where(l > 0.0, l, 1.0)[:, None]
    mask = (r < R)[:, None] & (c < K)[None, :]
    at = (g * R + r)[:, None] * K + c[None, :]
    if SPLIT:
        to = b * PARTS.S + part
        tl.store(outputs.partial + to * (H * K) + at, acc, mask=mask)
        sums = tl.where(l > 0.0, m + tl.log2(tl.where(l > 0.0, l, 1.0)), NOTHING)
        tl.store(outputs.lse + to * H + g * R + r, sums, mask=r < R)
    else:
        tl.store(outputs.out + b * (H * K) + at, acc.to(dtype), mask=mask)


# --- the kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def attend(raw, memory, norms, tables, pending, outputs, B, eps, scale, HEADS: tl.constexpr, PARTS: tl.constexpr,
           MODE: tl.constexpr):  # fmt: skip
    """Attend from the new token's queries that share a key-value head, to one part of the memory.

    The slots filled so far are divided evenly among at most S parts. The first part also has the token's own pair,
    which a standard layer stores in its slot (STORE). With DEFER it makes, uses and stores the pair of the slot before.
    With one query a key-value head, scores are products of vectors, and each row of a block of keys has a softmax of
    its own until the end. The loop then has no sum over keys. Several queries use `tl.dot`.
    """
    begin(MODE.PDL)
    G: tl.constexpr = HEADS.G
    K: tl.constexpr = HEADS.K
    R: tl.constexpr = HEADS.R
    RB: tl.constexpr = HEADS.RB
    BN: tl.constexpr = PARTS.BN
    DEFER: tl.constexpr = MODE.DEFER
    b, g, part = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G, tl.program_id(1)
    dtype = memory.k.dtype.element_ty
    n = tl.load(memory.slot)
    each = part_of_keys(n, PARTS)
    start = part * each
    if (part > 0) & (start >= n):
        return
    is_first = part == 0
    old = False
    last = n
    if DEFER:
        old = (tl.load(pending.slot) == n - 1) & (n > 0)
        last = tl.where(old, n - 1, n)
    stop = tl.minimum(start + each, last)
    filled = (b * G + g) * memory.capacity * K
    keys, values = memory.k + filled, memory.v + filled
    j, c = tl.arange(0, BN), tl.arange(0, HEADS.KB)
    here, offsets = start.to(tl.int64) * K, j[:, None] * K + c[None, :]
    mask = (c[None, :] < K) & (start + j < stop)[:, None]
    k = tl.load(keys + here + offsets, mask=mask, other=0.0)
    v = tl.load(values + here + offsets, mask=mask, other=0.0)

    # The loads above and below don't depend on each other. All are issued before the first result is used.
    position = tl.load(memory.positions + b)
    old_position = position
    if DEFER:
        old_position = tl.load(pending.positions + b)
    w_q, w_k = norm_weights(norms.q, g * R, R, RB, HEADS), norm_weights(norms.k, g, 1, 1, HEADS)
    angle = angles(tables.cos, tables.sin, position, HEADS)
    old_angle = angle
    if DEFER:
        old_angle = angles(tables.cos, tables.sin, old_position, HEADS)
    slope = head_slopes(tables.slopes, g, HEADS)

    await_kernel(MODE.PDL)
    if DEFER:
        old &= is_first
    q, own_k, own_v, old_k, old_v = new_heads(
        raw, b, g, B, is_first, old, w_q, w_k, angle, old_angle, eps, dtype, HEADS, DEFER
    )
    factor = scale * LOG2E
    q_row = q.to(tl.float32) * factor
    s_own = tl.sum(q_row * own_k.to(tl.float32), 1)
    s_old, has_old = s_own, False
    if DEFER:
        since, has_old = since_slot_before(memory, b, n, position, old, MODE)
        s_old = tl.sum(q_row * old_k.to(tl.float32), 1) - slope * since
    m, l, acc = first_state(s_own, own_v, is_first, s_old, old_v, has_old, HEADS, BN, DEFER)
    m, l, acc = walk_keys(
        q, slope, position, memory, keys, values, k, v, start, stop, n, b, factor, m, l, acc, HEADS, BN, MODE
    )
    if R == 1:
        m, l, acc = merged_rows(m, l, acc, HEADS)
    if MODE.STORE:
        store_pair(keys, values, n, own_k, own_v, is_first, HEADS)
    if DEFER:
        store_pair(keys, values, n - 1, old_k, old_v, old, HEADS)
    store_outputs(outputs, m, l, acc, b, g, part, dtype, HEADS, PARTS, MODE.SPLIT)


@triton.jit
def combine(partial, lse, slot, out, SB: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr):
    """Write attention outputs (B, H K) from their parts."""
    H: tl.constexpr = HEADS.H
    K: tl.constexpr = HEADS.K
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts = b * PARTS.S
    partial, lse = partial + parts * (H * K) + h * K, lse + parts * H + h
    a = combined(partial, lse, tl.load(slot), H, K, K, HEADS.KB, SB, PARTS)
    c = tl.arange(0, HEADS.KB)
    tl.store(out + (b * H + h) * K + c, a.to(out.dtype.element_ty), mask=c < K)
