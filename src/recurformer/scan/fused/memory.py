"""Choice of what the fused scan keeps for the backward, by the memory that it takes. Imports no Triton."""

from __future__ import annotations

import torch

from recurformer.config import ModelConfig
from recurformer.scan.fused.shape import LayerSizes

KEEP_PART = 4  # save="auto" keeps at most this part of the device's memory, over all recurrent layers of a model
# Width D from which save="auto" keeps the products with Q, K and V. A byte saves more time at larger D: at 1024 a peak
# that is 1.4 GB higher saved 1.4 ms of 105, at 1408 one that is 1.9 GB higher saved 3 ms of 161.
KEEP_WIDTH = 1280
SAVES = ("auto", "minimal", "pairs", "inner", "all")
USUAL_MEMORY = 2**36  # bytes


def total_memory(device: torch.device) -> int:
    """Return the bytes of a device's memory, free or not. A device that is no GPU counts as a usual one (64 GiB)."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else USUAL_MEMORY


def affordable_save(config: ModelConfig, row: int, device: torch.device, total: float | None = None) -> str:
    """Return the `save` that keeps most within the allowed part of the memory, and is worth its memory at this width.

    Args:
        config: the whole model.
        row: bytes of one value at every position.
        device: where the model runs.
        total: bytes of memory, for a device that is not here. Default: `total_memory(device)`.
    """
    total = total_memory(device) if total is None else total
    layers = config.layer_kinds.count("recurrent")
    for save in ("all", "inner", "pairs") if config.d_model >= KEEP_WIDTH else ("inner", "pairs"):
        if layers * row * kept_values(config, save) <= total // KEEP_PART:
            return save
    return "minimal"


def kept_values(config: ModelConfig, save: str) -> int:
    """Return the values a position that one layer keeps under `save` besides what it always keeps.

    Args:
        config: the model.
        save: any of `SAVES` but "auto".
    """
    sizes = LayerSizes.of(config)
    return {
        "minimal": 0,
        "pairs": sizes.queries + sizes.pairs,
        "inner": sizes.queries + sizes.pairs + sizes.inner,
        "all": sizes.projections + sizes.pairs + sizes.inner,
    }[save]
