"""The paper's claims about what the layer can compute and how gradients pass through it, as code.

`emulate_transformer` and `emulate_rnn` build weights (paper section 3); `position_gradients` measures (section 4).
"""

from recurformer.experiments.theory.gradients import PositionGradients, jacobian_gains, position_gradients
from recurformer.experiments.theory.rnn import RecurrentCell, elman_cell, emulate_rnn
from recurformer.experiments.theory.transformer import emulate_transformer

__all__ = [
    "PositionGradients",
    "RecurrentCell",
    "elman_cell",
    "emulate_rnn",
    "emulate_transformer",
    "jacobian_gains",
    "position_gradients",
]
