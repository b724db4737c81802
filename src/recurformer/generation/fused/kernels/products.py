# Triton compiles this file, so a type checker cannot read it.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportAssignmentType=false, reportReturnType=false
"""Products of weight matrices with a single row, with what comes before and after each fused in.

`PRODUCT` is a `launch.Product`. A program loads its first block of weights before it waits for its inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recurformer.generation.fused.kernels.parts import begin, combined
from recurformer.scan.fused.kernels.common import activated, await_kernel, normalised


@triton.jit
def load_rows(w1, w2, w3, row, N1: tl.constexpr, N2: tl.constexpr, PRODUCT: tl.constexpr):
    """Return rows row ... row + BN of three matrices that lie on top of each other.

    The first has N1 rows, the second the rows up to N2, the third the rows up to N. BN divides N1 and N2. CHECKED: rows
    from N on may be asked for, and are zeros.
    """
    N: tl.constexpr = PRODUCT.N
    IN: tl.constexpr = PRODUCT.IN
    ALIGN: tl.constexpr = PRODUCT.ALIGN
    i = row.to(tl.int64)
    at = w1 + i * IN
    if N1 < N:
        at = tl.where(row < N1, at, tl.where(row < N2, w2 + (i - N1) * IN, w3 + (i - N2) * IN))
    at = tl.multiple_of(at, ALIGN)
    n, c = tl.arange(0, PRODUCT.BN)[:, None], tl.arange(0, PRODUCT.WB)[None, :]
    if PRODUCT.WB > IN or PRODUCT.CHECKED:
        return tl.load(at + n * IN + c, mask=(c < IN) & (row + n < N), other=0.0)
    else:
        return tl.load(at + n * IN + c)


@triton.jit
def dots(w, h):
    """Return the products of rows w with a vector h."""
    return tl.sum(w.to(tl.float32) * h[None, :], 1)


@triton.jit
def normed_row(row, scale, dtype, eps, CENTRED: tl.constexpr, PRODUCT: tl.constexpr):
    """Return the norm of a row, rounded to the dtype of the weights."""
    h, _ = normalised(row, tl.arange(0, PRODUCT.WB) < PRODUCT.IN, PRODUCT.IN, eps, CENTRED)
    return (h * scale).to(dtype).to(tl.float32)


@triton.jit
def normed_product(
    x, norm_weight, matrices, gate, bias, gate_bias, pending, out, eps, KIND: tl.constexpr, CENTRED: tl.constexpr,
    DEFER: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Write out (N) = W norm(x) for one row, activated as `activated` does for KIND >= 0 (2: with a gate).

    W is three matrices on top of each other. DEFER: also multiply the rows from N1 on with norm(pending), a vector that
    the step before wrote, into a second row of out.
    """
    begin(PRODUCT.PDL)
    N: tl.constexpr = PRODUCT.N
    BN: tl.constexpr = PRODUCT.BN
    TILES: tl.constexpr = PRODUCT.TILES
    PROGRAMS: tl.constexpr = PRODUCT.PROGRAMS
    dtype = matrices.first.dtype.element_ty
    first = tl.program_id(0)
    c = tl.arange(0, PRODUCT.WB)
    w1, w2, w3 = matrices.first, matrices.second, matrices.third
    w = load_rows(w1, w2, w3, first * BN, PRODUCT.N1, PRODUCT.N2, PRODUCT)
    if KIND == 2:
        g = load_rows(gate, gate, gate, first * BN, N, N, PRODUCT)
    scale = tl.load(norm_weight + c, mask=c < PRODUCT.IN, other=0.0).to(tl.float32)
    if DEFER:
        old = normed_row(tl.load(pending + c, mask=c < PRODUCT.IN, other=0.0), scale, dtype, eps, CENTRED, PRODUCT)
    await_kernel(PRODUCT.PDL)
    loaded = tl.load(x + c, mask=c < PRODUCT.IN, other=0.0, cache_modifier=".cg")
    h = normed_row(loaded, scale, dtype, eps, CENTRED, PRODUCT)
    n = tl.arange(0, BN)
    row = first * BN
    for _ in range(first, TILES, PROGRAMS):
        if TILES > PROGRAMS:  # load the next rows while these are multiplied
            w_next = load_rows(w1, w2, w3, row + PROGRAMS * BN, PRODUCT.N1, PRODUCT.N2, PRODUCT)
            if KIND == 2:
                g_next = load_rows(gate, gate, gate, row + PROGRAMS * BN, N, N, PRODUCT)
        inside = row + n < N
        u = dots(w, h)
        if PRODUCT.BIAS:
            added = tl.load(bias + row + n, mask=inside, other=0.0)
            u += added
        u = u.to(dtype)
        if KIND >= 0:
            opened = u.to(tl.float32)
            if KIND == 2:
                opened = dots(g, h)
                if PRODUCT.BIAS:
                    opened += tl.load(gate_bias + row + n, mask=inside, other=0.0)
                opened = opened.to(dtype).to(tl.float32)
            u = activated(u.to(tl.float32), opened, KIND, dtype).to(dtype)
        tl.store(out + row + n, u.to(out.dtype.element_ty), mask=inside)
        if DEFER:  # noqa: SIM102 - the first is known when the kernel is compiled, the second when it runs
            if row >= PRODUCT.N1:
                again = dots(w, old)
                if PRODUCT.BIAS:
                    again += added
                tl.store(out + N + row + n, again.to(dtype), mask=inside)
        if TILES > PROGRAMS:
            w = w_next
            if KIND == 2:
                g = g_next
        row += PROGRAMS * BN


@triton.jit
def residual_product(
    a, lse, slot, weight, bias, x, out, scale, H: tl.constexpr, K: tl.constexpr, SB: tl.constexpr, PARTS: tl.constexpr,
    COMBINE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Write out (N) = x + scale (W a) for one row. COMBINE: a is the parts of attention outputs, put together here."""
    begin(PRODUCT.PDL)
    N: tl.constexpr = PRODUCT.N
    BN: tl.constexpr = PRODUCT.BN
    TILES: tl.constexpr = PRODUCT.TILES
    PROGRAMS: tl.constexpr = PRODUCT.PROGRAMS
    dtype = weight.dtype.element_ty
    first = tl.program_id(0)
    c = tl.arange(0, PRODUCT.WB)
    w = load_rows(weight, weight, weight, first * BN, N, N, PRODUCT)
    if COMBINE:
        keys = tl.load(slot)
        await_kernel(PRODUCT.PDL)
        h = combined(a, lse, keys, H, K, H * K, PRODUCT.WB, SB, PARTS).to(dtype).to(tl.float32)
    else:
        await_kernel(PRODUCT.PDL)
        h = tl.load(a + c, mask=c < PRODUCT.IN, other=0.0, cache_modifier=".cg").to(tl.float32)
    n = tl.arange(0, BN)
    row = first * BN
    for _ in range(first, TILES, PROGRAMS):
        if TILES > PROGRAMS:
            w_next = load_rows(weight, weight, weight, row + PROGRAMS * BN, N, N, PRODUCT)
        inside = row + n < N
        before = tl.load(x + row + n, mask=inside, other=0.0)
        u = dots(w, h)
        if PRODUCT.BIAS:
            u += tl.load(bias + row + n, mask=inside, other=0.0)
        tl.store(out + row + n, before + scale * u.to(dtype).to(tl.float32), mask=inside)
        if TILES > PROGRAMS:
            w = w_next
        row += PROGRAMS * BN
