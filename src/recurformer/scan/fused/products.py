"""Matrix products of a stack: which ones our kernels make, in which tiles, and which ones the library makes."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from recurformer.hardware import THIN_ROWS
from recurformer.scan.fused import kernels as triton_kernels
from recurformer.scan.fused.workspace import Workspace

kernels: Any = triton_kernels  # Triton checks the types of a launch when it compiles

Tile = dict[str, int]  # block sizes, warps and stages of a launch of `product_tiled`

ACTIVATION_TILE: Tile = {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 4}  # with the activation
TILE: Tile = {"BM": 128, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 5}  # other products of one position
SMALL_TILE: Tile = {"BM": 64, "BN": 64, "BK": 128, "num_warps": 4, "num_stages": 4}  # where TILE gives too few blocks
MOST_DEPTH = 1024  # inner dimension up to which our kernel, which starts early, is faster than the library's
FULL = 0.7  # the activation is fused where this part of the GPU's processors works, on average over a few waves
BUSY = 0.7  # SMALL_TILE is taken where blocks of TILE would occupy a smaller part of the GPU's processors


class Products:
    """Products with the weights of all layers."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.shape, self.sizes = workspace, workspace.shape, workspace.sizes

    def multiply(self, a: Tensor, weight: Tensor, out: Tensor, transposed: bool = True) -> None:
        """Compute out = a weight^T, or out = a weight where not `transposed`.

        Args:
            a: (L, n, in).
            weight: (L, out, in), or (L, in, out) where not `transposed`.
            out: (L, n, out), written.
            transposed: whether the weight is.
        """
        rows, L = a.shape[1], self.shape.L
        if rows <= THIN_ROWS and transposed and self.shape.dtype.itemsize == 2:
            width, bn = weight.shape[1], 32 if weight.shape[1] * L <= 2**15 else 64
            kernels.product_thin[(triton.cdiv(width, bn), L)](
                a, weight, out, rows, a.stride(0), weight.stride(0), out.stride(0), IN=a.shape[2], OUT=width, BM=16,
                BN=bn, BK=128, num_warps=4, num_stages=4,
            )  # fmt: skip
            return
        if rows == self.shape.B and self.ours_is_faster(a.shape[2], out.shape[2]):
            self.multiply_tiled(a, weight, out, transposed)
            return
        weight = weight.transpose(1, 2) if transposed else weight
        if L == 1:
            torch.mm(a[0], weight[0], out=out[0])
        else:
            torch.bmm(a, weight, out=out)

    def ours_is_faster(self, width_in: int, width_out: int) -> bool:
        """Return whether our kernel pays for a position's product.

        It does from Hopper on, where tensor descriptors fit the tensors and the kernel starts early.
        """
        facts = self.workspace.facts
        possible = self.fits_descriptors and (facts.launches_early or not facts.on_gpu)
        return possible and width_in <= MOST_DEPTH and width_out <= 2 * width_in

    @property
    def fits_descriptors(self) -> bool:
        """Whether the products' rows begin at multiples of 16 bytes, which tensor descriptors need."""
        widths = (self.sizes.D, self.sizes.F, self.sizes.queries, self.sizes.keys)
        return self.shape.dtype.itemsize == 2 and all(width % 8 == 0 for width in widths)

    @property
    def fuses_activation(self) -> bool:
        """Whether the products around the activation apply it.

        The library's products are faster in float32, and where blocks of one size would leave much of the GPU idle.
        """
        if self.workspace.activation == 2 or not self.fits_descriptors:
            return False
        tile = self.tile(self.sizes.F, True)
        blocks, waves = self.blocks(self.sizes.F, tile), self.waves(self.sizes.F, tile)
        fills_gpu = blocks >= FULL * waves * self.workspace.facts.multiprocessors
        return waves > 4 or fills_gpu or self.shape.B <= THIN_ROWS

    def multiply_tiled(
        self,
        a: Tensor,
        weight: Tensor,
        out: Tensor,
        transposed: bool,
        activation: int = -1,
        up: Tensor | None = None,
        inner: Tensor | None = None,
        r: int = 0,
    ) -> None:
        """Compute `multiply` by our kernel, with an activation where one is given.

        Forward (`transposed`), out is the activation of the product. Backward, out is the product times the
        activation's slope, and inner gets the activation itself.

        Args:
            a, weight, out, transposed: as for `multiply`.
            activation: KIND of the kernels, or -1 for none.
            up: (L, n, out), the inner values of a backward; None where the forward has kept them.
            inner: (L, n, out), written by a backward.
            r: position of the chunk, for inner values that are kept.
        """
        L, rows, width = out.shape
        w = self.workspace
        tile = self.tile(width, activation >= 0)
        bm, bn, br, bk = (tile[name] for name in ("BM", "BN", "BR", "BK"))
        up, inner = (out if given is None else given for given in (up, inner))
        kernels.product_tiled[(triton.cdiv(width, bn + br), triton.cdiv(rows, bm), L)](
            w.table, TensorDescriptor.from_tensor(a, [1, bm, bk]),
            *(TensorDescriptor.from_tensor(weight, [1, n, bk] if transposed else [1, bk, n]) for n in (bn, br or bn)),
            out, w.weights.up_bias, up, inner, r, rows, out.stride(0), up.stride(0), inner.stride(0),
            **w.options.stack, IN=a.shape[2], OUT=width, KIND=activation,
            BIAS=self.shape.config.mlp_bias and activation >= 0, KEEP=self.shape.keeps_inner and activation >= 0,
            BACKWARD=not transposed, **tile, **w.options.starts_early,
        )  # fmt: skip

    def tile(self, width: int, activated: bool) -> Tile:
        """Return the tile of `product_tiled` for a product of one position.

        Args:
            width: columns of the output.
            activated: whether the product applies the activation.
        """
        facts = self.workspace.facts
        found = {**(ACTIVATION_TILE if activated else TILE), "BR": 0}
        few = self.blocks(width, found) < BUSY * facts.multiprocessors
        # Rows that fit one small tile would not become more blocks.
        if not activated and few and SMALL_TILE["BM"] < self.shape.B:
            found |= SMALL_TILE
        found["BM"] = min(found["BM"], max(16, triton.next_power_of_2(self.shape.B)))
        if not facts.fits_large_tiles:
            found["num_stages"] = 2
        elif activated and found["BM"] == ACTIVATION_TILE["BM"]:
            # Half as many columns again, where that takes less time.
            wider = {**found, "BR": found["BN"] // 2}
            if 3 * self.waves(width, wider) < 2 * self.waves(width, found):
                return wider
        return found

    def blocks(self, width: int, tile: Tile) -> int:
        """Return the blocks of a position's product with outputs of some width."""
        return self.shape.L * triton.cdiv(width, tile["BN"] + tile["BR"]) * triton.cdiv(self.shape.B, tile["BM"])

    def waves(self, width: int, tile: Tile) -> int:
        """Return how many of these blocks the busiest processor of the GPU gets."""
        return triton.cdiv(self.blocks(width, tile), self.workspace.facts.multiprocessors)

    def accumulate(self, total: Tensor, g: Tensor, h: Tensor) -> None:
        """Compute total += g^T h in float32.

        Args:
            total: (L, out, in), float32, written.
            g: (L, n, out).
            h: (L, n, in).
        """
        if total.dtype == g.dtype:
            torch.baddbmm(total, g.transpose(1, 2), h, out=total)
        elif self.workspace.facts.on_gpu:
            if self.shape.L == 1:
                torch.addmm(total[0], g[0].T, h[0], out_dtype=torch.float32, out=total[0])
            else:
                torch.baddbmm(total, g.transpose(1, 2), h, out_dtype=torch.float32, out=total)
        else:
            total.baddbmm_(g.transpose(1, 2).float(), h.float())
