"""What the kernels of this package need of a device, and why they can't run where they can't. Imports no torch."""

from __future__ import annotations

import os
from functools import cache
from importlib import util
from typing import TYPE_CHECKING, Protocol

from recurformer.config import ModelConfig

if TYPE_CHECKING:
    import torch


class Device(Protocol):
    """A `torch.device`, or anything that names its type: "cpu", "cuda", "mps", "meta"."""

    @property
    def type(self) -> str: ...


MAX_HEAD_WIDTH, MAX_HEAD_WIDTH_32_BIT = 256, 128
THIN_ROWS = 16  # rows up to which a product is bound by reading its weights
MAX_STEP_WIDTH = 2**16  # values in a row that one program of a decode step holds
FLEX_BLOCK = 128  # queries and keys of a block; shorter sequences take scaled_dot_product_attention
FLEX_HEAD_WIDTHS = range(16, 129)

CAPABILITY = (8, 0)  # of the GPU, from Ampere on


EARLY_CAPABILITY = (9, 0)  # from which a kernel can be started before the one ahead of it has ended


HAS_TRITON = util.find_spec("triton") is not None


ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "swiglu": 2}  # what kernels call KIND


QK_NORMS = {"none": 0, "head": 1, "full": 2}  # what kernels call NORM


def interpreted() -> bool:
    """True when Triton's interpreter runs the kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernel_obstacle(device: Device, dtype: torch.dtype | None, instead: str) -> str | None:
    """Why no Triton kernel of ours can run on a device in a dtype (None: in any), in words with a remedy, or None.

    Args:
        instead: what can, as half a sentence.
    """
    if not HAS_TRITON:
        return f"triton is not installed; install it, or {instead}"
    if device.type not in ("cuda", "meta") and not interpreted():
        return f"the device is {device.type}; it needs an NVIDIA GPU, {instead}"
    import torch  # late: what comes before answers for a CPU

    if torch.version.hip:
        return f"the GPU is not NVIDIA's; {instead}"
    if dtype is not None and dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the compute dtype is {dtype}; float32, bfloat16 and float16 are possible, {instead}"
    if device.type == "cuda" and torch.cuda.is_available():
        found = torch.cuda.get_device_capability(
            torch.device(device.type) if not isinstance(device, torch.device) else device
        )
        if found < CAPABILITY:
            return f"the GPU has compute capability {found}; it must be at least {CAPABILITY}, {instead}"
    return None


def scan_obstacle(config: ModelConfig, device: Device, dtype: torch.dtype | None = None) -> str | None:
    """Why the fused scan can't run here, in words with a remedy, or None."""
    reason = kernel_obstacle(device, dtype, "model.scan = 'tiled' runs anywhere")
    if reason is not None:
        return reason
    if config.head_width > MAX_HEAD_WIDTH:
        return (
            f"the head width is {config.head_width}; it must be 1 to {MAX_HEAD_WIDTH}, model.scan = 'tiled' takes any"
        )
    if str(dtype) == "torch.float32" and config.head_width > MAX_HEAD_WIDTH_32_BIT:
        limit = MAX_HEAD_WIDTH_32_BIT
        return (
            f"the head width is {config.head_width}; in float32 it must be 1 to {limit}, model.scan = 'tiled' takes any"
        )
    return None


def step_obstacle(config: ModelConfig, device: Device, dtype: torch.dtype | None, batch_size: int) -> str | None:
    """Why the fused decode step can't run, in words with a remedy, or None."""
    plain = "the plain step runs anywhere"
    reason = kernel_obstacle(device, dtype, plain)
    if reason is not None:
        return reason
    if config.head_width > MAX_HEAD_WIDTH:
        return f"the head width is {config.head_width}; it must be 1 to {MAX_HEAD_WIDTH}, {plain}"
    for name, width in (("d_model", config.d_model), ("head_dim * n_heads", config.head_width * config.n_heads)):
        if width > MAX_STEP_WIDTH:
            return f"{name} is {width}; it must be at most {MAX_STEP_WIDTH}, {plain}"
    if batch_size * config.kv_heads >= 2**31:
        return f"the batch is {batch_size} rows; at most {2**31 // config.kv_heads} are possible, {plain}"
    return None


def on_amd(device: Device) -> bool:
    """Whether a device of type "cuda" is an AMD GPU."""
    if device.type != "cuda":
        return False
    import torch

    return torch.version.hip is not None


@cache
def compiler_present() -> bool:
    """Whether torch.compile can make kernels for an NVIDIA GPU."""
    import torch

    return torch.version.hip is None and HAS_TRITON
