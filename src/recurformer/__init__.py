"""Recurrent Transformers: language models whose layers attend to keys and values made from their own outputs."""

from recurformer.cache import KVCache
from recurformer.config import ModelConfig
from recurformer.folders import load, load_tokenizer, save
from recurformer.model import LanguageModel
from recurformer.version import __version__

__all__ = ["KVCache", "LanguageModel", "ModelConfig", "__version__", "load", "load_tokenizer", "save"]
