"""Recurrent Transformers: language models whose layers attend to keys and values made from their own outputs.

The public names load on first use, so that importing the package does not import PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from recurformer.version import __version__

if TYPE_CHECKING:
    from recurformer.cache import KVCache
    from recurformer.config import ModelConfig
    from recurformer.model import LanguageModel
    from recurformer.store.folders import load, load_tokenizer, save

__all__ = ["KVCache", "LanguageModel", "ModelConfig", "__version__", "load", "load_tokenizer", "save"]

_HOMES = {
    "KVCache": "cache",
    "LanguageModel": "model",
    "ModelConfig": "config",
    "load": "store.folders",
    "load_tokenizer": "store.folders",
    "save": "store.folders",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"recurformer.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
