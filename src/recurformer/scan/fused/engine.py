"""The position loop of the fused scan: which kernel and which product when, forward and backward, in CUDA graphs.

An engine belongs to one stack of L layers of one shape (L = 1: a layer by itself). It owns what lives for a chunk of C
positions, and runs a chunk of every layer as one step: layer l is at chunk w - l at step w, so that the layers of a
stack work side by side on different chunks. A step is recorded once as a CUDA graph and replayed for every chunk of
every call, of any N, for whatever differs is read from the table in device memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from recurformer.config import ModelConfig
from recurformer.hardware import ACTIVATIONS, EARLY_CAPABILITY, QK_NORMS
from recurformer.scan.fused import kernels as triton_kernels
from recurformer.scan.fused.scan import total_memory
from recurformer.scan.schedule import Schedule

kernels: Any = triton_kernels  # the types of a launch are Triton's to check, when it compiles

ENGINES, ENGINES_PART = 8, 8  # kept with buffers and graphs, at most: their number, and their part of the memory
RECEIVE = (2, 1, 2)  # heads, warps and rows at a time of the backward's kernel that reads a leaf
ATTEND = (2, 1)  # key-value heads and warps of the forward's
WIDE_TILE = {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 4}  # products with the activation
TILE = {"BM": 128, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 5}  # other products of one position
SMALL_TILE = {"BM": 64, "BN": 64, "BK": 128, "num_warps": 4, "num_stages": 4}  # those that are too few blocks otherwise
OWN_DEPTH = 1024  # inner dimension up to which our kernel, which starts early, is faster than the library's
PULL = {"absorb": (64, 4), "receive": (64, 4), "query": (64, 4)}  # block of what is looped over, and warps
ROOMY = 161 * 1024  # bytes of shared memory a block from which tiles fit as they are
FULL = 0.7  # of the GPU's processors at work, on average over a few waves of blocks, from which ours pay
BUSY = 0.7  # of them with a block of `TILE` below which `SMALL_TILE` is taken
AT_ONCE = 24 * 2**20  # bytes of queries, temporary pairs and what they are made of that may stay in the L2 cache
THIN = 16  # rows up to which a product is bound by reading its weights
PARTS = 1024  # programs that share the sum of a norm weight's gradient


@dataclass(frozen=True)
class Shape:
    """What a recorded step depends on; N and P are not among it."""

    config: ModelConfig  # layers and vocabulary do not matter
    L: int
    B: int
    C: int
    S: int  # positions of a leaf, which read each other directly
    R: int  # the same of the backward, whose kernels make more of larger ones
    dtype: torch.dtype
    device: torch.device
    segments: bool  # padding or documents
    keep: bool  # attention outputs and log-sum-exps, for a backward
    inner: bool  # and the MLP's inner values
    raw: bool  # and what Q, K and V make of the inputs, ahead of their norms
    branch_scale: float
    products: tuple[Any, ...] = ()  # PyTorch's precision settings, which a recorded product keeps


@dataclass
class Weights:
    """Weights of the stack, packed for the products: matrices (L, out, in) in the compute dtype, the rest float32."""

    qkv: Tensor
    kv: Tensor  # the last rows of qkv
    o: Tensor
    up: Tensor  # up, then gate
    down: Tensor
    attention_norm: Tensor
    mlp_norm: Tensor
    q_norm: Tensor
    k_norm: Tensor
    qkv_bias: Tensor
    kv_bias: Tensor
    o_bias: Tensor
    up_bias: Tensor
    down_bias: Tensor
    slopes: Tensor  # (H,)


class Engine:
    """Buffers, kernels and graphs of one shape."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        config, L = shape.config, shape.L
        self.D, self.F, self.H, self.G, self.K = (
            config.d_model, config.mlp_width, config.n_heads, config.kv_heads, config.head_width,
        )  # fmt: skip
        D, F, H, G, K = self.D, self.F, self.H, self.G, self.K
        self.kind = ACTIVATIONS[config.activation]
        self.U = F if self.kind < 2 else 2 * F  # inner values before activation
        self.norm = QK_NORMS[config.qk_norm]
        self.centred, self.rope = config.norm == "layer", config.position == "rope"
        self.alibi = config.position == "alibi"
        self.on_gpu = shape.device.type == "cuda"
        self.roomy = True
        self.early, self.multiprocessors = False, 1
        if self.on_gpu:
            self.side = torch.cuda.Stream(shape.device)
            self.multiprocessors = torch.cuda.get_device_properties(shape.device).multi_processor_count
            self.early = torch.cuda.get_device_capability(shape.device) >= EARLY_CAPABILITY
            self.roomy = torch.cuda.get_device_properties(shape.device).shared_memory_per_block_optin >= ROOMY
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}

        self.table = self.fresh(kernels.SLOTS, dtype=torch.int64).zero_()
        q_width, k_width = {0: (1, 1), 1: (K, K), 2: (H * K, G * K)}[self.norm]
        QKV, f32 = (H + 2 * G) * K, torch.float32
        qkv, qkv_bias = self.fresh(L, QKV, D), self.fresh(L, QKV, dtype=f32).zero_()
        self.w = Weights(
            qkv, self.fresh(L, 2 * G * K, D), self.fresh(L, D, H * K), self.fresh(L, self.U, D), self.fresh(L, D, F),
            self.fresh(L, D, dtype=f32), self.fresh(L, D, dtype=f32), self.fresh(L, q_width, dtype=f32),
            self.fresh(L, k_width, dtype=f32), qkv_bias, self.fresh(L, 2 * G * K, dtype=f32).zero_(),
            self.fresh(L, D, dtype=f32).zero_(), self.fresh(L, self.U, dtype=f32).zero_(),
            self.fresh(L, D, dtype=f32).zero_(), self.fresh(H, dtype=f32),
        )  # fmt: skip
        self.blocks = {
            "D": D, "DB": triton.next_power_of_2(D), "K": K, "G": G,
            "HB": triton.next_power_of_2(H), "GB": triton.next_power_of_2(G),
            "KB": triton.next_power_of_2((K + 1) // 2),
        }  # fmt: skip
        self.warps = 4 if D <= 1024 else 8
        self.parts = min(PARTS, shape.C * shape.B)
        self.schedule = Schedule(shape.C, 0, None, shape.S)
        self.mirror = Schedule(shape.C, 0, None, shape.R)

    def fresh(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer; zeros, for layers that do not work yet put what they hold through the products."""
        with torch.inference_mode(False):  # it outlives the call that makes it
            return torch.zeros(shape, dtype=dtype or self.shape.dtype, device=self.shape.device)

    # --- weights and the table ---

    def load(self, layers: list[Any], slopes: Tensor | None) -> None:
        """Pack the weights of LayerMaths, one of each layer."""
        w, F, QK = self.w, self.F, self.H * self.K
        for l, m in enumerate(layers):
            torch.cat([m.q, m.k, m.v], out=w.qkv[l])
            torch.cat([m.k, m.v], out=w.kv[l])
            w.o[l].copy_(m.o)
            w.up[l, :F].copy_(m.up)
            if m.gate is not None:
                w.up[l, F:].copy_(m.gate)
            w.down[l].copy_(m.down)
            w.attention_norm[l].copy_(m.attention_norm)
            w.mlp_norm[l].copy_(m.mlp_norm)
            if m.q_norm is not None:
                w.q_norm[l].copy_(m.q_norm)
                w.k_norm[l].copy_(m.k_norm)
            if m.q_bias is not None:
                w.qkv_bias[l].copy_(torch.cat([m.q_bias, m.k_bias, m.v_bias]))
                w.kv_bias[l].copy_(w.qkv_bias[l, QK:])
                w.o_bias[l].copy_(m.o_bias)
            if m.up_bias is not None:
                w.up_bias[l, :F].copy_(m.up_bias)
                if m.gate_bias is not None:
                    w.up_bias[l, F:].copy_(m.gate_bias)
                w.down_bias[l].copy_(m.down_bias)
        if slopes is not None:
            w.slopes.copy_(slopes)

    # --- running ---

    def run(self, name: str, step: Callable[[], None], steps: int, entries: dict[int, int]) -> None:
        """Do a step `steps` times, w counting from 0, with these table entries."""
        values = [0, *(entries.get(slot, 0) for slot in range(1, kernels.SLOTS))]
        if not self.on_gpu:
            for w in range(steps):
                self.enter([w, *values[1:]])
                step()
            return
        if name not in self.graphs:
            # Outside of all chunks: kernels are compiled and libraries wake up, nothing is written.
            self.enter([-(2**30), *values[1:]])
            graph, side = torch.cuda.CUDAGraph(), self.side
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize(self.shape.device)
            # A stream of its own: the shared one belongs to one device, and its workspaces to all graphs.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                step()
                self.table[:1].add_(1)
            self.graphs[name] = graph
        self.enter(values)
        for _ in range(steps):
            self.graphs[name].replay()

    @property
    def bytes(self) -> int:
        """Of all buffers there are so far."""
        mine = vars(self)
        held = [self.table, *vars(self.w).values()]
        for name in ("forward_buffers", "backward_buffers", "gradients"):  # made when they are first asked for
            held += mine.get(name, {}).values()
        return sum(t.untyped_storage().nbytes() for t in held)

    def settle(self) -> None:
        """Wait for recorded steps that still run: their graphs must not go before."""
        if self.graphs:
            torch.cuda.synchronize(self.shape.device)

    def enter(self, values: list[int]) -> None:
        """Fill the table. From pinned memory, which PyTorch keeps until it has been read, nothing waits for the GPU."""
        given = torch.tensor(values)
        self.table.copy_(given.pin_memory() if self.on_gpu else given, non_blocking=True)

    @property
    def soon(self) -> dict[str, Any]:
        """Options of a kernel that is started while the one ahead of it in the stream, a kernel too, still runs."""
        return {"EARLY": True, "launch_pdl": True} if self.early else {"EARLY": False}

    def product(self, a: Tensor, weight: Tensor, out: Tensor, transposed: bool = True) -> None:
        """out = a weight^T, or a weight: a (L, n, in), weight (L, out, in), out (L, n, out)."""
        rows, L = a.shape[1], self.shape.L
        if rows <= THIN and transposed and self.shape.dtype.itemsize == 2:
            width, bn = weight.shape[1], 32 if weight.shape[1] * L <= 2**15 else 64
            kernels.product_thin[(triton.cdiv(width, bn), L)](
                a, weight, out, rows, a.stride(0), weight.stride(0), out.stride(0), IN=a.shape[2], OUT=width, BM=16,
                BN=bn, BK=128, num_warps=4, num_stages=4,
            )  # fmt: skip
            return
        if rows == self.shape.B and self.own(a.shape[2], out.shape[2]):
            self.product_tiled(a, weight, out, transposed)
            return
        weight = weight.transpose(1, 2) if transposed else weight
        if L == 1:
            torch.mm(a[0], weight[0], out=out[0])
        else:
            torch.bmm(a, weight, out=out)

    def own(self, width_in: int, width_out: int) -> bool:
        """Whether a kernel of ours pays for a position's product: from Hopper on, where descriptors can describe it."""
        seen = self.describable and (self.early or not self.on_gpu)
        return seen and width_in <= OWN_DEPTH and width_out <= 2 * width_in

    @property
    def describable(self) -> bool:
        """Whether the products' rows begin at multiples of 16 bytes, as descriptors of tensors ask for."""
        widths = (self.D, self.F, self.H * self.K, self.G * self.K)
        return self.shape.dtype.itemsize == 2 and all(width % 8 == 0 for width in widths)

    def product_tiled(
        self, a: Tensor, weight: Tensor, out: Tensor, transposed: bool, kind: int = -1, up: Tensor | None = None,
        inner: Tensor | None = None, r: int = 0,
    ) -> None:  # fmt: skip
        """`product` by a kernel of ours.

        With an activation `kind`: GELU after it, or its slope at up (L, n, out), or at what is kept of position r of
        the chunk; of that, GELU goes to inner (L, n, out).
        """
        L, rows, width = out.shape
        tile = self.tile(width, kind >= 0)
        bm, bn, br, bk = (tile[name] for name in ("BM", "BN", "BR", "BK"))
        up, inner = (out if given is None else given for given in (up, inner))
        kernels.product_tiled[(triton.cdiv(width, bn + br), triton.cdiv(rows, bm), L)](
            self.table, TensorDescriptor.from_tensor(a, [1, bm, bk]),
            *(TensorDescriptor.from_tensor(weight, [1, n, bk] if transposed else [1, bk, n]) for n in (bn, br or bn)),
            out, self.w.up_bias, up, inner, r, rows, out.stride(0), up.stride(0), inner.stride(0), **self.size,
            IN=a.shape[2], OUT=width,
            KIND=kind, BIAS=self.shape.config.mlp_bias and kind >= 0,
            KEEP=self.shape.inner and kind >= 0, BACKWARD=not transposed, **tile, **self.soon,
        )  # fmt: skip

    def tile(self, width: int, wide: bool) -> dict[str, int]:
        """Block sizes and the like of `product_tiled` with outputs of some width.

        wide: with the activation.
        """
        found = {**(WIDE_TILE if wide else TILE), "BR": 0}
        few = self.blocks_of(width, found) < BUSY * self.multiprocessors
        if not wide and few and SMALL_TILE["BM"] < self.shape.B:  # else they would not be more
            found |= SMALL_TILE
        found["BM"] = min(found["BM"], max(16, triton.next_power_of_2(self.shape.B)))
        if not self.roomy:
            found["num_stages"] = 2
        elif wide and found["BM"] == WIDE_TILE["BM"]:  # half as many columns again, where that takes less time
            wider = {**found, "BR": found["BN"] // 2}
            if 3 * self.rounds(width, wider) < 2 * self.rounds(width, found):
                return wider
        return found

    def blocks_of(self, width: int, tile: dict[str, int]) -> int:
        """Programs of a product with outputs of some width."""
        return self.shape.L * triton.cdiv(width, tile["BN"] + tile["BR"]) * triton.cdiv(self.shape.B, tile["BM"])

    def rounds(self, width: int, tile: dict[str, int]) -> int:
        """How many of them come to one of the GPU's processors."""
        return triton.cdiv(self.blocks_of(width, tile), self.multiprocessors)

    def accumulate(self, total: Tensor, g: Tensor, h: Tensor) -> None:
        """total += g^T h in float32: g (L, n, out), h (L, n, in)."""
        if total.dtype == g.dtype:
            torch.baddbmm(total, g.transpose(1, 2), h, out=total)
        elif self.on_gpu:
            if self.shape.L == 1:
                torch.addmm(total[0], g[0].T, h[0], out_dtype=torch.float32, out=total[0])
            else:
                torch.baddbmm(total, g.transpose(1, 2), h, out_dtype=torch.float32, out=total)
        else:
            total.baddbmm_(g.transpose(1, 2).float(), h.float())

    # --- forward ---

    @cached_property
    def forward_buffers(self) -> dict[str, Tensor]:
        L, B, C, f32 = self.shape.L, self.shape.B, self.shape.C, torch.float32
        return {
            "h_some": self.fresh(L, self.at_once, B, self.D),
            "qkv": self.fresh(L, self.at_once, B, (self.H + 2 * self.G) * self.K),
            "m": self.fresh(L, C, B, self.H, dtype=f32),
            "l": self.fresh(L, C, B, self.H, dtype=f32),
            "acc": self.fresh(L, C, B, self.H, self.K, dtype=f32),
            "a": self.fresh(L, C, B, self.H * self.K),
            "lse": self.fresh(L, C, B, self.H, dtype=f32),
            "branch": self.fresh(L, B, self.D),
            "y": self.fresh(L, B, self.D, dtype=f32),
            "h": self.fresh(L, B, self.D),
            "up": self.fresh(L, B, self.U),
            "inner": self.fresh(L, B, self.F),
            "kv": self.fresh(L, B, 2 * self.G * self.K),
        }

    @property
    def size(self) -> dict[str, int]:
        return {"L": self.shape.L, "C": self.shape.C}

    def prepare(self, h: Tensor, qkv: Tensor, tmp: Tensor, temporary: int, queries: bool, reverse: bool) -> None:
        """A chunk's queries and temporary pairs; h, qkv and tmp are buffers (L, rows, B, ...), of `rows` at a time."""
        L, B, C, rows = self.shape.L, self.shape.B, self.shape.C, h.shape[1]
        w, k, kept = self.w, self.blocks, self.shape.raw and reverse
        for r0 in range(0, C, rows):
            kernels.norm_chunk[(B, rows, L)](
                self.table, h, w.attention_norm, r0, rows, B, self.eps, **self.size, D=self.D, DB=k["DB"],
                CENTRED=self.centred, OUTPUTS=False, REVERSE=reverse, num_warps=self.warps,
            )  # fmt: skip
            if not kept:
                self.product(h.flatten(1, 2), w.qkv, qkv.flatten(1, 2))
            kernels.inputs_to_heads[(B, rows, L)](
                self.table, qkv, w.q_norm, w.k_norm, w.qkv_bias, tmp, r0, rows, B, self.eps, **self.size, H=self.H,
                **self.heads, HB=k["HB"], WB=triton.next_power_of_2((self.H + 2 * self.G) * self.K), NORM=self.norm,
                REVERSE=reverse, QUERIES=queries or kept, TEMPORARY=temporary, KEEP=self.shape.raw and not reverse,
                KEPT=kept,
            )  # fmt: skip

    @property
    def at_once(self) -> int:
        """Positions whose queries and temporary pairs the forward makes at a time.

        As many as the L2 cache holds with what they are made of; of a stack, whose products are smaller, all.
        """
        found, width = self.shape.C, self.D + (self.H + 2 * self.G) * self.K
        while self.shape.L == 1 and found > 1 and found * self.shape.B * width * self.shape.dtype.itemsize > AT_ONCE:
            found //= 2
        return found

    @property
    def eps(self) -> float:
        return self.shape.config.norm_eps

    @property
    def heads(self) -> dict[str, Any]:
        k = self.blocks
        return {
            "G": self.G, "K": self.K, "GB": k["GB"], "KB": k["KB"], "CENTRED": self.centred, "ROPE": self.rope,
            "BIAS": self.shape.config.attention_bias,
        }  # fmt: skip

    @property
    def attention(self) -> dict[str, Any]:
        """What all attention kernels are told."""
        return {
            "H": self.H, "G": self.G, "K": self.K, "KB": max(16, triton.next_power_of_2(self.K)), "ALIBI": self.alibi,
            "SEGMENTS": self.shape.segments,
        }  # fmt: skip

    @property
    def dots(self) -> dict[str, Any]:
        single = self.shape.dtype == torch.float32
        kind = {torch.float32: triton.language.float32, torch.bfloat16: triton.language.bfloat16}
        return {"DT": kind.get(self.shape.dtype, triton.language.float16), "PRECISION": "ieee" if single else "tf32"}

    def forward(self) -> None:
        """One step: a chunk of every layer."""
        b, w, shape = self.forward_buffers, self.w, self.shape
        L, B, C, scale = shape.L, shape.B, shape.C, self.K**-0.5
        self.prepare(b["h_some"], b["qkv"], b["qkv"], 1, True, False)

        def absorb(q0: int, queries: int, k0: int, keys: int, pull: bool) -> None:
            bm = min(64, max(16, triton.next_power_of_2(queries)))
            bn, warps = PULL["absorb"] if pull else (min(64, max(16, keys)), 1 if keys <= 8 else 4)
            kernels.absorb[(B * self.H, triton.cdiv(queries, bm), L)](
                self.table, b["m"], b["l"], b["acc"], w.slopes, q0, queries, k0, keys, B, scale, **self.size,
                **self.attention, **self.dots, BM=bm, BN=bn, PULL=pull, num_warps=warps,
                **(self.soon if not pull else {"EARLY": False}),
            )  # fmt: skip

        absorb(0, C, 0, 0, True)
        for r in range(C):
            self.forward_position(r)
            if (r + 1) % shape.S == 0:
                self.store_pairs(b["kv"], r, 1, False)
            push = self.schedule.push(r, slice(0, C))
            if push is not None:
                keys, queries = push
                absorb(queries.start, queries.stop - queries.start, keys.start, keys.stop - keys.start, False)
        if shape.keep:
            kernels.keep_chunk[(B, C, L)](
                self.table, b["a"], b["lse"], B, **self.size, H=self.H, HB=self.blocks["HB"], W=self.H * self.K,
                WB=triton.next_power_of_2(self.H * self.K),
            )  # fmt: skip

    def store_pairs(self, raw: Tensor, r: int, rows: int, reverse: bool) -> None:
        shape = self.shape
        kernels.store_pairs[(shape.B, rows, shape.L)](
            self.table, raw, self.w.k_norm, self.w.kv_bias, r, rows, shape.B, self.eps, **self.size, **self.heads,
            NORM=self.norm, REVERSE=reverse, **self.soon,
        )  # fmt: skip

    def forward_position(self, r: int) -> None:
        b, w, shape, k = self.forward_buffers, self.w, self.shape, self.blocks
        L, B, config = shape.L, shape.B, shape.config
        s = shape.branch_scale
        row = {"D": self.D, "DB": k["DB"], "CENTRED": self.centred, "num_warps": self.warps}
        new = r % shape.S > 0  # position r - 1 belongs to the same leaf
        heads, warps = min(ATTEND[0], k["GB"]), ATTEND[1]
        kernels.attend[(B * triton.cdiv(self.G, heads), L)](
            self.table, b["kv"], w.k_norm, w.kv_bias, b["m"], b["l"], b["acc"], w.slopes, b["a"], b["lse"], r, B,
            self.K**-0.5, self.eps, **self.size, S=shape.S, H=self.H, G=self.G, K=self.K, KB=k["KB"], HP=heads,
            WB=triton.next_power_of_2(self.G * self.K), NORM=self.norm, CENTRED=self.centred, ROPE=self.rope,
            BIAS=config.attention_bias, NEW=new, KEEP=shape.keep, ALIBI=self.alibi, SEGMENTS=shape.segments,
            num_warps=warps, **self.soon,
        )  # fmt: skip
        self.product(b["a"][:, r], w.o, b["branch"])
        kernels.attended_rows[(B, 1, L)](
            self.table, b["branch"], w.o_bias, w.mlp_norm, b["y"], b["h"], r, 1, B, s, self.eps, **self.size,
            **row, BIAS=config.attention_bias, REVERSE=False, **self.soon,
        )  # fmt: skip
        if self.fused_activation:
            self.product_tiled(b["h"], w.up, b["inner"], True, self.kind, r=r)
        else:
            self.product(b["h"], w.up, b["up"])
            self.activate(b["up"], b["inner"], r, B, shape.inner)
        self.product(b["inner"], w.down, b["branch"])
        kernels.finished_rows[(B, L)](
            self.table, b["branch"], w.down_bias, w.attention_norm, b["y"], b["h"], r, B, s, self.eps,
            **self.size, **row, BIAS=config.mlp_bias, **self.soon,
        )  # fmt: skip
        self.product(b["h"], w.kv, b["kv"])

    def activate(self, up: Tensor, inner: Tensor, r: int, rows: int, keep: bool) -> None:
        """inner (L, n, F) of up (L, n, U), both as buffers (L, ..., width), at position r of the chunk.

        keep: keep up for the backward.
        """
        F, FB = self.F, min(2048, triton.next_power_of_2(self.F))
        kernels.activate_rows[(rows, triton.cdiv(F, FB), self.shape.L)](
            self.table, up, self.w.up_bias, inner, r, rows, up.stride(0), inner.stride(0), self.shape.B, **self.size,
            F=F, FB=FB, KIND=self.kind, BIAS=self.shape.config.mlp_bias, KEEP=keep,
            num_warps=8 if FB > 1024 else 4, **self.soon,
        )  # fmt: skip

    @property
    def fused_activation(self) -> bool:
        """Whether the products around the activation end with it.

        Library products are better in float32, and where blocks of one size would leave much of the GPU idle.
        """
        if self.kind == 2 or not self.describable:
            return False
        tile = self.tile(self.F, True)
        blocks, rounds = self.blocks_of(self.F, tile), self.rounds(self.F, tile)
        return rounds > 4 or blocks >= FULL * rounds * self.multiprocessors or self.shape.B <= THIN

    # --- backward ---

    @cached_property
    def backward_buffers(self) -> dict[str, Tensor]:
        L, B, C, f32 = self.shape.L, self.shape.B, self.shape.C, torch.float32
        D, F, U, H, G, K = self.D, self.F, self.U, self.H, self.G, self.K

        def chunk(width: int, dtype: torch.dtype | None = None) -> Tensor:
            return self.fresh(L, C, B, width, dtype=dtype)

        return {
            # of the forward, made again
            "h_x": chunk(D), "h_z": chunk(D), "h_y": chunk(D),
            "qkv": self.fresh(L, C if not self.shape.raw else 0, B, (H + 2 * G) * K), "k_raw": chunk(G * K),
            "tmp": chunk(2 * G * K), "a": chunk(H * K), "branch": chunk(D), "y": chunk(D, f32),
            "up": self.fresh(L, C if not self.shape.inner else 0, B, U), "inner": chunk(F),
            # gradients that the loop makes
            "gkv": chunk(2 * G * K, f32), "g_pair": chunk(2 * G * K), "g_key": chunk(G * K), "g_hz": chunk(D),
            "gz": self.fresh(L, B, D, dtype=f32), "sgz": chunk(D), "g_inner": self.fresh(L, B, F), "g_up": chunk(U),
            "g_hy": self.fresh(L, B, D), "gy": chunk(D, f32), "sgy": chunk(D), "ga": chunk(H * K),
            "delta": chunk(H, f32),
            # and what is made of them
            "gq": chunk(H * K), "g_own": chunk(2 * H * K), "g_raw": chunk((H + 2 * G) * K),
            "g_hx": chunk(D),
            "ring": self.fresh(L if L > 1 else 0, 2, C, B, D, dtype=f32),
        }  # fmt: skip

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """Sums over positions and batch, float32."""
        w, L, f32 = self.w, self.shape.L, torch.float32
        config = self.shape.config
        found = {name: self.fresh(*getattr(w, name).shape, dtype=f32) for name in ("qkv", "kv", "o", "up", "down")}
        for name in ("attention_norm", "q_norm", "k_norm") if self.norm else ("attention_norm",):
            found[name] = self.fresh(L, self.parts, getattr(w, name).shape[1], dtype=f32)
        if self.norm:
            found["k_norm_z"] = self.fresh(*w.k_norm.shape, dtype=f32)
        for name in ("attention_norm_z", "mlp_norm"):
            found[name] = self.fresh(L, self.shape.B, self.D, dtype=f32)
        if config.attention_bias:
            found |= {
                name: self.fresh(*getattr(w, name).shape, dtype=f32) for name in ("qkv_bias", "kv_bias", "o_bias")
            }
        if config.mlp_bias:
            found |= {name: self.fresh(*getattr(w, name).shape, dtype=f32) for name in ("up_bias", "down_bias")}
        return found

    def restore(self) -> None:
        """Before the backward, for a chunk: queries and persistent pairs from x and z, into the N-long tensors."""
        b, w, k = self.backward_buffers, self.w, self.blocks
        L, B, C = self.shape.L, self.shape.B, self.shape.C
        self.prepare(b["h_x"], b["qkv"], b["qkv"], 0, True, True)
        kernels.norm_chunk[(B, C, L)](
            self.table, b["h_z"], w.attention_norm, 0, C, B, self.eps, **self.size, D=self.D, DB=k["DB"],
            CENTRED=self.centred, OUTPUTS=True, REVERSE=True, num_warps=self.warps,
        )  # fmt: skip
        self.product(b["h_z"].flatten(1, 2), w.kv, b["g_pair"].flatten(1, 2))
        self.store_pairs(b["g_pair"], 0, C, True)

    def keys_receive(self, q0: int, queries: int, k0: int, keys: int, pull: bool) -> None:
        b, shape = self.backward_buffers, self.shape
        bn = min(64, max(16, triton.next_power_of_2(keys)))
        bm, warps = PULL["receive"] if pull else (min(32, max(16, queries)), 1 if queries <= 8 else 4)
        kernels.keys_receive[(shape.B * self.G, triton.cdiv(keys, bn), shape.L)](
            self.table, b["ga"], b["gkv"], self.w.slopes, q0, queries, k0, keys, shape.B, self.K**-0.5,
            **self.size, **self.attention, **self.dots, BM=bm, BN=bn, PULL=pull, num_warps=warps,
        )  # fmt: skip

    def backward(self) -> None:
        """One step: a chunk of every layer, from the last."""
        b, w, shape, k = self.backward_buffers, self.w, self.shape, self.blocks
        L, B, C, config = shape.L, shape.B, shape.C, shape.config
        row = {"D": self.D, "DB": k["DB"], "CENTRED": self.centred, "num_warps": self.warps}
        HK, GK = self.H * self.K, self.G * self.K

        # What the forward had, in parallel.
        self.prepare(b["h_x"], b["qkv"], b["tmp"], 2, False, True)
        kernels.norm_chunk[(B, C, L)](
            self.table, b["h_z"], w.attention_norm, 0, C, B, self.eps, **self.size, **row, OUTPUTS=True, REVERSE=True
        )
        if self.norm:
            self.product(b["h_z"].flatten(1, 2), w.kv[:, :GK], b["k_raw"].flatten(1, 2))
        kernels.load_attended[(B, C, L)](
            self.table, b["a"], B, **self.size, W=HK, WB=triton.next_power_of_2(HK), num_warps=4
        )
        self.product(b["a"].flatten(1, 2), w.o, b["branch"].flatten(1, 2))
        kernels.attended_rows[(B, C, L)](
            self.table, b["branch"], w.o_bias, w.mlp_norm, b["y"], b["h_y"], 0, C, B, shape.branch_scale, self.eps,
            **self.size, **row, BIAS=config.attention_bias, REVERSE=True, EARLY=False,
        )  # fmt: skip
        if not shape.inner:
            self.product(b["h_y"].flatten(1, 2), w.up, b["up"].flatten(1, 2))
        self.keys_receive(0, 0, 0, C, True)

        # One by one, from the last: data gradients alone.
        for r in reversed(range(C)):
            push = self.mirror.push(r, slice(0, C))
            if push is not None:
                keys, queries = push
                self.keys_receive(
                    queries.start, queries.stop - queries.start, keys.start, keys.stop - keys.start, False
                )
            self.backward_position(r)

        # In parallel again: queries, temporary pairs, inputs, every weight.
        bm = min(64, max(16, C))
        bn, warps = PULL["query"]
        kernels.query_gradient[(B * self.H, triton.cdiv(C, bm), L)](
            self.table, b["ga"], b["tmp"], w.slopes, b["gq"], b["g_own"], B, self.K**-0.5, **self.size,
            **self.attention, **self.dots, BM=bm, BN=bn, num_warps=warps,
        )  # fmt: skip
        q_sums, k_sums = (self.gradients.get(name, self.gradients["attention_norm"]) for name in ("q_norm", "k_norm"))
        kernels.heads_gradient[(self.parts, L)](
            self.table, b["gq"], b["g_own"], b["qkv"], w.qkv_bias, w.q_norm, w.k_norm, b["g_raw"], q_sums, k_sums, B,
            self.eps, **self.size, H=self.H, **self.heads, HB=k["HB"], PARTS=self.parts, NORM=self.norm,
            KEPT=shape.raw,
        )  # fmt: skip
        self.product(b["g_raw"].flatten(1, 2), w.qkv, b["g_hx"].flatten(1, 2), transposed=False)
        kernels.input_gradient[(self.parts, L)](
            self.table, b["ring"], b["g_hx"], w.attention_norm, b["gy"], self.gradients["attention_norm"], B, self.eps,
            **self.size, **row, PARTS=self.parts,
        )  # fmt: skip
        self.weight_gradients()

    def backward_position(self, r: int) -> None:
        b, w, g, shape, k = self.backward_buffers, self.w, self.gradients, self.shape, self.blocks
        L, B, config = shape.L, shape.B, shape.config
        s = shape.branch_scale
        row = {"D": self.D, "DB": k["DB"], "CENTRED": self.centred, "num_warps": self.warps}
        if r % shape.R < shape.R - 1:
            heads, warps, many = RECEIVE
            heads = min(heads, k["GB"])
            kernels.leaf_receives[(B * triton.cdiv(self.G, heads), L)](
                self.table, b["ga"], b["delta"], b["gkv"], w.slopes, r, B, self.K**-0.5, **self.size,
                **self.attention, S=shape.R, HP=heads, RB=min(many, shape.R), num_warps=warps, **self.soon,
            )  # fmt: skip
        kernels.pair_gradient[(B, L)](
            self.table, b["gkv"], b["k_raw"], w.kv_bias, w.k_norm, b["g_pair"], b["g_key"], r, B, self.eps,
            **self.size, **self.heads, NORM=self.norm, **self.soon,
        )  # fmt: skip
        self.product(b["g_pair"][:, r], w.kv, b["g_hz"][:, r], transposed=False)
        kernels.output_gradient[(B, L)](
            self.table, b["ring"], b["g_hz"], w.attention_norm, b["gz"], b["sgz"], g["attention_norm_z"], r, B, s,
            self.eps, **self.size, **row, **self.soon,
        )  # fmt: skip
        if self.fused_activation:
            up = None if shape.inner else b["up"][:, r]
            self.product_tiled(
                b["sgz"][:, r], w.down, b["g_up"][:, r], False, self.kind, up=up, inner=b["inner"][:, r], r=r
            )
        else:
            self.product(b["sgz"][:, r], w.down, b["g_inner"], transposed=False)
            FB = min(2048, triton.next_power_of_2(self.F))
            kernels.activation_gradient[(B, triton.cdiv(self.F, FB), L)](
                self.table, b["up"], w.up_bias, b["g_inner"], b["g_up"], b["inner"], r, B, **self.size, F=self.F, FB=FB,
                KIND=self.kind, BIAS=config.mlp_bias, KEPT=shape.inner, num_warps=8 if FB > 1024 else 4, **self.soon,
            )  # fmt: skip
        self.product(b["g_up"][:, r], w.up, b["g_hy"], transposed=False)
        kernels.attended_gradient[(B, L)](
            self.table, b["y"], b["g_hy"], w.mlp_norm, b["gz"], b["gy"], b["sgy"], g["mlp_norm"], r, B, s, self.eps,
            **self.size, **row, **self.soon,
        )  # fmt: skip
        self.product(b["sgy"][:, r], w.o, b["ga"][:, r], transposed=False)

    def weight_gradients(self) -> None:
        """Add a chunk's part to the gradients of all weights."""
        b, g = self.backward_buffers, self.gradients
        for name, out, inputs in (
            ("qkv", "g_raw", "h_x"), ("kv", "g_pair", "h_z"), ("o", "sgy", "a"), ("up", "g_up", "h_y"),
            ("down", "sgz", "inner"),
        ):  # fmt: skip
            self.accumulate(g[name], b[out].flatten(1, 2), b[inputs].flatten(1, 2))
            if f"{name}_bias" in g:
                g[f"{name}_bias"] += b[out].flatten(1, 2).sum(1, dtype=torch.float32)

        if self.norm:  # what the keys of persistent pairs add; the heads share a weight, or have one each
            g["k_norm_z"] += b["g_key"].view(self.shape.L, -1, g["k_norm_z"].shape[1]).sum(1, dtype=torch.float32)

    def named_gradients(self, l: int) -> dict[str, Tensor]:
        """Gradients of layer l by the names of LayerMaths."""
        g, HK, GK, F = self.gradients, self.H * self.K, self.G * self.K, self.F
        pairs = g["qkv"][l, HK:] + g["kv"][l]
        found = {
            "q": g["qkv"][l, :HK], "k": pairs[:GK], "v": pairs[GK:], "o": g["o"][l], "up": g["up"][l, :F],
            "down": g["down"][l],
        }  # fmt: skip
        if self.kind == 2:
            found["gate"] = g["up"][l, F:]
        found |= {name: g[name][l].sum(0) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm") if name in g}
        found["attention_norm"] += g["attention_norm_z"][l].sum(0)
        if "k_norm" in found:
            found["k_norm"] += g["k_norm_z"][l]
        if "qkv_bias" in g:
            pairs = g["qkv_bias"][l, HK:] + g["kv_bias"][l]
            found |= {"q_bias": g["qkv_bias"][l, :HK], "k_bias": pairs[:GK], "v_bias": pairs[GK:]}
            found["o_bias"] = g["o_bias"][l]
        if "up_bias" in g:
            found["up_bias"] = g["up_bias"][l, :F]
            if self.kind == 2:
                found["gate_bias"] = g["up_bias"][l, F:]
            found["down_bias"] = g["down_bias"][l]
        return found


_engines: OrderedDict[Any, Engine] = OrderedDict()


def engine_of(shape: Shape) -> Engine:
    """The engine of a shape and of the current stream, made when there is none; least recently used ones go."""
    stream = torch.cuda.current_stream(shape.device).cuda_stream if shape.device.type == "cuda" else 0
    key = (shape, stream)
    if key in _engines:
        _engines.move_to_end(key)
        return _engines[key]
    room = total_memory(shape.device) // ENGINES_PART
    while len(_engines) >= ENGINES or sum(held.bytes for held in _engines.values()) > room:
        _engines.popitem(last=False)[1].settle()
    engine = _engines[key] = Engine(shape)
    return engine
