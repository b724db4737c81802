"""The decode step in PyTorch operations, for any device, dtype and option. `LayerMaths` computes the layers."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from recurformer.attention import Rotation, alibi_slopes, rotary_frequencies
from recurformer.generation.state import DecodeState
from recurformer.layer import accumulation_dtype, normalise
from recurformer.model import LanguageModel, Layer


class PlainStep:
    """One token of every row: reads `tokens`, `slot` and positions, stores the new pairs, writes `logits`.

    All shapes are those of the buffers, so that a CUDA graph can hold the step. The engine advances slot and positions.

    Args:
        model: matrices of another dtype than the state's are cast once, here. The others are read where they are.
        state: the buffers.

    Attributes:
        visible: number of slots that attention reads; slots after the new one have no effect.
    """

    def __init__(self, model: LanguageModel, state: DecodeState) -> None:
        self.config, self.state, self.visible = model.config, state, state.capacity
        config, dtype, device = model.config, state.keys.dtype, state.keys.device
        acc = accumulation_dtype(dtype)
        with torch.inference_mode(False), torch.no_grad():
            self.layers = [(cast(Layer, layer).maths(dtype), cast(Layer, layer).kind) for layer in model.layers]
            self.embedding, self.norm = model.embedding.weight, model.norm.weight
            self.head = model.output_weight().detach().to(dtype)
            self.slopes = self.frequencies = None
            if config.position == "alibi":
                self.slopes = alibi_slopes(config.n_heads, config.alibi_slopes, device=device).to(acc)
            elif config.position == "rope":
                self.frequencies = rotary_frequencies(config, device)

    @torch.no_grad()
    def __call__(self, logits: bool = True) -> None:
        """Run one step; `logits`: also write the state's logits."""
        s, dtype = self.state, self.state.keys.dtype
        with torch.autocast(s.keys.device.type, enabled=False):  # every cast is explicit
            slot = s.slot.long()[None]
            bias, rotation = self.bias(), self.rotation()
            x = F.embedding(s.tokens, self.embedding)[:, None]
            x = x.to(accumulation_dtype(x.dtype))
            for l, (maths, kind) in enumerate(self.layers):
                q, k, v = maths.projections(x, rotation)
                # The slot holds a recurrent layer's temporary pair until the persistent one is known.
                s.keys[l].index_copy_(2, slot, k)
                s.values[l].index_copy_(2, slot, v)
                x = maths.outputs(x, self.attend(q, s.keys[l], s.values[l], bias))
                if kind == "recurrent":
                    k, v = maths.pairs(maths.attention_input(x), rotation)
                    s.keys[l].index_copy_(2, slot, k)
                    s.values[l].index_copy_(2, slot, v)
            if logits:
                x = normalise(x[:, 0], self.norm, self.config).to(dtype)
                s.logits.copy_(F.linear(x, self.head)[:, : self.config.vocab_size])

    def bias(self) -> Tensor:
        """Return the bias (B or 1, H or 1, n) of the scores of the visible slots: ALiBi, and -inf at unseen slots."""
        s, n = self.state, self.visible
        j = torch.arange(n, dtype=torch.int32, device=s.keys.device)
        seen = (j <= s.slot)[None]
        if s.valid is not None:
            seen = (seen & s.valid[:, :n]) | (j == s.slot)  # a pad sees itself
        if self.slopes is None:
            bias = torch.zeros((), dtype=accumulation_dtype(s.keys.dtype), device=j.device)
        else:
            at = j[None] if s.key_positions is None else s.key_positions[:, :n]
            distance = (s.positions[:, None] - at if s.key_positions is not None else s.slot - at).to(self.slopes.dtype)
            bias = -self.slopes[:, None] * distance[:, None]
        return torch.where(seen[:, None], bias, float("-inf"))

    def rotation(self) -> Rotation | None:
        """Return the rotary angles of the new tokens."""
        if self.frequencies is None:
            return None
        angles = self.state.positions[:, None, None, None].to(self.frequencies.dtype) * self.frequencies
        acc = accumulation_dtype(self.state.keys.dtype)
        return Rotation(angles.cos().to(acc), angles.sin().to(acc))

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """Return attention outputs of q, both (B, H, 1, K), over the visible slots. Scores are at least float32."""
        (B, H, _, K), n = q.shape, self.visible
        if q.device.type == "cpu" and q.dtype == bias.dtype:  # the fastest way on a CPU, and as exact
            grouped = keys.shape[1] != H
            return F.scaled_dot_product_attention(
                q, keys[:, :, :n], values[:, :, :n], attn_mask=bias[:, :, None], enable_gqa=grouped
            )
        keys, values = keys[:, :, :n].flatten(0, 1), values[:, :, :n].flatten(0, 1)  # (B G, n, K), views
        rows = q.reshape(len(keys), -1, K)  # (B G, H / G, K)
        acc = accumulation_dtype(q.dtype)
        if q.dtype == acc:
            scores = torch.bmm(rows, keys.transpose(1, 2))
        elif q.device.type == "cuda":
            scores = torch.bmm(rows, keys.transpose(1, 2), out_dtype=acc)
        else:
            scores = torch.bmm(rows.to(acc), keys.to(acc).transpose(1, 2))
        p = torch.add(bias, scores.view(B, H, n), alpha=K**-0.5).softmax(-1)
        return torch.bmm(p.to(q.dtype).view(len(keys), -1, n), values).view(B, H, 1, K)
