"""Recurrent layers, evaluated: one job ("given a layer's inputs x, return its outputs z"), several exact algorithms.

Every scan has the signature of `reference_scan` and answers to it in tests.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from itertools import groupby

import torch

from recurformer.config import ModelConfig
from recurformer.scan.fused import fused_scan, interpreted
from recurformer.scan.fused import obstacle as fused_obstacle
from recurformer.scan.reference import reference_scan
from recurformer.scan.tiled import tiled_scan
from recurformer.scan.wavefront import CHUNK as STACK_CHUNK
from recurformer.scan.wavefront import layer_scan

SCANS: dict[str, Callable] = {
    "reference": reference_scan,
    "tiled": tiled_scan,
    "fused": fused_scan,
    "wavefront": layer_scan,  # of one layer; `wavefront_scan` takes several
}
GPU_SCANS = ("fused",)
SCAN_CHOICES = ("auto", *SCANS)
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


def scan_by_name(name: str) -> Callable:
    """The function of one scan, for one layer."""
    return SCANS[name]


def choose_scan(
    requested: str,
    config: ModelConfig,
    device: torch.device,
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
    obstacle = fused_obstacle(config, device, dtype)
    if requested != "auto":
        kernels = requested in GPU_SCANS or (requested == "wavefront" and (device.type == "cuda" or interpreted()))
        if kernels and obstacle is not None:
            raise ValueError(f"model.scan is {requested!r}, which can't run: {obstacle}")
        return requested, "as asked"
    stack = longest_stack(config) if together else 1
    if device.type == "cuda" and obstacle is None:
        return gpu_scan(stack, batch_size, length)
    if device.type not in ("cpu", "cuda", "meta") or torch.version.hip:
        warn_unknown_device("AMD GPU" if torch.version.hip and device.type == "cuda" else device.type)
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
    chunks = None if length is None else -(-length // STACK_CHUNK)
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
    itemsize = torch.promote_types(dtype or torch.float32, torch.float32).itemsize
    return min(WAVEFRONT_PRODUCT // matrix, WAVEFRONT_BYTES // (N * stack * numbers * itemsize))


@cache
def warn_unknown_device(name: str) -> None:
    """Say once a process that a device gets the plain path."""
    warnings.warn(
        f"recurformer has no kernels of its own for {name}: recurrent layers run the plain PyTorch path there",
        stacklevel=3,
    )
