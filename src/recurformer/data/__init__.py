"""Text to tokens on disk, and tokens on disk to batches in an order that can be resumed.

The public names load on first use, so that preparing text does not import PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recurformer.data.dataset import TokenDataset
    from recurformer.data.preparation import PrepareSummary, prepare
    from recurformer.data.tokenizer import Tokenizer, load_tokenizer
    from recurformer.data.windows import Batch, TrainingWindows, evaluation_batches

__all__ = [
    "Batch",
    "PrepareSummary",
    "TokenDataset",
    "Tokenizer",
    "TrainingWindows",
    "evaluation_batches",
    "load_tokenizer",
    "prepare",
]

_HOMES = {
    "Batch": "windows",
    "PrepareSummary": "preparation",
    "TokenDataset": "dataset",
    "Tokenizer": "tokenizer",
    "TrainingWindows": "windows",
    "evaluation_batches": "windows",
    "load_tokenizer": "tokenizer",
    "prepare": "preparation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"recurformer.data.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
