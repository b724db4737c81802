"""Choice of the fused step for a batch."""

from __future__ import annotations

from recurformer.generation.fused.several_rows import SeveralRowsStep
from recurformer.generation.fused.single_row import SingleRowStep, fits_single_row
from recurformer.generation.fused.step import FusedStep
from recurformer.generation.fused.tuning import Tuning
from recurformer.generation.state import DecodeState
from recurformer.model import LanguageModel


def make_step(
    model: LanguageModel, state: DecodeState, *, defer: bool = False, tuning: Tuning | None = None
) -> FusedStep:
    """Return the fused step for the rows of a state; `FusedStep` describes the arguments."""
    kind = SingleRowStep if state.batch_size == 1 and fits_single_row(model.config) else SeveralRowsStep
    return kind(model, state, defer=defer, tuning=tuning or Tuning())
