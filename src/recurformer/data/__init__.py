"""Text to tokens on disk to batches, in an order that can be resumed."""

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
