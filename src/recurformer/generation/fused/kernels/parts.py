# Triton compiles this file, so a type checker cannot read it.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportAssignmentType=false, reportReturnType=false
"""Pieces that several kernels share: programmatic dependent launch, and the parts that attention divides keys into."""

from __future__ import annotations

import triton
import triton.language as tl

from recurformer.scan.fused.kernels.common import NOTHING


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel start."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def part_of_keys(n, PARTS: tl.constexpr):
    """Return the keys of each part when n keys are divided: whole blocks of BN, and at least LEAST keys."""
    return tl.maximum(tl.cdiv(tl.cdiv(n, PARTS.S), PARTS.BN) * PARTS.BN, PARTS.LEAST)


@triton.jit
def combined(partial, lse, n, H: tl.constexpr, K: tl.constexpr, W: tl.constexpr, WB: tl.constexpr, SB: tl.constexpr,
             PARTS: tl.constexpr):  # fmt: skip
    """Return the first W attention outputs of a row (H K), from the parts that n keys were divided into.

    SB parts are read at a time.
    """
    parts = tl.maximum(tl.cdiv(n, part_of_keys(n, PARTS)), 1)
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
        for i in tl.static_range(SB):  # nothing stands between the loads, so none waits for another
            there = (c < W) & (s0 + i < parts)
            e = tl.load(lse + (s0 + i) * H + c // K, mask=there, other=NOTHING)
            u = tl.load(partial + (s0 + i) * (H * K) + c, mask=there, other=0.0, cache_modifier=".cg")
            p = tl.where(there, tl.exp2(e - top), 0.0)
            total += p
            a += p * u
    return a / tl.where(total > 0.0, total, 1.0)
