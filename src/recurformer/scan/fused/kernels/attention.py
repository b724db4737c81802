# Triton compiles this file; to a type checker it is not Python.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false
"""Attention of the forward: the keys of a whole tile merged into softmax states, and the last few keys of a position.

The softmax state of a query is its running maximum, denominator and numerator, (L, C, B, H) and (L, C, B, H, K) in
float32. States exist for one chunk only: a pull starts them, pushes add tiles to them, and `attend_leaf` reads them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recurformer.scan.fused.kernels.common import NOTHING, await_kernel, exp
from recurformer.scan.fused.kernels.heads import half_masks, halves_at, pair_halves, store_halves
from recurformer.scan.fused.kernels.table import (
    FIRST,
    KEY_SEGMENTS,
    KV,
    LENGTH,
    PAST,
    POSITIONS,
    QUERY_SEGMENTS,
    Q,
    chunk_of,
    pointer,
)


@triton.jit
def masked_scores(s, table, b, i, j, past, slope, B, ALIBI: tl.constexpr, SEGMENTS: tl.constexpr, inside_i, inside_j):
    """Return the scores of queries i and slots j with ALiBi, and -inf where a query does not see a key.

    i and j broadcast. Queries are positions and keys are slots: position i has slot P + i. Without segments every
    distance is that of the slots.
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
            s -= slope * ((past + i).to(tl.float32) - j.to(tl.float32))  # float is cheaper, and exact up to 2^24
    return s


@triton.jit
def merge_keys(
    table, m_state, l_state, acc_state, slopes, q0, queries, k0, keys, B, scale, L: tl.constexpr, C: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PULL: tl.constexpr, ALIBI: tl.constexpr, SEGMENTS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Merge keys into the softmax states of queries q0, q0 + 1, ... of a chunk.

    PULL: start the states, with all keys before the chunk and the past's. Otherwise the keys are k0, k0 + 1, ... of the
    chunk, a finished tile.
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
        s = masked_scores(
            s, table, b, i[:, None], j[None, :], past, slope, B, ALIBI, SEGMENTS, (i < n)[:, None],
            (j < past + n)[None, :],
        )  # fmt: skip
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
def attend_leaf(
    table, raw, k_weight, bias, m_state, l_state, acc_state, slopes, out, lse_out, r, B, scale, eps, L: tl.constexpr,
    C: tl.constexpr, S: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, KB: tl.constexpr,
    HP: tl.constexpr, WB: tl.constexpr, NORM: tl.constexpr, CENTRED: tl.constexpr, ROPE: tl.constexpr,
    BIAS: tl.constexpr, NEW: tl.constexpr, KEEP: tl.constexpr, ALIBI: tl.constexpr, SEGMENTS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Write the attention output of position r, from its state, its temporary pair, and the pairs of its own leaf.

    NEW: position r - 1 belongs to the leaf, and its pair is made here, of raw (L, B, 2 G K), and stored, which saves
    a launch. Outputs are out (L, C, B, H K) and lse_out (L, C, B, H). A program handles HP key-value
    heads of one sequence.
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
        # The leaf is one tile, because the loads of a loop would wait for each other.
        p1, p2 = halves_at(kv + (rows * B)[:, None, None] * (2 * G * K), g, K, KB)
        k1, k2 = tl.load(p1, mask=s1, other=0.0), tl.load(p2, mask=s2, other=0.0)
        v1, v2 = tl.load(p1 + G * K, mask=s1, other=0.0), tl.load(p2 + G * K, mask=s2, other=0.0)
        s = tl.sum(q1[None] * k1.to(tl.float32), 2) + tl.sum(q2[None] * k2.to(tl.float32), 2)
        j = (past + start + rows)[:, None]
        s = masked_scores(s, table, b, i, j, past, slope, B, ALIBI, SEGMENTS, i < n, seen & (j < past + n))
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
            s = masked_scores(s, table, b, i, past + i - 1, past, slope, B, ALIBI, SEGMENTS, i < n, i - 1 < n)
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
