# Triton compiles this file; to a type checker it is not Python.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false
"""Attention of the backward: gradients of pairs tile by tile, of one leaf, and of a chunk's queries.

With p_ij = exp(s_ij - lse_i), ga the gradient of the attention outputs a, and delta_i = <ga_i, a_i> for each head:
gv_j += p_ij ga_i, ds_ij = p_ij (<ga_i, v_j> - delta_i), gk_j += ds_ij q_i, gq_i += ds_ij k_j. Probabilities are made
again from the kept log-sum-exps, so no tensor is (N, N).
"""

from __future__ import annotations

import triton
import triton.language as tl

from recurformer.scan.fused.kernels.attention import masked_scores
from recurformer.scan.fused.kernels.common import await_kernel, exp
from recurformer.scan.fused.kernels.table import DELTA, FIRST, GA, KV, LAST, LENGTH, LSE, PAST, A, Q, chunk_of, pointer


@triton.jit
def merged_keys_gradient(
    table, ga, gkv, slopes, q0, queries, k0, keys, B, scale, L: tl.constexpr, C: tl.constexpr, H: tl.constexpr,
    G: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PULL: tl.constexpr,
    ALIBI: tl.constexpr, SEGMENTS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add gradients from queries to those of pairs k0, k0 + 1, ... of the chunk, gkv (L, C, B, 2 G K), float32.

    PULL: start gkv, with all queries of later chunks. Otherwise the queries are q0, q0 + 1, ... of the chunk; their ga
    is in the chunk's buffer, and their delta is made here.
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
    # Addresses are loaded before the loop: a load whose address is still loading cannot be fetched ahead.
    q_at, lse_at = pointer(table, Q, DT), pointer(table, LSE, tl.float32)
    if PULL:
        ga_at, delta_at = pointer(table, GA, DT), pointer(table, DELTA, tl.float32)
    else:
        a_at = pointer(table, A, DT)
    for i0 in range(first.to(tl.int32), last.to(tl.int32), BM):
        i = i0 + tl.arange(0, BM)
        in_q = i < last
        mask_q = in_q[:, None] & (c < K)[None, :]
        # Unrolled, because only then are the loads of the outer loop fetched ahead.
        for head in tl.static_range(H // G):
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
            s = masked_scores(
                s, table, b, i[None, :], j[:, None], past, slope, B, ALIBI, SEGMENTS, (i < n)[None, :],
                (j < past + n)[:, None],
            )  # fmt: skip
            p = tl.where(in_q[None, :], exp(s - lse[None, :]), 0.0)
            dp = tl.dot(v, tl.trans(ga_i), input_precision=PRECISION)
            ds = p * (dp - delta[None, :]) * scale
            gv += tl.dot(p.to(DT), ga_i, input_precision=PRECISION)
            gk += tl.dot(ds.to(DT), q, input_precision=PRECISION)
    tl.store(to, gk, mask=mask_k)
    tl.store(to + G * K, gv, mask=mask_k)


@triton.jit
def leaf_gradient(
    table, ga, delta_chunk, gkv, slopes, r, B, scale, L: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, HP: tl.constexpr, RB: tl.constexpr,
    ALIBI: tl.constexpr, SEGMENTS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Add gradients from the later queries of its leaf to that of pair r, which is then complete.

    Query r + 1 comes for the first time: its delta is made here and kept in delta_chunk (L, C, B, H) for earlier pairs.
    A program handles HP key-value heads of one sequence, and RB queries at a time. A whole leaf at a time needs so many
    registers that few warps run.
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
            s = masked_scores(
                s, table, b, i[:, None], j, past, slope, B, ALIBI, SEGMENTS, (i < n)[:, None], j < past + n
            )
            p = tl.where(reads[:, None], exp(s - lse), 0.0)
            ds = p * (tl.sum(ga_i * v[None, :, :], 2) - delta) * scale
            gk += tl.sum(ds[:, :, None] * q, 0)
            gv += tl.sum(p[:, :, None] * ga_i, 0)
    tl.store(to, gk, mask=in_heads)
    tl.store(to + G * K, gv, mask=in_heads)


@triton.jit
def query_gradient(
    table, ga, tmp, slopes, gq, g_own, B, scale, L: tl.constexpr, C: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    K: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ALIBI: tl.constexpr,
    SEGMENTS: tl.constexpr, DT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a chunk's queries, gq (L, C, B, H K), and those of their own temporary pairs.

    g_own (L, C, B, 2, H K) holds each query head's part for its temporary key, then for its temporary value. ga and
    delta are stored where earlier chunks read them.
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

    # The temporary pair has no ALiBi: a query's distance to itself is 0.
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
        s = masked_scores(
            s, table, b, i[:, None], j[None, :], past, slope, B, ALIBI, SEGMENTS, (i < n)[:, None],
            (j < past + n)[None, :],
        )  # fmt: skip
        behind = (j - past - start).to(tl.int32)  # counted from the chunk's start, as rows are
        earlier = in_k[None, :] & (behind[None, :] < row[:, None])
        p = tl.where(earlier, exp(s - lse[:, None]), 0.0)
        dp = tl.dot(ga_i, tl.trans(v_j), input_precision=PRECISION)
        ds = p * (dp - delta[:, None]) * scale
        out += tl.dot(ds.to(DT), k_j, input_precision=PRECISION)
    tl.store(gq + here[:, None] * (H * K) + columns, out.to(DT), mask=mask)
