"""Generation: prompts in, tokens and text out. The parts are sampling, stopping, prompts and the decode engine."""

from recurformer.generation.prompt import pad_prompts
from recurformer.generation.rows import Generated, GenerationSettings, generate, generate_rows

__all__ = ["Generated", "GenerationSettings", "generate", "generate_rows", "pad_prompts"]
