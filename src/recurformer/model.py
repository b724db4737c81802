"""The Recurrent Transformer language model: embed the tokens, run the layers, finish.

A recurrent layer attends to keys and values made from its own *outputs* at earlier positions, and to one temporary pair
made from its input at the position itself. Both pairs come from the same weights, so a recurrent layer has exactly the
parameters of a Transformer layer. A standard layer attends to the pairs of its inputs throughout. A model may mix the
two kinds. `recurformer.layer` has the equations, `recurformer.scan` the algorithms that evaluate a recurrent layer.

Shape legend, here and everywhere: B batch, N new positions, P past positions (in the cache), M = P + N, L layers,
D width, F MLP width, H query heads, G key-value heads, K head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recurformer.attention import Layout, compiled, parallel_attention
from recurformer.cache import KVCache
from recurformer.checks import check_inputs, widened
from recurformer.choose import SCAN_CHOICES, choose_loss, choose_scan
from recurformer.config import LayerKind, ModelConfig
from recurformer.initialisation import draw_parameters
from recurformer.layer import LayerMaths, accumulation_dtype, compute_dtype, normalise
from recurformer.loss import chunked_loss, fused_loss, mean_over_targets, summed_loss
from recurformer.modules import Norm, WeightReader, calls_more_than_forward, norm_weight, plain_weight
from recurformer.scan.algorithms import scan_by_name
from recurformer.scan.wavefront import wavefront_scan

RECOMPUTE_CHOICES = ("none", "standard", "all")


class Layer(nn.Module):
    """The parameters of one layer, recurrent or standard, and its evaluation.

    Attributes:
        compiled: a standard layer runs its steps before and after attention through torch.compile, which fuses norms,
            activations and residuals. Recurrent layers are never compiled. Calls with a cache are not compiled either:
            decoding meets too many shapes.
        weight_of: function that returns the matrix of a projection's module. `LanguageModel.read_weights_with` sets it.
    """

    def __init__(self, config: ModelConfig, kind: LayerKind) -> None:
        super().__init__()
        self.config, self.kind = config, kind
        self.compiled = False
        self.weight_of: WeightReader = plain_weight
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
        """Return the layer's equations over its parameters.

        Args:
            dtype: of the matrices and biases; None: as stored.

        Raises:
            ValueError: when a hook or a wrapper of a submodule would have no effect.
        """
        tensors: dict[str, Tensor] = {}
        for name, module in self.named_children():
            if isinstance(module, Norm):
                tensors[name] = norm_weight(module, name)
                continue
            short = name.removesuffix("_proj")
            matrix, bias = self.weight_of(module, name), getattr(module, "bias", None)
            tensors[short] = matrix if dtype is None else matrix.to(dtype)
            if bias is not None:
                tensors[f"{short}_bias"] = bias if dtype is None else bias.to(dtype)
        return LayerMaths(self.config, **tensors)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        scan: str = "reference",
        cache: KVCache | None = None,
        index: int = 0,
        recompute: bool = False,
    ) -> Tensor:
        """Return the layer's outputs z (B, N, D).

        Args:
            x: (B, N, D), the layer's inputs.
            layout: positions, padding and documents of the batch.
            scan: name of the algorithm that evaluates a recurrent layer.
            cache: receives the new pairs; None: no cache.
            index: number of the layer in the cache.
            recompute: keep only x for the backward pass, which evaluates the layer again.
        """
        evaluate = self._recurrent if self.kind == "recurrent" else self._standard
        if not recompute:
            return evaluate(x, layout, scan, cache, index)
        return checkpoint(  # pyright: ignore[reportReturnType]
            evaluate, x, layout, scan, cache, index, use_reentrant=False, preserve_rng_state=False
        )

    def _recurrent(self, x: Tensor, layout: Layout, scan: str, cache: KVCache | None, index: int) -> Tensor:
        run = untraced(scan_by_name(scan))
        maths = self.maths(compute_dtype(self.q_proj.weight))
        with torch.autocast(x.device.type, enabled=False):  # every cast is written out
            z, keys, values = run(x, maths, layout, None if cache is None else cache.past(index))
        if cache is not None:
            cache.write(index, keys, values)
        return z

    def _standard(self, x: Tensor, layout: Layout, _scan: str, cache: KVCache | None, index: int) -> Tensor:
        before, after = LayerMaths.projections, LayerMaths.outputs
        if self.compiled and cache is None:
            before, after = compiled(before), compiled(after)
        maths = self.maths(compute_dtype(self.q_proj.weight))
        with torch.autocast(x.device.type, enabled=False):
            q, keys, values = before(maths, x, layout.rotation)
            if cache is not None:
                keys, values = cache.extend(index, keys, values)
            return after(maths, x, parallel_attention(q, keys, values, layout))


@dataclass
class Output:
    """The result of a call of the model."""

    logits: Tensor | None  # (B, N, V) in the compute dtype; None with return_logits=False
    loss: Tensor | None = None  # scalar, float32 (float64 for a float64 model), mean nats per real target
    cache: KVCache | None = field(default=None, repr=False)
    hidden: Tensor | None = field(default=None, repr=False)  # (B, N, D), input of the output layer; return_hidden=True


class LanguageModel(nn.Module):
    """A language model of recurrent and standard layers.

    `forward` is `embed`, `run_layers`, `finish`, then `logits` and `loss`. Each of these is public, so that a training
    loop may run the layers on different numbers of sequences at a time.

    Args:
        config: shape of the model. `init_weights` draws the parameters, from torch's global generator.

    Attributes:
        scan: how recurrent layers are evaluated: "auto", or the name of an exact algorithm of `recurformer.scan`.
        recompute: layers that keep only their inputs for the backward pass, which evaluates each of them again: "none",
            "standard" or "all" (also True). Less memory, more time. Calls with a cache keep everything.
        kept_engine: decode engine of the last `generate`, on a GPU. It is no part of the state, and is not copied.
        weight_of: function that returns the matrix of the output layer's module. `read_weights_with` sets it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self._scan, self._recompute = "auto", "none"
        self.weight_of: WeightReader = plain_weight
        self.kept_engine: Any = None
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

    @property
    def recompute(self) -> str:
        return self._recompute

    @recompute.setter
    def recompute(self, layers: Literal["none", "standard", "all"] | bool) -> None:
        name = ("all" if layers else "none") if isinstance(layers, bool) else layers
        if name not in RECOMPUTE_CHOICES:
            raise ValueError(f"recompute is {name!r}; choose one of {', '.join(map(repr, RECOMPUTE_CHOICES))}")
        self._recompute = name

    def read_weights_with(self, reader: WeightReader) -> None:
        """Let `reader(module, name)` return the matrix of every projection and of the output layer.

        Adapters that wrap these modules need it: the model multiplies by matrices and never calls a projection.
        """
        self.weight_of = reader
        for layer in self.layers:
            cast(Layer, layer).weight_of = reader

    def init_weights(self) -> None:
        """Draw every parameter anew, as `recurformer.initialisation` says."""
        head = None if self.config.tie_embeddings else self.head
        draw_parameters(self.config, self.embedding, self.layers, self.norm, head)

    def num_parameters(self, embedding: bool = False) -> int:
        """Return the number of parameters, without the embedding and the output layer unless `embedding`."""
        outside = () if embedding else ("embedding.weight", "head.weight")
        return sum(p.numel() for name, p in self.named_parameters() if name not in outside)

    # --- a call ------------------------------------------------------------------------------------------------------

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
        return_hidden: bool = False,
    ) -> Output:
        """Return the logits, and the loss when there are targets.

        Args:
            tokens: (B, N) integer ids. Ids at pads may be anything.
            targets: (B, N) integer, the token to predict AT each position (nothing is shifted), -100 to ignore.
            attention_mask: (B, N) bool or 0/1 of any dtype, 0 = padding, anywhere in a row. With a cache it may also be
                (B, P + N); its first P columns must then repeat the mask that the cache holds.
            document_ids: (B, N) integer, non-decreasing along N: packed documents that do not see each other.
            cache: the cache to continue. The new tokens are appended in place and the same object is returned.
            use_cache: start a cache that grows as needed.
            return_logits: False saves the memory of the logits and leaves `logits` None. Needs targets or
                `return_hidden`.
            validate: check token range, targets, mask values and document order. None: check on the CPU only, since on
                other devices the check forces a synchronisation.
            return_hidden: also return the input of the output layer.

        Returns:
            Output: logits (B, N, V); loss = sum of token losses / number of real targets (0 without any); cache.

        Raises:
            ValueError: naming the value, the limit and the remedy, before any work.
        """
        if not (return_logits or return_hidden) and targets is None:
            raise ValueError("return_logits=False without targets would compute nothing; give targets")
        tokens = widened(tokens)
        targets, attention_mask, document_ids = (
            None if given is None else widened(given) for given in (targets, attention_mask, document_ids)
        )
        valid = check_inputs(
            self.config, tokens, device=self.embedding.weight.device, targets=targets, attention_mask=attention_mask,
            document_ids=document_ids, cache=cache, use_cache=use_cache, validate=validate,
        )  # fmt: skip
        if cache is None and use_cache:
            cache = self.new_cache(len(tokens))
        x = self.hidden(tokens.long(), valid, document_ids, cache)
        logits = self.logits(x) if return_logits else None
        loss = None if targets is None else self.loss(x, targets, logits)
        return Output(logits, loss, cache, x if return_hidden else None)

    def new_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """Return an empty cache for calls of this model, in the compute dtype."""
        weight = self.embedding.weight
        return KVCache(self.config, batch_size, max_length, dtype=compute_dtype(weight), device=weight.device)

    def hidden(
        self, tokens: Tensor, valid: Tensor | None, documents: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Return the input of the output layer, (B, N, D): `forward` without checks, logits and loss.

        Args:
            tokens: (B, N) int64.
            valid: (B, N) bool, False at pads; None: no pads.
            documents: (B, N) int64, as `document_ids` of `forward`.
            cache: the cache to continue in place.
        """
        x = self.embed(tokens, valid)
        x = self.run_layers(x, valid=valid, documents=documents, cache=cache)
        return self.finish(x)

    def embed(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the input of the first layer, (B, N, D) in the accumulation dtype, zero at pads.

        Args:
            tokens: (B, N) int64. Ids at pads may be anything.
            valid: (B, N) bool, False at pads; None: no pads.
        """
        x = self.embedding(tokens if valid is None else tokens.masked_fill(~valid, 0))
        x = x.to(accumulation_dtype(x.dtype))
        # Zeros at pads: nothing of their contents, not even NaN, reaches a real position or a gradient.
        return x if valid is None else torch.where(valid[:, :, None], x, 0.0)

    def run_layers(
        self,
        x: Tensor,
        first: int = 0,
        stop: int | None = None,
        *,
        valid: Tensor | None = None,
        documents: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the output (B, N, D) of the layers first ... stop - 1, given the input x of the first of them.

        Args:
            x: (B, N, D) in the accumulation dtype.
            first, stop: range of layers, 0 <= first <= stop <= L; stop None: L.
            valid: (B, N) bool, False at pads; None: no pads.
            documents: (B, N) int64, non-decreasing along N; None: one document a row.
            cache: the cache to continue in place. Needs all layers.

        Raises:
            ValueError: for a range that the model does not have, x of another shape, or a cache with some layers only.
        """
        stop = self.config.n_layers if stop is None else stop
        self._check_run(x, first, stop, cache)
        B, N, _ = x.shape
        recompute = self.recompute if cache is None and torch.is_grad_enabled() else "none"
        scan, _ = choose_scan(
            self.scan, self.config, x.device, batch_size=B, length=N, past=0 if cache is None else cache.length,
            dtype=compute_dtype(self.embedding.weight), together=recompute != "all",
        )  # fmt: skip
        if cache is not None:
            cache.reserve(N)
        layout = self.layout(N, valid, documents, cache)
        for group in self.groups(range(first, stop), together=scan == "wavefront" and recompute != "all"):
            if len(group) > 1:
                x = self._wavefront(x, group, layout, cache)
            else:
                layer = cast(Layer, self.layers[group[0]])
                x = layer(x, layout, scan, cache, group[0], recompute in ("all", layer.kind))
        if cache is not None:
            cache.advance(N, valid)
        return x

    def _check_run(self, x: Tensor, first: int, stop: int, cache: KVCache | None) -> None:
        L, D = self.config.n_layers, self.config.d_model
        if not 0 <= first <= stop <= L:
            raise ValueError(f"layers {first} to {stop} were asked for; 0 <= first <= stop <= {L} must hold")
        if x.dim() != 3 or x.shape[-1] != D:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (B, N, {D})")
        if cache is not None and (first, stop) != (0, L):
            raise ValueError(f"a cache needs all layers, not {first} to {stop}: the others would have no pairs in it")

    def finish(self, x: Tensor) -> Tensor:
        """Return the input of the output layer, (B, N, D), given the output x of the last layer."""
        return normalise(x, norm_weight(self.norm, "norm"), self.config)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (..., V) in the compute dtype, given the input x (..., D) of the output layer."""
        V = self.config.vocab_size
        if self._calls_head():
            return self.head(x.to(compute_dtype(self.head.weight)))[..., :V]
        weight = self.output_weight()
        dtype = compute_dtype(weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), weight.to(dtype))[..., :V]

    def output_weight(self) -> Tensor:
        """Return the matrix of the output layer, (rows, D): the embedding's where the two are tied."""
        return self.embedding.weight if self.config.tie_embeddings else self.weight_of(self.head, "head")

    def _calls_head(self) -> bool:
        """Whether logits need a call of the output layer's module, because of hooks on it."""
        return not self.config.tie_embeddings and calls_more_than_forward(self.head)

    def loss(self, x: Tensor, targets: Tensor, logits: Tensor | None = None) -> Tensor:
        """Return the mean loss in nats over the real targets, 0 without any.

        Args:
            x: (B, N, D), the input of the output layer.
            targets: (B, N) integer, -100 to ignore.
            logits: (B, N, V), where they exist already; None: the loss is computed without ever holding all of them.
        """
        targets = targets.long()
        if logits is None and self._calls_head():
            logits = self.logits(x)  # a hook sees the output layer's whole output
        if logits is not None:
            return mean_over_targets(summed_loss(logits, targets), targets)
        weight = self.output_weight()
        dtype = compute_dtype(weight)
        if choose_loss(x.device, dtype)[0] == "fused":
            with torch.autocast(x.device.type, enabled=False):
                flat = x.flatten(0, 1).to(dtype)
                total = fused_loss(flat, weight.to(dtype), targets.flatten(), self.config.vocab_size)
        else:
            total = chunked_loss(x, targets, self.logits, self.config.padded_vocab_size)
        return mean_over_targets(total, targets)

    # --- parts of a call ---------------------------------------------------------------------------------------------

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

    def groups(self, indices: Sequence[int], together: bool) -> list[list[int]]:
        """Return consecutive layers in groups: each group is evaluated by one scan.

        A group has several layers only if all are recurrent, `together` is true, and none has hooks or another class:
        a wavefront does not call the layers, so hooks would have no effect.
        """

        def joins(index: int) -> bool:
            layer = self.layers[index]
            return (
                self.config.layer_kinds[index] == "recurrent"
                and type(layer) is Layer
                and not calls_more_than_forward(layer)
            )

        groups: list[list[int]] = []
        for index in indices:
            if together and groups and joins(index) and joins(index - 1):
                groups[-1].append(index)
            else:
                groups.append([index])
        return groups

    def _wavefront(self, x: Tensor, group: list[int], layout: Layout, cache: KVCache | None) -> Tensor:
        """Return the output of consecutive recurrent layers, and write their new pairs to the cache."""
        run = untraced(wavefront_scan)
        layers = [cast(Layer, self.layers[index]) for index in group]
        maths = [layer.maths(compute_dtype(layer.q_proj.weight)) for layer in layers]
        past = [None if cache is None else cache.past(index) for index in group]
        with torch.autocast(x.device.type, enabled=False):
            z, pairs = run(x, maths, layout, past)
        if cache is not None:
            for index, (keys, values) in zip(group, pairs, strict=True):
                cache.write(index, keys, values)
        return z

    def generate(self, tokens: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Return prompts (B, N) with their continuations, (B * num_samples, N + new).

        `recurformer.generation.rows.generate_rows` documents the options.
        """
        from recurformer.generation.rows import generate

        return generate(self, tokens, max_new_tokens, **options)


def untraced(scan: Callable[..., Any]) -> Callable[..., Any]:
    """Return a scan that torch.compile of the whole model does not trace: its loops over positions would not end."""
    return torch.compiler.disable(scan) if torch.compiler.is_compiling() else scan
