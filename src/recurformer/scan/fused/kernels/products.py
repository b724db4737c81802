# Triton compiles this file; to a type checker it is not Python.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false
"""Matrix products of one position, with or without the activation, and the activation as a kernel by itself.

`recurformer.scan.fused.products` decides which products these kernels make; the library makes the others. These kernels
can start before the kernel ahead has ended, and can apply the activation before they store.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recurformer.scan.fused.kernels.common import activated, activation_slope, await_kernel
from recurformer.scan.fused.kernels.table import kept_inner


@triton.jit
def product_thin(
    a, weight, out, rows, a_stride, w_stride, out_stride, IN: tl.constexpr, OUT: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute out (rows, OUT) = a (rows, IN) weight^T for at most BM rows, reading weights at full memory bandwidth."""
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


@triton.jit
def product_tiled(
    table, a, weight, rest, out, bias, up, inner, r, B, out_stride, up_stride, inner_stride, L: tl.constexpr,
    C: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, BACKWARD: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Compute a product with the activation around it.

    Forward: out (L, B, OUT) = a W^T, or GELU(a W^T + bias). BACKWARD: out = a W, or GELU'(up + bias) * (a W), and then
    GELU(up + bias) goes to inner. up and inner are (L, B, OUT). KIND is that of `activated`, or -1 for no activation.
    KEEP: inner values before GELU are kept at position r of the chunk: the forward stores them there, and BACKWARD
    reads them there, not from up.

    a (L, B, IN) and the weight, (L, OUT, IN) or BACKWARD (L, IN, OUT), are tensor descriptors with blocks (1, BM, BK)
    and (1, BN, BK) or (1, BK, BN). They read zeros beyond the edges. Strides are those between layers.

    A program makes BN columns, and BR more where BR is not 0. `rest` is the weight with blocks of BR columns. Blocks
    are powers of two, and a program of three quarters of one (128 + 64) can fill the GPU better.
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
    """Apply the activation to the product of `product_tiled` at rows m and columns f, and store the result."""
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
def activate_rows(
    table, up, bias, inner, r, rows, up_stride, inner_stride, B, L: tl.constexpr, C: tl.constexpr, F: tl.constexpr,
    FB: tl.constexpr, KIND: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Write inner (rows, F), the activation of up (rows, F), or (rows, 2 F) with the gate second.

    Strides are those between layers. KEEP: copy up to where the backward finds it, from position r of the chunk on.
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
