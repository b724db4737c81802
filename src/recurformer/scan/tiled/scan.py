"""Exact tiling in plain PyTorch operations, on any device: the paper's algorithm, forward and backward (section 5).

Forward. All queries and temporary pairs are known at once; persistent pairs appear one by one. Every query keeps a
running softmax state (m, l, acc) that blocks of pairs are pushed into as `schedule.py` says, so that it is complete
but for its own leaf when its position comes. The slot of position i holds its temporary pair until z_i is known and its
persistent pair afterwards, so that one read of the leaf up to slot i meets exactly the pairs that i attends to.

Backward. Positions run from last to first, and only data gradients go through the loop: at position i the gradient of
its persistent pair is complete, for every later query has pushed into it; it goes through the pair into z_i, through
both branches into a_i, and query i's own gradients are pushed on in the mirrored blocks. What the loop needs of the
forward is recomputed (or was kept) for a block of positions at a time, in parallel, and gradients of the weights of
MLP, attention output and persistent pairs are computed for the block in parallel after it. Those of queries, temporary
pairs and inputs come after the whole wave (of a single layer: all positions), when a query has passed every pair that
it met. No (N, N) tensor exists; the log-sum-exp of each query is all that is needed to make probabilities again.

Shapes here: E = B G rows of the attention products, R = H / G query heads that share a key-value head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from recurformer.scan.schedule import LeafStep, Schedule, Wave, choose_schedule, waves
from recurformer.scan.tiled.blocks import Attention, Leaf, LeafGradients, cut

if TYPE_CHECKING:
    from recurformer.attention import Layout, Rotation
    from recurformer.config import ModelConfig
    from recurformer.layer import LayerMaths

STACK_LEAF = 16  # as LEAF, of layers side by side: also what each is behind the one below
LEAF = 32  # positions that read each other directly: launches are what a small tile costs
POSITION_BLOCK = 64  # positions whose parallel part of the backward is done together; half, where memory counts
ONE_THREAD = 2**22  # multiply-adds of a position's largest product up to which the loop runs on one CPU thread
KEEP_BYTES = 2**29  # save="auto" keeps what the backward needs up to this many bytes a layer

pick_schedule = lru_cache(maxsize=256)(choose_schedule)


def tiled_scan(
    x: Tensor, layer: LayerMaths, layout: Layout, past: tuple[Tensor, Tensor] | None = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs and persistent pairs of one recurrent layer; arguments and results as `reference_scan`.

    Options are those of `stack_scan`.
    """
    z, ((keys, values),) = stack_scan(x, [layer], layout, [past], **options)
    return z, keys, values


def stack_scan(
    x: Tensor,
    layers: Sequence[LayerMaths],
    layout: Layout,
    past: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    *,
    chunk: int | str | None = "auto",
    leaf: int | None = None,
    save: str = "auto",
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Outputs of the last of several recurrent layers of one shape, and the persistent pairs of each.

    Args:
        x: (B, N, D), the first layer's inputs.
        layers: their maths and weights.
        layout: positions, padding, documents.
        past: of each layer, keys and values (B, G, P, K), constants; None: there are none.
        chunk: C of the two-level schedule, a power of two, by which a layer is behind the one below; None: pure tiling,
            one layer after the other; "auto": for one layer, least modelled HBM traffic; for several, one leaf.
        leaf: S, a power of two, positions that read each other directly, with memory for S^2 scores a head; 1 is the
            paper's algorithm to the letter. None: LEAF for one layer, STACK_LEAF for several, and no more than a chunk.
        save: what the forward keeps for the backward: "minimal" (inputs and outputs; the rest is recomputed in
            parallel), "all" (queries, pairs, attention outputs and the MLP's inner values), or "auto", by size.

    Returns:
        z (B, N, D), and a pair of keys and values (B, G, N, K) for each layer.

    Raises:
        ValueError: for a chunk or leaf that is no power of two, or an unknown `save`.
    """
    if torch.compiler.is_compiling():  # loops of thousands of operations: as one graph they take minutes to compile
        eager: Any = torch.compiler.disable(stack_scan)
        return eager(x, layers, layout, past, chunk=chunk, leaf=leaf, save=save)
    config = layers[0].config
    if save not in ("auto", "minimal", "all"):
        raise ValueError(f"save is {save!r}; choose 'auto', 'minimal' or 'all'")
    if leaf is None:
        leaf = LEAF if len(layers) == 1 else STACK_LEAF
        leaf = min(leaf, chunk) if isinstance(chunk, int) else leaf
    if isinstance(chunk, str):
        if chunk != "auto":
            raise ValueError(f"chunk is {chunk!r}; give a power of two, None (pure tiling) or 'auto'")
        if len(layers) == 1:
            sizes = (config.head_width, config.n_heads, config.kv_heads)
            schedule = pick_schedule(layout.length, layout.past, leaf, *sizes)
        else:
            schedule = Schedule(layout.length, layout.past, leaf, leaf)
    else:
        schedule = Schedule(layout.length, layout.past, chunk, leaf)
    names = [f.name for f in fields(layers[0]) if f.name not in ("config", "kv", "kv_bias")]  # packed ones repeat k, v
    tensors = [getattr(layer, name) for layer in layers for name in names]
    keep = save == "all"
    if save == "auto":
        inner = config.mlp_width * (1 if layers[0].gate is None else 2)
        per_position = 2 * (config.n_heads + config.kv_heads) * config.head_width + inner  # q and a, k and v, MLP
        keep = x.shape[0] * x.shape[1] * per_position * 4 <= KEEP_BYTES
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
    remembered: list[tuple[Tensor, Tensor] | None] = [None] * len(layers) if past is None else list(past)
    call = Call(config, layout, remembered, schedule, differentiable, keep and differentiable, names)
    z, keys, values = TiledScan.apply(x, call, *tensors)  # pyright: ignore[reportGeneralTypeIssues]
    return z, list(zip(keys, values, strict=True))


@dataclass(frozen=True)
class Call:
    """What is no differentiable tensor in one evaluation of a stack of layers."""

    config: ModelConfig
    layout: Layout
    past: list[tuple[Tensor, Tensor] | None]  # of each layer
    schedule: Schedule
    differentiable: bool
    keep: bool
    names: list[str]  # of the tensors of LayerMaths

    def layers(self, tensors: Sequence[Any]) -> list[LayerMaths]:
        """The stack, given the tensors of its first layer, its second, ..."""
        from recurformer.layer import LayerMaths

        count = len(self.names)
        each = [tensors[start : start + count] for start in range(0, len(tensors), count)]
        return [LayerMaths(self.config, **dict(zip(self.names, some, strict=True))) for some in each]

    @cached_property
    def waves(self) -> list[Wave]:
        """Which layers work where; a layer by itself does all its positions at once."""
        N, L = self.layout.length, len(self.past)
        return waves(L, N, N if L == 1 else self.schedule.chunk_length)

    @cached_property
    def leaves(self) -> list[LeafStep]:
        return list(self.schedule.leaves())

    def rotation_of(self, wave: Wave, B: int) -> Rotation | None:
        """The rotation of heads (layers, heads, n B, K)."""
        rotation = self.layout.rotation
        if rotation is None:
            return None
        shape = (B, 1, wave.length, -1)
        each = [(r.cos.expand(shape), r.sin.expand(shape)) for r in (rotation[span] for span in wave.spans())]
        cos, sin = (torch.stack(parts).permute(0, 2, 3, 1, 4).flatten(2, 3) for parts in zip(*each, strict=True))
        return replace(rotation, cos=cos, sin=sin)

    def leaves_of(self, wave: Wave) -> list[list[LeafStep]]:
        """The steps of a wave, for each its leaves, one of every layer."""
        side = self.schedule.leaf
        count = -(-wave.length // side)
        return [[self.leaves[start // side + n] for start in wave.starts] for n in range(count)]


class TiledScan(torch.autograd.Function):
    """A stack of layers as a pure function of its input and weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        from recurformer.layer import LayerMaths

        layers, config, rotation = call.layers(tensors), call.config, call.layout.rotation
        (B, N, D), L, side = x.shape, len(layers), call.schedule.leaf
        pairs = Pairs.empty(call, x)
        attentions = pairs.attentions(call)
        kept = Kept.empty(call, layers[0], pairs.q) if call.keep else None
        z = x.new_empty(L, N, B, D)  # position-major: what belongs to a position is one piece of memory
        inputs = [x, *z[:-1].transpose(1, 2)]  # (B, N, D)
        stack = LayerMaths.stack(layers, by_column=True)

        for wave in call.waves:
            small = stack[wave.layers.start : wave.layers.stop]
            x_wave = inputs_beside(inputs, wave)
            h, turned = small.attention_input(x_wave.flatten(1, 2)), call.rotation_of(wave, B)
            made = (small.queries(h, turned), *small.pairs(h, turned))  # (layers, heads, n B, K)
            by_batch = (t.unflatten(2, (-1, B)).permute(0, 3, 1, 2, 4) for t in made)
            for (l, span), q, k, v in zip(wave, *by_batch, strict=True):
                attentions[l].fill(span, q, k, v)
            del h, made
            states = [attentions[l].new_state(wave.length) for l in wave.layers]
            leaf = Leaf(attentions[0], min(side, wave.length), len(states))
            x_rows = x_wave.unbind(1)
            z_rows = beside(z, wave).unbind(1)
            kept_rows = [] if kept is None else [beside(t, wave).unbind(1) for t in kept.by_position()]
            for steps in call.leaves_of(wave):
                works = list(zip([attentions[l] for l in wave.layers], states, steps, wave.starts, strict=True))
                for place, (attention, state, step, origin) in enumerate(works):
                    if step.pull is not None:
                        attention.absorb(state, step.pull.queries, step.pull.keys, origin)
                    leaf.begin(place, attention, state, step.positions, origin)
                spans = [step.positions for step in steps]
                turns = turns_of(rotation, spans)
                first = spans[0].start - wave.starts[0]
                with few_threads(x, config, len(steps)), torch.inference_mode():
                    for row in range(spans[0].stop - spans[0].start):
                        a = leaf.read(row).view(len(steps), B, -1)
                        y = small.attended(x_rows[first + row], a.to(small.compute_dtype))
                        up, gate = small.mlp_inner(y)
                        z_i = small.finished(y, up, gate)
                        leaf.set_pair(row, *small.pairs(small.attention_input(z_i), turns[row]))
                        z_rows[first + row].copy_(z_i)
                        for rows_of_one, made in zip(kept_rows, (a, up, gate), strict=False):
                            rows_of_one[first + row].copy_(made)
                for place, (attention, state, step, origin) in enumerate(works):
                    leaf.end(place, attention, step.positions)
                    if step.push is not None:
                        attention.absorb(state, step.push.queries, step.push.keys, origin)
                if kept is not None:
                    for l, span, lse in zip(wave.layers, spans, leaf.log_sum_exp(), strict=True):
                        kept.lse[l][:, :, span] = lse

        shape = (L, B, config.kv_heads, N, -1)
        keys, values = (t.view(shape).to(layers[0].compute_dtype) for t in (pairs.k, pairs.v))
        if call.differentiable:
            ctx.save_for_backward(x, z, *tensors, *((*pairs, *kept) if kept is not None else ()))
        ctx.call = call
        ctx.mark_non_differentiable(keys, values)  # the cache holds constants
        ctx.set_materialize_grads(False)
        last = z[-1] if call.differentiable or L == 1 else z[-1].clone()  # a view would keep the outputs of all layers
        return last.transpose(0, 1), keys, values

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "the tiled scan has no second derivative (create_graph=True); set model.scan = 'reference', which has"
            )
        call: Call = ctx.call
        gz_out, count = incoming[0], len(call.names) * len(call.past)
        if gz_out is None:
            return (None,) * (2 + count)
        x, z, *rest = ctx.saved_tensors
        tensors, known = rest[:count], rest[count:]
        pairs, kept = (Pairs(*known[:3]), Kept(*known[3:])) if call.keep else (None, None)
        needed = ctx.needs_input_grad[2:]
        wanted = {name for name, need in zip(call.names * len(call.past), needed, strict=True) if need}
        with torch.autocast(x.device.type, enabled=False):
            gx, gradients = Backward(call, call.layers(tensors), x, z, pairs, kept, wanted).run(gz_out)
        found = [
            gradients[name][l] if name in gradients else None for l in range(len(call.past)) for name in call.names
        ]
        return (gx, None, *(g if need else None for g, need in zip(found, needed, strict=True)))


def rows(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The views of each tensor, (layers, n, ...), at every position."""
    return [tensor.unbind(1) for tensor in tensors]


def beside(t: Tensor, wave: Wave) -> Tensor:
    """Of t (L, N, ...), what the layers of a wave have at their positions, (layers, n, ...): a view."""
    behind = wave.starts[0] - wave.starts[1] if len(wave.starts) > 1 else 0
    first = t[wave.layers.start, wave.starts[0] : wave.starts[0] + wave.length]
    strides = (t.stride(0) - behind * t.stride(1), *first.stride())
    return t.as_strided((len(wave.layers), *first.shape), strides, first.storage_offset())


def inputs_beside(inputs: Sequence[Tensor], wave: Wave) -> Tensor:
    """Of each layer's inputs (B, N, D), those at its positions of a wave, (layers, n, B, D)."""
    return torch.stack([inputs[l][:, span].transpose(0, 1) for l, span in wave])


def turns_of(rotation: Rotation | None, spans: list[slice]) -> list[Rotation | None]:
    """For each of n positions, the rotation of several layers' heads there, angles (layers, 1, B or 1, K/2)."""
    if rotation is None:
        return [None] * (spans[0].stop - spans[0].start)
    each = [rotation[span] for span in spans]
    cos, sin = (
        torch.cat(parts, dim=1).permute(2, 1, 0, 3) for parts in zip(*((r.cos, r.sin) for r in each), strict=True)
    )
    return [replace(rotation, cos=c[:, None], sin=s[:, None]) for c, s in zip(cos, sin, strict=True)]


@contextmanager
def few_threads(x: Tensor, config: ModelConfig, layers: int) -> Iterator[None]:
    """One thread while small products follow each other on a CPU.

    A second thread gains little on a product of B rows and has to be waited for after each: where a neighbour holds its
    core, thousands of such waits make the loop many times slower. Products of several layers side by side share out
    better.
    """
    threads = torch.get_num_threads()
    work = x.shape[0] * x.shape[2] * config.mlp_width * layers
    if x.device.type != "cpu" or threads == 1 or work > ONE_THREAD:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Pairs(NamedTuple):
    """Queries and pairs of each layer in the accumulation dtype."""

    q: Tensor  # (L, E, R, N, K), scaled
    k: Tensor  # (L, E, N, K), persistent once they are known
    v: Tensor

    @classmethod
    def empty(cls, call: Call, x: Tensor) -> Pairs:
        config, (B, N, _), L = call.config, x.shape, len(call.past)
        G, K = config.kv_heads, config.head_width
        dtype = torch.promote_types(x.dtype, torch.float32)
        q = x.new_empty(L, B * G, config.n_heads // G, N, K, dtype=dtype)
        return cls(q, *(x.new_empty(L, B * G, N, K, dtype=dtype) for _ in range(2)))

    def attentions(self, call: Call) -> list[Attention]:
        """Of each layer."""
        B = self.k.shape[1] // call.config.kv_heads
        return [Attention(call.layout, B, *each) for each in zip(*self, call.past, strict=True)]


class Kept(NamedTuple):
    """What save="all" keeps for the backward besides queries and pairs."""

    lse: Tensor  # (L, E, R, N)
    a: Tensor  # (L, N, B, H K)
    up: Tensor  # (L, N, B, F)
    gate: Tensor | None  # (L, N, B, F), swiglu

    @classmethod
    def empty(cls, call: Call, layer: LayerMaths, q: Tensor) -> Kept:
        config, (L, E, _, N, _) = call.config, q.shape
        B = E // config.kv_heads
        up = q.new_empty(L, N, B, config.mlp_width, dtype=layer.compute_dtype)
        a = q.new_empty(L, N, B, config.n_heads * config.head_width)
        return cls(q.new_empty(q.shape[:4]), a, up, None if layer.gate is None else torch.empty_like(up))

    def by_position(self) -> list[Tensor]:
        """a, up and, where there is one, gate."""
        return [t for t in (self.a, self.up, self.gate) if t is not None]


# --- backward --------------------------------------------------------------------------------------------------------


class NormTape:
    """A norm's input (layers, n, ..., width), normalised, for its backward: `output = xhat * weight`.

    With xhat = (x - mean x) rstd, the gradient of x is
    `rstd weight g - mean(rstd weight g) - xhat rstd mean(g output)`. RMS has no mean and no second term.
    """

    def __init__(self, x: Tensor, weight: Tensor, config: ModelConfig) -> None:
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # statistics in the accumulation dtype
        self.centred, weight = config.norm == "layer", weight.to(x.dtype)[:, None]
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        rstd = (x.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt()
        self.xhat = x * rstd
        self.output = self.xhat * weight
        self.output_rows, self.slope_rows, self.pull_rows = rows(
            self.output, rstd * weight, self.xhat * (rstd / -x.shape[-1])
        )

    def backward(self, g: Tensor, row: int, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Gradient of the input at a position, given that of the output; plus the residual's."""
        along = (g * self.output_rows[row]).sum(-1, keepdim=True)
        slope = self.slope_rows[row]
        gx = g * slope if residual is None else torch.addcmul(residual, g, slope, out=out)
        if self.centred:
            gx -= (g * slope).mean(-1, keepdim=True)
        return gx.addcmul_(self.pull_rows[row], along)

    def weight_gradient(self, g: Tensor) -> Tensor:
        """Sum over everything but layers and the normalised dimension."""
        return (g * self.xhat).flatten(1, -2).sum(1)


class Backward:
    """Gradients of one call. Work tensors of a block of n positions of several layers are (layers, n, B, ...)."""

    def __init__(
        self, call: Call, layers: list[LayerMaths], x: Tensor, z: Tensor, pairs: Pairs | None, kept: Kept | None,
        wanted: set[str],
    ) -> None:  # fmt: skip
        from recurformer.layer import LayerMaths

        self.call, self.layers, self.x, self.z, self.kept, self.wanted = call, layers, x, z, kept, wanted
        self.config, self.layout = call.config, call.layout
        self.acc, self.dtype = x.dtype, layers[0].compute_dtype
        self.inputs = [x, *z[:-1].transpose(1, 2)]  # (B, N, D)
        if pairs is None:
            pairs, rotation = Pairs.empty(call, x), self.layout.rotation
            for layer, attention, u, w in zip(layers, pairs.attentions(call), self.inputs, z, strict=True):
                known = layer.pairs(layer.attention_input(w.transpose(0, 1)), rotation)
                attention.fill(slice(0, x.shape[1]), layer.queries(layer.attention_input(u), rotation), *known)
        self.attentions = pairs.attentions(call)
        self.q = q = pairs.q
        self.lse = q.new_empty(q.shape[:4]) if kept is None else kept.lse
        self.ga, self.delta = torch.empty_like(q), q.new_empty(q.shape[:4])  # <ga_i, a_i>, per head
        self.gq = torch.zeros_like(q)  # of the scaled queries
        one = self.attentions[0]
        self.gkv = q.new_zeros(
            len(layers), one.B, 2, one.G, one.N, one.K
        )  # of the persistent pairs, keys beside values
        self.gradients: dict[str, Tensor] = {}  # (L, ...)
        self.stack = LayerMaths.stack(layers)

    def run(self, gz_out: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Gradients of x and, by name, of the wanted tensors of each layer."""
        side = self.call.schedule.leaf
        length = max(side, POSITION_BLOCK if self.kept is not None else POSITION_BLOCK // 2)
        # At each position the gradient of the outputs of the layer that comes next there, then of its inputs.
        self.g = gz_out.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        for wave in reversed(self.call.waves):
            for block in reversed(list(cut(slice(0, wave.length), length))):  # of whole leaves
                self.block(wave.part(block))
            for block in cut(slice(0, wave.length), length):
                self.inputs_of(wave.part(block))
        gradients = {}
        for name in list(self.gradients):
            total = self.gradients.pop(name)
            parts = zip(total, self.layers, strict=True)
            # Of their own memory, each layer's: who keeps one must not keep all.
            gradients[name] = [g.to(getattr(layer, name).dtype, copy=len(self.layers) > 1) for g, layer in parts]
        return self.g.transpose(0, 1), gradients

    def total(self, name: str, layers: range) -> Tensor:
        """What the gradients of some layers' weights add up to, in at least float32."""
        if name not in self.gradients:
            weight = getattr(self.layers[0], name)
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.gradients[name] = weight.new_zeros(len(self.layers), *weight.shape, dtype=dtype)
        return self.gradients[name][layers.start : layers.stop]

    def add(self, name: str, layers: range, gradient: Tensor) -> None:
        """Accumulate the gradients (layers, ...) of a weight."""
        if name in self.wanted:
            self.total(name, layers).add_(gradient)

    def add_product(self, name: str, layers: range, g: Tensor, h: Tensor) -> None:
        """Accumulate those of a matrix and its bias from its outputs' g and its inputs h, (layers, n, B, ...)."""
        g = g.flatten(1, -2)
        if name in self.wanted:
            total, factors = (
                self.total(name, layers),
                (g.to(self.dtype).transpose(1, 2), h.flatten(1, -2).to(self.dtype)),
            )
            if total.dtype == self.dtype:
                torch.baddbmm(total, *factors, out=total)
            else:
                total.add_(torch.bmm(*factors))
        if f"{name}_bias" in self.wanted:
            self.add(f"{name}_bias", layers, g.to(self.acc).sum(1))

    def block(self, wave: Wave) -> None:
        """Positions of one block of each layer, last to first."""
        from recurformer.layer import linear

        config, s, layers, n = self.config, self.config.branch_scale, wave.layers, wave.length
        stack, rotation = self.stack[layers.start : layers.stop], self.layout.rotation
        assert stack.kv is not None
        B, width = self.x.shape[0], len(layers)

        def many(t: Tensor) -> Tensor:
            """(layers, n B, ...) as (layers, n, B, ...)."""
            return t.unflatten(1, (n, B))

        # In parallel: what the forward had at these positions.
        a = torch.stack([self.attend(l, span) for l, span in wave]) if self.kept is None else beside(self.kept.a, wave)
        a_inner = a.flatten(1, 2).to(self.dtype)
        y = stack.attended(inputs_beside(self.inputs, wave).flatten(1, 2), a_inner)
        if self.kept is None:
            up, gate = stack.mlp_inner(y)
        else:
            up = beside(self.kept.up, wave).flatten(1, 2)
            gate = None if self.kept.gate is None else beside(self.kept.gate, wave).flatten(1, 2)
        inner, slope_up, slope_gate = activation_slopes(up, gate, config)
        mlp_norm = NormTape(many(y), stack.mlp_norm, config)
        z_norm = NormTape(beside(self.z, wave), stack.attention_norm, config)
        h_z = z_norm.output.to(self.dtype)
        key_norm = None
        if stack.k_norm is not None:
            k_raw = many(linear(h_z.flatten(1, 2), stack.k, stack.k_bias))
            k_raw = k_raw.unflatten(-1, (config.kv_heads, -1)) if config.qk_norm == "head" else k_raw
            key_norm = NormTape(k_raw, stack.k_norm, config)
        del y, up, gate

        # One by one, from the last: data gradients alone. `rows` of a tensor are its views by position, made at once.
        G, K = config.kv_heads, config.head_width
        gz, gy = (self.x.new_empty(width, n, B, self.x.shape[2]) for _ in range(2))
        g_mlp_norm, g_z_norm = (torch.empty_like(gz, dtype=self.dtype) for _ in range(2))
        g_up = torch.empty_like(many(inner))
        g_gate = None if slope_gate is None else torch.empty_like(g_up)
        g_pair = gz.new_empty(width, n, B, 2, G, K)
        g_key = None if key_norm is None else torch.empty_like(key_norm.output)  # before the norm of keys
        gz_out = torch.stack([self.g[span] for span in wave.spans()])
        gz_rows, gy_rows, g_up_rows, g_mlp_norm_rows, g_z_norm_rows = rows(gz, gy, g_up, g_mlp_norm, g_z_norm)
        gz_out_rows, a_rows, slope_rows, g_pair_rows = rows(gz_out, a, many(slope_up), g_pair)
        for steps in reversed(self.call.leaves_of(wave)):
            spans = [step.positions for step in steps]
            for l, step in zip(layers, steps, strict=True):
                if step.push is not None:
                    self.push(l, step.push.queries, step.push.keys)
            attentions, lse, gkv = ([t[l] for l in layers] for t in (self.attentions, self.lse, self.gkv))
            leaf = LeafGradients(attentions, spans, lse, gkv)  # pyright: ignore[reportArgumentType]
            turns = turns_of(None if rotation is None else rotation.inverse(), spans)
            first = spans[0].start - wave.starts[0]
            with few_threads(self.x, config, width), torch.inference_mode():
                for row in reversed(range(spans[0].stop - spans[0].start)):
                    r = first + row
                    # z_i, through the persistent pair
                    pair = leaf.pair(row).view(width, B, 2, G, K)
                    g_k, turn = pair[:, :, 0], turns[row]
                    if turn is not None:
                        g_k.copy_(turn(g_k.transpose(1, 2)).transpose(1, 2))
                    if key_norm is not None and g_key is not None:
                        g_key_i = g_key[:, r]
                        g_key_i.copy_(g_k.reshape(g_key_i.shape))
                        g_k.copy_(key_norm.backward(g_key_i, r).view(g_k.shape))
                    g_pair_rows[r].copy_(pair)
                    g_z_norm_i = torch.bmm(pair.view(width, B, -1).to(self.dtype), stack.kv)
                    g_z_norm_rows[r].copy_(g_z_norm_i)
                    gz_i = z_norm.backward(g_z_norm_i, r, gz_out_rows[r], out=gz_rows[r])
                    # y_i, through the MLP
                    g_inner, g_up_i = torch.bmm((s * gz_i).to(self.dtype), stack.down), g_up_rows[r]
                    torch.mul(g_inner, slope_rows[r], out=g_up_i)
                    g_mlp_norm_i = torch.bmm(g_up_i, stack.up)
                    if g_gate is not None and slope_gate is not None and stack.gate is not None:
                        g_gate_i = torch.mul(g_inner, many(slope_gate)[:, r], out=g_gate[:, r])
                        g_mlp_norm_i = torch.baddbmm(g_mlp_norm_i, g_gate_i, stack.gate)
                    g_mlp_norm_rows[r].copy_(g_mlp_norm_i)
                    gy_i = mlp_norm.backward(g_mlp_norm_i, r, gz_i, out=gy_rows[r])
                    # a_i, through the attention output
                    ga = torch.bmm((s * gy_i).to(self.dtype), stack.o)
                    leaf.meet(row, ga.to(self.acc), a_rows[r])
            for place, (l, step) in enumerate(zip(layers, steps, strict=True)):
                attention, span = self.attentions[l], step.positions
                ga = leaf.ga[place].reshape(-1, attention.R, span.stop - span.start, K)
                here = a[place, first : first + ga.shape[2]].view(-1, *ga.shape[:2], K).permute(1, 2, 0, 3)
                self.ga[l][:, :, span] = ga
                self.delta[l][:, :, span] = (ga * here).sum(-1)
                self.gq[l][:, :, span] += leaf.queries(place, attention.k[:, span])
                if step.pull is not None:
                    self.push(l, step.pull.queries, step.pull.keys)

        # In parallel again: the weights.
        self.add_product("down", layers, s * gz, many(inner))
        self.add_product("up", layers, g_up, mlp_norm.output)
        if g_gate is not None:
            self.add_product("gate", layers, g_gate, mlp_norm.output)
        self.add("mlp_norm", layers, mlp_norm.weight_gradient(g_mlp_norm))
        self.add_product("o", layers, s * gy, many(a_inner))
        self.add_product("k", layers, g_pair[:, :, :, 0].flatten(3), h_z)
        self.add_product("v", layers, g_pair[:, :, :, 1].flatten(3), h_z)
        if key_norm is not None and g_key is not None:
            self.add("k_norm", layers, key_norm.weight_gradient(g_key))
        self.add("attention_norm", layers, z_norm.weight_gradient(g_z_norm))
        for span, gy_of_layer in zip(wave.spans(), gy, strict=True):
            self.g[span] = gy_of_layer

    def inputs_of(self, wave: Wave) -> None:
        """The rest of a block's gradients, once all pairs that its queries met have been passed: of its inputs."""
        n, layers = wave.length, wave.layers
        one = self.attentions[0]
        B, G, K = one.B, one.G, one.K
        x, turn = inputs_beside(self.inputs, wave).flatten(1, 2), self.call.rotation_of(wave, B)
        inputs = Inputs(self.stack[layers.start : layers.stop], x, turn, self.wanted)
        k_tmp, v_tmp = (  # (layers, E, 1, n, K)
            t.detach().to(self.acc).view(-1, G, n, B, K).permute(0, 3, 1, 2, 4).reshape(-1, B * G, 1, n, K)
            for t in (inputs.k, inputs.v)
        )
        q, ga, gq = (torch.stack([t[l][:, :, span] for l, span in wave]) for t in (self.q, self.ga, self.gq))
        lse, delta = (torch.stack([t[l][:, :, span] for l, span in wave]) for t in (self.lse, self.delta))
        p_own = ((q * k_tmp).sum(-1) - lse).exp()[..., None]
        ds_own = p_own * ((ga * v_tmp).sum(-1) - delta)[..., None]
        gq = (gq + ds_own * k_tmp) * K**-0.5

        def by_head(t: Tensor) -> Tensor:
            """(layers, E, ..., n, K) as (layers, heads, n B, K)."""
            return t.reshape(len(layers), B, -1, n, K).permute(0, 2, 3, 1, 4).flatten(2, 3)

        gx, gradients = inputs.backward(by_head(gq), by_head((ds_own * q).sum(2)), by_head((p_own * ga).sum(2)))
        for name, gradient in gradients.items():
            if name in self.wanted:
                self.add(name, layers, gradient.view(len(layers), *getattr(self.layers[0], name).shape))
        for span, gx_of_layer in zip(wave.spans(), gx.unflatten(1, (n, B)), strict=True):
            self.g[span] += gx_of_layer

    def attend(self, l: int, block: slice) -> Tensor:
        """Attention outputs (n, B, H K) of a block's queries, all pairs being known; notes their log-sum-exps."""
        attention, layer, n = self.attentions[l], self.layers[l], block.stop - block.start
        rotation = None if self.layout.rotation is None else self.layout.rotation[block]
        pairs = layer.pairs(layer.attention_input(self.inputs[l][:, block]), rotation)
        k_tmp, v_tmp = (t.to(self.acc).flatten(0, 1)[:, None] for t in pairs)
        state = attention.new_state(n)
        attention.absorb(state, block, slice(-self.layout.past, block.stop), origin=block.start)
        own = (attention.q[:, :, block] * k_tmp).sum(-1)
        lse = torch.logaddexp(state.m + state.l.log(), own)
        self.lse[l][:, :, block] = lse
        a = state.acc * (state.m - lse).exp()[..., None] + v_tmp * (own - lse).exp()[..., None]  # (E, R, n, K)
        return a.permute(2, 0, 1, 3).reshape(n, attention.B, -1)

    def push(self, l: int, queries: slice, keys: slice) -> None:
        """Add to the gradients of a layer's pairs what queries, whose ga is known, send them, and to the queries' own.

        The past is constant.
        """
        attention, rows = self.attentions[l], self.attentions[l].rows
        B, G, R, K = attention.B, attention.G, attention.R, attention.K
        for q, kv in attention.blocks(queries, keys):
            k, v = attention.pairs_at(kv)
            p = attention.scores(q, kv, k).sub_(rows(self.lse[l], q)[..., None]).exp_()
            ds = torch.bmm(rows(self.ga[l], q), v.transpose(1, 2)).sub_(rows(self.delta[l], q)[..., None]).mul_(p)
            # Not baddbmm_: on a strided destination it runs one small product after the other.
            self.gq[l][:, :, q] += torch.bmm(ds, k).view(B * G, R, -1, K)
            if kv.start >= 0:
                self.gkv[l, :, 0, :, kv] += torch.bmm(ds.transpose(1, 2), rows(attention.q, q)).view(B, G, -1, K)
                self.gkv[l, :, 1, :, kv] += torch.bmm(p.transpose(1, 2), rows(self.ga[l], q)).view(B, G, -1, K)


class Inputs:
    """Queries and temporary pairs of a block of layers side by side, with autograd: nothing in them is sequential."""

    NAMES = ("attention_norm", "q", "kv", "q_norm", "k_norm", "q_bias", "kv_bias")
    PARTS: ClassVar = {"kv": ("k", "v"), "kv_bias": ("k_bias", "v_bias")}

    def __init__(self, stack: LayerMaths, x: Tensor, turn: Rotation | None, wanted: set[str]) -> None:
        """Evaluate them.

        Args:
            stack: the maths of the layers.
            x: (layers, n B, D).
            turn: rotation of heads (layers, heads, n B, K).
            wanted: names of the tensors of single layers whose gradients matter.
        """
        self.x = x.detach().requires_grad_()
        self.leaves = {
            name: getattr(stack, name).detach().requires_grad_(not wanted.isdisjoint(self.PARTS.get(name, (name,))))
            for name in self.NAMES
            if getattr(stack, name) is not None
        }
        with torch.enable_grad():
            maths = replace(stack, **self.leaves)
            h = maths.attention_input(self.x)
            self.q = maths.queries(h, turn)  # (layers, H, n B, K)
            self.k, self.v = maths.pairs(h, turn)  # (layers, G, n B, K)

    def backward(self, gq: Tensor, gk: Tensor, gv: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of x and, by name, of the weights."""
        leaves = {name: leaf for name, leaf in self.leaves.items() if leaf.requires_grad}
        outputs = (self.q, self.k, self.v)
        incoming = [g.to(t.dtype) for g, t in zip((gq, gk, gv), outputs, strict=True)]
        gx, *gradients = torch.autograd.grad(outputs, (self.x, *leaves.values()), incoming)
        found: dict[str, Tensor] = {}
        for name, gradient in zip(leaves, gradients, strict=True):
            names = self.PARTS.get(name, (name,))
            parts = gradient.chunk(len(names), dim=2 if name == "kv_bias" else 1)
            found |= dict(zip(names, parts, strict=True))
        return gx, found


def activation_slopes(up: Tensor, gate: Tensor | None, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    """The activated inner values and their element-wise derivatives by `up` and `gate`, from the one definition."""
    from recurformer.layer import activate

    leaves = [t.detach().requires_grad_() for t in (up, gate) if t is not None]
    with torch.enable_grad():
        inner = activate(leaves[0], leaves[1] if gate is not None else None, config)
    slopes = torch.autograd.grad(inner, leaves, torch.ones_like(inner))
    return inner.detach(), slopes[0], slopes[1] if gate is not None else None
