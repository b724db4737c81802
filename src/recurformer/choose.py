"""Decides which of several exact algorithms runs where, and says why: scan, attention, loss and decoding step.

torch is imported inside functions only, and only for devices that are no CPU.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import metadata, util
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from recurformer.config import ModelConfig
from recurformer.hardware import (
    FLEX_BLOCK,
    FLEX_HEAD_WIDTHS,
    Device,
    compiler_present,
    interpreted,
    on_amd,
    scan_obstacle,
    step_obstacle,
    tiled_obstacle,
)
from recurformer.scan.schedule import WAVEFRONT_CHUNK
from recurformer.settings import shown

if TYPE_CHECKING:
    import torch


class Choice(NamedTuple):
    """The name of an algorithm and the reason for it, in words."""

    name: str
    why: str


SUBJECTS = ("scan", "attention", "loss", "decoding")  # what `choices` decides


def choices(config: ModelConfig, device: Device) -> dict[str, Choice]:
    """Return what a model runs on a device by default, for each of SUBJECTS.

    The scan and the decoding step are those of "auto". Decoding is of one sequence, in a dtype that the kernels take.
    """
    kinds = config.layer_kinds
    return {
        "scan": choose_scan("auto", config, device)
        if "recurrent" in kinds
        else Choice("none", "the model has no recurrent layer"),
        "attention": choose_attention(config, device)
        if "standard" in kinds
        else Choice("none", "the model has no standard layer"),
        "loss": choose_loss(device),
        "decoding": choose_step("auto", config, device, None, 1),
    }


# --- scan of recurrent layers ----------------------------------------------------------------------------------------

GPU_SCANS = ("fused",)
SCAN_CHOICES = ("auto", "reference", "tiled", "fused", "wavefront")

# Up to this many positions, a call on a GPU uses PyTorch operations: the kernels need buffers and graphs for each new
# shape, which pays only for longer calls. Such short calls come from decoding.
TOO_SHORT_FOR_KERNELS = 8

# On a GPU, the wavefront is faster than one layer after the other up to this batch. Larger batches fill the GPU anyway.
MAX_WAVEFRONT_BATCH = 128

# On a GPU, the least share of useful work in the wavefront. While the stack fills and empties, the layers that have no
# positions are still computed and discarded. The limit is an estimate from the times of long sequences.
MIN_WAVEFRONT_UTILISATION = 0.4

# On a CPU, the wavefront joins products up to this many multiply-adds per position. Larger products
# gain little from being joined.
WAVEFRONT_PRODUCT = 2**23

# On a CPU, the most numbers of a layer's largest matrix in the wavefront: the weights of all layers share the cache.
WAVEFRONT_MATRIX = 2**19

# On a CPU, the fewest and the most positions of a call in the wavefront. A call must also be no shorter than its past:
# otherwise pulling the past, which is no faster in the wavefront, takes most of the time.
WAVEFRONT_LENGTHS = (128, 4096)

# On a CPU, the most bytes of pairs, queries, inputs and outputs in the wavefront, which holds those of all layers.
WAVEFRONT_BYTES = 2**30


def choose_scan(
    requested: str,
    config: ModelConfig,
    device: Device,
    *,
    batch_size: int | None = None,
    length: int | None = None,
    past: int = 0,
    dtype: torch.dtype | None = None,
    together: bool = True,
) -> Choice:
    """Return the scan that evaluates the recurrent layers of a call.

    | requested    | where                                                     | scan                     |
    |--------------|-----------------------------------------------------------|--------------------------|
    | a name       | anywhere; ValueError where it can't run                   | that one                 |
    | "auto"       | a norm that only `layer.py` knows                         | reference                |
    | "auto"       | NVIDIA GPU, up to TOO_SHORT_FOR_KERNELS positions         | tiled                    |
    | "auto"       | NVIDIA GPU, several recurrent layers, small batch         | wavefront (its kernels)  |
    | "auto"       | NVIDIA GPU, otherwise                                     | fused                    |
    | "auto"       | CPU, several recurrent layers, small products             | wavefront (tiled)        |
    | "auto"       | otherwise                                                 | tiled                    |

    Args:
        requested: the model's `scan`, one of SCAN_CHOICES.
        config: of the model.
        device: of the model.
        batch_size: B of the call. None: unknown; a CPU then assumes 1 row, a GPU that the kernels pay.
        length: N of the call. None: unknown; a CPU then assumes 128 positions, a GPU that the kernels pay.
        past: P, positions in the cache.
        dtype: the compute dtype. None: not known, and taken as one that the kernels support.
        together: False where layers are evaluated one by one in any case, as when activations are recomputed.

    Raises:
        ValueError: if the requested scan can't run here. The message names a scan that can.
    """
    obstacle = scan_obstacle(config, device, dtype)
    if requested != "auto":
        kernels = requested in GPU_SCANS or (requested == "wavefront" and (device.type == "cuda" or interpreted()))
        if kernels and obstacle is not None:
            raise ValueError(f"scan is {requested!r}, which can't run: {obstacle}")
        if requested != "reference" and (reason := tiled_obstacle(config)) is not None:
            raise ValueError(f"scan is {requested!r}, which can't run: {reason}")
        return Choice(requested, "as requested")
    if (reason := tiled_obstacle(config)) is not None:
        return Choice("reference", f"the loop that defines the layer; not tiled: {reason}")
    stack = longest_stack(config) if together else 1
    if device.type == "cuda" and obstacle is None:
        return gpu_scan(stack, batch_size, length)
    if device.type not in ("cpu", "cuda", "meta") or on_amd(device):
        warn_unknown_device("AMD GPU" if on_amd(device) else device.type)
    if device.type == "cpu" and stack > 1 and not interpreted():  # the interpreter would run the GPU's wavefront
        limit = wavefront_batch(config, stack, length, past, dtype)
        if (batch_size or 1) <= limit:
            why = "exact tiling, recurrent layers side by side: small products of several layers as one"
            return Choice("wavefront", why if batch_size is not None else f"{why}, up to a batch of {limit}")
    why = "exact tiling with a hand-written backward, in PyTorch operations on any device"
    return Choice("tiled", why if device.type != "cuda" else f"{why}; not fused: {obstacle}")


def longest_stack(config: ModelConfig) -> int:
    """Return the largest number of consecutive recurrent layers, which could be evaluated together."""
    runs = [len(list(run)) for kind, run in groupby(config.layer_kinds) if kind == "recurrent"]
    return max(runs, default=0)


def gpu_scan(stack: int, batch_size: int | None, length: int | None) -> Choice:
    """Return the scan of a GPU that runs the kernels.

    Args:
        stack: consecutive recurrent layers that may be evaluated together.
        batch_size: as `choose_scan`.
        length: as `choose_scan`.
    """
    if length is not None and length <= TOO_SHORT_FOR_KERNELS:
        return Choice("tiled", f"{length} positions are too few for the kernels' set-up to pay")
    chunks = None if length is None else -(-length // WAVEFRONT_CHUNK)
    utilisation = 1.0 if chunks is None or stack < 2 else chunks / (chunks + stack - 1)
    if (
        stack > 1
        and batch_size is not None
        and batch_size <= MAX_WAVEFRONT_BATCH
        and utilisation >= MIN_WAVEFRONT_UTILISATION
    ):
        return Choice("wavefront", f"recurrent layers side by side fill the GPU at a batch of {batch_size}")
    otherwise = f"; side by side up to a batch of {MAX_WAVEFRONT_BATCH}" if stack > 1 and batch_size is None else ""
    return Choice("fused", f"Triton kernels and CUDA graphs, one layer after the other{otherwise}")


def wavefront_batch(config: ModelConfig, stack: int, length: int | None, past: int, dtype: torch.dtype | None) -> int:
    """Return the largest batch for which the wavefront of `stack` layers pays on a CPU.

    Returns 0 where it never pays, because of the model's width or the length of the call.
    """
    matrix, (shortest, longest) = config.d_model * config.mlp_width, WAVEFRONT_LENGTHS
    N = shortest if length is None else length
    length_pays, outweighs_past = shortest <= N <= longest, past <= N
    if matrix > WAVEFRONT_MATRIX or not (length_pays and outweighs_past):
        return 0
    elements = 2 * config.d_model + (config.n_heads + 2 * config.kv_heads) * config.head_width  # a position and layer
    itemsize = 8 if str(dtype) == "torch.float64" else 4  # pairs and states have at least float32
    return min(WAVEFRONT_PRODUCT // matrix, WAVEFRONT_BYTES // (N * stack * elements * itemsize))


@cache
def warn_unknown_device(name: str) -> None:
    """Warn once per process that there are no kernels for a device."""
    warnings.warn(
        f"recurformer has no kernels of its own for {name}: recurrent layers run the plain PyTorch path there",
        stacklevel=3,
    )


# --- attention of standard layers ------------------------------------------------------------------------------------


def choose_attention(config: ModelConfig, device: Device) -> Choice:
    """Return the attention of the standard layers of a model: "sdpa" or "flex"."""
    if device.type != "cuda" or not compiler_present():
        return Choice("sdpa", "scaled_dot_product_attention")
    if config.head_width not in FLEX_HEAD_WIDTHS:
        return Choice(
            "sdpa",
            f"FlexAttention takes heads of {FLEX_HEAD_WIDTHS[0]} to {FLEX_HEAD_WIDTHS[-1]}, not {config.head_width}",
        )
    when = "" if config.position == "alibi" else "with pads or documents, "
    return Choice("flex", f"FlexAttention {when}from {FLEX_BLOCK} tokens on; else scaled_dot_product_attention")


# --- loss ------------------------------------------------------------------------------------------------------------


@cache
def liger_version() -> str | None:
    """Return the version of the installed liger-kernel, "" when it does not state one, None when it is missing."""
    if util.find_spec("liger_kernel") is None:
        return None
    try:
        return metadata.version("liger-kernel")
    except metadata.PackageNotFoundError:
        return ""


def choose_loss(device: Device, dtype: torch.dtype | None = None) -> Choice:
    """Return how the loss is computed where no logits are wanted: "fused" or "chunked".

    Args:
        device: of the model.
        dtype: of the output layer's product. None: not known, and taken as one that the fused loss supports.
    """
    if device.type != "cuda":
        return Choice("chunked", "blocks of logits in PyTorch operations, made again in the backward")
    if str(dtype) == "torch.float64":
        return Choice("chunked", "the fused loss works in float32")
    if (version := liger_version()) is None:
        return Choice("chunked", "liger-kernel is not installed (extra: recurformer[gpu])")
    return Choice("fused", f"liger-kernel {version}: logits and their gradient in one pass, by blocks")


# --- decoding step ---------------------------------------------------------------------------------------------------

STEPS = ("plain", "fused")
STEP_CHOICES = ("auto", *STEPS)


def choose_step(
    requested: str, config: ModelConfig, device: Device, dtype: torch.dtype | None, batch_size: int
) -> Choice:
    """Return the step with which an engine decodes: "plain" or "fused".

    Args:
        requested: one of STEP_CHOICES.
        config: of the model.
        device: of the model.
        dtype: the compute dtype. None: not known, and taken as one that the kernels support.
        batch_size: sequences that are decoded together.

    Raises:
        ValueError: for an unknown step, and for a step that can't run here. The message names one that can.
    """
    if requested not in STEP_CHOICES:
        raise ValueError(f"step is {shown(requested)}; choose one of {', '.join(map(repr, STEP_CHOICES))}")
    if requested == "plain":
        return Choice("plain", "as requested")
    obstacle = step_obstacle(config, device, dtype, batch_size)
    if requested == "fused":
        if obstacle is not None:
            raise ValueError(f"step is 'fused', which can't run: {obstacle}")
        return Choice("fused", "as requested")
    if device.type == "cuda" and obstacle is None:
        return Choice("fused", "Triton kernels in one CUDA graph")
    return Choice("plain", f"PyTorch operations; not fused: {obstacle or f'the device is {device.type}'}")
