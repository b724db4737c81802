"""Recurrent Transformers: language models whose layers attend to keys and values made from their own outputs."""

from recurformer.config import ModelConfig
from recurformer.version import __version__

__all__ = ["ModelConfig", "__version__"]
