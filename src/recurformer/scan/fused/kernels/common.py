# Triton compiles this file; to a type checker it is not Python.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false
"""Pieces that kernels of several subjects share: waiting for the kernel ahead, exponentials, activations, norms.

Everything is computed in float32. `recurformer.generation.kernels` takes the wait, the activation and the norm from
this file too.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

COMPILED = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")  # the interpreter knows no instructions of the GPU
NOTHING = tl.constexpr(-1e30)  # maximum of no scores: finite, because exp(-inf - -inf) would be NaN


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
def normal_tail(u):
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
        tail, _ = normal_tail(u)
        return tl.maximum(u, 0.0) - tl.minimum(tl.abs(u), 64.0) * tail  # the tail of 64 is 0, and so it is of infinity
    elif KIND == 1:
        return 0.5 * u * (1.0 + tanh(0.7978845608028654 * (u + 0.044715 * u * u * u)))
    else:
        return u * (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)


@triton.jit
def activation_slope(u, KIND: tl.constexpr):
    """Derivative of GELU."""
    if KIND == 0:
        tail, e = normal_tail(u)
        return tl.where(u > 0, 1.0 - tail, tail) + (0.3989422804014327 * u) * e
    else:
        t = tanh(0.7978845608028654 * (u + 0.044715 * u * u * u))
        return 0.5 * (1.0 + t) + 0.5 * u * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 3 * 0.044715 * u * u)


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
