"""The forward pass of the tiled scan (paper section 5).

All queries and temporary pairs are known at once, persistent pairs appear one position after the other. Each query has
a running softmax state (m, l, acc). Blocks of pairs are merged into the states in the order of `schedule.py`, so that
a state lacks only the pairs of its own leaf when its position comes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recurformer.layer import LayerMaths
from recurformer.scan.schedule import Wave
from recurformer.scan.tiled.blocks import Leaf
from recurformer.scan.tiled.call import (
    Activations,
    QueriesAndPairs,
    TiledCall,
    layer_inputs,
    one_thread_for_small_products,
    position_rotations,
    wave_inputs,
    wave_rotation,
    wave_view,
)
from recurformer.scan.tiled.stack import StackedLayers


class WaveRows(NamedTuple):
    """The tensors that a wave reads and writes at each of its positions, (layers, B, ...) each."""

    x: tuple[Tensor, ...]  # inputs
    z: tuple[Tensor, ...]  # outputs
    saved: list[tuple[Tensor, ...]]  # a, up and gate, where they are kept


class TiledForward:
    """The forward pass of one call.

    Attributes:
        z: (L, N, B, D), the outputs of each layer; the numbers of a position are one piece of memory.
        pairs: queries and persistent pairs of each layer.
        activations: values that are kept for the backward, or None.
    """

    def __init__(self, call: TiledCall, layers: list[LayerMaths], x: Tensor) -> None:
        (B, N, D), L = x.shape, len(layers)
        self.call, self.x = call, x
        self.stack = StackedLayers.of(layers, for_forward=True)
        self.pairs = QueriesAndPairs.empty(call, x)
        self.attentions = self.pairs.attentions(call)
        self.activations = Activations.empty(call, layers[0], self.pairs.q) if call.keep else None
        self.z = x.new_empty(L, N, B, D)
        self.inputs = layer_inputs(x, self.z)

    def run(self) -> None:
        """Evaluate all layers at all positions."""
        for wave in self.call.waves:
            self.wave(wave)

    def wave(self, wave: Wave) -> None:
        """Evaluate the layers of a wave at their positions, leaf by leaf."""
        stack, x = self.stack[wave.layers.start : wave.layers.stop], wave_inputs(self.inputs, wave)
        self.make_queries_and_temporary_pairs(stack, x, wave)
        saved = [] if self.activations is None else self.activations.by_position()
        rows = WaveRows(x.unbind(1), wave_view(self.z, wave).unbind(1), [wave_view(t, wave).unbind(1) for t in saved])
        attentions = [self.attentions[l] for l in wave.layers]
        states = [attention.new_state(wave.length) for attention in attentions]
        leaf = Leaf(attentions[0], min(self.call.schedule.leaf, wave.length), len(states))
        for steps in self.call.leaves_of(wave):
            of_layers = list(zip(attentions, states, steps, wave.starts, strict=True))
            for place, (attention, state, step, start) in enumerate(of_layers):
                if step.pull is not None:
                    attention.merge(state, step.pull, start)
                leaf.load(place, attention, state, step.positions, start)
            spans = [step.positions for step in steps]
            self.positions(stack, leaf, rows, spans, spans[0].start - wave.starts[0])
            for place, (attention, state, step, start) in enumerate(of_layers):
                leaf.store_pairs(place, attention, step.positions)
                if step.push is not None:
                    attention.merge(state, step.push, start)
            if self.activations is not None:
                for l, span, lse in zip(wave.layers, spans, leaf.log_sum_exp(), strict=True):
                    self.activations.lse[l][:, :, span] = lse

    def make_queries_and_temporary_pairs(self, stack: StackedLayers, x: Tensor, wave: Wave) -> None:
        """Make the queries and temporary pairs of a wave from its inputs x (layers, n, B, D)."""
        B = x.shape[2]
        h, rotation = stack.attention_input(x.flatten(1, 2)), wave_rotation(self.call.layout.rotation, wave, B)
        made = (stack.queries(h, rotation), *stack.pairs(h, rotation))  # (layers, heads, n B, K)
        by_batch = (t.unflatten(2, (-1, B)).permute(0, 3, 1, 2, 4) for t in made)
        for (l, span), q, k_tmp, v_tmp in zip(wave, *by_batch, strict=True):
            self.attentions[l].fill(span, q, k_tmp, v_tmp)

    def positions(self, stack: StackedLayers, leaf: Leaf, rows: WaveRows, spans: list[slice], first: int) -> None:
        """Evaluate the positions of a leaf one after the other: the sequential part of the forward.

        Args:
            stack: the layers of the wave.
            leaf: loaded with one leaf of each layer.
            rows: of the whole wave.
            spans: the positions of each layer in this leaf.
            first: the leaf's first position, counted from the start of the wave.
        """
        rotations = position_rotations(self.call.layout.rotation, spans)
        with one_thread_for_small_products(self.x, self.call.config, len(spans)), torch.inference_mode():
            for row, rotation in enumerate(rotations):
                a = leaf.attend(row).view(len(spans), self.x.shape[0], -1)
                y = stack.after_attention(rows.x[first + row], a.to(stack.compute_dtype))
                up, gate = stack.mlp_inner(y)
                z = stack.after_mlp(y, up, gate)
                leaf.set_pair(row, *stack.pairs(stack.attention_input(z), rotation))
                rows.z[first + row].copy_(z)
                made = (a, up) if gate is None else (a, up, gate)
                for saved, value in zip(rows.saved, made, strict=False):  # none are saved where no backward needs them
                    saved[first + row].copy_(value)
