"""Everything that both passes of an engine share: buffers, packed weights, the table, and repeated launch options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from recurformer.hardware import ACTIVATIONS, CENTRED_NORMS, EARLY_CAPABILITY, QK_NORMS
from recurformer.scan.fused.shape import EngineShape
from recurformer.scan.fused.table import Slot
from recurformer.scan.fused.weights import PackedWeights

LARGE_TILE_BYTES = 161 * 1024  # shared memory a block that the tiles of our products need with all their stages
PARTS = 1024  # programs that share the sum of a norm weight's gradient


@dataclass(frozen=True)
class DeviceFacts:
    """Facts of a device that launches depend on. The defaults are those of a CPU, for the interpreter."""

    on_gpu: bool = False
    launches_early: bool = False  # programmatic dependent launch: a kernel starts before the one ahead of it has ended
    fits_large_tiles: bool = True
    multiprocessors: int = 1

    @classmethod
    def of(cls, device: torch.device) -> DeviceFacts:
        """Return the facts of a device."""
        if device.type != "cuda":
            return cls()
        properties = torch.cuda.get_device_properties(device)
        return cls(
            on_gpu=True,
            launches_early=torch.cuda.get_device_capability(device) >= EARLY_CAPABILITY,
            fits_large_tiles=properties.shared_memory_per_block_optin >= LARGE_TILE_BYTES,
            multiprocessors=properties.multi_processor_count,
        )


class LaunchOptions:
    """Keyword arguments that several launches share, by subject.

    DB, HB, GB and KB are D, H, G and half of K, or all of K, rounded up to a power of two.
    """

    def __init__(self, shape: EngineShape, facts: DeviceFacts) -> None:
        config, s = shape.config, shape.sizes
        centred = CENTRED_NORMS[config.norm]
        half_width = triton.next_power_of_2((s.K + 1) // 2)
        self.head_block = triton.next_power_of_2(s.H)  # HB
        self.group_block = triton.next_power_of_2(s.G)  # GB
        # Layers and positions of a chunk: every kernel that reads the table.
        self.stack: dict[str, Any] = {"L": shape.L, "C": shape.C}
        # One row of activations a program.
        self.row: dict[str, Any] = {
            "D": s.D, "DB": triton.next_power_of_2(s.D), "CENTRED": centred, "num_warps": 4 if s.D <= 1024 else 8,
        }  # fmt: skip
        # Pairs of one row, as two halves of each head.
        self.pair: dict[str, Any] = {
            "G": s.G, "K": s.K, "KB": half_width, "NORM": QK_NORMS[config.qk_norm], "CENTRED": centred,
            "ROPE": config.position == "rope", "BIAS": config.attention_bias,
        }  # fmt: skip
        # Which keys a query sees, and how distance counts.
        self.visibility: dict[str, Any] = {"ALIBI": config.position == "alibi", "SEGMENTS": shape.segmented}
        # Attention with whole heads as tiles.
        self.attention: dict[str, Any] = {
            "H": s.H, "G": s.G, "K": s.K, "KB": max(16, triton.next_power_of_2(s.K)), **self.visibility,
        }  # fmt: skip
        # Matrix products inside a kernel.
        dtypes = {torch.float32: triton.language.float32, torch.bfloat16: triton.language.bfloat16}
        self.matrix: dict[str, Any] = {
            "DT": dtypes.get(shape.dtype, triton.language.float16),
            "PRECISION": "ieee" if shape.dtype == torch.float32 else "tf32",
        }
        # A kernel that follows a kernel of ours in the stream, and may start while that one still runs.
        self.starts_early: dict[str, Any] = {"EARLY": facts.launches_early}
        if facts.launches_early:
            self.starts_early["launch_pdl"] = True
        # A kernel that could start early, and does not.
        self.starts_after: dict[str, Any] = {"EARLY": False}


class Workspace:
    """Buffers, packed weights and launch options of one shape.

    Args:
        shape: of the stack.
        facts: of the device. Default: those of `shape.device`.
    """

    def __init__(self, shape: EngineShape, facts: DeviceFacts | None = None) -> None:
        self.shape, self.sizes = shape, shape.sizes
        self.facts = DeviceFacts.of(shape.device) if facts is None else facts
        self.options = LaunchOptions(shape, self.facts)
        self.buffers: list[Tensor] = []
        self.table = self.new_buffer(len(Slot), dtype=torch.int64)
        self.weights = PackedWeights.empty(shape, self.new_buffer)
        self.activation = ACTIVATIONS[shape.config.activation]  # KIND of the kernels
        self.normed_heads = QK_NORMS[shape.config.qk_norm] > 0
        self.parts = min(PARTS, shape.C * shape.B)

    def new_buffer(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a new buffer of zeros, in the compute dtype by default.

        It holds zeros, because a layer that has no chunk yet still takes part in every product.
        """
        with torch.inference_mode(False):  # the buffer outlives the call that makes it
            buffer = torch.zeros(sizes, dtype=dtype or self.shape.dtype, device=self.shape.device)
        self.buffers.append(buffer)
        return buffer

    @property
    def bytes(self) -> int:
        """Bytes of all buffers made so far."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self.buffers)

    def fill_table(self, row: list[int]) -> None:
        """Copy a row of entries to the table.

        On a GPU the copy comes from pinned memory, which PyTorch keeps until it has been read, so nothing waits.
        """
        entries = torch.tensor(row)
        self.table.copy_(entries.pin_memory() if self.facts.on_gpu else entries, non_blocking=True)
