"""The tiled scan on NVIDIA GPUs: Triton kernels, library products, and the whole position loop in CUDA graphs.

`kernels.py` holds what happens between two products, `engine.py` the order of it all. Everything in between PyTorch's
world and the engine's is here: an autograd function over a stack of layers, the layers of which may also be one.
"""

from __future__ import annotations

import threading
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recurformer.hardware import scan_obstacle

if TYPE_CHECKING:
    from collections.abc import Sequence

    from recurformer.attention import Layout
    from recurformer.config import ModelConfig
    from recurformer.layer import LayerMaths

CHUNK = 64  # positions of a chunk up to N = 1024, twice as many behind that
LEAF, LEAF_BACKWARD = 8, 16  # positions of a leaf
KEEP_PART = 4  # save="auto" keeps what in a whole model takes at most this part of the memory
# D from which it keeps what Q, K and V make of the inputs: the time that a byte saves grows with D. At 1024 a peak that
# is 1.4 GB higher saved 1.4 ms of 105, at 1408 one that is 1.9 GB higher 3 ms of 161.
KEEP_WIDTH = 1280
SAVES = ("auto", "minimal", "pairs", "inner", "all")

Past = tuple[Tensor, Tensor] | None
LOCK = threading.RLock()  # an engine serves one call at a time


def fused_scan(
    x: Tensor, layer: LayerMaths, layout: Layout, past: Past = None, **options: Any
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
    past: Sequence[Past] | None = None,
    *,
    chunk: int | None = None,
    leaf: int | None = None,
    save: str = "auto",
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Outputs of the last of several recurrent layers of one shape, and the persistent pairs of each.

    Args:
        x: (B, N, D), the first layer's inputs.
        layers: their maths and weights.
        layout: positions, padding, documents.
        past: of each layer, keys and values (B, G, P, K), constants; None: there are none.
        chunk: C, a power of two: positions between two pulls, by which a layer is behind the one below; None: by N.
        leaf: S, a power of two up to C, positions that read each other directly; None: what was found to be fast.
        save: what the forward keeps for the backward besides inputs, outputs and attention outputs: "minimal"
            (nothing), "pairs" (queries and pairs), "inner" (and the MLP's inner values), "all" (and what Q, K and V
            make of the inputs, in place of queries) or "auto", by memory and width.

    Returns:
        z (B, N, D), and a pair of keys and values (B, G, N, K) for each layer.

    Raises:
        ValueError: where the kernels can't run (device, head width, dtype), naming what can.
    """
    first = layers[0]
    reason = scan_obstacle(first.config, x.device, first.compute_dtype)
    if reason is not None:
        raise ValueError(f"the fused scan can't run: {reason}")
    if save not in SAVES:
        raise ValueError(f"save is {save!r}; choose one of {', '.join(map(repr, SAVES))}")
    from recurformer.scan.fused.engine import Shape

    B, N, _ = x.shape
    if chunk is None:
        chunk = min(CHUNK if N <= 1024 else 2 * CHUNK, max(16, 1 << (N - 1).bit_length()))
    S, R = (min(side, chunk) for side in ((LEAF, LEAF_BACKWARD) if leaf is None else (leaf, leaf)))
    for name, side in (("chunk", chunk), ("leaf", S)):
        if side < 1 or side & (side - 1):
            raise ValueError(f"{name} is {side}; it must be a power of two")
    config = first.config
    names = [f.name for f in fields(first) if f.name not in ("config", "kv", "kv_bias")]  # packed ones repeat k and v
    tensors = [getattr(layer, name) for layer in layers for name in names]
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
    if save == "auto" and differentiable:
        save = affordable(config, B * N * first.compute_dtype.itemsize, x.device)
    segmented = layout.valid is not None or layout.documents is not None
    shape = Shape(
        replace(config, n_layers=1, layers="recurrent", vocab_size=1, vocab_multiple=1, residual_scale="none"),
        len(layers), B, chunk, S, R, first.compute_dtype, x.device, segmented, differentiable,
        differentiable and save in ("inner", "all"), differentiable and save == "all", config.branch_scale,
        precision(x.device),
    )  # fmt: skip
    call = Call(
        shape, layout, list(past) if past is not None else [None] * len(layers), save != "minimal", names, config
    )
    with torch.cuda.device_of(x):  # kernels and graphs go to the current device
        z, keys, values = StackScan.apply(x, call, *tensors)  # pyright: ignore[reportGeneralTypeIssues]
    return z, list(zip(keys, values, strict=True))


def total_memory(device: torch.device) -> int:
    """Bytes of a device, free or not; where that is no GPU, those of a usual one."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**36


def affordable(config: ModelConfig, row: int, device: torch.device, total: float | None = None) -> str:
    """The most that may be kept: what takes at most a part of the device's memory in all recurrent layers of a model,
    and at widths where it is worth its memory.

    Args:
        row: bytes of one value at every position.
        total: the memory of a device that is not here; None: `total_memory`.
    """
    total = total_memory(device) if total is None else total
    layers = config.layer_kinds.count("recurrent")
    for save in ("all", "inner", "pairs") if config.d_model >= KEEP_WIDTH else ("inner", "pairs"):
        if layers * row * kept_values(config, save) <= total // KEEP_PART:
            return save
    return "minimal"


def kept_values(config: ModelConfig, save: str) -> int:
    """Values a position that one layer keeps under `save`, which is not "auto", besides what it always keeps."""
    queries, pairs = config.n_heads * config.head_width, 2 * config.kv_heads * config.head_width
    inner = config.mlp_width * (2 if config.activation == "swiglu" else 1)
    raw = queries + pairs
    return {
        "minimal": 0, "pairs": queries + pairs, "inner": queries + pairs + inner, "all": raw + pairs + inner,
    }[save]  # fmt: skip


def precision(device: torch.device) -> tuple[Any, ...]:
    """PyTorch's settings that products on a GPU depend on."""
    if device.type != "cuda":
        return ()
    matmul = torch.backends.cuda.matmul
    return (
        torch.get_float32_matmul_precision(),
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
    )


def release() -> None:
    """Give back the buffers and graphs that are kept for shapes met before."""
    from recurformer.scan.fused import engine

    with LOCK:
        for one in engine._engines.values():
            one.settle()
        engine._engines.clear()


class Call:
    """What is no differentiable tensor in one evaluation."""

    def __init__(
        self, shape: Any, layout: Layout, past: list[Past], keep: bool, names: list[str], config: ModelConfig
    ) -> None:
        self.shape, self.layout, self.past, self.keep, self.names, self.config = (
            shape,
            layout,
            past,
            keep,
            names,
            config,
        )

    def layers(self, tensors: Sequence[Tensor | None]) -> list[LayerMaths]:
        from recurformer.layer import LayerMaths

        count = len(self.names)
        return [
            LayerMaths(self.config, **dict(zip(self.names, tensors[l * count : (l + 1) * count], strict=True)))  # pyright: ignore[reportArgumentType]
            for l in range(self.shape.L)
        ]

    @property
    def whole(self) -> int:
        """N rounded up to chunks."""
        return -(-self.layout.length // self.shape.C) * self.shape.C

    def empty(self, name: str) -> Tensor:
        """An N-long tensor: q, a or ga (L, N, B, H K), kv (L, P + N, B, 2 G K), lse or delta (L, N, B, H), raw or up.

        raw is (L, N, B, (H + 2 G) K), up (L, N, B, U), U = F or 2 F.
        """
        shape, config, P = self.shape, self.config, self.layout.past
        H, G, K = config.n_heads, config.kv_heads, config.head_width
        length, width, dtype = {
            "q": (self.whole, H * K, shape.dtype), "a": (self.whole, H * K, shape.dtype),
            "ga": (self.whole, H * K, shape.dtype), "kv": (P + self.whole, 2 * G * K, shape.dtype),
            "lse": (self.whole, H, torch.float32), "delta": (self.whole, H, torch.float32),
            "raw": (self.whole, (H + 2 * G) * K, shape.dtype),
            "up": (self.whole, config.mlp_width * (2 if config.activation == "swiglu" else 1), shape.dtype),
        }[name]  # fmt: skip
        return torch.empty(shape.L, length, shape.B, width, dtype=dtype, device=shape.device)

    def new_pairs(self) -> Tensor:
        """`empty("kv")` with the past in front."""
        kv, P = self.empty("kv"), self.layout.past
        if P:
            for l, past in enumerate(self.past):
                assert past is not None
                pairs = torch.stack(past, dim=3)  # (B, G, P, 2, K)
                kv[l, :P].copy_(pairs.permute(2, 0, 3, 1, 4).flatten(2))
        return kv


class Entries:
    """The table of one call, and the tensors that it points to, which must live as long as the call runs."""

    def __init__(self, call: Call, x: Tensor, **named: Tensor) -> None:
        from recurformer.scan.fused import kernels

        layout, shape = call.layout, call.shape
        self.values: dict[int, int] = {kernels.LENGTH.value: layout.length, kernels.PAST.value: layout.past}
        self.kept: list[Tensor] = []
        self.kernels = kernels
        self.point(X=x, **named)
        if layout.rotation is not None:
            cos, sin = layout.rotation.cos.float().contiguous(), layout.rotation.sin.float().contiguous()
            self.point(COS=cos, SIN=sin)
            self.values[kernels.ROTATION_STRIDE.value] = cos[0].numel() if cos.shape[0] > 1 else 0
        if shape.segments:
            self.point(**segments(layout, shape.B, shape.C, call.whole // shape.C))

    def point(self, **named: Tensor) -> None:
        """Enter the addresses of contiguous tensors."""
        for name, tensor in named.items():
            assert tensor.is_contiguous()
            self.kept.append(tensor)
            self.values[getattr(self.kernels, name).value] = tensor.data_ptr()


def segments(layout: Layout, B: int, C: int, chunks: int) -> dict[str, Tensor]:
    """Who sees whom as integers: a query sees earlier keys of its own segment; pads are keys of none.

    FIRST and LAST, (B, chunks): the first slot that a chunk's queries see, and the end of those that see its keys.
    """
    P, N, device = layout.past, layout.length, layout.positions.device
    M = P + N
    if layout.documents is None:
        documents = torch.zeros(B, M, dtype=torch.int64, device=device)
        first = torch.zeros(B, chunks, dtype=torch.int64, device=device)
        last = torch.full((B, chunks), N, dtype=torch.int64, device=device)
    else:
        changes = torch.nn.functional.pad(layout.documents.diff(dim=1) != 0, (1, 0), value=True)
        documents = changes.cumsum(1)
        slots = torch.arange(M, device=device)
        begin = torch.where(changes, slots, 0).cummax(1).values
        ends = torch.nn.functional.pad(changes[:, 1:], (0, 1), value=True)
        end = torch.where(ends, slots + 1, M).flip(1).cummin(1).values.flip(1)
        starts = torch.arange(chunks, device=device) * C
        first = begin[:, P + starts]
        last = end[:, P + (starts + C).clamp(max=N) - 1] - P
    keys = documents if layout.valid is None else torch.where(layout.valid, documents, -1)
    found = {
        "POSITIONS": layout.positions.expand(B, M), "QUERY_SEGMENTS": documents, "KEY_SEGMENTS": keys.expand(B, M),
        "FIRST": first, "LAST": last,
    }  # fmt: skip
    return {name: t.to(torch.int32).contiguous() for name, t in found.items()}


def aligned(t: Tensor) -> Tensor:
    """Float32, contiguous and at an address that vector loads can take."""
    t = t.float().contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


class StackScan(torch.autograd.Function):
    """A stack of layers as a pure function of its input and weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        from recurformer.scan.fused.engine import engine_of

        shape, layout = call.shape, call.layout
        B, N, D = x.shape
        x = aligned(x)
        z = torch.empty(shape.L, B, N, D, dtype=torch.float32, device=x.device)
        q, kv = call.empty("q"), call.new_pairs()
        kept = {"A": call.empty("a"), "LSE": call.empty("lse")} if shape.keep else {}
        if shape.inner:
            kept["UP"] = call.empty("up")
        if shape.raw:
            kept["RAW"] = call.empty("raw")
        entries = Entries(call, x, Z=z, Q=q, KV=kv, **kept)
        with LOCK:
            engine = engine_of(shape)
            engine.load(call.layers(tensors), layout.slopes)
            _ = engine.forward_buffers
            engine.run("forward", engine.forward, call.whole // shape.C + shape.L - 1, entries.values)

        config, P = call.config, layout.past
        pairs = kv[:, P : P + N].view(shape.L, N, B, 2, config.kv_heads, config.head_width)
        keys, values = pairs.permute(3, 0, 2, 4, 1, 5)  # (L, B, G, N, K)
        if shape.keep:
            ctx.save_for_backward(
                x, z, kept["A"], kept["LSE"], kept.get("UP"), kept.get("RAW"),
                q if call.keep and not shape.raw else None, kv if call.keep else None, *tensors,
            )  # fmt: skip
        ctx.call = call
        ctx.mark_non_differentiable(keys, values)
        ctx.set_materialize_grads(False)
        last = z[-1] if shape.keep or shape.L == 1 else z[-1].clone()  # a view would keep the outputs of all layers
        return last, keys, values

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "the fused scan has no second derivative (create_graph=True); set model.scan = 'reference', which has"
            )
        call: Call = ctx.call
        if incoming[0] is None:
            return (None,) * (2 + len(call.names) * call.shape.L)
        with LOCK:
            return StackScan.gradients(ctx, call, incoming[0])

    @staticmethod
    def gradients(ctx: Any, call: Call, gz: Tensor) -> tuple[Tensor | None, ...]:
        """What `backward` returns, given the gradient of the last layer's outputs."""
        from recurformer.scan.fused.engine import engine_of

        x, z, a, lse, up, raw, q, kv, *tensors = ctx.saved_tensors
        shape, layout = call.shape, call.layout
        engine = engine_of(shape)
        engine.load(call.layers(tensors), layout.slopes)
        steps = call.whole // shape.C + shape.L - 1
        entries = Entries(call, x, Z=z, A=a, LSE=lse)
        entries.point(**{name: kept for name, kept in (("UP", up), ("RAW", raw)) if kept is not None})
        _ = engine.backward_buffers
        restore = kv is None
        q, kv = call.empty("q") if q is None else q, call.new_pairs() if kv is None else kv
        entries.point(Q=q, KV=kv)
        if restore:
            engine.run("restore", engine.restore, steps, entries.values)
        gx = torch.empty_like(x)
        entries.point(GZ=aligned(gz), GX=gx, GA=call.empty("ga"), DELTA=call.empty("delta"))
        for total in engine.gradients.values():
            total.zero_()
        engine.run("backward", engine.backward, steps, entries.values)
        found = []
        for l, layer in enumerate(call.layers(tensors)):
            gradients = engine.named_gradients(l)
            for position, name in enumerate(call.names):
                needed = ctx.needs_input_grad[2 + l * len(call.names) + position]
                found.append(gradients[name].to(getattr(layer, name).dtype, copy=True) if needed else None)
        return (gx, None, *found)
