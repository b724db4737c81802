# Triton compiles this file; to a type checker it is not Python.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false
"""Pieces that kernels of several subjects share: waiting for the kernel ahead, exponentials, activations, norms.

Everything is computed in float32. `recurformer.generation.fused.kernels` takes the wait, the activation and the norm
from this file too.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

COMPILED = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")  # the interpreter has no GPU instructions
NOTHING = tl.constexpr(-1e30)  # maximum of no scores: finite, because exp(-inf - -inf) would be NaN


@triton.jit
def await_kernel(EARLY: tl.constexpr):
    """Wait for the kernel ahead, where this one starts before that one has ended (EARLY); then let the next one start.

    Before the wait a kernel may read weights and whatever was written before the kernel ahead started. It writes
    nothing before the wait. After the wait all earlier kernels have ended, because each of them waited in turn. A
    program that returns early never waits, so every launch keeps at least one program that runs to its end.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def exp(x):
    """Return e^x in two instructions.

    The compiler's own takes five, because it also makes numbers below 2^-126. They are 0 here.
    """
    if COMPILED:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp(x)


@triton.jit
def reciprocal(x):
    """Return 1 / x in one instruction, for x that is neither huge nor tiny."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def normal_tail(u):
    """Return P(X > |u|) of the standard normal distribution, and exp(-u^2 / 2).

    Abramowitz and Stegun, formula 7.1.26, halved: one exponential, and an error below 1e-7. The built-in erf costs
    several times as much.
    """
    e = exp(-0.5 * (u * u))
    t = reciprocal(1.0 + 0.231641888 * tl.abs(u))
    poly = 0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
    return t * poly * e, e


@triton.jit
def tanh(u):
    """Return the hyperbolic tangent."""
    return 2.0 * tl.sigmoid(2.0 * u) - 1.0


@triton.jit
def activated(u, gate, KIND: tl.constexpr, dtype: tl.constexpr):
    """Return the activation of u, rounded where the definition rounds.

    KIND: 0 GELU, 1 GELU in the tanh form, 2 SiLU(gate) u.
    """
    if KIND == 0:
        tail, _ = normal_tail(u)
        return tl.maximum(u, 0.0) - tl.minimum(tl.abs(u), 64.0) * tail  # infinity times its tail, 0, would be NaN
    elif KIND == 1:
        return 0.5 * u * (1.0 + tanh(0.7978845608028654 * (u + 0.044715 * u * u * u)))
    else:
        return u * (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)


@triton.jit
def activation_slope(u, KIND: tl.constexpr):
    """Return the derivative of GELU: KIND 0 exact, 1 in the tanh form."""
    if KIND == 0:
        tail, e = normal_tail(u)
        return tl.where(u > 0, 1.0 - tail, tail) + (0.3989422804014327 * u) * e
    else:
        t = tanh(0.7978845608028654 * (u + 0.044715 * u * u * u))
        return 0.5 * (1.0 + t) + 0.5 * u * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 3 * 0.044715 * u * u)


@triton.jit
def normalised(x, mask, width: tl.constexpr, eps, CENTRED: tl.constexpr):
    """Return a masked row normed, and 1 / rms of the row (CENTRED: of the row less its mean)."""
    if CENTRED:
        x = tl.where(mask, x - tl.sum(x, 0) / width, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    return x * rstd, rstd


@triton.jit
def norm_gradient(g, xhat, rstd, mask, width: tl.constexpr, CENTRED: tl.constexpr):
    """Return the gradient of a norm's input, where g is the gradient of its output times the norm's weight."""
    gx = g - xhat * (tl.sum(g * xhat, 0) / width)
    if CENTRED:
        gx = tl.where(mask, gx - tl.sum(g, 0) / width, 0.0)
    return gx * rstd
