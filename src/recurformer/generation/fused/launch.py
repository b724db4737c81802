"""Arguments of the kernels of a decode step, as named structures.

The dataclasses are compile-time constants (`tl.constexpr`). The named tuples hold tensors, and integers of the launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """Shape of the heads, and what a layer does to queries and keys.

    Attributes:
        H: query heads.
        G: key-value heads.
        K: head width.
        R: query heads that share a key-value head, H / G.
        RB: rows of a block of these query heads: 1, or a power of two of at least 16.
        KB: power of two that is at least K, and at least 16.
        QB: power of two that is at least H K.
        NORM: QK-norm: 0 none, 1 each head by itself, 2 the whole row.
        CENTRED: the norm subtracts the mean (layer norm).
        ROPE: queries and keys are rotated.
        ALIBI: scores have a linear bias.
    """

    H: int
    G: int
    K: int
    R: int
    RB: int
    KB: int
    QB: int
    NORM: int
    CENTRED: bool
    ROPE: bool
    ALIBI: bool


@dataclass(frozen=True)
class Parts:
    """How attention divides the memory.

    Attributes:
        S: parts at most.
        LEAST: keys of a part at least.
        BN: keys of a block.
    """

    S: int
    LEAST: int
    BN: int


@dataclass(frozen=True)
class AttentionMode:
    """Options of one launch of attention.

    Attributes:
        PADS: some slots are padding.
        STORE: store the token's own pair (standard layers).
        DEFER: make and store the pair of the slot before (recurrent layers whose pairs wait for the next step).
        SPLIT: write partial outputs, one for each part; otherwise write the output itself.
        PRECISION: of matrix products, as `tl.dot` names it.
        PDL: use programmatic dependent launch.
    """

    PADS: bool
    STORE: bool
    DEFER: bool
    SPLIT: bool
    PRECISION: str
    PDL: bool


@dataclass(frozen=True)
class Product:
    """Shape and blocks of a product of a weight matrix (N, IN) with one row.

    Attributes:
        N: rows of the matrix.
        N1, N2: rows before the second and before the third part, where the matrix is three tensors.
        IN: columns.
        WB: power of two that is at least IN.
        BN: rows of a block.
        PROGRAMS: programs of the launch; each takes every PROGRAMS-th block.
        ALIGN: bytes that divide the address of every row.
        BIAS: add a bias.
        PDL: use programmatic dependent launch.
    """

    N: int
    N1: int
    N2: int
    IN: int
    WB: int
    BN: int
    PROGRAMS: int
    ALIGN: int
    BIAS: bool
    PDL: bool

    @property
    def TILES(self) -> int:  # noqa: N802 - a constant of the kernel
        """Blocks of rows."""
        return -(-self.N // self.BN)

    @property
    def CHECKED(self) -> bool:  # noqa: N802 - a constant of the kernel
        """A block may reach beyond the last row."""
        return self.N % self.BN > 0 or self.TILES > self.PROGRAMS


class Memory(NamedTuple):
    """Pairs of one layer, and the next slot; `DecodeState` describes the tensors."""

    k: Tensor  # keys (B, G, capacity, K)
    v: Tensor  # values; Triton's tuples have an attribute `values` of their own, which would hide a field of that name
    slot: Tensor
    positions: Tensor
    valid: Tensor
    key_positions: Tensor
    capacity: int


class HeadNorms(NamedTuple):
    """Weights of a layer's QK-norm."""

    q: Tensor
    k: Tensor


class PositionTables(NamedTuple):
    """ALiBi slopes (H,); cosines and sines (capacity, K / 2) of RoPE."""

    slopes: Tensor
    cos: Tensor
    sin: Tensor


class PendingSlot(NamedTuple):
    """Slot whose persistent pairs are still to be made (-2: none), and the positions (B,) there."""

    slot: Tensor
    positions: Tensor


class AttentionOutputs(NamedTuple):
    """Partial outputs (B, S, H K) with their log2-sum-exps (B, S, H), both float32; or the output (B, H K)."""

    partial: Tensor
    lse: Tensor
    out: Tensor


class Matrices(NamedTuple):
    """Three weight matrices that lie on top of each other; the same one thrice where there is only one."""

    first: Tensor
    second: Tensor
    third: Tensor
