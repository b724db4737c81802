"""The reference agrees with the paper's formulas, written out number by number, and with finite differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LAYER_OPTIONS, assert_close, every_scan, layer_of, logits_of, random_tokens, strong, tiny

from recurformer import KVCache, LanguageModel, ModelConfig
from recurformer.scan.algorithms import SCANS

# --- paper section 2.2 in plain Python: one sequence, loops over layers, positions and heads --------------------------


def plain_norm(u: np.ndarray, weight: np.ndarray, kind: str, eps: float) -> np.ndarray:
    if kind == "layer":
        u = u - u.mean()
    return u / math.sqrt((u * u).mean() + eps) * weight


def plain_activation(up: np.ndarray, gate: np.ndarray | None, kind: str) -> np.ndarray:
    if kind == "swiglu":
        assert gate is not None
        return np.array([g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)])
    if kind == "gelu":
        return np.array([0.5 * u * (1 + math.erf(u / math.sqrt(2))) for u in up])
    return np.array([0.5 * u * (1 + math.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))) for u in up])


def plain_slopes(heads: int, scheme: str) -> list[float]:
    if scheme == "geometric" or heads & (heads - 1) == 0:
        return [2 ** (-8 * h / heads) for h in range(1, heads + 1)]
    below = 1 << (heads.bit_length() - 1)
    return plain_slopes(below, scheme) + plain_slopes(2 * below, scheme)[::2][: heads - below]


def plain_logits(model: LanguageModel, tokens: list[int]) -> np.ndarray:
    """Logits (N, V) of one sequence."""
    c = model.config
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    H, G, K, kinds = c.n_heads, c.n_kv_heads or c.n_heads, c.head_dim or c.d_model // c.n_heads, c.layer_kinds
    s = 1 / math.sqrt(c.n_layers) if c.residual_scale == "depth" else 1.0
    slopes = plain_slopes(H, c.alibi_slopes) if c.position == "alibi" else [0.0] * H

    def norm(u: np.ndarray, name: str) -> np.ndarray:
        return plain_norm(u, weights[f"{name}.weight"], c.norm, c.norm_eps)

    def linear(u: np.ndarray, name: str) -> np.ndarray:
        product = weights[f"{name}.weight"] @ u
        return product + weights[f"{name}.bias"] if f"{name}.bias" in weights else product

    def rotated(head: np.ndarray, position: int) -> np.ndarray:
        turned = head.copy()
        for pair in range(K // 2):
            angle = position * c.rope_theta ** (-2 * pair / K)
            first, second = head[pair], head[pair + K // 2]
            turned[pair] = first * math.cos(angle) - second * math.sin(angle)
            turned[pair + K // 2] = second * math.cos(angle) + first * math.sin(angle)
        return turned

    def heads_of(u: np.ndarray, name: str, position: int) -> list[np.ndarray]:
        if c.qk_norm == "full":
            u = norm(u, name)
        heads = [u[start : start + K] for start in range(0, len(u), K)]
        if c.qk_norm == "head":
            heads = [norm(head, name) for head in heads]
        return [rotated(head, position) for head in heads] if c.position == "rope" else heads

    def pair_of(u: np.ndarray, layer: str, position: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        v = linear(u, f"{layer}.v_proj")
        keys = heads_of(linear(u, f"{layer}.k_proj"), f"{layer}.k_norm", position)
        return keys, [v[start : start + K] for start in range(0, G * K, K)]

    stream = [weights["embedding.weight"][token] for token in tokens]
    for l, kind in enumerate(kinds):
        layer, pairs, outputs = f"layers.{l}", [], []
        for i, x in enumerate(stream):
            h = norm(x, f"{layer}.attention_norm")
            q = heads_of(linear(h, f"{layer}.q_proj"), f"{layer}.q_norm", i)
            own = pair_of(h, layer, i)
            seen = [*pairs, own]
            a = []
            for head in range(H):
                g = head // (H // G)
                scores = [
                    float(q[head] @ keys[g]) / math.sqrt(K) - slopes[head] * (i - j) for j, (keys, _) in enumerate(seen)
                ]
                exponentials = [math.exp(score - max(scores)) for score in scores]
                total = sum(exponentials)
                a.append(sum(e / total * values[g] for e, (_, values) in zip(exponentials, seen, strict=True)))
            y = x + s * linear(np.concatenate(a), f"{layer}.o_proj")
            inner = norm(y, f"{layer}.mlp_norm")
            gate = linear(inner, f"{layer}.gate_proj") if c.activation == "swiglu" else None
            z = y + s * linear(
                plain_activation(linear(inner, f"{layer}.up_proj"), gate, c.activation), f"{layer}.down_proj"
            )
            outputs.append(z)
            pairs.append(own if kind == "standard" else pair_of(norm(z, f"{layer}.attention_norm"), layer, i))
        stream = outputs
    output = "embedding" if c.tie_embeddings else "head"
    return np.stack([weights[f"{output}.weight"][: c.vocab_size] @ norm(x, "norm") for x in stream])


# Options that concern more than one layer.
MODEL_OPTIONS: dict[str, dict[str, Any]] = {
    "standard": {"layers": "standard"},
    "hybrid-first": {"layers": "first:1", "n_layers": 3},
    "hybrid-listed": {"layers": ("standard", "recurrent", "standard"), "n_layers": 3},
    "tied": {"tie_embeddings": True, "vocab_multiple": 32},
    "swiglu-biases-standard": {"activation": "swiglu", "mlp_bias": True, "attention_bias": True, "layers": "standard"},
}
OPTIONS = {**LAYER_OPTIONS, **MODEL_OPTIONS}


@every_scan
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_logits_are_the_papers_formulas(options: dict[str, Any], scan: str):
    model = tiny(scan=scan, dtype=torch.float64, **options)
    tokens = random_tokens(2, 9)
    expected = torch.from_numpy(np.stack([plain_logits(model, row.tolist()) for row in tokens]))
    assert_close(logits_of(model, tokens), expected, 1e-12)


def test_recurrent_and_standard_layers_differ():
    tokens = random_tokens(1, 9)
    recurrent, standard = (logits_of(tiny(layers=kind), tokens) for kind in ("recurrent", "standard"))
    assert_close(recurrent[:, 0], standard[:, 0])  # the first position attends only to its own temporary pair
    assert (recurrent[:, 1:] - standard[:, 1:]).abs().amax(-1).min() > 0.1


# --- finite differences ----------------------------------------------------------------------------------------------

GRADIENT_OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "grouped-rope-full": {"n_kv_heads": 1, "position": "rope", "qk_norm": "full", "norm": "layer"},
    "swiglu-biases-none": {
        "activation": "swiglu", "mlp_bias": True, "attention_bias": True, "qk_norm": "none", "position": "none",
    },
    "gelu-tanh-unscaled": {"activation": "gelu_tanh", "residual_scale": "none"},
}  # fmt: skip


@every_scan
@pytest.mark.parametrize("options", GRADIENT_OPTIONS.values(), ids=GRADIENT_OPTIONS.keys())
def test_gradients_are_finite_differences(options: dict[str, Any], scan: str):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=5, d_model=4, n_layers=2, n_heads=2, d_mlp=5, **options)
    model = strong(LanguageModel(config), 0.5).double()
    layer = layer_of(model, 0)
    layout = model.layout(4, torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1]]).bool())
    real = layout.valid
    assert real is not None

    def outputs(x: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # The parameters are arguments because gradcheck changes them in place and must know of them.
        z, keys, values = SCANS[scan](x, layer.maths(), layout, None)
        return z[real], keys.transpose(1, 2)[real], values.transpose(1, 2)[real]

    x = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(outputs, (x, *layer.parameters()))


@every_scan
def test_gradients_with_a_past_are_finite_differences(scan: str):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=5, d_model=4, n_layers=1, n_heads=2, n_kv_heads=1, d_mlp=5)
    model = strong(LanguageModel(config), 0.5).double()
    layer, cache = layer_of(model, 0), KVCache(config, 1, dtype=torch.float64)
    with torch.no_grad():
        model(torch.tensor([[3, 0, 1]]), cache=cache)
    layout, past = model.layout(3, None, None, cache), cache.past(0)

    def outputs(x: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return SCANS[scan](x, layer.maths(), layout, past)

    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(outputs, (x, *layer.parameters()))
