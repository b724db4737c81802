"""Prompts in, tokens and text out: sampling, stopping, and the decode engine."""

from recurformer.generation.sampling import generate, generate_rows

__all__ = ["generate", "generate_rows"]
