"""Recurrent layers, evaluated: one job ("given a layer's inputs x, return its outputs z"), several exact algorithms.

Every scan has the signature of `reference_scan` and answers to it in tests.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch

from recurformer.config import ModelConfig
from recurformer.scan.fused import fused_scan
from recurformer.scan.fused import obstacle as fused_obstacle
from recurformer.scan.reference import reference_scan
from recurformer.scan.tiled import tiled_scan
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
# On a CPU, where they do: positions at least, multiply-adds of a position's largest product and numbers of a layer's
# largest matrix at most. Larger products are worth a launch each, and the weights of a whole stack must fit the cache.
WAVEFRONT_LENGTH, WAVEFRONT_PRODUCT, WAVEFRONT_MATRIX = 128, 2**23, 2**19


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
    dtype: torch.dtype | None = None,
) -> tuple[str, str]:
    """The scan that will run and why, in words.

    Args:
        requested: the model's setting.
        config, device: of the model.
        batch_size, length: B and N of the call; None: those of a usual training step.
        dtype: the compute dtype; None: one that the kernels take.

    Raises:
        ValueError: if the scan asked for can't run here, naming what can.
    """
    obstacle = fused_obstacle(config, device, dtype)
    if requested != "auto":
        needs_gpu = requested in GPU_SCANS or (requested == "wavefront" and device.type == "cuda")
        if needs_gpu and obstacle is not None:
            raise ValueError(f"model.scan is {requested!r}, which can't run: {obstacle}")
        return requested, "as asked"
    stacked = ("recurrent", "recurrent") in pairwise(config.layer_kinds)
    if device.type == "cuda" and obstacle is None:
        if length is not None and length <= SHORT:
            return "tiled", f"{length} positions are too few for the kernels' set-up to pay"
        if stacked and batch_size is not None and batch_size <= WAVEFRONT_ROWS:
            return "wavefront", f"recurrent layers side by side fill the GPU at a batch of {batch_size}"
        return "fused", "Triton kernels and CUDA graphs, one layer after the other"
    if device.type not in ("cpu", "cuda", "meta") or torch.version.hip:
        warn_unknown_device("AMD GPU" if torch.version.hip and device.type == "cuda" else device.type)
    if device.type == "cpu" and stacked and small(config, batch_size, length):
        return "wavefront", "exact tiling, recurrent layers side by side: small products of several layers as one"
    why = "exact tiling with a hand-written backward, in PyTorch operations on any device"
    return "tiled", why if device.type != "cuda" else f"{why}; not fused: {obstacle}"


def small(config: ModelConfig, batch_size: int | None, length: int | None) -> bool:
    """True where launches are what a layer's loop over positions costs on a CPU."""
    matrix = config.d_model * config.mlp_width
    long = length is None or length >= WAVEFRONT_LENGTH
    return long and matrix <= WAVEFRONT_MATRIX and matrix * (batch_size or 1) <= WAVEFRONT_PRODUCT


@cache
def warn_unknown_device(name: str) -> None:
    """Say once a process that a device gets the plain path."""
    warnings.warn(
        f"recurformer has no kernels of its own for {name}: recurrent layers run the plain PyTorch path there",
        stacklevel=3,
    )
