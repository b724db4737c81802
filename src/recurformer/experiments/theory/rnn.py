"""One recurrent layer that carries out the updates of a recurrent cell, token by token (paper section 3).

The stream has four blocks: the input u_i of the token, the previous state (empty at first), the state, and one large
constant coordinate that makes every norm a division by a constant. Attention must return the persistent value of the
previous position and nothing else; the MLP computes the cell's update and writes the state; the value is the state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurformer.attention import rotary_frequencies
from recurformer.config import Activation, ModelConfig
from recurformer.experiments.theory.transformer import linear_units
from recurformer.model import LanguageModel, Layer


@dataclass(frozen=True, kw_only=True)
class RecurrentCell:
    """The cells that one layer computes, up to sharpness: an affine map plus an MLP with one hidden layer,

        s_i = A s_{i-1} + B u_i + c + W phi(P s_{i-1} + Q u_i + p)                          phi = gelu or gelu_tanh
        s_i = A s_{i-1} + B u_i + c + W (silu(G s_{i-1} + H u_i + g) * (P s_{i-1} + Q u_i + p))            swiglu

    S state width, U input width, M hidden width. Elman cells with GELU are the case A = B = 0; cells with a
    multiplicative gate are the swiglu case. tanh and ReLU are limits: `elman_cell`. A GRU's update is not in the class,
    because its reset gate feeds a second nonlinearity: it takes a deeper MLP, or a fit of this one on a bounded region.
    """

    activation: Activation
    state_matrix: Tensor  # A (S, S)
    input_matrix: Tensor  # B (S, U)
    bias: Tensor  # c (S,)
    down: Tensor  # W (S, M)
    up_state: Tensor  # P (M, S)
    up_input: Tensor  # Q (M, U)
    up_bias: Tensor  # p (M,)
    initial: Tensor  # s_{-1} (S,)
    gate_state: Tensor | None = None  # G (M, S), swiglu
    gate_input: Tensor | None = None  # H (M, U)
    gate_bias: Tensor | None = None  # g (M,)

    def __post_init__(self) -> None:
        (S, U), M = self.input_matrix.shape, self.down.shape[-1]
        shapes = {
            "state_matrix": (S, S), "bias": (S,), "down": (S, M), "up_state": (M, S), "up_input": (M, U),
            "up_bias": (M,), "initial": (S,), "gate_state": (M, S), "gate_input": (M, U), "gate_bias": (M,),
        }  # fmt: skip
        for name, shape in shapes.items():
            tensor: Tensor | None = getattr(self, name)
            if (tensor is None) != (name.startswith("gate") and self.activation != "swiglu"):
                raise ValueError(
                    f"{name} is {'missing' if tensor is None else 'given'}; gates belong to activation 'swiglu', "
                    f"and this is {self.activation!r}"
                )
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; input_matrix and down ask for {shape}")

    def step(self, state: Tensor, inputs: Tensor) -> Tensor:
        """s_i (..., S) from s_{i-1} (..., S) and u_i (..., U)."""
        up = state @ self.up_state.T + inputs @ self.up_input.T + self.up_bias
        if self.gate_state is not None and self.gate_input is not None and self.gate_bias is not None:
            hidden = F.silu(state @ self.gate_state.T + inputs @ self.gate_input.T + self.gate_bias) * up
        else:
            hidden = F.gelu(up, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return state @ self.state_matrix.T + inputs @ self.input_matrix.T + self.bias + hidden @ self.down.T

    def run(self, inputs: Tensor) -> Tensor:
        """All states (B, N, S) for inputs (B, N, U): the plain loop."""
        state, states = self.initial.expand(inputs.shape[0], -1), []
        for i in range(inputs.shape[1]):
            state = self.step(state, inputs[:, i])
            states.append(state)
        return torch.stack(states, dim=1)


@torch.no_grad()
def elman_cell(cell: nn.RNNCell, *, knots: int = 64, reach: float = 6.0) -> RecurrentCell:
    """A `torch.nn.RNNCell` (tanh or ReLU) as a `RecurrentCell`: each nonlinearity becomes a sum of GELUs.

    tanh is fitted by least squares with `knots` GELUs, in float64; the error falls with their number. ReLU is
    gelu(t h) / t up to 0.17 / t, with t = 1e8.

    Args:
        cell: with or without biases.
        knots: GELUs for each tanh.
        reach: the fit of tanh holds while the cell's pre-activations stay within -reach ... reach.

    Returns:
        RecurrentCell: float64, of hidden width S * knots (S for ReLU).
    """
    if knots < 2 or not 0 < reach < math.inf:
        raise ValueError(f"knots is {knots} and reach {reach}; give at least 2 knots and a finite reach above 0")
    S, dtype = cell.hidden_size, torch.float64
    if cell.nonlinearity == "relu":
        sharp, centres = 1e8, torch.zeros(1, dtype=dtype)
        weights, constant = torch.full((1,), 1 / sharp, dtype=dtype), torch.zeros((), dtype=dtype)
    else:
        centres = torch.linspace(-reach, reach, knots, dtype=dtype)
        sharp = (knots - 1) / (2 * reach)  # a GELU is as wide as the knots are apart
        points = torch.linspace(-reach, reach, 40 * knots, dtype=dtype)
        basis = torch.cat([F.gelu(sharp * (points[:, None] - centres)), torch.ones_like(points)[:, None]], dim=1)
        fit = torch.linalg.lstsq(basis, points.tanh()[:, None], driver="gelsd").solution[:, 0]
        weights, constant = fit[:-1], fit[-1]
    bias = (cell.bias_ih + cell.bias_hh).to(dtype) if cell.bias else torch.zeros(S, dtype=dtype)
    every = torch.eye(S, dtype=dtype).repeat_interleave(len(centres), dim=0)  # the state's unit of each hidden unit
    return RecurrentCell(
        activation="gelu",
        state_matrix=torch.zeros(S, S, dtype=dtype),
        input_matrix=torch.zeros(S, cell.input_size, dtype=dtype),
        bias=constant.repeat(S),
        down=every.T * weights.repeat(S),
        up_state=sharp * every @ cell.weight_hh.to(dtype),
        up_input=sharp * every @ cell.weight_ih.to(dtype),
        up_bias=sharp * (every @ bias - centres.repeat(S)),
        initial=torch.zeros(S, dtype=dtype),
    )


@torch.no_grad()
def emulate_rnn(
    cell: RecurrentCell,
    inputs: Tensor,
    readout: Tensor,
    *,
    sharpness: float = 40.0,
    large: float = 1e6,
    length: int = 1024,
) -> LanguageModel:
    """One recurrent layer whose outputs are the states of a recurrent cell (paper section 3).

    Args:
        cell: the computation of the MLP.
        inputs: (V, U), the cell's input for each token.
        readout: (V, S); the logits at i are `readout @ s_i`.
        sharpness: by how much the score of the previous position exceeds that of any other one within `length`. The
            attention weight elsewhere is at most length * exp(-sharpness).
        large: the large coordinate, against which the norm of the rest of the stream must be small: each read is off by
            a relative |stream|^2 / (2 large^2).
        length: the longest sequence for which `sharpness` holds.

    Returns:
        LanguageModel: float64, one recurrent layer, one head, width U + 2 S + 1.

    Raises:
        ValueError: for shapes that do not fit the cell, or parameters out of range.

    The cell passes on an error in its state: a cell that contracts forgets the error, and a chaotic one makes it grow.
    """
    (S, U), M = cell.input_matrix.shape, cell.down.shape[-1]
    if inputs.dim() != 2 or readout.dim() != 2 or inputs.shape[1] != U or readout.shape != (inputs.shape[0], S):
        raise ValueError(
            f"inputs {tuple(inputs.shape)} and readout {tuple(readout.shape)} do not fit a cell of {U} inputs and "
            f"{S} states; they must be (V, {U}) and (V, {S})"
        )
    if not 0 < sharpness < math.inf or not 1 < large < math.inf or length < 1:
        raise ValueError(
            f"sharpness is {sharpness}, large {large}, length {length}; they must be finite, above 0, 1 and 0"
        )
    width, head_dim = U + 2 * S + 1, max(8, S + S % 2)
    hidden = M + len(linear_units(cell.activation)) * S
    config = ModelConfig(
        vocab_size=inputs.shape[0], d_model=width, n_layers=1, n_heads=1, head_dim=head_dim, d_mlp=hidden,
        activation=cell.activation, position="rope", qk_norm="none", norm_eps=1e-12, residual_scale="none",
        attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    model = LanguageModel(config).double()
    for name, parameter in model.named_parameters():
        nn.init.constant_(parameter, 1.0 if "norm" in name else 0.0)
    stream = _Stream(slice(0, U), slice(U, U + S), slice(U + S, U + 2 * S), math.sqrt(width) / large)
    model.embedding.weight[:, stream.token] = inputs.double()
    model.embedding.weight[:, stream.state] = cell.initial.double()
    model.embedding.weight[:, -1] = large
    model.head.weight[:, stream.state] = readout.double() / stream.gain
    layer = model.layers[0]
    assert isinstance(layer, Layer)
    _attend_to_previous(layer, config, stream, _amplitude(rotary_frequencies(config), sharpness, length))
    _compute_cell(layer, cell, stream)
    return model.eval()


class _Stream(NamedTuple):
    """Coordinates of the residual stream's blocks, and the factor of every norm."""

    token: slice
    previous: slice
    state: slice
    gain: float


def _attend_to_previous(layer: Layer, config: ModelConfig, stream: _Stream, amplitude: float) -> None:
    """Make attention copy the previous position's state into the stream.

    Rotary positions concentrate the weights: with the query turned by one position, the score of distance d is a sum of
    cos(frequency * (d - 1)) over the frequencies, largest at d = 1. ALiBi alone cannot do this. Its slopes are below 1,
    and each position keeps more than 1/e of the next one's weight. The temporary pair, at distance 0, loses to the
    previous position's pair. At the first position it is alone: its value is the cell's initial state, which every
    token's embedding carries.
    """
    S, half = stream.state.stop - stream.state.start, config.head_width // 2
    frequencies = rotary_frequencies(config)
    layer.k_proj.bias[:half] = 1.0
    layer.q_proj.bias.copy_(amplitude * torch.cat([frequencies.cos(), -frequencies.sin()]))
    layer.v_proj.weight[:S, stream.state] = torch.eye(S, dtype=torch.float64) / stream.gain
    layer.o_proj.weight[stream.previous, :S] = torch.eye(S, dtype=torch.float64)


def _compute_cell(layer: Layer, cell: RecurrentCell, stream: _Stream) -> None:
    """Make the MLP compute the cell's update from the token and the previous state, and write the state."""
    S, M = cell.state_matrix.shape[0], cell.down.shape[-1]

    def write(rows: slice, projection: nn.Linear, of_state: Tensor, of_input: Tensor, bias: Tensor) -> None:
        projection.weight[rows, stream.previous] = of_state.double() / stream.gain
        projection.weight[rows, stream.token] = of_input.double() / stream.gain
        projection.bias[rows] = bias.double()

    write(slice(0, M), layer.up_proj, cell.up_state, cell.up_input, cell.up_bias)
    if cell.gate_state is not None and cell.gate_input is not None and cell.gate_bias is not None:
        write(slice(0, M), layer.gate_proj, cell.gate_state, cell.gate_input, cell.gate_bias)
    layer.down_proj.weight[stream.state, :M] = cell.down.double()
    # The affine part goes through linear units. The stream already holds the initial state, which is taken off.
    affine = cell.bias.double() - cell.initial.double()
    for n, (inward, outward) in enumerate(linear_units(cell.activation)):
        rows = slice(M + n * S, M + (n + 1) * S)
        write(rows, layer.up_proj, inward * cell.state_matrix, inward * cell.input_matrix, 0.0 * affine)
        layer.down_proj.weight[stream.state, rows] = outward * torch.eye(S, dtype=torch.float64)
        if cell.activation == "swiglu":
            layer.gate_proj.bias[rows] = 1.0
    layer.down_proj.bias[stream.state] = affine


def _amplitude(frequencies: Tensor, sharpness: float, length: int) -> float:
    """Return the factor of the query with which distance 1 leads every other distance below `length` by `sharpness`."""
    others = torch.cat([torch.tensor([0.0]), torch.arange(2.0, max(3, length))]).double()
    lead = (1 - (frequencies * (others[:, None] - 1)).cos()).sum(-1).min().item()
    return sharpness * math.sqrt(2 * len(frequencies)) / lead
