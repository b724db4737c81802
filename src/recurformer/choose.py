"""Which of several exact algorithms runs where, and why: scan, attention, loss and decode step. Imports no torch."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from itertools import groupby
from typing import TYPE_CHECKING

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
)
from recurformer.scan.schedule import WAVEFRONT_CHUNK

if TYPE_CHECKING:
    import torch

GPU_SCANS = ("fused",)
SCAN_CHOICES = ("auto", "reference", "tiled", "fused", "wavefront")
SHORT = 8  # positions up to which a call is made of plain operations: decoding, above all
WAVEFRONT_ROWS = 128  # batch up to which layers side by side beat one after the other on a GPU
# There too: of what a stack does, the part that counts, at least. Until the last layer has begun and after the first
# one has ended, layers without work go through all products too. An estimate, from times of long sequences.
WAVEFRONT_AT_WORK = 0.4
# On a CPU, where they do: multiply-adds of a position's largest product, and numbers of a layer's largest matrix, at
# most. Larger products are worth a launch each, and the weights of a whole stack must fit the cache.
WAVEFRONT_PRODUCT, WAVEFRONT_MATRIX = 2**23, 2**19
# There too: positions at least and at most, and bytes of the pairs, queries, inputs and outputs of all layers at most.
# Behind a past that is longer than the call there is more to pull than to do side by side.
WAVEFRONT_LENGTHS, WAVEFRONT_BYTES = (128, 4096), 2**30


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
) -> tuple[str, str]:
    """The scan that will run and why, in words.

    Args:
        requested: the model's setting.
        config, device: of the model.
        batch_size, length: B and N of the call; None: not known, and taken for those of a usual training step.
        past: P, positions in the cache.
        dtype: the compute dtype; None: not known, and taken for one that the kernels take.
        together: False where layers are evaluated one by one whatever the scan, as when activations are recomputed.

    Raises:
        ValueError: if the scan asked for can't run here, naming what can.
    """
    obstacle = scan_obstacle(config, device, dtype)
    if requested != "auto":
        kernels = requested in GPU_SCANS or (requested == "wavefront" and (device.type == "cuda" or interpreted()))
        if kernels and obstacle is not None:
            raise ValueError(f"model.scan is {requested!r}, which can't run: {obstacle}")
        return requested, "as asked"
    stack = longest_stack(config) if together else 1
    if device.type == "cuda" and obstacle is None:
        return gpu_scan(stack, batch_size, length)
    if device.type not in ("cpu", "cuda", "meta") or on_amd(device):
        warn_unknown_device("AMD GPU" if on_amd(device) else device.type)
    if device.type == "cpu" and stack > 1 and not interpreted():  # the interpreter would run the GPU's wavefront
        limit = wavefront_batch(config, stack, length, past, dtype)
        if (batch_size or 1) <= limit:
            why = "exact tiling, recurrent layers side by side: small products of several layers as one"
            return "wavefront", why if batch_size is not None else f"{why}, up to a batch of {limit}"
    why = "exact tiling with a hand-written backward, in PyTorch operations on any device"
    return "tiled", why if device.type != "cuda" else f"{why}; not fused: {obstacle}"


def longest_stack(config: ModelConfig) -> int:
    """Recurrent layers that could work side by side."""
    runs = [len(list(run)) for kind, run in groupby(config.layer_kinds) if kind == "recurrent"]
    return max(runs, default=0)


def gpu_scan(stack: int, batch_size: int | None, length: int | None) -> tuple[str, str]:
    """The scan of a GPU that runs the kernels, and why; arguments as of `choose_scan`."""
    if length is not None and length <= SHORT:
        return "tiled", f"{length} positions are too few for the kernels' set-up to pay"
    chunks = None if length is None else -(-length // WAVEFRONT_CHUNK)
    at_work = 1.0 if chunks is None or stack < 2 else chunks / (chunks + stack - 1)
    if stack > 1 and batch_size is not None and batch_size <= WAVEFRONT_ROWS and at_work >= WAVEFRONT_AT_WORK:
        return "wavefront", f"recurrent layers side by side fill the GPU at a batch of {batch_size}"
    aside = f"; side by side up to a batch of {WAVEFRONT_ROWS}" if stack > 1 and batch_size is None else ""
    return "fused", f"Triton kernels and CUDA graphs, one layer after the other{aside}"


def wavefront_batch(config: ModelConfig, stack: int, length: int | None, past: int, dtype: torch.dtype | None) -> int:
    """The largest batch at which `stack` layers work side by side on a CPU: there launches are what a position costs.

    0 where they never do, for their width or the length of the call.
    """
    matrix, (shortest, longest) = config.d_model * config.mlp_width, WAVEFRONT_LENGTHS
    N = shortest if length is None else length
    if matrix > WAVEFRONT_MATRIX or not max(shortest, past) <= N <= longest:
        return 0
    numbers = 2 * config.d_model + (config.n_heads + 2 * config.kv_heads) * config.head_width  # a position and layer
    itemsize = 8 if str(dtype) == "torch.float64" else 4  # of pairs and states, in at least float32
    return min(WAVEFRONT_PRODUCT // matrix, WAVEFRONT_BYTES // (N * stack * numbers * itemsize))


@cache
def warn_unknown_device(name: str) -> None:
    """Say once a process that a device gets the plain path."""
    warnings.warn(
        f"recurformer has no kernels of its own for {name}: recurrent layers run the plain PyTorch path there",
        stacklevel=3,
    )


def choose_attention(config: ModelConfig, device: Device) -> tuple[str, str]:
    """What the standard layers of a model run on a device, and why, in words."""
    if device.type != "cuda" or not compiler_present():
        return "sdpa", "scaled_dot_product_attention"
    if config.head_width not in FLEX_HEAD_WIDTHS:
        return (
            "sdpa",
            f"FlexAttention takes heads of {FLEX_HEAD_WIDTHS[0]} to {FLEX_HEAD_WIDTHS[-1]}, not {config.head_width}",
        )
    when = "" if config.position == "alibi" else "with pads or documents, "
    return "flex", f"FlexAttention {when}from {FLEX_BLOCK} tokens on; else scaled_dot_product_attention"


@cache
def liger_version() -> str | None:
    """Return the version of the installed liger-kernel, "" when it does not state one, None when it is missing."""
    if util.find_spec("liger_kernel") is None:
        return None
    try:
        return metadata.version("liger-kernel")
    except metadata.PackageNotFoundError:
        return ""


def choose_loss(device: Device, dtype: torch.dtype | None = None) -> tuple[str, str]:
    """How the loss is made where no logits are wanted, "fused" or "chunked", and why, in words.

    Args:
        device: of the model.
        dtype: of the output layer's product.
    """
    if device.type != "cuda":
        return "chunked", "blocks of logits in PyTorch operations, made again in the backward"
    if str(dtype) == "torch.float64":
        return "chunked", "the fused loss works in float32"
    if (version := liger_version()) is None:
        return "chunked", "liger-kernel is not installed (extra: recurformer[gpu])"
    return "fused", f"liger-kernel {version}: logits and their gradient in one pass, by blocks"


STEPS = ("plain", "fused")


STEP_CHOICES = ("auto", *STEPS)


def choose_step(
    requested: str, config: ModelConfig, device: Device, dtype: torch.dtype | None, batch_size: int
) -> tuple[str, str]:
    """The step that an engine will run, "plain" or "fused", and why, in words.

    Raises:
        ValueError: if the step asked for can't run here, naming what can, or does not exist.
    """
    if requested not in STEP_CHOICES:
        raise ValueError(f"step is {requested!r}; choose one of {', '.join(map(repr, STEP_CHOICES))}")
    if requested == "plain":
        return "plain", "as asked"
    reason = step_obstacle(config, device, dtype, batch_size)
    if requested == "fused":
        if reason is not None:
            raise ValueError(f"step is 'fused', which can't run: {reason}")
        return "fused", "as asked"
    if device.type == "cuda" and reason is None:
        return "fused", "Triton kernels in one CUDA graph"
    return "plain", f"PyTorch operations; not fused: {reason or f'the device is {device.type}'}"


@dataclass(frozen=True)
class Choice:
    """One of several ways to compute the same, and why it is the one."""

    name: str
    why: str


def chosen_scan(config: ModelConfig, device: Device) -> Choice:
    """What `auto` means for a model on a device."""
    if "recurrent" not in config.layer_kinds:
        return Choice("none", "the model has no recurrent layer")
    return Choice(*choose_scan("auto", config, device))


def chosen_attention(config: ModelConfig, device: Device) -> Choice:
    """How standard layers attend on a device."""
    if "standard" not in config.layer_kinds:
        return Choice("none", "the model has no standard layer")
    return Choice(*choose_attention(config, device))


def chosen_loss(_: ModelConfig, device: Device) -> Choice:
    """How training takes its loss on a device."""
    return Choice(*choose_loss(device))


def chosen_step(config: ModelConfig, device: Device) -> Choice:
    """What makes a token on a device, after the prompt: of one row, in a dtype that kernels take."""
    return Choice(*choose_step("auto", config, device, None, 1))


CHOOSERS = {"scan": chosen_scan, "attention": chosen_attention, "loss": chosen_loss, "decoding": chosen_step}
