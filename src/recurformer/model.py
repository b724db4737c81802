"""The Recurrent Transformer language model, all of it in this one file.

What is unusual about the architecture (paper section 2):
  - a recurrent layer attends to keys and values made from its own *outputs* at the earlier positions, and to one
    temporary pair made from its input at the position itself;
  - both pairs come from the same weights, so a recurrent layer has exactly the parameters of a Transformer layer;
  - a standard layer is the same maths with the pairs of the inputs throughout, and any mix of the two kinds is a model.
How a recurrent layer is evaluated (position by position, in tiles, ...) is the business of `recurformer.scan`.

Shape legend, here and everywhere: B batch, N new positions, P past positions (in the cache), M = P + N, L layers,
D width, F MLP width, H query heads, G key-value heads, K head width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recurformer.attention import biased_scores, compiled, flex, flex_applies, visible_blocks
from recurformer.cache import KVCache
from recurformer.config import LayerKind, ModelConfig
from recurformer.loss import IGNORE, choose_loss, fused_loss
from recurformer.scan import SCAN_CHOICES, choose_scan, scan_by_name
from recurformer.scan.wavefront import wavefront_scan

LOGITS_AT_ONCE = 2**25  # elements; above this the loss without logits works in chunks that are recomputed backward


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: residual stream, norm statistics, softmax and loss (design: precision)."""
    return torch.promote_types(dtype, torch.float32)


# --- positions -------------------------------------------------------------------------------------------------------


def alibi_slopes(n_heads: int, scheme: str = "geometric", *, device: Any = None) -> Tensor:
    """ALiBi slopes (H,), float64, of heads h = 1..H.

    Args:
        scheme: "geometric" is 2^(-8h/H) for every H, as the official code; "interleaved" is Press et al.: for H no
            power of two, the slopes of the next smaller power of two, then every other one of the next larger.
    """

    def geometric(count: int) -> Tensor:
        return torch.exp2(-8.0 * torch.arange(1, count + 1, dtype=torch.float64, device=device) / count)

    if scheme == "geometric":
        return geometric(n_heads)
    power = 2 ** int(math.log2(n_heads))
    return torch.cat([geometric(power), geometric(2 * power)[0::2][: n_heads - power]])


def rotary_frequencies(config: ModelConfig, device: Any = None) -> Tensor:
    """Angle a position (K / 2,) by which RoPE turns each pair of coordinates: theta^(-2c/K); float64 (MPS: float32)."""
    K = config.head_width
    exact = torch.float32 if torch.device(device or "cpu").type == "mps" else torch.float64  # MPS has no float64
    return config.rope_theta ** (-torch.arange(0, K, 2, dtype=exact, device=device) / K)


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of the rotary angles, each (B or 1, 1, N, K/2)."""

    cos: Tensor
    sin: Tensor

    def __getitem__(self, positions: slice) -> Rotation:
        return Rotation(self.cos[:, :, positions], self.sin[:, :, positions])

    def inverse(self) -> Rotation:
        """The rotation back."""
        return Rotation(self.cos, -self.sin)

    def __call__(self, u: Tensor) -> Tensor:
        """Rotate u (B, heads, N, K): coordinate c and c + K/2 are a pair (the half-split convention)."""
        first, second = u.to(self.cos.dtype).chunk(2, dim=-1)
        turned = [first * self.cos - second * self.sin, second * self.cos + first * self.sin]
        return torch.cat(turned, dim=-1).to(u.dtype)


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one call stand and who sees whom: the one place for positions, padding and documents.

    Slots are columns of the batch, 0..M-1, the first P of them in the cache. A token's *position* is the number of
    real tokens before it in its row. A query sees itself and, of the earlier slots, those that hold a real token of
    its own document.
    """

    past: int  # P
    length: int  # N
    positions: Tensor  # (B or 1, M) int64
    valid: Tensor | None = None  # (B, M) bool, False at pads; None: no pads
    documents: Tensor | None = None  # (B, M) int64, non-decreasing; None: one document a row
    slopes: Tensor | None = None  # (H,) in the accumulation dtype; None: no ALiBi
    rotation: Rotation | None = None  # of the N new positions; None: no RoPE

    @property
    def causal_only(self) -> bool:
        """True when attention is plain causal attention over the new tokens."""
        return self.past == 0 and self.valid is None and self.documents is None and self.slopes is None

    def visible(self, queries: slice, keys: slice) -> Tensor | None:
        """(B or 1, 1, q, k) bool, True where a query sees a key; None when every query of the block sees every key.

        Args:
            queries: range of new positions, 0 <= start < stop <= N.
            keys: range of slots, 0 <= start < stop <= M.
        """
        seen: Tensor | None = None
        device = self.positions.device
        i = torch.arange(self.past + queries.start, self.past + queries.stop, device=device)[:, None]
        j = torch.arange(keys.start, keys.stop, device=device)
        if keys.stop > self.past + queries.start + 1:
            seen = (j <= i)[None]
        if self.valid is not None:
            real = self.valid[:, None, keys]
            seen = real if seen is None else seen & real
        if self.documents is not None:
            of_query = self.documents[:, self.past + queries.start : self.past + queries.stop, None]
            same = of_query == self.documents[:, None, keys]
            seen = same if seen is None else seen & same
        if seen is None:
            return None
        if keys.stop > self.past + queries.start:
            seen = seen | (j == i)  # a pad sees itself: no row of scores is ever empty
        return seen[:, None]

    def bias(self, queries: slice, keys: slice) -> Tensor | None:
        """(B or 1, H or 1, q, k): what is added to the scaled scores, ALiBi and -inf where a key is not seen."""
        bias: Tensor | None = None
        if self.slopes is not None:
            i = self.positions[:, self.past + queries.start : self.past + queries.stop, None]
            distance = (i - self.positions[:, None, keys]).to(self.slopes.dtype)
            bias = -self.slopes[:, None, None] * distance[:, None]
        visible = self.visible(queries, keys)
        if visible is None:
            return bias
        if bias is None:
            bias = torch.zeros((), dtype=torch.float32, device=visible.device)
        return torch.where(visible, bias, float("-inf"))

    @cached_property
    def earliest(self) -> list[int] | None:
        """Per new position, the first slot that a query there sees in any row; None: always slot 0."""
        if self.documents is None:
            return None
        begins = F.pad(self.documents.diff(dim=1) != 0, (1, 0), value=True)
        slots = torch.arange(self.documents.shape[1], device=begins.device)
        return torch.where(begins, slots, 0).cummax(1).values.amin(0).tolist()

    @cached_property
    def full_bias(self) -> Tensor | None:
        """`bias` of all N queries and M keys, made once for all layers."""
        return self.bias(slice(0, self.length), slice(0, self.past + self.length))

    @cached_property
    def flex(self) -> tuple[Any, Any]:
        """`bias` and `visible` as FlexAttention takes them, made once for all layers."""
        return biased_scores(self), visible_blocks(self)


# --- one layer -------------------------------------------------------------------------------------------------------


def normalise(x: Tensor, weight: Tensor, config: ModelConfig) -> Tensor:
    """RMS or layer norm over the last dimension, in the accumulation dtype; the weights of a stack broadcast."""
    x = x.to(accumulation_dtype(x.dtype))
    weight = weight.to(x.dtype)
    if weight.dim() == 1:
        norm = F.rms_norm if config.norm == "rms" else F.layer_norm
        return norm(x, weight.shape, weight, eps=config.norm_eps)
    if config.norm == "layer":
        return F.layer_norm(x, weight.shape[-1:], eps=config.norm_eps) * weight
    # Written out, with one operation over the width: on a CPU F.rms_norm takes twice as long for a position's few rows.
    width = x.shape[-1]
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square().add(width * config.norm_eps).rsqrt()
    return x * inverse * (weight * width**0.5)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b; of a stack, x (L, n, in) with W (L, out, in) and b (L, 1, out), to each layer its own."""
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    weight = weight.transpose(1, 2)
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)


def activate(up: Tensor, gate: Tensor | None, config: ModelConfig) -> Tensor:
    """The MLP's inner activation: GELU of `up`, or SiLU(gate) * up."""
    if gate is not None:
        return F.silu(gate) * up
    return F.gelu(up, approximate="tanh" if config.activation == "gelu_tanh" else "none")


@dataclass(frozen=True)
class LayerMaths:
    """The maths of one layer (paper section 2.2) as functions of plain tensors; the only place where it is written.

    Matrices and biases are in the compute dtype, norm weights as stored. `Layer.maths()` fills it from parameters.
    """

    config: ModelConfig
    attention_norm: Tensor  # (D,)
    q: Tensor  # (H K, D)
    k: Tensor  # (G K, D)
    v: Tensor  # (G K, D)
    o: Tensor  # (D, H K)
    mlp_norm: Tensor  # (D,)
    up: Tensor  # (F, D)
    down: Tensor  # (D, F)
    gate: Tensor | None = None  # (F, D), swiglu
    q_norm: Tensor | None = None  # (K,) or (H K,)
    k_norm: Tensor | None = None  # (K,) or (G K,)
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None
    kv: Tensor | None = None  # (2 G K, D), k above v, where `stack` has made one product of two
    kv_bias: Tensor | None = None

    @classmethod
    def stack(cls, layers: Sequence[LayerMaths], by_column: bool = False) -> LayerMaths:
        """The maths of several layers of one shape at once, for x (L, n, D): n positions of each layer.

        In `pairs` n stands where N does, and L where B does. Matrices become (L, out, in), biases and norm weights
        broadcast against (L, n, width), those of heads against (L, n, G, K); `kv` makes one product of two.

        Args:
            by_column: lay the branches' matrices out for products with few rows of x; else for those with few rows of
                gradients. Projections always are the latter: backward they are to give the very bits of the forward.
        """

        def matrices(*parts: str) -> Tensor:
            joined = [torch.cat([getattr(layer, part) for part in parts]) for layer in layers]
            if by_column and parts[0] in ("o", "up", "gate", "down"):
                return torch.stack([matrix.t() for matrix in joined]).transpose(1, 2)
            return torch.stack(joined) if len(layers) > 1 else joined[0][None]

        first, head = layers[0], layers[0].config.qk_norm == "head"
        tensors: dict[str, Tensor] = {"kv": matrices("k", "v")}
        tensors["k"], tensors["v"] = tensors["kv"].chunk(2, dim=1)
        if first.k_bias is not None and first.v_bias is not None:
            biases = [torch.cat([getattr(layer, name) for name in ("k_bias", "v_bias")]) for layer in layers]
            tensors["kv_bias"] = torch.stack(biases)[:, None]
            tensors["k_bias"], tensors["v_bias"] = tensors["kv_bias"].chunk(2, dim=2)
        for name in (f.name for f in fields(cls)):
            tensor = getattr(first, name)
            if not isinstance(tensor, Tensor) or name in tensors:
                continue
            if tensor.dim() == 2:
                tensors[name] = matrices(name)
            else:
                stacked = torch.stack([getattr(layer, name) for layer in layers])[:, None]
                tensors[name] = stacked[:, None] if head and name in ("q_norm", "k_norm") else stacked
        return cls(first.config, **tensors)

    def __getitem__(self, layers: slice) -> LayerMaths:
        """Some layers of a stack."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: t[layers] for name, t in tensors.items() if isinstance(t, Tensor)})

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.q.dtype

    def attention_input(self, x: Tensor) -> Tensor:
        """h = RMS(x), (B, N, D), in the compute dtype. Of outputs z it gives what the persistent pairs are made of."""
        return normalise(x, self.attention_norm, self.config).to(self.compute_dtype)

    def projections(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, N, K) and pairs (B, G, N, K) of x (B, N, D): what a standard layer's attention needs."""
        h = self.attention_input(x)
        return self.queries(h, rotation), *self.pairs(h, rotation)

    def queries(self, h: Tensor, rotation: Rotation | None) -> Tensor:
        """q = RMSq(Q h), rotated; (B, N, D) to (B, H, N, K)."""
        return self._heads(linear(h, self.q, self.q_bias), self.q_norm, rotation)

    def pairs(self, h: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """k = RMSk(K h), rotated, and v = V h; (B, N, D) to two of (B, G, N, K).

        Of RMS(x) these are the temporary pairs k^, v^; of RMS(z) the persistent ones.
        """
        if self.kv is None:
            k, v = linear(h, self.k, self.k_bias), linear(h, self.v, self.v_bias)
        else:
            k, v = linear(h, self.kv, self.kv_bias).chunk(2, dim=-1)
        return self._heads(k, self.k_norm, rotation), self._heads(v, None, None)

    def _heads(self, u: Tensor, norm_weight: Tensor | None, rotation: Rotation | None) -> Tensor:
        dtype, K = u.dtype, self.config.head_width
        if norm_weight is not None and self.config.qk_norm == "full":
            u = normalise(u, norm_weight, self.config)
        u = u.unflatten(-1, (-1, K))
        if norm_weight is not None and self.config.qk_norm == "head":
            u = normalise(u, norm_weight, self.config)
        u = u.transpose(1, 2)
        return (u if rotation is None else rotation(u)).to(dtype)

    def outputs(self, x: Tensor, a: Tensor) -> Tensor:
        """z from the layer's input x (B, N, D) and the attention outputs a (B, H, N, K): both residual branches."""
        y = self.attended(x, a.transpose(1, 2).flatten(2))
        return self.finished(y, *self.mlp_inner(y))

    def attended(self, x: Tensor, a: Tensor) -> Tensor:
        """y = x + s O a, with the heads of a side by side, (..., H K)."""
        return torch.add(x, linear(a, self.o, self.o_bias), alpha=self.config.branch_scale)

    def mlp_inner(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """The MLP's inner values before activation, up and (swiglu) gate, (..., F), from y (..., D)."""
        h = normalise(y, self.mlp_norm, self.config).to(self.compute_dtype)
        return linear(h, self.up, self.up_bias), None if self.gate is None else linear(h, self.gate, self.gate_bias)

    def finished(self, y: Tensor, up: Tensor, gate: Tensor | None) -> Tensor:
        """z = y + s MLP(RMS(y)), given the MLP's inner values."""
        branch = linear(activate(up, gate, self.config), self.down, self.down_bias)
        return torch.add(y, branch, alpha=self.config.branch_scale)


class Norm(nn.Module):
    """The weight of a norm; `normalise` does the work."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


def plain_weight(module: nn.Module) -> Tensor:
    """The matrix of a linear module.

    Raises:
        TypeError: when something wraps it, whose part the matrix would lack.
    """
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{type(module).__name__} stands where a linear module was; recurformer.hf takes adapters")
    return module.weight


class Layer(nn.Module):
    """One layer, recurrent or standard: the parameters, and the choice between scan and parallel attention.

    Attributes:
        compiled: a standard layer's steps before and after attention run through torch.compile, which fuses norms,
            activations and residuals. Recurrent layers are never compiled, and nothing is where there is a cache:
            decoding meets too many shapes.
        recompute: a standard layer keeps only its input for the backward and is evaluated again there.
        weight_of: gives the matrix of a projection's module; adapters that wrap modules bring their own.
    """

    weight_of: Callable[[nn.Module], Tensor] = staticmethod(plain_weight)

    def __init__(self, config: ModelConfig, kind: LayerKind) -> None:
        super().__init__()
        self.config, self.kind = config, kind
        self.compiled = self.recompute = False
        D, F_, K = config.d_model, config.mlp_width, config.head_width
        H, G = config.n_heads, config.kv_heads
        self.attention_norm = Norm(D)
        self.q_proj = nn.Linear(D, H * K, bias=config.attention_bias)
        self.k_proj = nn.Linear(D, G * K, bias=config.attention_bias)
        self.v_proj = nn.Linear(D, G * K, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * K, D, bias=config.attention_bias)
        if config.qk_norm != "none":
            self.q_norm = Norm(H * K if config.qk_norm == "full" else K)
            self.k_norm = Norm(G * K if config.qk_norm == "full" else K)
        self.mlp_norm = Norm(D)
        self.up_proj = nn.Linear(D, F_, bias=config.mlp_bias)
        if config.activation == "swiglu":
            self.gate_proj = nn.Linear(D, F_, bias=config.mlp_bias)
        self.down_proj = nn.Linear(F_, D, bias=config.mlp_bias)

    def maths(self, dtype: torch.dtype | None = None) -> LayerMaths:
        """The layer's maths over its parameters, matrices cast to the compute dtype (default: as stored)."""
        tensors: dict[str, Tensor] = {}
        for module_name, module in self.named_children():
            name = module_name.removesuffix("_proj")
            if isinstance(module, Norm):
                tensors[name] = module.weight
                continue
            matrix, bias = self.weight_of(module), getattr(module, "bias", None)
            tensors[name] = matrix if dtype is None else matrix.to(dtype)
            if bias is not None:
                tensors[f"{name}_bias"] = bias if dtype is None else bias.to(dtype)
        return LayerMaths(self.config, **tensors)

    def forward(
        self, x: Tensor, layout: Layout, scan: str = "reference", cache: KVCache | None = None, index: int = 0
    ) -> Tensor:
        """The layer's outputs z (B, N, D); appends the new pairs to layer `index` of the cache when there is one."""
        if self.kind == "recurrent":
            return self._recurrent(x, layout, scan, cache, index)
        if self.recompute and cache is None and torch.is_grad_enabled():
            return checkpoint(  # pyright: ignore[reportReturnType]
                self._standard, x, layout, None, index, use_reentrant=False, preserve_rng_state=False
            )
        return self._standard(x, layout, cache, index)

    def _recurrent(self, x: Tensor, layout: Layout, scan: str, cache: KVCache | None, index: int) -> Tensor:
        run: Callable[..., Any] = scan_by_name(scan)
        if torch.compiler.is_compiling():  # of the whole model: loops over positions are not to be traced
            run = torch.compiler.disable(run)
        past = None if cache is None else cache.past(index)
        maths = self.maths(compute_dtype(self.q_proj.weight))
        with torch.autocast(x.device.type, enabled=False):  # every cast is written out
            z, keys, values = run(x, maths, layout, past)  # pyright: ignore[reportCallIssue]
        if cache is not None:
            cache.write(index, keys, values)
        return z

    def _standard(self, x: Tensor, layout: Layout, cache: KVCache | None, index: int) -> Tensor:
        before, after = LayerMaths.projections, LayerMaths.outputs
        if self.compiled and cache is None:
            before, after = compiled(before), compiled(after)
        maths = self.maths(compute_dtype(self.q_proj.weight))
        with torch.autocast(x.device.type, enabled=False):
            q, keys, values = before(maths, x, layout.rotation)
            if cache is not None:
                keys, values = cache.extend(index, keys, values)
            return after(maths, x, parallel_attention(q, keys, values, layout))


def parallel_attention(q: Tensor, keys: Tensor, values: Tensor, layout: Layout) -> Tensor:
    """Attention of a standard layer: q (B, H, N, K) over keys and values (B, G, M, K), to (B, H, N, K)."""
    keys, values = keys.to(q.dtype), values.to(q.dtype)
    if flex_applies(q, layout):
        return flex(q, keys, values, layout)
    bias = None if layout.causal_only else layout.full_bias
    return F.scaled_dot_product_attention(
        q,
        keys,
        values,
        attn_mask=None if bias is None else bias.to(q.dtype),
        is_causal=layout.causal_only and layout.length > 1,
        enable_gqa=q.shape[1] != keys.shape[1],
    )


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of matrix products: autocast's where it is on, else the weights'. float64 is never lowered."""
    device = weight.device.type
    if device != "meta" and weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


# --- the language model ----------------------------------------------------------------------------------------------


@dataclass
class Output:
    """What a call of the model returns."""

    logits: Tensor | None  # (B, N, V) in the compute dtype; None under return_logits=False
    loss: Tensor | None = None  # scalar, float32 (float64 for a float64 model), mean nats per real target
    cache: KVCache | None = field(default=None, repr=False)


class LanguageModel(nn.Module):
    """A language model of recurrent and standard layers.

    Args:
        config: its shape. Parameters are initialised as `init_weights` says, from torch's global generator.

    Attributes:
        scan: how recurrent layers are evaluated: "auto", or the name of one exact algorithm of `recurformer.scan`.
        recompute: keep only the inputs of the layers for the backward, which runs each layer's forward again: less
            memory, more time. Calls with a cache are not affected.
        weight_of: as `Layer.weight_of`, of the output layer.
    """

    weight_of: Callable[[nn.Module], Tensor] = staticmethod(plain_weight)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._scan = "auto"
        self.recompute = False
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layer_kinds)
        self.norm = Norm(config.d_model)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.d_model, config.padded_vocab_size, bias=False)
        self.init_weights()

    @property
    def scan(self) -> str:
        return self._scan

    @scan.setter
    def scan(self, name: str) -> None:
        if name not in SCAN_CHOICES:
            raise ValueError(f"scan is {name!r}; choose one of {', '.join(map(repr, SCAN_CHOICES))}")
        self._scan = name

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw every parameter anew. Norm weights are 1 and biases 0; matrices are normal with these deviations:

        | matrix                | "fan_in"   | "official" (cut at 3 sigma)                 |
        |-----------------------|------------|---------------------------------------------|
        | embedding             | 1/sqrt(D)  | 1/sqrt(D); in both `embedding_std` if given |
        | output                | 1/sqrt(D)  | 1/sqrt(D)                                   |
        | q, k, v, up, gate     | 1/sqrt(D)  | 1/sqrt(D)                                   |
        | o                     | 1/sqrt(HK) | 1/sqrt(2 D (l + 1)), l = 0 the first layer  |
        | down                  | 1/sqrt(F)  | 1/sqrt(2 F (l + 1))                         |
        """
        official, D, F_ = self.config.init == "official", self.config.d_model, self.config.mlp_width

        def draw(weight: Tensor, std: float) -> None:
            if official:
                nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
            else:
                nn.init.normal_(weight, std=std)

        wide = self.config.embedding_std
        draw(self.embedding.weight, D**-0.5 if wide is None else wide)
        for l, layer in enumerate(self.layers):
            for name, module in layer.named_children():
                if isinstance(module, Norm):
                    nn.init.ones_(module.weight)
                elif isinstance(module, nn.Linear):
                    std = module.in_features**-0.5
                    if official and name in ("o_proj", "down_proj"):
                        std = (2 * (D if name == "o_proj" else F_) * (l + 1)) ** -0.5
                    draw(module.weight, std)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        nn.init.ones_(self.norm.weight)
        if not self.config.tie_embeddings:
            draw(self.head.weight, D**-0.5)

    def num_parameters(self, embedding: bool = False) -> int:
        """Number of parameters; without the embedding and the output layer unless `embedding`."""
        outside = () if embedding else ("embedding.weight", "head.weight")
        return sum(p.numel() for name, p in self.named_parameters() if name not in outside)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        use_cache: bool = False,
        return_logits: bool = True,
        validate: bool | None = None,
        after: tuple[int, Tensor] | None = None,
    ) -> Output:
        """Logits, and the loss when there are targets.

        Args:
            tokens: (B, N) integer ids. Ids at pads may be anything.
            targets: (B, N) integer, the token to predict AT each position (nothing is shifted), -100 to ignore.
            attention_mask: (B, N) bool or 0/1 of any dtype, 0 = padding, anywhere in a row; with a cache also
                (B, P + N), whose first P columns must repeat what the cache remembers.
            document_ids: (B, N) integer, non-decreasing along N: packed documents that do not see each other.
            cache: continue it; the new tokens are appended in place and the same object is returned.
            use_cache: start a cache that grows as needed.
            return_logits: False saves their memory (needs targets) and leaves `logits` None.
            validate: check token range, targets, mask values and document order. None: on the CPU only, for on other
                devices the check forces a synchronisation.
            after: (depth, x): enter above the first `depth` layers, with their outputs x as `residual_stream` gives
                them, not with a cache.

        Returns:
            Output: logits (B, N, V); loss = sum of token losses / number of real targets (0 without any); cache.

        Raises:
            ValueError: naming the value, the limit and the remedy, before any work.
        """
        valid = check_inputs(
            self, tokens, targets, attention_mask, document_ids, cache, use_cache, return_logits, validate
        )
        if cache is None and use_cache:
            weight = self.embedding.weight
            cache = KVCache(self.config, tokens.shape[0], dtype=compute_dtype(weight), device=weight.device)
        if after is None:
            x = self.hidden(tokens.long(), valid, document_ids, cache)
        else:
            depth, x = after
            self._check_depth(depth)
            if x.shape != (*tokens.shape, self.config.d_model):
                raise ValueError(
                    f"after has x of shape {tuple(x.shape)}; it must be {(*tokens.shape, self.config.d_model)}"
                )
            if cache is not None:
                raise ValueError("after and a cache do not go together: the layers below would have no pairs in it")
            x = self._upwards(x, depth, self.config.n_layers, valid, document_ids)
            x = normalise(x, self.norm.weight, self.config)
        logits = self.logits(x) if return_logits else None
        return Output(logits, None if targets is None else self._loss(x, logits, targets), cache)

    def residual_stream(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        *,
        depth: int,
        validate: bool | None = None,
    ) -> Tensor:
        """What leaves the first `depth` layers, (B, N, D) in the accumulation dtype; `forward` continues `after` it.

        So the layers of a model may take different numbers of sequences at a time in training.

        Args:
            depth: 0 to L; 0 is the embedding.
            tokens, attention_mask, document_ids, validate: as `forward`.

        Raises:
            ValueError: as `forward`, and for a depth that the model does not have.
        """
        self._check_depth(depth)
        valid = check_inputs(self, tokens, None, attention_mask, document_ids, None, False, True, validate)
        return self._upwards(self._embedded(tokens.long(), valid), 0, depth, valid, document_ids)

    def _check_depth(self, depth: int) -> None:
        if not 0 <= depth <= self.config.n_layers:
            raise ValueError(f"depth is {depth}; the model has {self.config.n_layers} layers, so it must be 0 to that")

    def hidden(
        self, tokens: Tensor, valid: Tensor | None, documents: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """What the output layer reads, (B, N, D): `forward` without checks, logits and loss.

        Args:
            tokens: (B, N) int64.
            valid: (B, N) bool, False at pads; None: no pads.
            documents: (B, N) int64, as `document_ids`.
            cache: continued in place.
        """
        x = self._upwards(self._embedded(tokens, valid), 0, self.config.n_layers, valid, documents, cache)
        if cache is not None:
            cache.advance(tokens.shape[1], valid)
        return normalise(x, self.norm.weight, self.config)

    def _embedded(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        # Pads enter as zeros: nothing of their contents, be it NaN, reaches a real position or a gradient.
        x = F.embedding(tokens if valid is None else tokens.masked_fill(~valid, 0), self.embedding.weight)
        x = x.to(accumulation_dtype(x.dtype))
        return x if valid is None else torch.where(valid[:, :, None], x, 0.0)

    def _upwards(
        self,
        x: Tensor,
        first: int,
        stop: int,
        valid: Tensor | None,
        documents: Tensor | None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x (B, N, D) through the layers first..stop - 1."""
        B, N, _ = x.shape
        recompute = self.recompute and cache is None and torch.is_grad_enabled()
        scan, _ = choose_scan(
            self.scan, self.config, x.device, batch_size=B, length=N, past=0 if cache is None else cache.length,
            dtype=compute_dtype(self.embedding.weight), together=not recompute,
        )  # fmt: skip
        layout = self._layout(B, N, valid, documents, cache)
        for stack in self._stacks(range(first, stop), together=scan == "wavefront" and not recompute):
            if len(stack) > 1:
                x = self._wavefront(x, stack, layout, cache)
            elif recompute:
                x = checkpoint(self.layers[stack[0]], x, layout, scan, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
            else:
                x = self.layers[stack[0]](x, layout, scan, cache, stack[0])
        return x

    def _stacks(self, indices: range, together: bool) -> list[list[int]]:
        """Of these layers, those that are evaluated together: consecutive recurrent ones, or, without `together`, none.

        One that is more than a layer, wrapped or with hooks, is evaluated by itself.
        """

        def joins(index: int) -> bool:
            layer = self.layers[index]
            hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
            return self.config.layer_kinds[index] == "recurrent" and type(layer) is Layer and not any(hooks)

        stacks: list[list[int]] = []
        for index in indices:
            if together and stacks and joins(index) and joins(index - 1):
                stacks[-1].append(index)
            else:
                stacks.append([index])
        return stacks

    def _wavefront(self, x: Tensor, stack: list[int], layout: Layout, cache: KVCache | None) -> Tensor:
        """Outputs of consecutive recurrent layers; appends their new pairs to the cache when there is one."""
        run: Callable[..., Any] = wavefront_scan
        if torch.compiler.is_compiling():
            run = torch.compiler.disable(run)
        layers = [cast(Layer, self.layers[index]) for index in stack]
        maths = [layer.maths(compute_dtype(layer.q_proj.weight)) for layer in layers]
        past = [None if cache is None else cache.past(index) for index in stack]
        with torch.autocast(x.device.type, enabled=False):
            z, pairs = run(x, maths, layout, past)  # pyright: ignore[reportCallIssue]
        if cache is not None:
            for index, (keys, values) in zip(stack, pairs, strict=True):
                cache.write(index, keys, values)
        return z

    def logits(self, x: Tensor) -> Tensor:
        """(..., V) in the compute dtype, of what `hidden` returns."""
        weight = self.embedding.weight if self.config.tie_embeddings else self.weight_of(self.head)
        dtype = compute_dtype(weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), weight.to(dtype))[..., : self.config.vocab_size]

    def _layout(self, B: int, N: int, valid: Tensor | None, documents: Tensor | None, cache: KVCache | None) -> Layout:
        config, device = self.config, self.embedding.weight.device
        P = 0
        if cache is not None:
            P = cache.length
            cache.reserve(N)
            valid = cache.validity_with(valid, N)
        if valid is None:
            positions = torch.arange(P + N, device=device)[None]
        else:
            positions = valid.cumsum(1) - valid.long()
        if documents is not None:  # positions restart in each document
            begins = F.pad(documents.diff(dim=1) != 0, (1, 0), value=True)
            positions = positions - torch.where(begins, positions, 0).cummax(1).values
        acc = accumulation_dtype(self.embedding.weight.dtype)
        slopes = rotation = None
        if config.position == "alibi":
            slopes = alibi_slopes(config.n_heads, config.alibi_slopes, device=device).to(acc)
        elif config.position == "rope":
            frequencies = rotary_frequencies(config, device)
            angles = positions[:, None, P:, None].to(frequencies.dtype) * frequencies
            rotation = Rotation(angles.cos().to(acc), angles.sin().to(acc))
        return Layout(P, N, positions, valid, documents, slopes, rotation)

    def _loss(self, x: Tensor, logits: Tensor | None, targets: Tensor) -> Tensor:
        def total(part: Tensor, wanted: Tensor, made: Tensor | None = None) -> Tensor:
            made = self.logits(part) if made is None else made
            made = made.flatten(0, -2).to(accumulation_dtype(made.dtype))
            return F.cross_entropy(made, wanted.flatten(), ignore_index=IGNORE, reduction="sum")

        targets = targets.long()
        weight = self.embedding.weight if self.config.tie_embeddings else self.head.weight
        dtype = compute_dtype(weight)
        rows = max(1, LOGITS_AT_ONCE // self.config.padded_vocab_size)
        if logits is None and choose_loss(x.device, dtype)[0] == "fused":
            with torch.autocast(x.device.type, enabled=False):
                flat = x.flatten(0, 1).to(dtype)
                loss = fused_loss(flat, weight.to(dtype), targets.flatten(), self.config.vocab_size)
        elif logits is not None or targets.numel() <= rows:
            loss = total(x, targets, logits)
        else:
            # Chunks whose logits are thrown away and made again in the backward: all V * B * N never exist at once.
            parts = zip(x.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
            losses = [
                checkpoint(total, part, wanted, use_reentrant=False) if torch.is_grad_enabled() else total(part, wanted)
                for part, wanted in parts
            ]
            loss = torch.stack(losses).sum()  # pyright: ignore[reportArgumentType]
        return loss / (targets != IGNORE).sum().clamp(min=1)

    def generate(self, tokens: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Continue prompts (B, N); `recurformer.generation.generate` has the options. (B * num_samples, N + new)."""
        from recurformer.generation import generate

        return generate(self, tokens, max_new_tokens, **options)


# --- what bad input gets ---------------------------------------------------------------------------------------------


def check_inputs(
    model: LanguageModel,
    tokens: Tensor,
    targets: Tensor | None,
    attention_mask: Tensor | None,
    document_ids: Tensor | None,
    cache: KVCache | None,
    use_cache: bool,
    return_logits: bool,
    validate: bool | None,
) -> Tensor | None:
    """Raise ValueError on what `LanguageModel.forward` can't take; return the new tokens' mask (None: all real)."""
    config, device = model.config, model.embedding.weight.device
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens must be integer ids of shape (B, N), not {tokens.dtype} of {tuple(tokens.shape)}")
    B, N = tokens.shape
    if B == 0 or N == 0:
        raise ValueError(f"tokens have shape {(B, N)}; at least one row and one position are needed")
    for name, tensor in {"targets": targets, "document_ids": document_ids}.items():
        if tensor is not None and (tensor.shape != tokens.shape or tensor.is_floating_point()):
            raise ValueError(
                f"{name} must be integers of the tokens' shape {(B, N)}, not {tensor.dtype} of {tuple(tensor.shape)}"
            )
    for name, tensor in {
        "tokens": tokens, "targets": targets, "document_ids": document_ids, "attention_mask": attention_mask,
    }.items():  # fmt: skip
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} are on {tensor.device}, the model on {device}; move one of them")
    if not return_logits and targets is None:
        raise ValueError("return_logits=False without targets would compute nothing; give targets")
    if document_ids is not None and (cache is not None or use_cache):
        raise ValueError(
            "document_ids and a cache do not go together; call without the cache, or one document at a time"
        )
    P = 0
    if cache is not None:
        cache.check(config, B, N, device)
        P = cache.length
    if validate is None:
        validate = device.type == "cpu"

    valid = attention_mask
    if attention_mask is not None:
        if tuple(attention_mask.shape) not in {(B, N), (B, P + N)}:
            expected = f"{(B, N)}" if P == 0 else f"{(B, N)} for the new tokens or {(B, P + N)} for all"
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; it must be {expected}")
        if (
            validate
            and attention_mask.dtype != torch.bool
            and not ((attention_mask == 0) | (attention_mask == 1)).all()
        ):
            raise ValueError("attention_mask holds values other than 0 and 1; 1 marks a real token, 0 padding")
        valid = attention_mask.bool()
        if cache is not None and valid.shape[1] == P + N and P > 0:
            if not torch.equal(valid[:, :P], cache.valid[:, :P]):
                raise ValueError(
                    f"attention_mask's first {P} columns disagree with what the cache remembers; "
                    f"pass the mask of the {N} new tokens alone"
                )
            valid = valid[:, P:]
        if valid.all():  # a mask of ones is no mask, bit for bit
            valid = None
    if validate:
        real = tokens if valid is None else tokens[valid]
        if real.numel() and (real.min() < 0 or real.max() >= config.vocab_size):
            worst = real.min() if real.min() < 0 else real.max()
            raise ValueError(
                f"token id {int(worst)} is outside the vocabulary of {config.vocab_size} (0 to {config.vocab_size - 1})"
            )
        if targets is not None:
            wrong = targets[(targets != IGNORE) & ((targets < 0) | (targets >= config.vocab_size))]
            if wrong.numel():
                raise ValueError(
                    f"target {int(wrong[0])} is outside the vocabulary of {config.vocab_size}; -100 means ignore"
                )
        if document_ids is not None and (document_ids.long().diff(dim=1) < 0).any():
            raise ValueError("document_ids decrease along a row; documents must be contiguous, with non-decreasing ids")
    return valid
