"""Memory of a training step, by arithmetic on its configuration: weights, optimizer, what layers keep, the peak."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from recurformer.choose import choose_scan, gpu_scan, longest_stack
from recurformer.config import ModelConfig
from recurformer.loss import LOGITS_AT_ONCE
from recurformer.scan.fused.memory import affordable_save, kept_values, total_memory
from recurformer.scan.tiled.backward import POSITION_BLOCK
from recurformer.scan.tiled.scan import KEEP_BYTES
from recurformer.training.config import TrainConfig

H100_BYTES = 79.1 * 2**30  # memory that is free on one
GPU_SCANS = ("none", "fused", "wavefront")  # with one of these, a GPU runs fused kernels only


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step, by purpose."""

    weights: int
    gradients: int
    optimizer: int  # AdamW's two means of each learning parameter
    standard: int  # what standard layers keep for the backward of a micro-batch
    recurrent: int  # what recurrent layers keep for theirs
    working: int  # buffers beyond what is kept, at the moment that takes most
    moment: str  # the name of that moment

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.standard + self.recurrent + self.working


@dataclass(frozen=True)
class _Sizes:
    """Widths of a model, and bytes of a value."""

    full: int  # bytes of a weight, and of a value in the residual stream
    short: int  # bytes of a value that matrix products read and write
    D: int  # residual stream
    Q: int  # queries of all heads
    P: int  # keys of all heads, or values
    F: int  # inside of the MLP after its activation
    inner: int  # inside of the MLP before its activation

    @classmethod
    def of(cls, config: TrainConfig) -> _Sizes:
        m = config.model
        full = 8 if config.precision == "fp64" else 4
        return cls(
            full=full,
            short=2 if config.precision == "bf16" else full,
            D=m.d_model,
            Q=m.n_heads * m.head_width,
            P=m.kv_heads * m.head_width,
            F=m.mlp_width,
            inner=m.mlp_width * (2 if m.activation == "swiglu" else 1),
        )


def estimate_memory(
    config: TrainConfig, *, gpu: bool, scan: str, device_bytes: float = math.inf, parts: int = 1
) -> Memory:
    """Estimate the peak memory of a step from the tensors that the code is known to keep.

    Args:
        config: the run; with several processes, the `share` of one.
        gpu: whether the fused kernels, compiled layers and the fused loss run, instead of plain operations.
        scan: name of the recurrent layers' scan.
        device_bytes: memory of the device, free or not: the fused scan keeps more where there is much.
        parts: number of processes over which weights, gradients and optimizer state are split.
    """
    m, sizes = config.model, _Sizes.of(config)
    kinds = m.layer_kinds
    everything, full = m.num_parameters(embedding=True), sizes.full
    learning = everything
    if config.trained == "recurrent":
        learning = m.num_parameters() * kinds.count("recurrent") // len(kinds)
    tokens = (config.micro_batch_size or config.batch_size) * config.data.window  # of a micro-batch

    one = _standard_layer(config, sizes, gpu)
    standard = kinds.count("standard") * (full * sizes.D if config.recompute else one) * tokens
    recurrent, loop = _recurrent_layers(config, sizes, gpu, scan, device_bytes)
    # When the backward comes to the last recurrent layer, the standard layers above it have freed what they kept.
    above = kinds[::-1].index("recurrent") if "recurrent" in kinds else 0
    freed = standard * above // max(1, kinds.count("standard"))
    moments = {
        "of the loss": loss_bytes(m, tokens, full, gpu),
        "of a standard layer, evaluated again": one * tokens if config.recompute and "standard" in kinds else 0,
        "of recurrent layers in the backward": loop - freed,
    }
    moment = max(moments, key=lambda name: moments[name])
    copies = sizes.short * everything if sizes.short < full else 0  # autocast's copies of the weights in bf16
    # FSDP gathers embedding and output layer, and the layer that runs.
    gathered = 0 if parts == 1 else full * (everything - m.num_parameters() + m.num_parameters() // m.n_layers)
    return Memory(
        weights=full * everything // parts + copies + gathered,
        gradients=full * learning // parts + gathered,
        optimizer=2 * full * learning // parts,
        standard=standard,
        recurrent=recurrent,
        working=moments[moment],
        moment=moment,
    )


def _standard_layer(config: TrainConfig, sizes: _Sizes, gpu: bool) -> int:
    """Return the bytes a token that a standard layer keeps for its backward.

    They are: both residuals; the inputs of both branches; q, k and v before and after their norm; attention's output;
    the MLP's inside before and after its activation. RMS norms that are not compiled also keep their factors.
    """
    full, short, D, Q, P = sizes.full, sizes.short, sizes.D, sizes.Q, sizes.P
    kept = 2 * full * D + short * (2 * D + 2 * (Q + P) + P + Q) + short * (sizes.inner + sizes.F)
    compiled = gpu if config.compile is None else config.compile
    if config.model.norm == "rms" and not compiled:
        kept += full * (2 * D + (0 if config.model.qk_norm == "none" else Q + P))
    return kept


def _recurrent_layers(config: TrainConfig, sizes: _Sizes, gpu: bool, scan: str, device_bytes: float) -> tuple[int, int]:
    """Return the bytes that recurrent layers keep, and those of buffers while they run their backward.

    Every layer keeps its input and attention's output. It keeps more where more is affordable.
    """
    m, full, short = config.model, sizes.full, sizes.short
    D, Q, P = sizes.D, sizes.Q, sizes.P
    count = m.layer_kinds.count("recurrent")
    if count == 0:
        return 0, 0
    tokens = rows_of(config) * config.data.window
    layers_at_once = count if scan == "wavefront" else 1
    if gpu:
        save = affordable_save(m, short * tokens, torch.device("cuda"), device_bytes)
        kept = count * tokens * (full * D + short * Q + 4 * m.n_heads + short * kept_values(m, save))
        loop = tokens * (count * 10 if scan == "wavefront" else 24) * D
        if save == "all":  # queries are made again
            loop += short * tokens * layers_at_once * Q
        return kept, loop

    more = full * (2 * Q + 2 * P + sizes.inner)
    kept = count * tokens * (full * D + (more if tokens * more <= KEEP_BYTES else 0))
    # All positions: queries and pairs, their gradients, and the gradients of attention's output and of the stream.
    # A block of positions: the MLP's inside and its slopes, and the MLP's inputs.
    block = rows_of(config) * min(config.data.window, POSITION_BLOCK)
    return kept, full * (tokens * layers_at_once * (3 * Q + 4 * P + D) + block * (6 * sizes.inner + 8 * D))


def loss_bytes(model: ModelConfig, tokens: int, full: int, gpu: bool) -> int:
    """Return the bytes of the loss: logits, log-probabilities and gradients of the rows that are made at once. The
    fused loss has blocks instead, and keeps two gradients."""

    V, D = model.padded_vocab_size, model.d_model
    if gpu:
        return tokens * D * 8 + V * D * 4
    return 3 * full * V * min(tokens, max(1, LOGITS_AT_ONCE // V))


def available_bytes(device: torch.device) -> float:
    """Return the free memory of a device in bytes; infinity where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    except OSError:
        pass
    return math.inf


def memory_on(config: TrainConfig, device: torch.device, scan: str, parts: int = 1) -> Memory:
    """Estimate the memory on a device of this machine; see `estimate_memory`."""
    gpu = device.type == "cuda" and scan in GPU_SCANS
    return estimate_memory(config, gpu=gpu, scan=scan, device_bytes=total_memory(device), parts=parts)


def memory_on_h100(config: TrainConfig, parts: int = 1) -> tuple[Memory, str]:
    """Estimate the memory on an H100 that need not be here; return it with the scan that the H100 would take."""
    scan = h100_scan(config, together=parts == 1)
    gpu = scan in GPU_SCANS
    return estimate_memory(config, gpu=gpu, scan=scan, device_bytes=H100_BYTES, parts=parts), scan


# --- sequences and scans --------------------------------------------------------------------------------------------


def rows_of(config: TrainConfig) -> int:
    """Return the number of sequences that recurrent layers take at once."""
    return config.recurrent_micro_batch_size or config.micro_batch_size or config.batch_size


def scan_of(config: TrainConfig, device: torch.device, together: bool = True) -> str:
    """Return the scan of the recurrent layers; "none" for a model without any.

    Args:
        together: False where weights are split over processes, which evaluates layers one by one.

    Raises:
        ValueError: for a scan that the device does not have.
    """
    if "recurrent" not in config.model.layer_kinds:
        return "none"
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(config.precision, torch.float32)
    return choose_scan(
        config.scan, config.model, device, batch_size=rows_of(config), length=config.data.window, dtype=dtype,
        together=together and not config.recompute,
    )[0]  # fmt: skip


def h100_scan(config: TrainConfig, together: bool = True) -> str:
    """Return the scan that an H100 would take. The H100 need not be here."""
    if "recurrent" not in config.model.layer_kinds:
        return "none"
    if config.scan != "auto":
        return config.scan
    stack = longest_stack(config.model) if together and not config.recompute else 1
    return gpu_scan(stack, rows_of(config), config.data.window).name
