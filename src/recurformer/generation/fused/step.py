"""One decode step as Triton kernels: the buffers, attention and pairs that every fused step has.

The step reads every weight once. The persistent pair of a recurrent layer is made of the layer's output z, and can wait
for the next step (`defer`). The next step's product with the same key and value weights then makes it, together with
that step's temporary pair.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from torch import Tensor

from recurformer.attention import alibi_slopes, rotary_frequencies
from recurformer.generation.fused.launch import (
    AttentionMode,
    AttentionOutputs,
    HeadNorms,
    Memory,
    PendingSlot,
    PositionTables,
)
from recurformer.generation.fused.tuning import Tuning, attention_parts, head_constants, power_of_two
from recurformer.generation.fused.weights import StepWeights
from recurformer.generation.state import DecodeState
from recurformer.hardware import ACTIVATIONS, CENTRED_NORMS, EARLY_CAPABILITY, interpreted, step_obstacle
from recurformer.model import LanguageModel

NO_SLOT = -2  # the pending slot when there is none: no slot number is negative, and none follows it


class FusedStep(abc.ABC):
    """One token for every row of a state: kernels enqueued on the current stream, capturable in a CUDA graph.

    A step reads `tokens`, `slot`, `positions` (and `valid`, `key_positions`) of the state. It stores the pairs of the
    new tokens in their slot and writes `logits`. The caller advances `slot` and `positions`. A token is a pad where
    `valid` is False at the new slot. `make_step` makes a step.

    Args:
        model: its weights are read where they are, as far as they have the state's dtype; see `refresh`.
        state: the buffers.
        defer: leave the new pairs of recurrent layers to the next step, which makes them at no cost. Otherwise the step
            makes them at its end and reads key and value weights twice. With `defer`, call `flush` before anything but
            the next step reads, copies or adds pairs. (A state cut back to fewer slots needs no flush.)
        tuning: block sizes.

    Raises:
        ValueError: where the kernels can't run, naming what can.
    """

    single: ClassVar[bool]  # one row, whose products are kernels of ours

    def __init__(self, model: LanguageModel, state: DecodeState, *, defer: bool, tuning: Tuning) -> None:
        config, device = model.config, state.keys.device
        reason = step_obstacle(config, device, state.keys.dtype, state.batch_size)
        if reason is not None:
            raise ValueError(f"the fused step can't run: {reason}")
        from recurformer.generation.fused import kernels

        self.kernels: Any = kernels
        self.state, self.config, self.device, self.dtype = state, config, device, state.keys.dtype
        self.B, self.D, self.F = state.batch_size, config.d_model, config.mlp_width
        self.tuning = tuning.for_device(device)
        self.recurrent = [l for l, kind in enumerate(config.layer_kinds) if kind == "recurrent"]
        self.defer = defer and bool(self.recurrent)
        self.pdl = self.tuning.pdl and self.single and not interpreted()
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < EARLY_CAPABILITY:
            self.pdl = False
        self.heads = head_constants(config)
        self.parts = attention_parts(self.tuning, self.heads, self.B, state.capacity, self.single)
        self.splits = self.parts.S > 1 or self.single  # a single row's product puts parts together anyway
        self.activation, self.centred = ACTIVATIONS[config.activation], CENTRED_NORMS[config.norm]
        self.row_warps = 4 if self.D <= 2048 else 8
        with torch.inference_mode(False):
            self._make_buffers()
        with torch.no_grad():
            self.weights = StepWeights(model, self.dtype, stacked=not self.single)

    def _make_buffers(self) -> None:
        B, L, D, heads, f32 = self.B, self.config.n_layers, self.D, self.heads, torch.float32
        self.rows = 2 * B if self.defer else B  # rows of the first product of a recurrent layer
        self.x, self.y, self.z = (
            self.fresh(B, D, dtype=f32),
            self.fresh(B, D, dtype=f32),
            self.fresh(L, B, D, dtype=f32),
        )
        self.z.zero_()  # of a step that never was; what is made of it is thrown away
        self.raw = self.fresh(self.rows, (heads.H + 2 * heads.G) * heads.K)
        self.raw_pairs = self.fresh(len(self.recurrent), B, 2 * heads.G * heads.K)
        self.inner = self.fresh(B, self.F)
        self.a = self.fresh(B, heads.H * heads.K)
        self.partial = self.fresh(B, self.parts.S, heads.H * heads.K, dtype=f32)
        self.lse = self.fresh(B, self.parts.S, heads.H, dtype=f32)
        slot = torch.full((), NO_SLOT, dtype=torch.int32, device=self.device)
        self.pending = PendingSlot(slot, torch.zeros(B, dtype=torch.int32, device=self.device))
        self.layer_numbers = torch.tensor(self.recurrent, dtype=torch.int32, device=self.device)
        self.nothing = self.x  # the argument of a kernel that needs no such tensor
        self.tables = self._position_tables()

    def fresh(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return an uninitialised tensor, of the state's dtype unless another is given."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def _position_tables(self) -> PositionTables:
        config, slopes, cos, sin = self.config, self.nothing, self.nothing, self.nothing
        if config.position == "alibi":
            slopes = alibi_slopes(config.n_heads, config.alibi_slopes, device=self.device).float()
        elif config.position == "rope":
            frequencies = rotary_frequencies(config, self.device)
            positions = torch.arange(self.state.capacity, dtype=frequencies.dtype, device=self.device)
            angles = positions[:, None] * frequencies
            cos, sin = angles.cos().float(), angles.sin().float()
        return PositionTables(slopes, cos, sin)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over weights that changed in place: those kept as copies are copied anew.

        Raises:
            ValueError: when weights have moved; graphs that hold their addresses are worthless then.
        """
        self.weights.refresh()

    # --- a step ------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def run_layers(self) -> None:
        """Enqueue all layers, from x to the last z, and what the output layer reads where that is not z."""

    @abc.abstractmethod
    def write_logits(self) -> None:
        """Enqueue the output layer."""

    @abc.abstractmethod
    def pair_product(self, l: int, out: Tensor, first: bool) -> None:
        """Enqueue the product of layer l that makes keys and values (B, 2 G K) of its output z.

        first: no kernel of ours ran just before, so this one must not start early.
        """

    @torch.no_grad()
    def __call__(self, logits: bool = True) -> None:
        """Enqueue one step; `logits`: also write the state's logits."""
        state = self.state
        # This kernel waits for all work before it. No other kernel of a single row's step does.
        self.launch(
            self.kernels.embed, (self.B,), state.tokens, state.slot, self.or_nothing(state.valid),
            self.weights.embedding, self.x, state.capacity, D=self.D, DB=power_of_two(self.D),
            PADS=state.valid is not None, PDL=self.pdl, num_warps=self.row_warps,
        )  # fmt: skip
        self.run_layers()
        if logits:
            self.write_logits()
        if self.defer:
            self.launch(
                self.kernels.remember, (1,), state.slot, state.positions, *self.pending, self.B,
                BB=power_of_two(self.B), PDL=self.pdl, early=True,
            )  # fmt: skip
        elif self.recurrent:
            self._make_pairs(PendingSlot(state.slot, state.positions))

    @torch.no_grad()
    def flush(self) -> None:
        """Enqueue what makes the pairs that the last step has left to the next; does nothing where there are none."""
        if self.defer:
            self._make_pairs(self.pending)
            self.pending.slot.fill_(NO_SLOT)

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, early: bool = False, **options: Any) -> None:
        """Launch a kernel; `early`: with programmatic dependent launch it may start while those before it run."""
        options.setdefault("num_stages", 1)
        if early and self.pdl:
            options["launch_pdl"] = True
        kernel[grid](*args, **options)

    def or_nothing(self, tensor: Tensor | None) -> Tensor:
        """Return the tensor, or one that stands for it where a kernel does not read it."""
        return self.nothing if tensor is None else tensor

    def layer_input(self, l: int) -> Tensor:
        """Return the buffer that holds x (B, D) of a layer."""
        return self.x if l == 0 else self.z[l - 1]

    def waits(self, l: int) -> bool:
        """Whether the pairs of a layer are left to the next step."""
        return self.defer and self.config.layer_kinds[l] == "recurrent"

    def attend(self, l: int) -> None:
        """Enqueue attention of a layer's queries over its memory."""
        state, maths = self.state, self.weights.layers[l].maths
        memory = Memory(
            state.keys[l], state.values[l], state.slot, state.positions, self.or_nothing(state.valid),
            self.or_nothing(state.key_positions), state.capacity,
        )  # fmt: skip
        mode = AttentionMode(
            PADS=state.valid is not None,
            STORE=self.config.layer_kinds[l] == "standard",
            DEFER=self.waits(l),
            SPLIT=self.splits,
            PRECISION="ieee" if self.dtype == torch.float32 else "tf32",
            PDL=self.pdl,
        )
        self.launch(
            self.kernels.attend, (self.B * self.heads.G, self.parts.S), self.raw, memory,
            HeadNorms(self.or_nothing(maths.q_norm), self.or_nothing(maths.k_norm)), self.tables, self.pending,
            AttentionOutputs(self.partial, self.lse, self.a), self.B, self.config.norm_eps, self.heads.K**-0.5,
            HEADS=self.heads, PARTS=self.parts, MODE=mode,
            num_warps=self.tuning.attention_warps[0 if self.single else 1], early=True,
        )  # fmt: skip

    def _make_pairs(self, at: PendingSlot) -> None:
        """Enqueue what makes persistent pairs of all recurrent layers, from the outputs z that the last step left."""
        state, heads, k_norms = self.state, self.heads, self.weights.k_norms
        for i, l in enumerate(self.recurrent):
            self.pair_product(l, self.raw_pairs[i], first=i == 0)
        self.launch(
            self.kernels.store_pairs, (self.B * heads.G, len(self.recurrent)), self.raw_pairs, self.layer_numbers,
            state.keys, state.values, self.or_nothing(k_norms), self.tables.cos, self.tables.sin, *at, self.B,
            state.capacity, self.config.norm_eps, W=0 if k_norms is None else k_norms.shape[1],
            GB=power_of_two(heads.G * heads.K), HEADS=heads, num_warps=1,
        )  # fmt: skip
