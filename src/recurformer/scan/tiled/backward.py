"""The backward pass of the tiled scan: the blocks of the forward in reverse order.

gX is the gradient of the loss by X. The gradient of a persistent pair is complete once all later positions are done,
so the positions run from the last to the first. Only gradients of data are sequential. A block of positions therefore
has three parts:

  1. recompute the values of the forward for all positions at once, or read those that it has kept;
  2. loop over the positions: from the pair's gradient to gz_i, gy_i and ga_i, which go on into earlier pairs by the
     mirrored tiles;
  3. the gradients of the weights of MLP, attention output and persistent pairs, for all positions at once.

The gradients of queries, temporary pairs and inputs follow after the wave. (A single layer is one wave.) Only then has
a query met all its pairs. No (N, N) tensor exists: the log-sum-exp of a query gives its probabilities again.

Work tensors are (layers, n, B, ...): n positions of several layers. Other shapes are those of `blocks.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from recurformer.layer import LayerMaths
from recurformer.scan.schedule import Block, LeafStep, Wave
from recurformer.scan.tiled.blocks import LeafGradients, cut
from recurformer.scan.tiled.call import (
    Activations,
    QueriesAndPairs,
    TiledCall,
    layer_inputs,
    one_thread_for_small_products,
    position_rotations,
    position_views,
    wave_inputs,
    wave_rotation,
    wave_view,
)
from recurformer.scan.tiled.derivatives import InputProjections, NormTape, activation_slopes
from recurformer.scan.tiled.gradients import AttentionGradients, WeightGradients
from recurformer.scan.tiled.stack import StackedLayers

if TYPE_CHECKING:
    from recurformer.attention import Rotation

POSITION_BLOCK = 64  # positions whose parallel parts are done together; half as many where values are recomputed


class ForwardRecord(NamedTuple):
    """The tensors that the forward leaves for the backward."""

    x: Tensor  # (B, N, D), inputs of the first layer
    z: Tensor  # (L, N, B, D), outputs of each layer
    pairs: QueriesAndPairs | None  # None: to be recomputed
    activations: Activations | None


class TiledBackward:
    """The backward pass of one call.

    Args:
        call: what the forward was called with.
        layers: weights and equations.
        record: of the forward.
        wanted: names of the tensors of a layer that need a gradient.
        gz: (B, N, D), the gradient of the last layer's outputs.

    Attributes:
        g_stream: (N, B, D), the gradient of the residual stream. At each position, a layer finds the gradient of its
            outputs here and leaves that of its inputs, which the layer below finds in turn.
    """

    def __init__(
        self, call: TiledCall, layers: list[LayerMaths], record: ForwardRecord, wanted: set[str], gz: Tensor
    ) -> None:
        self.g_stream = gz.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        self.call, self.layers, self.record = call, layers, record
        self.stack = StackedLayers.of(layers, for_forward=False)
        self.inputs = layer_inputs(record.x, record.z)
        self.weights = WeightGradients(layers, wanted)
        pairs = self.recompute_pairs() if record.pairs is None else record.pairs
        lse = None if record.activations is None else record.activations.lse
        self.attention = AttentionGradients(call, pairs, lse)

    def run(self) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Return the gradient of x (B, N, D) and, by name, those of the wanted tensors of each layer."""
        length = POSITION_BLOCK if self.record.activations is not None else POSITION_BLOCK // 2
        length = max(self.call.schedule.leaf, length)  # whole leaves
        for wave in reversed(self.call.waves):
            for block in reversed(list(cut(slice(0, wave.length), length))):
                self.through_outputs(wave.part(block))
            for block in cut(slice(0, wave.length), length):
                self.through_inputs(wave.part(block))
        return self.g_stream.transpose(0, 1), self.weights.of_each_layer()

    def through_outputs(self, wave: Wave) -> None:
        """Go from the outputs z of a block of positions to its residual stream y, and on into all earlier pairs."""
        known = self.recompute(wave)
        gz = torch.stack([self.g_stream[span] for span in wave.spans()])
        loop = BlockLoop(self.stack[wave.layers.start : wave.layers.stop], known, gz)
        for steps in reversed(self.call.leaves_of(wave)):
            self.leaf(wave, steps, loop)
        loop.add_weight_gradients(self.weights, wave.layers)
        for span, gy in zip(wave.spans(), loop.gy, strict=True):
            self.g_stream[span] = gy

    def leaf(self, wave: Wave, steps: list[LeafStep], loop: BlockLoop) -> None:
        """Take one leaf of each layer from its last position to its first."""
        attention, spans = self.attention, [step.positions for step in steps]
        for l, step in zip(wave.layers, steps, strict=True):
            if step.push is not None:
                attention.send(l, step.push)
        leaf = attention.begin_leaf(wave.layers, spans)
        rotation = self.call.layout.rotation
        rotations = position_rotations(None if rotation is None else rotation.inverse(), spans)
        first = spans[0].start - wave.starts[0]
        with one_thread_for_small_products(self.record.x, self.call.config, len(spans)), torch.inference_mode():
            for row in reversed(range(len(rotations))):
                loop.position(first + row, leaf, row, rotations[row])
        for place, (l, step) in enumerate(zip(wave.layers, steps, strict=True)):
            attention.end_leaf(l, step.positions, leaf, place, loop.a[place, first : first + len(rotations)])
            if step.pull is not None:
                attention.send(l, step.pull)

    def through_inputs(self, wave: Wave) -> None:
        """Go from the queries and temporary pairs of a block of positions to its inputs x.

        All pairs that the queries met must be done.
        """
        n, layers, attention = wave.length, wave.layers, self.attention
        B, G, K = attention.layers[0].B, attention.layers[0].G, attention.layers[0].K
        x, rotation = wave_inputs(self.inputs, wave).flatten(1, 2), wave_rotation(self.call.layout.rotation, wave, B)
        projections = InputProjections(self.stack[layers.start : layers.stop], x, rotation, self.weights.wanted)
        k_tmp, v_tmp = (  # (layers, E, 1, n, K)
            t.detach().to(attention.q.dtype).view(-1, G, n, B, K).permute(0, 3, 1, 2, 4).reshape(-1, B * G, 1, n, K)
            for t in (projections.k_tmp, projections.v_tmp)
        )
        q, ga, gq, lse, delta = (
            torch.stack([t[l][:, :, span] for l, span in wave])
            for t in (attention.q, attention.ga, attention.gq, attention.lse, attention.delta)
        )
        # Probability of a query's own temporary pair, and the gradient of its score.
        p = ((q * k_tmp).sum(-1) - lse).exp()[..., None]
        ds = p * ((ga * v_tmp).sum(-1) - delta)[..., None]
        gq = (gq + ds * k_tmp) * K**-0.5

        def by_head(t: Tensor) -> Tensor:
            """(layers, E, ..., n, K) as (layers, heads, n B, K)."""
            return t.reshape(len(layers), B, -1, n, K).permute(0, 2, 3, 1, 4).flatten(2, 3)

        gx, gradients = projections.backward(by_head(gq), by_head((ds * q).sum(2)), by_head((p * ga).sum(2)))
        for name, gradient in gradients.items():
            self.weights.add(name, layers, gradient)
        for span, gx_of_layer in zip(wave.spans(), gx.unflatten(1, (n, B)), strict=True):
            self.g_stream[span] += gx_of_layer

    # Recomputation of the forward, in parallel over positions.

    def recompute_pairs(self) -> QueriesAndPairs:
        """Return all queries and persistent pairs, made from the inputs and outputs of each layer."""
        x, z, rotation = self.record.x, self.record.z, self.call.layout.rotation
        pairs = QueriesAndPairs.empty(self.call, x)
        for layer, attention, x_l, z_l in zip(
            self.layers, pairs.attentions(self.call), self.inputs, z.transpose(1, 2), strict=True
        ):
            k, v = layer.pairs(layer.attention_input(z_l), rotation)
            attention.fill(slice(0, x.shape[1]), layer.queries(layer.attention_input(x_l), rotation), k, v)
        return pairs

    def recompute_attention(self, l: int, positions: slice) -> Tensor:
        """Return the attention outputs of one layer's positions, (n, B, H K), and note their log-sum-exps.

        All pairs must be known.
        """
        attention, layer, n = self.attention.layers[l], self.layers[l], positions.stop - positions.start
        rotation = None if self.call.layout.rotation is None else self.call.layout.rotation[positions]
        pairs = layer.pairs(layer.attention_input(self.inputs[l][:, positions]), rotation)
        k_tmp, v_tmp = (t.to(attention.q.dtype).flatten(0, 1)[:, None] for t in pairs)
        state = attention.new_state(n)
        attention.merge(state, Block(slice(-self.call.layout.past, positions.stop), positions), positions.start)
        score = (attention.q[:, :, positions] * k_tmp).sum(-1)  # of the query's own temporary pair
        lse = torch.logaddexp(state.m + state.l.log(), score)
        self.attention.lse[l][:, :, positions] = lse
        a = state.acc * (state.m - lse).exp()[..., None] + v_tmp * (score - lse).exp()[..., None]  # (E, R, n, K)
        return a.permute(2, 0, 1, 3).reshape(n, attention.B, -1)

    def recompute(self, wave: Wave) -> BlockActivations:
        """Return the values of the forward at a block of positions, kept or made again, with the slopes there."""
        kept, n, B = self.record.activations, wave.length, self.record.x.shape[0]
        stack = self.stack[wave.layers.start : wave.layers.stop]
        config = stack.config

        def by_position(t: Tensor) -> Tensor:
            """(layers, n B, ...) as (layers, n, B, ...)."""
            return t.unflatten(1, (n, B))

        a = torch.stack([self.recompute_attention(l, s) for l, s in wave]) if kept is None else wave_view(kept.a, wave)
        y = stack.after_attention(wave_inputs(self.inputs, wave).flatten(1, 2), a.flatten(1, 2).to(stack.compute_dtype))
        if kept is None:
            up, gate = stack.mlp_inner(y)
        else:
            up = wave_view(kept.up, wave).flatten(1, 2)
            gate = None if kept.gate is None else wave_view(kept.gate, wave).flatten(1, 2)
        inner, slope_up, slope_gate = activation_slopes(up, gate, config)
        z_norm = NormTape(wave_view(self.record.z, wave), stack.attention_norm, config)
        h_z = z_norm.output.to(stack.compute_dtype)
        key_norm = None
        if stack.k_norm is not None:
            keys = by_position(stack.keys_before_norm(h_z.flatten(1, 2)))
            keys = keys.unflatten(-1, (config.kv_heads, -1)) if config.qk_norm == "head" else keys
            key_norm = NormTape(keys, stack.k_norm, config)
        return BlockActivations(
            a, NormTape(by_position(y), stack.mlp_norm, config), by_position(inner), by_position(slope_up),
            None if slope_gate is None else by_position(slope_gate), z_norm, h_z, key_norm,
        )  # fmt: skip


# --- one block of positions ------------------------------------------------------------------------------------------


class BlockActivations(NamedTuple):
    """Values and slopes of the forward at a block of positions of several layers, all of (layers, n, B, ...)."""

    a: Tensor  # (layers, n, B, H K), attention outputs in the accumulation dtype
    mlp_norm: NormTape  # of y
    inner: Tensor  # (layers, n, B, F), activated
    slope_up: Tensor  # d inner / d up, elementwise
    slope_gate: Tensor | None  # d inner / d gate, elementwise
    z_norm: NormTape  # of z
    h_z: Tensor  # (layers, n, B, D), RMS(z) in the compute dtype
    key_norm: NormTape | None  # of the persistent keys


class BlockLoop:
    """The loop over a block of positions, from the last to the first: gradients of data alone.

    Args:
        stack: the layers of the block.
        known: values and slopes of the forward at its positions.
        gz: (layers, n, B, D), the gradient of the outputs from the layers above.
    """

    def __init__(self, stack: StackedLayers, known: BlockActivations, gz: Tensor) -> None:
        self.stack, self.known, self.a = stack, known, known.a
        config, (width, n, B, _) = stack.config, gz.shape
        self.scale, self.pair_shape = config.branch_scale, (width, B, 2, config.kv_heads, config.head_width)
        self.gz, self.gy = torch.empty_like(gz), torch.empty_like(gz)
        # Gradients of the outputs of both norms, and of the inner values of the MLP before the activation.
        self.g_mlp_norm, self.g_z_norm = (torch.empty_like(gz, dtype=stack.compute_dtype) for _ in range(2))
        self.g_up = torch.empty_like(known.inner)
        self.g_gate = None if known.slope_gate is None else torch.empty_like(known.inner)
        # Gradients of the persistent pairs before rotation, and of the keys also before their norm.
        self.g_pair = gz.new_empty(width, n, B, 2, config.kv_heads, config.head_width)
        self.g_key = None if known.key_norm is None else torch.empty_like(known.key_norm.output)
        self.above_rows, self.gz_rows, self.gy_rows, self.a_rows = position_views(gz, self.gz, self.gy, self.a)
        self.g_mlp_norm_rows, self.g_z_norm_rows = position_views(self.g_mlp_norm, self.g_z_norm)
        self.g_up_rows, self.slope_up_rows, self.g_pair_rows = position_views(self.g_up, known.slope_up, self.g_pair)
        self.g_gate_rows, self.slope_gate_rows, self.g_key_rows = (
            () if t is None else t.unbind(1) for t in (self.g_gate, known.slope_gate, self.g_key)
        )

    def position(self, r: int, leaf: LeafGradients, row: int, rotation: Rotation | None) -> None:
        """Go from the gradients of a position's persistent pair to those of its attention outputs.

        Args:
            r: the position in this block.
            leaf: it has the gradients of the pair, and takes those of the attention outputs.
            row: the position in the leaf.
            rotation: the inverse of the rotation of the keys there.
        """
        gz = self.through_pair(r, leaf.pair_gradient(row).view(self.pair_shape), rotation)
        gy = self.through_mlp(r, gz)
        ga = torch.bmm((self.scale * gy).to(self.stack.compute_dtype), self.stack.o)
        leaf.add_query(row, ga.to(self.a.dtype), self.a_rows[r])

    def through_pair(self, r: int, g_pair: Tensor, rotation: Rotation | None) -> Tensor:
        """Return gz_i, (layers, B, D), given the gradients of the persistent pair, (layers, B, 2, G, K)."""
        known, gk = self.known, g_pair[:, :, 0]
        if rotation is not None:
            gk.copy_(rotation(gk.transpose(1, 2)).transpose(1, 2))
        if known.key_norm is not None:
            g_key = self.g_key_rows[r]
            g_key.copy_(gk.reshape(g_key.shape))
            gk.copy_(known.key_norm.backward(g_key, r).view(gk.shape))
        self.g_pair_rows[r].copy_(g_pair)
        g_norm = torch.bmm(g_pair.view(*g_pair.shape[:2], -1).to(self.stack.compute_dtype), self.stack.kv)
        self.g_z_norm_rows[r].copy_(g_norm)
        return known.z_norm.backward(g_norm, r, self.above_rows[r], out=self.gz_rows[r])

    def through_mlp(self, r: int, gz: Tensor) -> Tensor:
        """Return gy_i, given gz_i, both (layers, B, D)."""
        stack = self.stack
        g_inner, g_up = torch.bmm((self.scale * gz).to(stack.compute_dtype), stack.down), self.g_up_rows[r]
        torch.mul(g_inner, self.slope_up_rows[r], out=g_up)
        g_norm = torch.bmm(g_up, stack.up)
        if stack.gate is not None:
            g_gate = torch.mul(g_inner, self.slope_gate_rows[r], out=self.g_gate_rows[r])
            g_norm = torch.baddbmm(g_norm, g_gate, stack.gate)
        self.g_mlp_norm_rows[r].copy_(g_norm)
        return self.known.mlp_norm.backward(g_norm, r, gz, out=self.gy_rows[r])

    def add_weight_gradients(self, weights: WeightGradients, layers: range) -> None:
        """Add the gradients of the weights behind the queries and temporary pairs, for all positions at once."""
        known, scale = self.known, self.scale
        weights.add_product("down", layers, scale * self.gz, known.inner)
        weights.add_product("up", layers, self.g_up, known.mlp_norm.output)
        if self.g_gate is not None:
            weights.add_product("gate", layers, self.g_gate, known.mlp_norm.output)
        weights.add("mlp_norm", layers, known.mlp_norm.weight_gradient(self.g_mlp_norm))
        weights.add_product("o", layers, scale * self.gy, known.a.to(self.stack.compute_dtype))
        weights.add_product("k", layers, self.g_pair[:, :, :, 0].flatten(3), known.h_z)
        weights.add_product("v", layers, self.g_pair[:, :, :, 1].flatten(3), known.h_z)
        if known.key_norm is not None and self.g_key is not None:
            weights.add("k_norm", layers, known.key_norm.weight_gradient(self.g_key))
        weights.add("attention_norm", layers, known.z_norm.weight_gradient(self.g_z_norm))
