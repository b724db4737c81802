"""The limits of this package's kernels, and the reason why they can't run where they can't.

torch is imported inside functions only, and only for devices that are no CPU.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import util
from typing import TYPE_CHECKING, Protocol

from recurformer.config import ModelConfig

if TYPE_CHECKING:
    import torch


class Device(Protocol):
    """A `torch.device`, or any object with the name of a device type: "cpu", "cuda", "mps" or "meta"."""

    @property
    def type(self) -> str:
        """The name."""
        ...


# --- limits ----------------------------------------------------------------------------------------------------------

MAX_HEAD_WIDTH = 256  # widest head of the fused scan and step: a program of a kernel holds whole heads
MAX_HEAD_WIDTH_32_BIT = 128  # the same in float32, where a head takes twice the room
THIN_ROWS = 16  # rows up to which a product is bound by reading its weights
MAX_STEP_WIDTH = 2**16  # numbers of a row, which one program of the fused decoding step holds

FLEX_BLOCK = 128  # queries and keys of a FlexAttention block; shorter sequences use scaled_dot_product_attention
FLEX_HEAD_WIDTHS = range(16, 129)

CAPABILITY = (8, 0)  # least compute capability of a GPU: Ampere, the first with bfloat16
EARLY_CAPABILITY = (9, 0)  # least compute capability for programmatic dependent launches: Hopper

HAS_TRITON = util.find_spec("triton") is not None

# Numbers by which kernels know the options of a layer.
OUT_OF_MEMORY = (  # what libraries say, in lower case
    "can't allocate memory", "not enough memory", "cannot allocate memory", "out of memory", "alloc_failed",
    "bad_alloc", "storage size calculation overflowed",
)  # fmt: skip


ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "swiglu": 2}  # KIND
QK_NORMS = {"none": 0, "head": 1, "full": 2}  # NORM
# Norms that the kernels and the hand-written backward know, and whether each subtracts the mean.
CENTRED_NORMS = {"rms": False, "layer": True}


# --- obstacles -------------------------------------------------------------------------------------------------------


def interpreted() -> bool:
    """Return True when Triton's interpreter runs the kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernel_obstacle(device: Device, dtype: torch.dtype | None, instead: str) -> str | None:
    """Return why no Triton kernel of this package can run, in words and with a remedy, or None where one can.

    Args:
        device: where it would run.
        dtype: the compute dtype. None: any that the kernels support.
        instead: the remedy, as half a sentence.
    """
    if not HAS_TRITON:
        return f"triton is not installed; install it, or {instead}"
    if device.type not in ("cuda", "meta") and not interpreted():
        return f"the device is {device.type}; it needs an NVIDIA GPU, {instead}"
    import torch  # not at the top, because the answers above need no torch

    if torch.version.hip:
        return f"the GPU is not NVIDIA's; {instead}"
    if dtype is not None and dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the compute dtype is {dtype}; float32, bfloat16 and float16 are possible, {instead}"
    if device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(
            device if isinstance(device, torch.device) else torch.device(device.type)
        )
        if capability < CAPABILITY:
            return f"the GPU has compute capability {capability}; it must be at least {CAPABILITY}, {instead}"
    return None


def norm_obstacle(config: ModelConfig, instead: str) -> str | None:
    """Return why a norm needs another algorithm than the kernels and the hand-written backward, or None."""
    if config.norm in CENTRED_NORMS:
        return None
    return f"the norm is {config.norm!r}; {' and '.join(map(repr, CENTRED_NORMS))} are possible, {instead}"


def tiled_obstacle(config: ModelConfig) -> str | None:
    """Return why the tiled scan can't run, in words and with a remedy, or None where it can."""
    return norm_obstacle(config, "scan = 'reference' runs any")


def scan_obstacle(config: ModelConfig, device: Device, dtype: torch.dtype | None = None) -> str | None:
    """Return why the fused scan can't run, in words and with a remedy, or None where it can."""
    obstacle = kernel_obstacle(device, dtype, "scan = 'tiled' runs anywhere") or tiled_obstacle(config)
    if obstacle is not None:
        return obstacle
    where, limit = "", MAX_HEAD_WIDTH
    if str(dtype) == "torch.float32" and config.head_width <= MAX_HEAD_WIDTH:
        where, limit = "in float32 ", MAX_HEAD_WIDTH_32_BIT
    if config.head_width > limit:
        return f"the head width is {config.head_width}; {where}it must be 1 to {limit}, scan = 'tiled' takes any"
    return None


def step_obstacle(config: ModelConfig, device: Device, dtype: torch.dtype | None, batch_size: int) -> str | None:
    """Return why the fused decoding step can't run, in words and with a remedy, or None where it can."""
    plain = "the plain step runs anywhere"
    obstacle = kernel_obstacle(device, dtype, plain) or norm_obstacle(config, plain)
    if obstacle is not None:
        return obstacle
    if config.head_width > MAX_HEAD_WIDTH:
        return f"the head width is {config.head_width}; it must be 1 to {MAX_HEAD_WIDTH}, {plain}"
    for name, width in (("d_model", config.d_model), ("head_dim * n_heads", config.head_width * config.n_heads)):
        if width > MAX_STEP_WIDTH:
            return f"{name} is {width}; it must be at most {MAX_STEP_WIDTH}, {plain}"
    if batch_size * config.kv_heads >= 2**31:
        return f"the batch is {batch_size} rows; at most {2**31 // config.kv_heads} are possible, {plain}"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it, says that a GPU or this machine has no memory left.

    PyTorch has no class of its own for a CPU, and for the libraries that it calls.
    """
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen).lower()
        if isinstance(seen, MemoryError) or type(seen).__name__ == "OutOfMemoryError":
            return True
        if isinstance(seen, RuntimeError | OSError) and any(words in text for words in OUT_OF_MEMORY):
            return True
        seen = seen.__cause__
    return False


def on_amd(device: Device) -> bool:
    """Return whether a device of type "cuda" is an AMD GPU."""
    if device.type != "cuda":
        return False
    import torch

    return torch.version.hip is not None


@cache
def compiler_present() -> bool:
    """Return whether torch.compile can make kernels for an NVIDIA GPU."""
    import torch

    return torch.version.hip is None and HAS_TRITON
