"""Block sizes of the kernels of a decode step: plain integers, chosen for a model, a batch and a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from recurformer.config import ModelConfig
from recurformer.generation.fused.launch import Heads, Parts, Product
from recurformer.hardware import CENTRED_NORMS, QK_NORMS

MAX_PARTS = 64  # parts of the memory at most
H100_MULTIPROCESSORS = 132  # assumed where there is no GPU to ask


@dataclass(frozen=True)
class Tuning:
    """Block sizes; the defaults suit an H100.

    Attributes:
        thread_bytes: bytes of weights that a thread of a single row's product holds at once.
        wide: input width from which these products have 8 warps instead of 4.
        warps_per_multiprocessor: warps of these products on a multiprocessor; beyond them programs take several blocks.
        block: keys that attention handles at once, times head width, for each warp.
        attention_warps: warps of an attention program for a single row, and for several.
        parts: programs of attention for each multiprocessor among which the memory is divided.
        spread: keys of a memory from which attention gives each multiprocessor a part of it.
        gathered: numbers that a thread block of the product behind attention reads of the partial outputs at once.
        pdl: kernels of a single row use programmatic dependent launch (compute capability 9 and above).
        multiprocessors: number to reckon with; None: that of the device.
    """

    thread_bytes: int = 256
    wide: int = 4096
    warps_per_multiprocessor: int = 12
    block: int = 512
    attention_warps: tuple[int, int] = (16, 4)
    parts: int = 1
    spread: int = 1024
    gathered: int = 2**12
    pdl: bool = True
    multiprocessors: int | None = None

    def for_device(self, device: torch.device) -> Tuning:
        """Return this with the number of multiprocessors filled in."""
        if self.multiprocessors is not None:
            return self
        if device.type != "cuda":
            return replace(self, multiprocessors=H100_MULTIPROCESSORS)
        return replace(self, multiprocessors=torch.cuda.get_device_properties(device).multi_processor_count)

    @property
    def programs(self) -> int:
        """Multiprocessors; `for_device` has filled them in."""
        assert self.multiprocessors is not None
        return self.multiprocessors


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def head_constants(config: ModelConfig) -> Heads:
    """Return the constants that describe a model's heads."""
    H, G, K = config.n_heads, config.kv_heads, config.head_width
    R = H // G
    return Heads(
        H=H,
        G=G,
        K=K,
        R=R,
        RB=1 if R == 1 else max(16, power_of_two(R)),
        KB=max(16, power_of_two(K)),
        QB=power_of_two(H * K),
        NORM=QK_NORMS[config.qk_norm],
        CENTRED=CENTRED_NORMS[config.norm],
        ROPE=config.position == "rope",
        ALIBI=config.position == "alibi",
    )


def attention_parts(tuning: Tuning, heads: Heads, rows: int, capacity: int, single: bool) -> Parts:
    """Return how attention divides a memory of `capacity` slots."""
    warps, tiles = tuning.attention_warps[0 if single else 1], rows * heads.G
    BN = max(16, min(256, tuning.block * warps // heads.KB))
    least = max(1, -(-tuning.spread * tiles // (tuning.programs * BN))) * BN
    wanted = -(-tuning.programs * tuning.parts // tiles)
    S = max(1, min(wanted if single else wanted // 2, -(-capacity // least), MAX_PARTS))
    return Parts(S=S, LEAST=least, BN=BN)


def product_blocks(
    tuning: Tuning,
    matrices: Sequence[Tensor],
    *,
    rows: int | None = None,
    bias: bool = False,
    pdl: bool = False,
    combines: bool = False,
    two_inputs: bool = False,
) -> tuple[Product, int]:
    """Return the constants and the warps of a product with a single row.

    Args:
        matrices: one to three weight matrices that lie on top of each other.
        rows: rows of them that count; None: all.
        bias, pdl: as in `Product`.
        combines: the product first puts the parts of attention together. That is expensive, so one program a
            multiprocessor takes all its rows at once.
        two_inputs: the product takes two vectors, whose registers leave room for fewer programs.
    """
    width, itemsize = matrices[0].shape[1], matrices[0].element_size()
    rows = sum(w.shape[0] for w in matrices) if rows is None else rows
    N1 = matrices[0].shape[0] if len(matrices) > 1 else rows
    N2 = N1 + matrices[1].shape[0] if len(matrices) > 2 else rows
    unit = gcd(N1, N2) if rows > N1 else 2**20
    WB = power_of_two(width)
    warps = 8 if tuning.wide <= WB else 4
    if WB * itemsize > warps * 32 * 4 * tuning.thread_bytes:
        warps = 16
    thread_bytes, most = tuning.thread_bytes, 2**20
    if combines:
        warps = 8 if WB < 2048 else 16
        thread_bytes, most = 2 * thread_bytes, power_of_two(-(-rows // tuning.programs))
    unit &= -unit  # the largest power of two that divides it
    BN = max(1, min(warps * 32 * thread_bytes // (WB * itemsize), unit, power_of_two(rows), most))
    room = tuning.warps_per_multiprocessor * (3 if two_inputs else 4) // 4
    programs = min(tuning.programs * max(1, room // warps), -(-rows // BN))
    align = gcd(16, width * itemsize)  # of the rows of a matrix
    if matrices[0].device.type != "meta":
        align = gcd(align, *(w.data_ptr() for w in matrices))
    product = Product(
        N=rows, N1=N1, N2=N2, IN=width, WB=WB, BN=BN, PROGRAMS=programs, ALIGN=align, BIAS=bias, PDL=pdl
    )  # fmt: skip
    return product, warps
