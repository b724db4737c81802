"""Recurrent layers, evaluated: one job ("given a layer's inputs x, return its outputs z"), several exact algorithms.

Every scan has the signature of `reference_scan` and answers to it in tests.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch

from recurformer.config import ModelConfig
from recurformer.scan.fused import fused_scan
from recurformer.scan.fused import obstacle as fused_obstacle
from recurformer.scan.reference import reference_scan
from recurformer.scan.tiled import tiled_scan

SCANS: dict[str, Callable] = {"reference": reference_scan, "tiled": tiled_scan, "fused": fused_scan}
SCAN_CHOICES = ("auto", *SCANS)


def scan_by_name(name: str) -> Callable:
    """The function of one scan."""
    return SCANS[name]


def choose_scan(requested: str, config: ModelConfig, device: torch.device) -> tuple[str, str]:
    """The scan that will run and why, in words."""
    if requested != "auto":
        return requested, "as asked"
    if device.type not in ("cpu", "cuda", "meta") or torch.version.hip:
        warn_unknown_device("AMD GPU" if torch.version.hip and device.type == "cuda" else device.type)
    return "tiled", "exact tiling with a hand-written backward, in PyTorch operations on any device"


@cache
def warn_unknown_device(name: str) -> None:
    """Say once a process that a device gets the plain path."""
    warnings.warn(
        f"recurformer has no kernels of its own for {name}: recurrent layers run the plain PyTorch path there",
        stacklevel=3,
    )
