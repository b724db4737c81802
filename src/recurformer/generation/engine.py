"""The decode engine: static buffers that grow, and one step for all rows, recorded as a CUDA graph on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recurformer.cache import KVCache
from recurformer.choose import choose_step
from recurformer.generation.fused.make import make_step
from recurformer.generation.plain_step import PlainStep
from recurformer.generation.prompt import read_prompt, reads_by_steps
from recurformer.generation.state import DecodeState
from recurformer.layer import compute_dtype
from recurformer.model import LanguageModel, Layer
from recurformer.modules import calls_more_than_forward

FIRST_VISIBLE = 256  # slots that the plain step's first graph reads; each further graph reads twice as many


def engine_obstacle(model: LanguageModel) -> str | None:
    """Return why no engine can decode for this model, with a remedy, or None."""
    replaced = any(getattr(model, name) != getattr(LanguageModel, name).__get__(model) for name in ("hidden", "logits"))
    if type(model) is not LanguageModel or replaced:
        return "the model computes its logits in a way of its own; decode with step='model'"
    for index, layer in enumerate(model.layers):
        if type(layer) is not Layer:
            return f"layer {index} is more than a layer (wrapped, or with hooks); decode with step='model'"
    for name, module in model.named_modules():
        if calls_more_than_forward(module):
            what = f"{name.replace('layers.', 'layer ')} is more than a layer (wrapped, or with hooks)"
            return f"{what if name else 'the model has hooks'}; decode with step='model'"
    if type(model.embedding).forward is not nn.Embedding.forward:
        return f"the embedding is a {type(model.embedding).__name__}; decode with step='model'"
    return None


def fingerprint(model: LanguageModel) -> tuple[tuple[int, int], ...] | None:
    """Return addresses and version counters of all weights; None where PyTorch does not count changes."""
    if any(p.is_inference() for p in model.parameters()):
        return None
    return tuple((p.data_ptr(), p._version) for p in model.parameters())


class DecodeEngine:
    """Continues a fixed number of rows, one token of each a step, for layers of any kind.

    All rows fill the same slots; shorter prompts have pads, best on the left. The buffers grow as needed and keep their
    contents. `crop`, `clone` and `select` are exact at any point, like those of `KVCache`.

    Args:
        model: its weights are read where they are. Weights of another dtype are cast once, so that later changes need a
            new engine.
        batch_size: B, rows.
        capacity: slots to begin with.
        dtype: of products and cache; None: the model's, or autocast's where it is on.
        step: "plain" (PyTorch operations), "fused" (Triton kernels), or "auto".
        padded: make room for a mask now. Otherwise the first prompt with pads does.

    Attributes:
        length: slots filled, pads included.
        state: the buffers. Growth replaces them.
        step_name, why: the step that runs, and the reason in words.

    Raises:
        ValueError: for sizes below 1, an unknown step, a step that can't run here, or a model with wrapped layers.
    """

    def __init__(
        self,
        model: LanguageModel,
        batch_size: int,
        capacity: int = FIRST_VISIBLE,
        *,
        dtype: torch.dtype | None = None,
        step: str = "auto",
        padded: bool = False,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("capacity", capacity)):
            if value < 1:
                raise ValueError(f"{name} is {value}; a decode engine needs at least 1")
        reason = engine_obstacle(model)
        if reason is not None:
            raise ValueError(reason)
        weight = model.embedding.weight
        dtype = compute_dtype(weight) if dtype is None else dtype
        self.step_name, self.why = choose_step(step, model.config, weight.device, dtype, batch_size)
        self.model, self.config, self.device, self.dtype = model, model.config, weight.device, dtype
        self.on_gpu = weight.device.type == "cuda"
        self.side = torch.cuda.Stream(weight.device) if self.on_gpu else None
        self.length = 0
        self._requested, self._weights = step, fingerprint(model)
        self._plain: PlainStep | None = None
        self.graphs: dict[tuple[bool, int], torch.cuda.CUDAGraph] = {}
        self._use(DecodeState.empty(model.config, batch_size, capacity, dtype, weight.device, padded))

    def __repr__(self) -> str:
        return f"DecodeEngine(step={self.step_name!r}, length={self.length}, batch_size={self.batch_size})"

    def __deepcopy__(self, memo: Any) -> None:
        """Return nothing: a copy of a model that keeps an engine makes its own."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as None, for the same reason."""
        return type(None), ()

    def serves(self, model: LanguageModel, batch_size: int, step: str) -> bool:
        """Return whether a new engine with these arguments would be the same, changed weights included."""
        same = (model, model.config, compute_dtype(model.embedding.weight), batch_size, step)
        own = (self.model, self.config, self.dtype, self.batch_size, self._requested)
        return same == own and self._weights is not None and self._weights == fingerprint(model)

    @property
    def batch_size(self) -> int:
        """B, rows."""
        return self.state.batch_size

    @property
    def capacity(self) -> int:
        """Slots that fit before the buffers grow."""
        return self.state.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of the key and value buffers."""
        return self.state.nbytes

    # --- tokens ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(
        self, tokens: Tensor, valid: Tensor | None = None, *, samples: int = 1, chunk: int | None = None
    ) -> Tensor:
        """Append the tokens of prompts; return the logits (B, V) after each row's last real one.

        The next step overwrites them.

        Args:
            tokens: (B, N) ids, or (B / samples, N), N >= 1.
            valid: of their shape, bool, False at pads; None: no pads.
            samples: number of neighbouring rows that continue the same prompt, which is read once.
            chunk: positions that go through the layers at once; None: as many as memory allows.

        Raises:
            ValueError: for another shape, or `samples` above 1 when slots are filled.
        """
        (rows, N), device = tokens.shape, self.device
        if rows * samples != self.batch_size or N == 0:
            raise ValueError(
                f"tokens have shape {(rows, N)} for {samples} samples each; the engine has {self.batch_size} rows"
            )
        if valid is not None and valid.shape != tokens.shape:
            raise ValueError(f"valid has shape {tuple(valid.shape)}; it must be that of the tokens, {(rows, N)}")
        if samples > 1 and self.length:
            raise ValueError(f"{self.length} slots are filled; only an empty engine forks prompts into {samples}")
        if valid is not None and bool(valid.all()):
            valid = None
        self.reserve(N, padded=valid is not None)
        by_steps = reads_by_steps(self.model, self.step_name, self.batch_size, N)[0]
        left = valid is None or bool((valid[:, 1:] >= valid[:, :-1]).all() and valid[:, -1].all())
        if by_steps and left:
            return self._read_by_steps(tokens, valid, samples)
        self.flush()
        state, fork = self.state, None
        if samples > 1:
            fork = torch.arange(rows, device=device).repeat_interleave(samples)
            cache = KVCache(self.config, rows, N, dtype=self.dtype, device=device)
        else:
            cache = state.as_cache(self.config, self.length)
        x = read_prompt(self.model, cache, tokens, valid, chunk)
        if fork is not None:
            state.load(cache, fork)
        else:
            state.place(cache.length)
        self.length += N
        logits = self.model.logits(x)
        state.logits.copy_(logits if fork is None else logits[fork])
        return state.logits

    def _read_by_steps(self, tokens: Tensor, valid: Tensor | None, samples: int) -> Tensor:
        """Read left-padded prompts token by token; arguments and result as in `prefill`."""
        if valid is not None:
            tokens = torch.where(valid, tokens, tokens[:, -1:])  # ids at pads may be outside of the vocabulary
            assert self.state.valid is not None
            slots = slice(self.length, self.length + tokens.shape[1])
            self.state.valid[:, slots] = valid.repeat_interleave(samples, 0)
            self.state.place(self.length)
        tokens = tokens.repeat_interleave(samples, 0).t().contiguous()
        for column in tokens[:-1]:
            self.step(column, logits=False)
        return self.step(tokens[-1])

    @torch.no_grad()
    def step(self, tokens: Tensor | None = None, *, logits: bool = True) -> Tensor:
        """Append one token of every row; return the logits (B, V) after it, which the next step overwrites.

        Args:
            tokens: (B,) int64 ids, all real; None: those that `state.tokens` holds.
            logits: False: skip the output layer and leave the logits as they were.
        """
        self.reserve(1)
        state = self.state
        if tokens is not None:
            state.tokens.copy_(tokens)
        self._set_visible()
        with torch.autocast(
            self.device.type, enabled=False
        ):  # the engine has chosen the dtype; a caller's autocast must not
            if self.on_gpu:
                with torch.cuda.device(self.device):
                    self._graph(logits).replay()
            else:
                self._step(logits)
                state.advance()
        self.length += 1
        return state.logits

    def _set_visible(self) -> None:
        """Set the slots that the plain step reads: all filled ones, on a GPU rounded up to a power of two."""
        if self._plain is None:
            return
        visible = self.length + 1
        if self.on_gpu:
            visible = min(self.capacity, max(FIRST_VISIBLE, 1 << (visible - 1).bit_length()))
        self._plain.visible = visible

    def _graph(self, logits: bool) -> torch.cuda.CUDAGraph:
        """Return the step as a CUDA graph, recorded when it is first needed; recording leaves the state as it is."""
        key = (logits, 0 if self._plain is None else self._plain.visible)
        if key not in self.graphs:
            graph, side = torch.cuda.CUDAGraph(), self.side
            assert side is not None
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._step(
                    logits
                )  # compiles kernels and loads libraries, and writes what the first replay writes again
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize(self.device)
            # PyTorch's shared capture stream belongs to one device, and all graphs would share its workspaces.
            with torch.cuda.graph(graph, pool=self.pool, stream=side, capture_error_mode="thread_local"):
                self._step(logits)
                self.state.advance()
            self.pool = graph.pool()
            self.graphs[key] = graph
        return self.graphs[key]

    # --- buffers -----------------------------------------------------------------------------------------------------

    def reserve(self, new: int, *, padded: bool = False) -> None:
        """Make room for `new` more slots, doubling as often as needed, and for a mask. All slots keep their pairs."""
        capacity, padded = self.capacity, padded or self.state.valid is not None
        while capacity < self.length + new:
            capacity *= 2
        if capacity == self.capacity and padded == (self.state.valid is not None):
            return
        self.flush()
        old = self.state.as_cache(self.config, self.length)
        tokens = self.state.tokens
        state = DecodeState.empty(self.config, self.batch_size, capacity, self.dtype, self.device, padded)
        state.load(old)
        state.tokens.copy_(tokens)
        state.logits.copy_(self.state.logits)
        self._use(state)

    def _use(self, state: DecodeState) -> None:
        """Make the step work on these buffers."""
        self.settle()
        self.state = state
        self.graphs = {}
        self.pool: Any = None
        self._step: Any = None  # frees the old step before the new one takes memory
        if self.step_name == "fused":
            self._step = make_step(self.model, state, defer=True)
        else:
            if self._plain is None:
                self._plain = PlainStep(self.model, state)
            self._plain.state = state
            self._step = self._plain

    def settle(self) -> None:
        """Wait for recorded steps that still run, because a graph must not be freed before it ends."""
        if self.on_gpu and self.graphs:
            torch.cuda.synchronize(self.device)

    def flush(self) -> None:
        """Make the pairs of the last token, where the step has left them to the next step."""
        if self.step_name == "fused" and self.length:
            self._step.flush()

    def refresh(self) -> None:
        """Copy weights that were changed in place, where the step has copies of them."""
        if self.step_name == "fused":
            self._step.refresh()

    # --- the cache ---------------------------------------------------------------------------------------------------

    def cache(self) -> KVCache:
        """Return the filled slots as a `KVCache` over the engine's own memory; its clone outlives the next call."""
        self.flush()
        return self.state.as_cache(self.config, self.length)

    @torch.no_grad()
    def load(self, cache: KVCache, rows: Tensor | Sequence[int] | None = None) -> None:
        """Replace the engine's contents by those of a cache.

        Args:
            cache: is only read.
            rows: rows of the cache, one for each row of the engine, in order, repeats allowed; None: all.

        Raises:
            ValueError: for a cache of another model or device, or a number of rows that is not the engine's.
        """
        index = None if rows is None else torch.as_tensor(rows, device=self.device)
        cache.check(self.config, self.batch_size if index is None else cache.batch_size, 0, self.device)
        if index is not None and (len(index) != self.batch_size or index.min() < 0 or index.max() >= cache.batch_size):
            raise ValueError(
                f"rows are {index.tolist()}; give {self.batch_size} numbers from 0 to {cache.batch_size - 1}"
            )
        self.reset()
        self.reserve(cache.length, padded=cache.padded)
        self.state.load(cache, index)
        self.length = cache.length

    def reset(self) -> None:
        """Forget every slot."""
        self.crop(0)

    def crop(self, n: int) -> None:
        """Keep the first n slots (roll-back). The logits stay those of the last step."""
        if not 0 <= n <= self.length:
            raise ValueError(f"can't crop to {n} slots; the engine holds {self.length}")
        self.flush()
        if self.state.valid is not None:
            self.state.valid[:, n:] = True
        self.length = n
        self.state.place(n)

    def clone(self) -> DecodeEngine:
        """Return an independent engine with the same contents (fork)."""
        return self._another(None, self.batch_size)

    def select(self, rows: Tensor | Sequence[int]) -> DecodeEngine:
        """Return a new engine of the given rows, in this order, repeats allowed (beams, several samples)."""
        index = torch.as_tensor(rows, device=self.device)
        if index.dim() != 1 or index.numel() == 0 or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(f"rows must be a non-empty list of row numbers, not {rows!r}")
        if index.min() < 0 or index.max() >= self.batch_size:
            raise ValueError(f"rows {index.tolist()} reach outside the engine's {self.batch_size} rows")
        return self._another(index, index.numel())

    @torch.no_grad()
    def _another(self, rows: Tensor | None, batch_size: int) -> DecodeEngine:
        """Return a new engine with these rows of the contents; None: all."""
        self.flush()
        padded = self.state.valid is not None
        made = DecodeEngine(self.model, batch_size, self.capacity, dtype=self.dtype, step=self.step_name, padded=padded)
        made.state.load(self.state.as_cache(self.config, self.length), rows)
        made.length = self.length
        for name in ("tokens", "logits"):
            mine = getattr(self.state, name)
            getattr(made.state, name).copy_(mine if rows is None else mine[rows])
        return made
