# Triton compiles this file; to a type checker it is not Python.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false
"""Loads through the table: the addresses and sizes of one call, kept in device memory.

A CUDA graph records the arguments of its launches. Kernels therefore read from the table whatever differs between
chunks, calls and lengths, and one graph of a chunk serves every chunk, every call and every N. The slots are those of
`recurformer.scan.fused.table.Slot`, with the same names. Layer l of L works on chunk w - l at step w of the forward,
and on the mirror image of that chunk in the backward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from recurformer.scan.fused.table import Slot

# Triton reads a global only when it is a constexpr.
STEP, LENGTH, PAST = (tl.constexpr(slot.value) for slot in (Slot.STEP, Slot.LENGTH, Slot.PAST))
X, Z, Q, KV, A, LSE = (tl.constexpr(slot.value) for slot in (Slot.X, Slot.Z, Slot.Q, Slot.KV, Slot.A, Slot.LSE))
POSITIONS, QUERY_SEGMENTS = tl.constexpr(Slot.POSITIONS.value), tl.constexpr(Slot.QUERY_SEGMENTS.value)
KEY_SEGMENTS = tl.constexpr(Slot.KEY_SEGMENTS.value)
FIRST, LAST = tl.constexpr(Slot.FIRST.value), tl.constexpr(Slot.LAST.value)
COS, SIN, ROTATION_STRIDE = (tl.constexpr(slot.value) for slot in (Slot.COS, Slot.SIN, Slot.ROTATION_STRIDE))
GZ, GX, GA, DELTA = (tl.constexpr(slot.value) for slot in (Slot.GZ, Slot.GX, Slot.GA, Slot.DELTA))
UP, RAW = tl.constexpr(Slot.UP.value), tl.constexpr(Slot.RAW.value)


@triton.jit
def pointer(table, slot, dtype: tl.constexpr):
    """Return the pointer in a slot.

    Loads are wide only where Triton knows that the pointer is aligned. That brought a forward and backward from 117.0
    to 112.9 ms.
    """
    return tl.multiple_of(tl.load(table + slot).to(tl.pointer_type(dtype)), 16)


@triton.jit
def chunk_of(table, l, L: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr):
    """Return the first position of layer l's chunk, N rounded up to chunks, and whether the layer has a chunk now."""
    w, n = tl.load(table + STEP), tl.load(table + LENGTH)
    chunks = (n + C - 1) // C
    if REVERSE:
        c = chunks - 1 - (w - (L - 1 - l))
    else:
        c = w - l
    return c * C, chunks * C, (c >= 0) & (c < chunks)


@triton.jit
def input_row(table, l, b, i, B, D: tl.constexpr):
    """Return the address of layer l's input at (b, i): x, or the outputs of the layer below."""
    n = tl.load(table + LENGTH)
    x, z = pointer(table, X, tl.float32), pointer(table, Z, tl.float32)
    return tl.where(l == 0, x, z + (l - 1) * (n * B) * D) + (b * n + i) * D


@triton.jit
def output_row(table, l, b, i, B, D: tl.constexpr):
    """Return the address of layer l's output at (b, i)."""
    n = tl.load(table + LENGTH)
    return pointer(table, Z, tl.float32) + (((l * B + b) * n + i) * D)


@triton.jit
def raw_row(table, raw, l, rows, r, b, i, B, whole, width: tl.constexpr, KEPT: tl.constexpr):
    """Return the address of an input's products with Q, K and V: in raw (L, rows, B, width), or where they are kept."""
    if KEPT:
        return pointer(table, RAW, raw.dtype.element_ty) + ((l * whole + i) * B + b) * width
    return raw + ((l * rows + r) * B + b) * width


@triton.jit
def kept_inner(table, l, r, B, width, L: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr, dtype: tl.constexpr):
    """Return where the MLP's inner values are kept from position r of the chunk on, and whether there is a chunk."""
    start, whole, active = chunk_of(table, l, L, C, REVERSE)
    return pointer(table, UP, dtype) + (l * whole + start + r) * B * width, active


@triton.jit
def angles(table, b, i, K: tl.constexpr, KB: tl.constexpr):
    """Return the cosines and sines of a position, (1, K / 2). Positions beyond the last one are not read."""
    n, stride = tl.load(table + LENGTH), tl.load(table + ROTATION_STRIDE)
    c = tl.arange(0, KB)[None, :]
    inside = (c < K // 2) & (i < n)
    offset = b * stride + i * (K // 2) + c
    cos = tl.load(pointer(table, COS, tl.float32) + offset, mask=inside, other=1.0)
    return cos, tl.load(pointer(table, SIN, tl.float32) + offset, mask=inside, other=0.0)
