"""Evaluation of a model on text: perplexity, bits per byte, zero-shot accuracy."""

from recurformer.evaluation.perplexity import Evaluation, evaluate, open_data

__all__ = ["Evaluation", "evaluate", "open_data"]
