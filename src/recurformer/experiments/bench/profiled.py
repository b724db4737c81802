"""The process that a profiler watches: one scan of one recurrent layer between the profiler's start and stop.

`python -m recurformer.experiments.bench.profiled '{"length": 256, ...}'`, with the entries
of `traffic.MeasureSettings`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from recurformer.config import OFFICIAL_OPTIONS, ModelConfig
from recurformer.experiments.bench.timing import build_model
from recurformer.layer import compute_dtype
from recurformer.scan.algorithms import SCANS, scan_by_name


def pure_tiling(name: str, length: int) -> Callable[..., Any]:
    """A scan with the options that make its schedule the paper's, where it has others.

    Args:
        length: N. The fused scan works chunk by chunk: one chunk that holds all positions has nothing to pull.
    """
    scan = scan_by_name(name)
    if name == "tiled":
        return partial(scan, chunk=None, leaf=1)
    if name in ("fused", "wavefront"):
        return partial(scan, chunk=1 << (length - 1).bit_length(), leaf=1)
    return scan


def main(settings: dict[str, Any], device: torch.device | None = None) -> None:
    """Run the scan twice to warm up and once under the profiler."""
    device = torch.device("cuda") if device is None else device
    H, K, B, N = (settings[name] for name in ("n_heads", "head_dim", "batch_size", "length"))
    assert settings["scan"] in SCANS
    torch.manual_seed(0)
    options = {**OFFICIAL_OPTIONS, "vocab_size": 256, "vocab_multiple": 1}
    model = build_model(ModelConfig(**options, d_model=H * K, n_heads=H, n_layers=1), device)
    layer, layout, scan = model.layers[0], model.layout(N), pure_tiling(settings["scan"], N)
    x = torch.randn(B, N, H * K, device=device, requires_grad=settings["backward"])
    gradient = torch.randn_like(x) if settings["backward"] else None

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            maths = layer.maths(compute_dtype(layer.q_proj.weight))  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue, reportArgumentType]
        with torch.set_grad_enabled(settings["backward"]):
            z, _, _ = scan(x, maths, layout)
            if gradient is not None:
                z.backward(gradient)

    run()
    run()
    if device.type != "cuda":
        run()
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
