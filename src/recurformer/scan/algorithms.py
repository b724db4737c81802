"""The scans by name."""

from __future__ import annotations

from collections.abc import Callable

from recurformer.scan.fused.scan import fused_scan
from recurformer.scan.reference import reference_scan
from recurformer.scan.tiled.scan import tiled_scan
from recurformer.scan.wavefront import layer_scan

SCANS: dict[str, Callable] = {
    "reference": reference_scan,
    "tiled": tiled_scan,
    "fused": fused_scan,
    "wavefront": layer_scan,  # for a single layer; `wavefront_scan` takes several
}


def scan_by_name(name: str) -> Callable:
    """Return the function that runs one scan for one layer."""
    return SCANS[name]
