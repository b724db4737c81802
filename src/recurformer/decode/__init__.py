"""Decoding: one token of every row a step, in static buffers, as one CUDA graph where there is a GPU."""

from recurformer.decode.engine import STEP_CHOICES, DecodeEngine, choose_step, obstacle
from recurformer.decode.prompt import read_prompt, reads_by_steps
from recurformer.decode.state import State

__all__ = ["STEP_CHOICES", "DecodeEngine", "State", "choose_step", "obstacle", "read_prompt", "reads_by_steps"]
