"""Exact tiling in plain PyTorch operations, on any device: the paper's algorithm, forward and backward (section 5).

Forward. All queries and temporary pairs are known at once; persistent pairs appear one by one. Every query keeps a
running softmax state (m, l, acc) that blocks of pairs are pushed into as `schedule.py` says, so that it is complete
but for its own leaf when its position comes. The slot of position i holds its temporary pair until z_i is known and its
persistent pair afterwards, so that one read of the leaf up to slot i meets exactly the pairs that i attends to.

Backward. Positions run from last to first, and only data gradients go through the loop: at position i the gradient of
its persistent pair is complete, for every later query has pushed into it; it goes through the pair into z_i, through
both branches into a_i, and query i's own gradients are pushed on in the mirrored blocks. What the loop needs of the
forward is recomputed (or was kept) for a block of positions at a time, in parallel; what it leaves behind, gradients of
all weights, queries, temporary pairs and inputs, is computed for the block in parallel after it. No (N, N) tensor
exists; the log-sum-exp of each query is all that is needed to make probabilities again.

Shapes here: E = B G rows of the attention products, R = H / G query heads that share a key-value head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recurformer.scan.blocks import Attention, Leaf, LeafGradients, cut
from recurformer.scan.schedule import LeafStep, Schedule, choose_schedule

if TYPE_CHECKING:
    from recurformer.config import ModelConfig
    from recurformer.model import LayerMaths, Layout, Rotation

LEAF = 32  # positions that read each other directly: launches are what a small tile costs
POSITION_BLOCK = 64  # positions whose parallel part of the backward is done together; half, where memory counts
ONE_THREAD = 2**22  # multiply-adds of a position's largest product up to which the loop runs on one CPU thread
KEEP_BYTES = 2**29  # save="auto" keeps what the backward needs up to this many bytes a layer

pick_schedule = lru_cache(maxsize=256)(choose_schedule)


def tiled_scan(
    x: Tensor,
    layer: LayerMaths,
    layout: Layout,
    past: tuple[Tensor, Tensor] | None = None,
    *,
    chunk: int | str | None = "auto",
    leaf: int = LEAF,
    save: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs and persistent pairs of one recurrent layer; arguments and results as `reference_scan`.

    Args:
        x, layer, layout, past: see `reference_scan`.
        chunk: C of the two-level schedule, a power of two; None: pure tiling; "auto": least modelled HBM traffic.
        leaf: S, a power of two, positions that read each other directly, with memory for S^2 scores a head; 1 is the
            paper's algorithm to the letter.
        save: what the forward keeps for the backward: "minimal" (inputs and outputs; the rest is recomputed in
            parallel), "all" (queries, pairs, attention outputs and the MLP's inner values), or "auto", by size.

    Raises:
        ValueError: for a chunk or leaf that is no power of two, or an unknown `save`.
    """
    if torch.compiler.is_compiling():  # loops of thousands of operations: as one graph they take minutes to compile
        eager: Any = torch.compiler.disable(tiled_scan)
        return eager(x, layer, layout, past, chunk=chunk, leaf=leaf, save=save)
    config = layer.config
    if save not in ("auto", "minimal", "all"):
        raise ValueError(f"save is {save!r}; choose 'auto', 'minimal' or 'all'")
    if isinstance(chunk, str):
        if chunk != "auto":
            raise ValueError(f"chunk is {chunk!r}; give a power of two, None (pure tiling) or 'auto'")
        schedule = pick_schedule(layout.length, layout.past, leaf, config.head_width, config.n_heads, config.kv_heads)
    else:
        schedule = Schedule(layout.length, layout.past, chunk, leaf)
    tensors = {f.name: getattr(layer, f.name) for f in fields(layer) if f.name != "config"}
    keep = save == "all"
    if save == "auto":
        inner = config.mlp_width * (1 if layer.gate is None else 2)
        per_position = 2 * (config.n_heads + config.kv_heads) * config.head_width + inner  # q and a, k and v, MLP
        keep = x.shape[0] * x.shape[1] * per_position * 4 <= KEEP_BYTES
    keep = keep and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors.values()))
    call = Call(config, layout, past, schedule, keep, tuple(tensors))
    return TiledScan.apply(x, call, *tensors.values())  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Call:
    """What is no differentiable tensor in one evaluation of a layer."""

    config: ModelConfig
    layout: Layout
    past: tuple[Tensor, Tensor] | None
    schedule: Schedule
    keep: bool
    names: tuple[str, ...]  # of the tensors of LayerMaths

    def layer(self, tensors: Any) -> LayerMaths:
        from recurformer.model import LayerMaths

        return LayerMaths(self.config, **dict(zip(self.names, tensors, strict=True)))


class TiledScan(torch.autograd.Function):
    """One layer as a pure function of its input and weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        layer, layout, schedule = call.layer(tensors), call.layout, call.schedule
        config, rotation = call.config, call.layout.rotation
        B, N, _ = x.shape
        h = layer.attention_input(x)
        attention = Attention.of(layout, layer.queries(h, rotation), *layer.pairs(h, rotation), call.past)
        del h
        state, leaf = attention.new_state(N), Leaf(attention, schedule.leaf)
        # Position-major from here: what belongs to a position is one piece of memory.
        x_rows = x.transpose(0, 1).contiguous().unbind(0)
        z = x.new_empty(N, B, x.shape[2])
        z_rows = z.unbind(0)
        kept = Kept.empty(call, layer, attention) if call.keep else None

        small = layer.packed()
        for positions, pull, push in schedule.leaves():
            if pull is not None:
                attention.absorb(state, pull.queries, pull.keys)
            leaf.begin(state, positions)
            with few_threads(x, config), torch.inference_mode():
                for row, i in enumerate(range(positions.start, positions.stop)):
                    a = leaf.read(row)
                    y = small.attended(x_rows[i], a.view(B, -1).to(small.compute_dtype))
                    up, gate = small.mlp_inner(y)
                    z_i = small.finished(y, up, gate)
                    h_z = small.attention_input(z_i)[:, None]
                    leaf.set_pair(row, *small.pairs(h_z, None if rotation is None else rotation[i : i + 1]))
                    z_rows[i].copy_(z_i)
                    if kept is not None:
                        kept.store(i, a, up, gate)
            leaf.end()
            if kept is not None:
                kept.lse[:, :, positions] = leaf.log_sum_exp()
            if push is not None:
                attention.absorb(state, push.queries, push.keys)

        z = z.transpose(0, 1)
        keys, values = (t.view(B, config.kv_heads, N, -1).to(layer.compute_dtype) for t in (attention.k, attention.v))
        ctx.save_for_backward(x, z, *tensors, *(kept or ()))
        ctx.call = call
        ctx.mark_non_differentiable(keys, values)  # the cache holds constants
        ctx.set_materialize_grads(False)
        return z, keys, values

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "the tiled scan has no second derivative (create_graph=True); set model.scan = 'reference', which has"
            )
        call: Call = ctx.call
        gz_out = incoming[0]
        if gz_out is None:
            return (None,) * (2 + len(call.names))
        x, z, *rest = ctx.saved_tensors
        tensors, kept = rest[: len(call.names)], Kept(*rest[len(call.names) :]) if call.keep else None
        wanted = {name for name, need in zip(call.names, ctx.needs_input_grad[2:], strict=True) if need}
        with torch.autocast(x.device.type, enabled=False):
            gx, gradients = Backward(call, call.layer(tensors), x, z, kept, wanted).run(gz_out)
        return (gx, None, *(gradients.get(name) for name in call.names))


def rows(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The views of each tensor at every index of its first dimension."""
    return [tensor.unbind(0) for tensor in tensors]


@contextmanager
def few_threads(x: Tensor, config: ModelConfig) -> Iterator[None]:
    """One thread while small products follow each other on a CPU.

    A second thread gains little on a product of B rows and has to be waited for after each: where a neighbour holds its
    core, thousands of such waits make the loop many times slower.
    """
    threads = torch.get_num_threads()
    if x.device.type != "cpu" or threads == 1 or x.shape[0] * x.shape[2] * config.mlp_width > ONE_THREAD:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Kept(NamedTuple):
    """What save="all" keeps for the backward."""

    q: Tensor  # (E, R, N, K), scaled
    k: Tensor  # (E, N, K), persistent
    v: Tensor
    a: Tensor  # (N, E, R, K)
    lse: Tensor  # (E, R, N)
    up: Tensor  # (N, B, F)
    gate: Tensor | None  # (N, B, F), swiglu

    @classmethod
    def empty(cls, call: Call, layer: LayerMaths, attention: Attention) -> Kept:
        q, shape = attention.q, (attention.N, attention.B, call.config.mlp_width)
        up = q.new_empty(shape, dtype=layer.compute_dtype)
        gate = None if layer.gate is None else torch.empty_like(up)
        a = q.new_empty(attention.N, *q.shape[:2], attention.K)
        return cls(q, attention.k, attention.v, a, q.new_empty(q.shape[:3]), up, gate)

    def store(self, position: int, a: Tensor, up: Tensor, gate: Tensor | None) -> None:
        self.a[position].copy_(a)
        self.up[position].copy_(up)
        if self.gate is not None and gate is not None:
            self.gate[position].copy_(gate)


# --- backward --------------------------------------------------------------------------------------------------------


class NormTape:
    """A norm's input, normalised, for its backward: `output = xhat * weight`, statistics in the accumulation dtype.

    With xhat = (x - mean x) rstd, the gradient of x is
    `rstd weight g - mean(rstd weight g) - xhat rstd mean(g output)`. RMS has no mean and no second term.
    """

    def __init__(self, x: Tensor, weight: Tensor, config: ModelConfig) -> None:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        self.centred, weight = config.norm == "layer", weight.to(x.dtype)
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        rstd = (x.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt()
        self.xhat = x * rstd
        self.output = self.xhat * weight
        self.output_rows, self.slope_rows, self.pull_rows = rows(
            self.output, rstd * weight, self.xhat * (rstd / -x.shape[-1])
        )

    def backward(self, g: Tensor, row: int, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Gradient of the input at `row` of the first dimension, given that of the output; plus the residual's."""
        along = (g * self.output_rows[row]).sum(-1, keepdim=True)
        slope = self.slope_rows[row]
        gx = g * slope if residual is None else torch.addcmul(residual, g, slope, out=out)
        if self.centred:
            gx -= (g * slope).mean(-1, keepdim=True)
        return gx.addcmul_(self.pull_rows[row], along)

    def weight_gradient(self, g: Tensor) -> Tensor:
        """Sum over everything but the normalised dimension."""
        return (g * self.xhat).flatten(0, -2).sum(0)


class Backward:
    """Gradients of one call. Work tensors of a block of n positions are position-major, (n, B, ...)."""

    def __init__(
        self, call: Call, layer: LayerMaths, x: Tensor, z: Tensor, kept: Kept | None, wanted: set[str]
    ) -> None:
        self.call, self.layer, self.x, self.z, self.kept, self.wanted = call, layer, x, z, kept, wanted
        self.config, self.layout, self.schedule = call.config, call.layout, call.schedule
        self.acc, self.dtype = x.dtype, layer.compute_dtype
        if kept is not None:
            self.attention = Attention(self.layout, x.shape[0], kept.q, kept.k, kept.v, call.past)
        else:
            rotation = self.layout.rotation
            pairs = layer.pairs(layer.attention_input(z), rotation)
            q = layer.queries(layer.attention_input(x), rotation)
            self.attention = Attention.of(self.layout, q, *pairs, call.past)
        q = self.attention.q
        self.lse = q.new_empty(q.shape[:3]) if kept is None else kept.lse
        self.ga, self.delta = torch.empty_like(q), q.new_empty(q.shape[:3])  # <ga_i, a_i>, per head
        B, G, N, K = self.attention.B, self.attention.G, self.attention.N, self.attention.K
        self.gkv = q.new_zeros(B, 2, G, N, K)  # of the persistent pairs, keys beside values
        self.gradients: dict[str, Tensor] = {}
        # Products that the loop repeats: the pair's two matrices as one.
        self.kv_weight = torch.cat([layer.k, layer.v])
        self.leaves = list(self.schedule.leaves())

    def run(self, gz_out: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of x and, by name, of the wanted tensors."""
        N, side = self.x.shape[1], self.schedule.leaf
        gx = self.x.new_empty(N, *self.x[:, 0].shape)
        length = POSITION_BLOCK if self.kept is not None else POSITION_BLOCK // 2
        for block in reversed(list(cut(slice(0, N), max(length, side)))):  # of whole leaves
            leaves = self.leaves[block.start // side : -(-block.stop // side)]
            gx[block] = self.block(block, leaves, gz_out[:, block].transpose(0, 1))
        return gx.transpose(0, 1), {name: g.to(getattr(self.layer, name).dtype) for name, g in self.gradients.items()}

    def add(self, name: str, gradient: Tensor | None) -> None:
        """Accumulate the gradient of a weight, in at least float32."""
        if gradient is None or name not in self.wanted:
            return
        if name in self.gradients:
            self.gradients[name] += gradient
        else:
            self.gradients[name] = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)

    def add_product(self, name: str, g: Tensor, h: Tensor) -> None:
        """Accumulate the gradients of a matrix and its bias from its outputs' g and its inputs h, (n, B, ...)."""
        g = g.flatten(0, -2)
        if name in self.wanted:
            self.add(name, g.to(self.dtype).T @ h.flatten(0, -2).to(self.dtype))
        if f"{name}_bias" in self.wanted:
            self.add(f"{name}_bias", g.to(self.acc).sum(0))

    def block(self, block: slice, leaves: list[LeafStep], gz_out: Tensor) -> Tensor:
        """Positions of one block, last to first; gradients of outputs and, returned, of inputs are (n, B, D)."""
        layer, config, attention, s = self.layer, self.config, self.attention, self.config.branch_scale
        B, G, R, K, n = attention.B, attention.G, attention.R, attention.K, block.stop - block.start
        rotation = None if self.layout.rotation is None else self.layout.rotation[block]

        # In parallel: what the forward had at these positions.
        inputs = Inputs(layer, self.x[:, block], rotation, self.wanted)
        k_tmp, v_tmp = (t.detach().to(self.acc).reshape(B * G, 1, n, -1) for t in (inputs.k, inputs.v))
        if self.kept is None:
            a, self.lse[:, :, block] = self.attend(block, k_tmp, v_tmp)
            a = a.permute(2, 0, 1, 3).contiguous()
        else:
            a = self.kept.a[block]
        a_rows = a.view(n, B, -1).to(self.dtype)
        y = layer.attended(self.x[:, block].transpose(0, 1), a_rows)
        if self.kept is None:
            up, gate = layer.mlp_inner(y)
        else:
            up, gate = self.kept.up[block], None if self.kept.gate is None else self.kept.gate[block]
        inner, slope_up, slope_gate = activation_slopes(up, gate, config)
        mlp_norm = NormTape(y, layer.mlp_norm, config)
        del y, up, gate
        z_norm = NormTape(self.z[:, block].transpose(0, 1), layer.attention_norm, config)
        h_z = z_norm.output.to(self.dtype)
        key_norm = None
        if layer.k_norm is not None:
            k_raw = F.linear(h_z, layer.k, layer.k_bias)
            k_raw = k_raw.view(n, B, G, K) if config.qk_norm == "head" else k_raw
            key_norm = NormTape(k_raw, layer.k_norm, config)

        # One by one, from the last: data gradients alone. `rows` of a tensor are its views by position, made at once.
        gz, gy = (self.x.new_empty(n, B, self.x.shape[2]) for _ in range(2))
        g_mlp_norm, g_z_norm = (torch.empty_like(gz, dtype=self.dtype) for _ in range(2))
        g_up = torch.empty_like(inner)
        g_gate = None if slope_gate is None else torch.empty_like(inner)
        g_pair = gz.new_empty(n, B, 2, G, K)
        g_k = g_pair[:, :, 0]
        g_key = None if key_norm is None else torch.empty_like(key_norm.output)  # before the norm of keys
        gz_rows, gy_rows, g_up_rows, g_mlp_norm_rows, g_z_norm_rows = rows(gz, gy, g_up, g_mlp_norm, g_z_norm)
        gz_out_rows, a_by_row, slope_rows = rows(gz_out.contiguous(), a, slope_up)
        g_pair_rows, g_k_rows = rows(g_pair, g_k)
        for positions, pull, push in reversed(leaves):
            if push is not None:
                self.push(push.queries, push.keys)
            leaf = LeafGradients(attention, positions, self.lse, self.gkv)
            with few_threads(self.x, config), torch.inference_mode():
                for row in reversed(range(positions.stop - positions.start)):
                    r = positions.start + row - block.start
                    # z_i, through the persistent pair
                    leaf.pair(row, g_pair_rows[r].view(-1, 1, K))
                    if rotation is not None:
                        g_k_rows[r].copy_(rotation[r : r + 1].inverse()(g_k_rows[r].unsqueeze(2)).squeeze(2))
                    if key_norm is not None and g_key is not None:
                        g_key[r] = g_k_rows[r].reshape(g_key.shape[1:])
                        g_k_rows[r].copy_(key_norm.backward(g_key[r], r).view(B, G, K))
                    g_z_norm_i = g_z_norm_rows[r]
                    torch.mm(g_pair_rows[r].view(B, -1).to(self.dtype), self.kv_weight, out=g_z_norm_i)
                    gz_i = z_norm.backward(g_z_norm_i, r, gz_out_rows[r], out=gz_rows[r])
                    # y_i, through the MLP
                    g_inner, g_up_i = torch.mm((s * gz_i).to(self.dtype), layer.down), g_up_rows[r]
                    torch.mul(g_inner, slope_rows[r], out=g_up_i)
                    g_mlp_norm_i = torch.mm(g_up_i, layer.up, out=g_mlp_norm_rows[r])
                    if g_gate is not None and slope_gate is not None and layer.gate is not None:
                        torch.mul(g_inner, slope_gate[r], out=g_gate[r])
                        g_mlp_norm_i.addmm_(g_gate[r], layer.gate)
                    gy_i = mlp_norm.backward(g_mlp_norm_i, r, gz_i, out=gy_rows[r])
                    # a_i, through the attention output
                    ga = torch.mm((s * gy_i).to(self.dtype), layer.o)
                    leaf.meet(row, ga.view(B * G, R, K).to(self.acc), a_by_row[r])
            self.ga[:, :, positions] = leaf.ga.reshape(B * G, R, -1, K)
            here = a[positions.start - block.start : positions.stop - block.start].permute(1, 2, 0, 3)
            self.delta[:, :, positions] = (self.ga[:, :, positions] * here).sum(-1)
            if pull is not None:
                self.push(pull.queries, slice(0, pull.keys.stop))  # the past is constant

        # In parallel again: every weight, the queries, the temporary pairs, the inputs.
        self.add_product("down", s * gz, inner)
        self.add_product("up", g_up, mlp_norm.output)
        if g_gate is not None:
            self.add_product("gate", g_gate, mlp_norm.output)
        self.add("mlp_norm", mlp_norm.weight_gradient(g_mlp_norm))
        self.add_product("o", s * gy, a_rows)
        self.add_product("k", g_k.flatten(2), h_z)
        self.add_product("v", g_pair[:, :, 1].flatten(2), h_z)
        if key_norm is not None and g_key is not None:
            self.add("k_norm", key_norm.weight_gradient(g_key))
        self.add("attention_norm", z_norm.weight_gradient(g_z_norm))
        gx, gradients = inputs.backward(*self.query_gradients(block, k_tmp, v_tmp))
        for name, gradient in gradients.items():
            self.add(name, gradient)
        return gy.add_(gx.transpose(0, 1))

    def attend(self, block: slice, k_tmp: Tensor, v_tmp: Tensor) -> tuple[Tensor, Tensor]:
        """Attention outputs (E, R, n, K) and log-sum-exps (E, R, n) of a block's queries, all pairs being known."""
        attention = self.attention
        state = attention.new_state(block.stop - block.start)
        attention.absorb(state, block, slice(-self.layout.past, block.stop), origin=block.start)
        own = (attention.q[:, :, block] * k_tmp).sum(-1)
        lse = torch.logaddexp(state.m + state.l.log(), own)
        return state.acc * (state.m - lse).exp()[..., None] + v_tmp * (own - lse).exp()[..., None], lse

    def push(self, queries: slice, keys: slice) -> None:
        """Add to the gradients of pairs what queries, whose ga is known, send them."""
        attention, rows = self.attention, self.attention.rows
        for q, kv in attention.blocks(queries, keys):
            k, v = attention.pairs_at(kv)
            p, ds = self.probabilities(q, kv, k, v)
            B, G, K = attention.B, attention.G, attention.K
            # Not baddbmm_: on a strided destination it runs one small product after the other.
            self.gkv[:, 0, :, kv] += torch.bmm(ds.transpose(1, 2), rows(attention.q, q)).view(B, G, -1, K)
            self.gkv[:, 1, :, kv] += torch.bmm(p.transpose(1, 2), rows(self.ga, q)).view(B, G, -1, K)

    def probabilities(self, q: slice, kv: slice, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """p_ij and the gradients ds_ij of the scores, (E, R q, k)."""
        rows = self.attention.rows
        p = self.attention.scores(q, kv, k).sub_(rows(self.lse, q)[..., None]).exp_()
        dp = torch.bmm(rows(self.ga, q), v.transpose(1, 2))
        return p, dp.sub_(rows(self.delta, q)[..., None]).mul_(p)

    def query_gradients(self, block: slice, k_tmp: Tensor, v_tmp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of a block's q (B, H, n, K) and temporary pairs (B, G, n, K)."""
        attention = self.attention
        B, G, R, K, n = attention.B, attention.G, attention.R, attention.K, block.stop - block.start
        q, ga = attention.q[:, :, block], self.ga[:, :, block]
        p_own = ((q * k_tmp).sum(-1) - self.lse[:, :, block]).exp()[..., None]
        ds_own = p_own * ((ga * v_tmp).sum(-1) - self.delta[:, :, block])[..., None]
        gq = ds_own * k_tmp
        for part, kv in attention.blocks(block, slice(-self.layout.past, block.stop)):
            k, v = attention.pairs_at(kv)
            here = slice(part.start - block.start, part.stop - block.start)
            _, ds = self.probabilities(part, kv, k, v)
            gq[:, :, here] += torch.bmm(ds, k).view(B * G, R, -1, K)
        pairs = (ds_own * q).sum(1), (p_own * ga).sum(1)
        return (gq * K**-0.5).view(B, G * R, n, K), pairs[0].view(B, G, n, K), pairs[1].view(B, G, n, K)


class Inputs:
    """Queries and temporary pairs of a block from its inputs, with autograd: nothing in them is sequential."""

    NAMES = ("attention_norm", "q", "k", "v", "q_norm", "k_norm", "q_bias", "k_bias", "v_bias")

    def __init__(self, layer: LayerMaths, x: Tensor, rotation: Rotation | None, wanted: set[str]) -> None:
        self.x = x.detach().requires_grad_()
        self.leaves = {
            name: getattr(layer, name).detach().requires_grad_(name in wanted)
            for name in self.NAMES
            if getattr(layer, name) is not None
        }
        with torch.enable_grad():
            maths = replace(layer, **self.leaves)
            h = maths.attention_input(self.x)
            self.q = maths.queries(h, rotation)
            self.k, self.v = maths.pairs(h, rotation)

    def backward(self, gq: Tensor, gk: Tensor, gv: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {name: leaf for name, leaf in self.leaves.items() if leaf.requires_grad}
        outputs = (self.q, self.k, self.v)
        incoming = [g.to(t.dtype) for g, t in zip((gq, gk, gv), outputs, strict=True)]
        gx, *gradients = torch.autograd.grad(outputs, (self.x, *leaves.values()), incoming)
        return gx, dict(zip(leaves, gradients, strict=True))


def activation_slopes(up: Tensor, gate: Tensor | None, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    """The activated inner values and their element-wise derivatives by `up` and `gate`, from the one definition."""
    from recurformer.model import activate

    leaves = [t.detach().requires_grad_() for t in (up, gate) if t is not None]
    with torch.enable_grad():
        inner = activate(leaves[0], leaves[1] if gate is not None else None, config)
    slopes = torch.autograd.grad(inner, leaves, torch.ones_like(inner))
    return inner.detach(), slopes[0], slopes[1] if gate is not None else None
