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

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recurformer.attention import Layout, compiled, parallel_attention
from recurformer.cache import KVCache
from recurformer.checks import check_inputs
from recurformer.choose import SCAN_CHOICES, choose_loss, choose_scan
from recurformer.config import LayerKind, ModelConfig
from recurformer.layer import LayerMaths, accumulation_dtype, compute_dtype, normalise
from recurformer.loss import IGNORE, fused_loss
from recurformer.scan.algorithms import scan_by_name
from recurformer.scan.wavefront import wavefront_scan

LOGITS_AT_ONCE = 2**25  # elements; above this the loss without logits works in chunks that are recomputed backward


# --- one layer -------------------------------------------------------------------------------------------------------


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
            self.config,
            self.embedding.weight.device,
            tokens,
            targets,
            attention_mask,
            document_ids,
            cache,
            use_cache,
            return_logits,
            validate,
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
        valid = check_inputs(
            self.config,
            self.embedding.weight.device,
            tokens,
            None,
            attention_mask,
            document_ids,
            None,
            False,
            True,
            validate,
        )
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
        if cache is not None:
            cache.reserve(N)
        layout = self.layout(N, valid, documents, cache)
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

    def layout(
        self, length: int, valid: Tensor | None = None, documents: Tensor | None = None, cache: KVCache | None = None
    ) -> Layout:
        """Return who sees whom when this model reads `length` new tokens.

        Args:
            length: N, new positions of each row.
            valid: (B, N) bool, False at pads; None: no pads.
            documents: (B, N) int64, non-decreasing; None: one document a row.
            cache: the cache that the call continues; None: there is no past.
        """
        weight = self.embedding.weight
        return Layout.build(
            self.config,
            length,
            past=0 if cache is None else cache.length,
            valid=valid if cache is None else cache.validity_with(valid, length),
            documents=documents,
            dtype=accumulation_dtype(weight.dtype),
            device=weight.device,
        )

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
        """Continue prompts (B, N); `recurformer.generation.sampling` has the options. (B * num_samples, N + new)."""
        from recurformer.generation.sampling import generate

        return generate(self, tokens, max_new_tokens, **options)


# --- what bad input gets ---------------------------------------------------------------------------------------------
