"""One decoding step as Triton kernels: for a single row five a layer, each bound by memory; for more, library products.

`kernels.py` says what a kernel does, this file in which order and with which blocks. The step reads every weight once:
the persistent pair of a recurrent layer, made of its output z, can wait for the next step (`defer`), whose product with
the same key and value weights makes it beside that step's temporary pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recurformer.generation.state import State
from recurformer.hardware import ACTIVATIONS, EARLY_CAPABILITY, QK_NORMS, THIN_ROWS, interpreted, step_obstacle

if TYPE_CHECKING:
    from recurformer.layer import LayerMaths
    from recurformer.model import LanguageModel

MAX_ROW_WIDTH = 2**15  # IN of the products of a single row, which hold whole rows of the weights


@dataclass(frozen=True)
class Tuning:
    """Block sizes; the defaults suit an H100.

    Attributes:
        thread_bytes: of weights, that each thread of a single row's products holds at once.
        wide: input width from which those products have 8 warps instead of 4.
        warps_per_multiprocessor: of those products; programs beyond that take turns.
        block: keys that attention handles at once, times head width, for each warp.
        attention_warps: warps of an attention program for a single row, and for several.
        parts: programs of attention for each multiprocessor that the memory is divided among.
        spread: keys of a memory from which attention gives each multiprocessor a part of it.
        gathered: partial attention outputs that a program of the product behind them takes at once.
        pdl: kernels of a single row start early (compute capability 9 and above).
        multiprocessors: to reckon with; None: those of the device.
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


@dataclass
class Weights:
    """One layer's weights: matrices are the model's own tensors where dtype and layout allow."""

    maths: LayerMaths
    qkv_bias: Tensor  # ((H + 2 G) K,) float32
    o_bias: Tensor
    up_bias: Tensor
    gate_bias: Tensor
    down_bias: Tensor
    qkv: Tensor | None  # ((H + 2 G) K, D), a copy, for several rows


class FusedStep:
    """One token for every row of a state: kernels enqueued on the current stream, capturable in a CUDA graph.

    A step reads `tokens`, `slot`, `positions` (and `valid`, `key_positions`) of the state, stores the pairs of the new
    tokens in their slot and writes `logits`; `slot` and `positions` are the caller's to advance. Where `valid` is False
    at the new slot, the token is a pad.

    Args:
        model: its weights are read where they are, as far as they have the state's dtype; see `refresh`.
        state: the buffers.
        defer: leave the new pairs of recurrent layers to the next step, which makes them at no cost; without, the step
            makes them at its end and reads key and value weights twice. With it, call `flush` before anything but the
            next step reads, copies or adds pairs. (A state cut back to fewer slots needs no flush.)
        tuning: block sizes.

    Raises:
        ValueError: where the kernels can't run, naming what can.
    """

    def __init__(
        self, model: LanguageModel, state: State, *, defer: bool = False, tuning: Tuning | None = None
    ) -> None:
        self.model, self.state, self.config = model, state, model.config
        config, self.device, self.dtype = self.config, state.keys.device, state.keys.dtype
        self.L, self.B, self.G, self.capacity, self.K = state.keys.shape
        reason = step_obstacle(config, self.device, self.dtype, self.B)
        if reason is not None:
            raise ValueError(f"the fused step can't run: {reason}")
        from recurformer.generation import kernels

        self.kernels: Any = kernels
        self.D, self.H, self.F = config.d_model, config.n_heads, config.mlp_width
        self.tuning = tuning or Tuning()
        self.recurrent = [l for l, kind in enumerate(config.layer_kinds) if kind == "recurrent"]
        self.defer = defer and bool(self.recurrent)
        self.single = self.B == 1 and max(self.D, self.F, self.H * self.K) <= MAX_ROW_WIDTH
        on_gpu = self.device.type == "cuda"
        present = torch.cuda.get_device_properties(self.device).multi_processor_count if on_gpu else 132
        self.multiprocessors = self.tuning.multiprocessors or present
        self.pdl = self.tuning.pdl and self.single and not interpreted()
        if on_gpu and torch.cuda.get_device_capability(self.device) < EARLY_CAPABILITY:
            self.pdl = False
        self._choose_blocks()
        self._make_buffers()
        self.weights: list[Weights] = []
        self.refresh()

    # --- set-up ------------------------------------------------------------------------------------------------------

    def _choose_blocks(self) -> None:
        tuning, K = self.tuning, self.K
        self.R = self.H // self.G
        self.KB = max(16, _power(K))
        self.attention_warps = tuning.attention_warps[0 if self.single else 1]
        self.BN = max(16, min(256, tuning.block * self.attention_warps // self.KB))
        self.least = max(1, -(-tuning.spread * self.B * self.G // (self.multiprocessors * self.BN))) * self.BN
        wanted = -(-self.multiprocessors * tuning.parts // (self.B * self.G))
        self.S = max(1, min(wanted if self.single else wanted // 2, -(-self.capacity // self.least), 64))
        self.parts = self.S > 1 or self.single  # a single row's product puts them together anyway
        self.norm, self.kind = QK_NORMS[self.config.qk_norm], ACTIVATIONS[self.config.activation]
        self.centred = self.config.norm == "layer"
        self.DB = _power(self.D)
        self.row_warps = 4 if self.D <= 2048 else 8
        self.heads = {
            "K": K, "KB": self.KB, "NORM": self.norm, "CENTRED": self.centred,
            "ROPE": self.config.position == "rope",
        }  # fmt: skip

    def _make_buffers(self) -> None:
        state, B, L, D = self.state, self.B, self.L, self.D
        QKV, f32 = (self.H + 2 * self.G) * self.K, torch.float32
        config = self.config
        with torch.inference_mode(False):
            rows = 2 * B if self.defer else B
            self.x = self._fresh(B, D, dtype=f32)
            self.z = self._fresh(L, B, D, dtype=f32)
            self.y = self._fresh(B, D, dtype=f32)
            self.raw = self._fresh(rows, QKV)
            self.raw_pairs = self._fresh(len(self.recurrent), B, 2 * self.G * self.K)
            self.inner = self._fresh(B, self.F)
            self.a = self._fresh(B, self.H * self.K)
            self.partial = self._fresh(B, self.S, self.H * self.K, dtype=f32)
            self.lse = self._fresh(B, self.S, self.H, dtype=f32)
            if not self.single:
                self.h = self._fresh(rows, D)
                self.branch = self._fresh(B, D)
                self.up, self.gate = self._fresh(B, self.F), self._fresh(B, self.F if self.kind == 2 else 0)
                self.logits = self._fresh(B, config.vocab_size)
            self.z.zero_()  # of a step that never was; what is made of it is thrown away
            self.pending_slot = torch.full((), -2, dtype=torch.int32, device=self.device)
            self.pending_positions = torch.zeros(B, dtype=torch.int32, device=self.device)
            self.layer_numbers = torch.tensor(self.recurrent, dtype=torch.int32, device=self.device)
            self.slopes = self.x
            self.cos = self.sin = self.x
            if config.position == "alibi":
                from recurformer.attention import alibi_slopes

                self.slopes = alibi_slopes(self.H, config.alibi_slopes, device=self.device).float()
            elif config.position == "rope":
                from recurformer.attention import rotary_frequencies

                frequencies = rotary_frequencies(config, self.device)
                angles = torch.arange(self.capacity, dtype=frequencies.dtype, device=self.device)[:, None] * frequencies
                self.cos, self.sin = angles.cos().float(), angles.sin().float()
        self.pads = state.valid is not None
        self.nothing = self.x  # stands where a kernel is given no such tensor

    def _fresh(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over weights that changed in place: those kept as copies are copied anew.

        Raises:
            ValueError: when weights have moved; graphs that hold their addresses are worthless then.
        """
        with torch.inference_mode(False):
            found = self._collect()
        if not hasattr(self, "packed"):
            self.packed = found
            self._arrange()
            return
        for name, (tensor, copied) in found.items():
            old, _ = self.packed[name]
            if copied:
                old.copy_(tensor)
            elif old.data_ptr() != tensor.data_ptr():
                raise ValueError(f"the model's {name} has moved since the decode engine was made; make a new engine")

    def _collect(self) -> dict[str, tuple[Tensor, bool]]:
        """Every weight by name, and whether it is a copy."""
        model, dtype, config = self.model, self.dtype, self.config
        own = {p.data_ptr() for p in model.parameters()}
        found: dict[str, tuple[Tensor, bool]] = {}

        def enter(name: str, tensor: Tensor) -> None:
            tensor = tensor.detach().contiguous()
            copied = tensor.data_ptr() not in own or tensor.device.type == "meta"
            found[name] = (tensor, copied)

        for l, layer in enumerate(model.layers):
            maths: LayerMaths = layer.maths(dtype)  # pyright: ignore[reportCallIssue]
            for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm", "q", "k", "v", "o", "up", "gate", "down"):
                tensor = getattr(maths, name)
                if tensor is not None:
                    enter(f"layers.{l}.{name}", tensor)
            if not self.single:
                enter(f"layers.{l}.qkv", torch.cat([maths.q, maths.k, maths.v]))
            zero = torch.zeros(1, dtype=torch.float32, device=self.device)
            qkv_bias = zero
            if maths.q_bias is not None and maths.k_bias is not None and maths.v_bias is not None:
                qkv_bias = torch.cat([maths.q_bias, maths.k_bias, maths.v_bias])
            for name in ("o", "up", "gate", "down"):
                bias = getattr(maths, f"{name}_bias")
                enter(f"layers.{l}.{name}_bias", zero.clone() if bias is None else bias.float().clone())
            enter(f"layers.{l}.qkv_bias", qkv_bias.float().clone())
        if config.qk_norm != "none":
            enter("k_norm", torch.stack([found[f"layers.{l}.k_norm"][0].float() for l in range(self.L)]))
        enter("norm", model.norm.weight)
        enter("embedding", model.embedding.weight)
        enter("head", model.output_weight().to(dtype))
        return found

    def _arrange(self) -> None:
        from recurformer.layer import LayerMaths

        def get(name: str) -> Tensor | None:
            return self.packed[name][0] if name in self.packed else None

        for l in range(self.L):
            names = ("attention_norm", "mlp_norm", "q_norm", "k_norm", "q", "k", "v", "o", "up", "gate", "down")
            maths = LayerMaths(self.config, **{name: get(f"layers.{l}.{name}") for name in names})  # pyright: ignore[reportArgumentType]
            biases = {f"{name}_bias": get(f"layers.{l}.{name}_bias") for name in ("qkv", "o", "up", "gate", "down")}
            self.weights.append(Weights(maths, qkv=get(f"layers.{l}.qkv"), **biases))  # pyright: ignore[reportArgumentType]
        self.k_norm = get("k_norm")
        self.final_norm, self.embedding, self.head = (self.packed[n][0] for n in ("norm", "embedding", "head"))

    # --- a step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, logits: bool = True) -> None:
        """Enqueue one step; `logits`: also write the state's logits."""
        state = self.state
        # This one waits for all that is before it, as no other kernel of a single row's step does.
        self._launch(
            self.kernels.embed, (self.B,), state.tokens, state.slot, self._or_nothing(state.valid), self.embedding,
            self.x, self.capacity, D=self.D, DB=self.DB, PADS=self.pads, PDL=self.pdl, num_warps=self.row_warps,
            early=False,
        )  # fmt: skip
        if self.single:
            self._single(logits)
        else:
            self._several(logits)
        if self.defer:
            self._launch(
                self.kernels.remember, (1,), state.slot, state.positions, self.pending_slot, self.pending_positions,
                self.B, BB=_power(self.B), PDL=self.pdl, early=True,
            )  # fmt: skip
        elif self.recurrent:
            self._make_pairs(state.slot, state.positions)

    @torch.no_grad()
    def flush(self) -> None:
        """Enqueue what makes the pairs that the last step has left to the next; does nothing where there are none."""
        if self.defer:
            self._make_pairs(self.pending_slot, self.pending_positions)
            self.pending_slot.fill_(-2)

    def _launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, early: bool = False, **options: Any) -> None:
        """Launch a kernel; `early`: under PDL it may start while those before it run."""
        options.setdefault("num_stages", 1)
        if early and self.pdl:
            options["launch_pdl"] = True
        kernel[grid](*args, **options)

    def _or_nothing(self, tensor: Tensor | None) -> Tensor:
        return self.nothing if tensor is None else tensor

    def _input(self, l: int) -> Tensor:
        """x of a layer, (B, D)."""
        return self.x if l == 0 else self.z[l - 1]

    def _attend(self, l: int) -> None:
        state, m = self.state, self.weights[l].maths
        recurrent = self.config.layer_kinds[l] == "recurrent"
        self._launch(
            self.kernels.attend, (self.B * self.G, self.S), self.raw, state.keys[l], state.values[l],
            self._or_nothing(m.q_norm), self._or_nothing(m.k_norm), self.slopes, self.cos, self.sin, state.slot,
            state.positions, self._or_nothing(state.valid), self._or_nothing(state.key_positions), self.pending_slot,
            self.pending_positions, self.partial, self.lse, self.a, self.B, self.capacity, self.config.norm_eps,
            self.K**-0.5, H=self.H, G=self.G, R=self.R, RB=1 if self.R == 1 else max(16, _power(self.R)),
            QB=_power(self.H * self.K), BN=self.BN, S=self.S, LEAST=self.least, ALIBI=self.config.position == "alibi",
            PADS=self.pads, STORE=not recurrent, DEFER=recurrent and self.defer, PARTS=self.parts,
            PRECISION="ieee" if self.dtype == torch.float32 else "tf32", PDL=self.pdl, **self.heads,
            num_warps=self.attention_warps, early=True,
        )  # fmt: skip

    def _make_pairs(self, slot: Tensor, positions: Tensor) -> None:
        """Persistent pairs of all recurrent layers, of the z that the last step left."""
        B, G, K, state, QK = self.B, self.G, self.K, self.state, self.H * self.K
        for i, l in enumerate(self.recurrent):
            w = self.weights[l]
            out, bias = self.raw_pairs[i], w.qkv_bias[QK:]
            if self.single:
                m, has_bias = w.maths, self.config.attention_bias
                self._normed_product(self.z[l], m.attention_norm, (m.k, m.v), out, bias, has_bias, early=i > 0)
            else:
                self._add_and_norm(self.z[l], None, w.maths.attention_norm, self.z[l], B)
                assert w.qkv is not None
                self._product(self.h[:B], w.qkv[QK:], out, bias if self.config.attention_bias else None)
        width = 0 if self.k_norm is None else self.k_norm.shape[1]
        self._launch(
            self.kernels.store_pairs, (B * G, len(self.recurrent)), self.raw_pairs, self.layer_numbers, state.keys,
            state.values, self._or_nothing(self.k_norm), self.cos, self.sin, slot, positions, B, self.capacity,
            self.config.norm_eps, G=G, GB=_power(G * K), W=width, **self.heads, num_warps=1,
        )  # fmt: skip

    # --- a single row ------------------------------------------------------------------------------------------------

    def _blocks(self, width: int, rows: int, unit: int, once: bool = False, twice: bool = False) -> dict[str, int]:
        """Rows of weights at a time (a divisor of `unit`), programs and warps of a product with `width` inputs.

        once: preparing the inputs is expensive, so one program a multiprocessor takes all of its rows at a time.
        twice: there are two vectors of inputs, whose registers leave room for fewer programs.
        """
        tuning, itemsize = self.tuning, self.dtype.itemsize
        WB = _power(width)
        warps = 8 if tuning.wide <= WB else 4
        if WB * itemsize > warps * 32 * 4 * tuning.thread_bytes:
            warps = 16
        thread_bytes, most = tuning.thread_bytes, 2**20
        if once:
            warps = 8 if WB < 2048 else 16
            thread_bytes, most = 2 * thread_bytes, _power(-(-rows // self.multiprocessors))
        unit &= -unit  # the largest power of two in it
        bn = max(1, min(warps * 32 * thread_bytes // (WB * itemsize), unit, _power(rows), most))
        room = tuning.warps_per_multiprocessor * (3 if twice else 4) // 4
        programs = self.multiprocessors * max(1, room // warps)
        align = gcd(16, width * itemsize)  # of rows
        return {
            "IN": width, "WB": WB, "BN": bn, "PROGRAMS": min(programs, -(-rows // bn)), "ALIGN": align,
            "num_warps": warps,
        }  # fmt: skip

    def _normed_product(
        self, x: Tensor, norm: Tensor, matrices: Sequence[Tensor], out: Tensor, bias: Tensor, has_bias: bool,
        *, gate: Tensor | None = None, gate_bias: Tensor | None = None, kind: int = -1, pending: Tensor | None = None,
        rows: int | None = None, early: bool = True,
    ) -> None:  # fmt: skip
        rows = sum(w.shape[0] for w in matrices) if rows is None else rows
        N1 = matrices[0].shape[0] if len(matrices) > 1 else rows
        N2 = N1 + matrices[1].shape[0] if len(matrices) > 2 else rows
        unit = gcd(N1, N2) if rows > N1 else 2**20
        blocks = self._blocks(self.D, rows, unit, twice=pending is not None)
        blocks["ALIGN"] = _aligned(blocks["ALIGN"], *matrices)
        self._launch(
            self.kernels.normed_product, (blocks["PROGRAMS"],), x, norm, matrices[0],
            matrices[min(1, len(matrices) - 1)], matrices[-1], self._or_nothing(gate), bias,
            self._or_nothing(gate_bias),
            self._or_nothing(pending), out, self.config.norm_eps, N1=N1, N2=N2, N=rows, KIND=kind, CENTRED=self.centred,
            BIAS=has_bias, DEFER=pending is not None, PDL=self.pdl, **blocks, early=early,
        )  # fmt: skip

    def _residual_product(self, a: Tensor, weight: Tensor, bias: Tensor, has_bias: bool, x: Tensor, out: Tensor,
                          combine: bool) -> None:  # fmt: skip
        blocks = self._blocks(weight.shape[1], self.D, 2**20, once=combine)
        blocks["ALIGN"] = _aligned(blocks["ALIGN"], weight)
        SB = max(1, min(_power(self.S), self.tuning.gathered // blocks["WB"]))
        self._launch(
            self.kernels.residual_product, (blocks["PROGRAMS"],), a, self.lse, self.state.slot, weight, bias, x, out,
            self.config.branch_scale, N=self.D, H=self.H, K=self.K, S=self.S, SB=SB, LEAST=self.least, BLOCK=self.BN,
            COMBINE=combine, BIAS=has_bias, PDL=self.pdl, **blocks, early=True,
        )  # fmt: skip

    def _single(self, logits: bool) -> None:
        config = self.config
        for l, w in enumerate(self.weights):
            m = w.maths
            pending = self.z[l] if self.defer and config.layer_kinds[l] == "recurrent" else None
            x, z = self._input(l), self.z[l]
            self._normed_product(
                x, m.attention_norm, (m.q, m.k, m.v), self.raw, w.qkv_bias, config.attention_bias, pending=pending
            )
            self._attend(l)
            self._residual_product(self.partial, m.o, w.o_bias, config.attention_bias, x, self.y, True)
            self._normed_product(
                self.y, m.mlp_norm, (m.up,), self.inner, w.up_bias, config.mlp_bias, gate=m.gate,
                gate_bias=w.gate_bias, kind=self.kind,
            )  # fmt: skip
            self._residual_product(self.inner, m.down, w.down_bias, config.mlp_bias, self.y, z, False)
        if logits:
            self._normed_product(
                self.z[-1], self.final_norm, (self.head,), self.state.logits, self.nothing, False,
                rows=config.vocab_size,
            )  # fmt: skip

    # --- several rows ------------------------------------------------------------------------------------------------

    def _product(self, a: Tensor, weight: Tensor, out: Tensor, bias: Tensor | None) -> None:
        """out = a W^T + bias, for rows a."""
        rows, width = a.shape[0], weight.shape[0]
        if bias is None and rows <= THIN_ROWS and self.dtype.itemsize == 2:
            from recurformer.scan.fused import kernels as scan_kernels

            kernel: Any = scan_kernels.product_thin
            bn = 32 if width <= 2**15 else 64
            kernel[(-(-width // bn), 1)](
                a, weight, out, rows, 0, 0, 0, IN=a.shape[1], OUT=width, BM=16, BN=bn, BK=128, num_warps=4,
                num_stages=4,
            )  # fmt: skip
        elif bias is None:
            torch.mm(a, weight.t(), out=out)
        else:
            torch.addmm(bias.to(self.dtype), a, weight.t(), out=out)

    def _add_and_norm(
        self, x: Tensor, branch: Tensor | None, norm: Tensor, out: Tensor, rows: int, pending: Tensor | None = None
    ) -> None:
        """out = x + s branch, h = norm(out); rows B ... of h: norm(pending)."""
        self._launch(
            self.kernels.add_and_norm, (rows,), x, self._or_nothing(branch), norm, out, self.h,
            self._or_nothing(pending), self.B, self.config.branch_scale, self.config.norm_eps, D=self.D, DB=self.DB,
            CENTRED=self.centred, BRANCH=branch is not None, num_warps=self.row_warps,
        )  # fmt: skip

    def _several(self, logits: bool) -> None:
        config, B, state = self.config, self.B, self.state

        def before(l: int, branch: Tensor | None) -> None:
            """The end of layer l - 1 and the first norm of layer l, with that of its pending outputs."""
            pending = self.z[l] if self.defer and config.layer_kinds[l] == "recurrent" else None
            rows = B if pending is None else 2 * B
            x = self.x if branch is None else self.y
            self._add_and_norm(x, branch, self.weights[l].maths.attention_norm, self._input(l), rows, pending)
            w = self.weights[l]
            assert w.qkv is not None
            self._product(self.h[:rows], w.qkv, self.raw[:rows], w.qkv_bias if config.attention_bias else None)

        before(0, None)
        for l, w in enumerate(self.weights):
            m = w.maths
            self._attend(l)
            if self.parts:
                self._launch(
                    self.kernels.combine, (B, self.H), self.partial, self.lse, state.slot, self.a, H=self.H, K=self.K,
                    KB=self.KB, S=self.S, SB=min(8, _power(self.S)), LEAST=self.least, BLOCK=self.BN, num_warps=1,
                )  # fmt: skip
            self._product(self.a, m.o, self.branch, w.o_bias if config.attention_bias else None)
            self._add_and_norm(self._input(l), self.branch, m.mlp_norm, self.y, B)
            self._product(self.h[:B], m.up, self.up, w.up_bias if config.mlp_bias else None)
            if m.gate is not None:
                self._product(self.h[:B], m.gate, self.gate, w.gate_bias if config.mlp_bias else None)
            FB = min(1024, _power(self.F))
            self._launch(
                self.kernels.activate, (B, -(-self.F // FB)), self.up, self.gate if m.gate is not None else self.up,
                self.inner, F=self.F, FB=FB, KIND=self.kind,
            )  # fmt: skip
            self._product(self.inner, m.down, self.branch, w.down_bias if config.mlp_bias else None)
            if l + 1 < self.L:
                before(l + 1, self.branch)
        self._add_and_norm(self.y, self.branch, self.final_norm, self.z[-1], B)
        if logits:
            head = self.head[: config.vocab_size]
            if state.logits.dtype == self.dtype:
                self._product(self.h[:B], head, state.logits, None)
            else:
                self._product(self.h[:B], head, self.logits, None)
                state.logits.copy_(self.logits)


def _power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def _aligned(align: int, *tensors: Tensor) -> int:
    """What divides all addresses, of `align`."""
    return gcd(align, *(t.data_ptr() for t in tensors)) if tensors[0].device.type != "meta" else align
