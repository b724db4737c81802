"""Recurrent Transformers that compute what a Transformer or a recurrent cell computes, and how exactly."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from helpers import assert_close, logits_of, random_tokens, tiny
from torch import Tensor, nn

from recurformer import LanguageModel
from recurformer.experiments.theory import RecurrentCell, elman_cell, emulate_rnn, emulate_transformer

N = 256
MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    "official": {"norm": "layer", "qk_norm": "full", "residual_scale": "none", "n_layers": 3},
    "llama": {"activation": "swiglu", "position": "rope", "n_kv_heads": 2, "qk_norm": "none", "tie_embeddings": True},
    "biases": {
        "norm": "layer", "activation": "gelu_tanh", "attention_bias": True, "mlp_bias": True, "position": "none",
        "d_mlp": 10, "head_dim": 6, "vocab_multiple": 8, "n_layers": 1,
    },
    "gated": {"activation": "swiglu", "mlp_bias": True, "norm_eps": 0.1, "alibi_slopes": "interleaved", "n_heads": 1},
}  # fmt: skip


def transformer(name: str, dtype: torch.dtype = torch.float64, **more: Any) -> LanguageModel:
    return tiny(layers="standard", scan="auto", dtype=dtype, **{**MODELS[name], **more})


@torch.no_grad()
def error(transformer: LanguageModel, large: float) -> float:
    """Largest difference of the logits."""
    tokens = random_tokens(2, N)
    emulated = emulate_transformer(transformer, large=large)
    return (logits_of(emulated, tokens) - logits_of(transformer, tokens)).abs().max().item()


@pytest.mark.parametrize("name", MODELS)
def test_a_transformer_is_reproduced_to_1e_6(name: str):
    made, tokens = transformer(name), random_tokens(2, N)
    with torch.no_grad():
        expected, emulated = logits_of(made, tokens), emulate_transformer(made)
        assert expected.std() > 0.3
        assert_close(logits_of(emulated, tokens), expected, 1e-6)
    assert set(emulated.config.layer_kinds) == {"recurrent"}
    assert emulated.config.n_layers == 2 * made.config.n_layers
    extra = 2 if made.config.norm == "layer" else 1
    assert emulated.config.d_model == (made.config.n_layers + 1) * made.config.d_model + extra


@pytest.mark.parametrize("name", ["default", "official"])
def test_the_error_falls_as_the_square_of_the_large_coordinate(name: str):
    made = transformer(name)
    errors = [error(made, large) for large in (1e3, 1e4, 1e5, 1e6)]
    assert errors[0] > 1e-4
    for before, after in itertools.pairwise(errors):
        assert before / after == pytest.approx(100, rel=0.05)


def test_float32_reaches_its_rounding():
    made = transformer("default", torch.float32)
    assert error(made, 1e5) < 2e-5  # the logits are up to 7 large


def test_masks_documents_and_cache_pass_through():
    made = transformer("default")
    emulated = emulate_transformer(made)
    tokens = random_tokens(2, 40)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :5] = mask[1, 17:20] = False
    documents = (torch.arange(40) // 13).expand(2, -1)
    with torch.no_grad():
        masked = [logits_of(m, tokens, attention_mask=mask)[mask] for m in (emulated, made)]
        assert_close(masked[0], masked[1], 1e-6)
        packed = [logits_of(m, tokens, document_ids=documents) for m in (emulated, made)]
        assert_close(packed[0], packed[1], 1e-6)
        first = emulated(tokens[:, :30], use_cache=True)
        rest = logits_of(emulated, tokens[:, 30:], cache=first.cache)
        assert_close(rest, logits_of(made, tokens)[:, 30:], 1e-6)


def test_what_cannot_be_emulated_is_refused():
    with pytest.raises(ValueError, match="only a model of standard layers"):
        emulate_transformer(tiny(layers="first:1"))
    for large in (1.0, -3.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite number above 1"):
            emulate_transformer(transformer("default"), large=large)


# --- recurrent cells -------------------------------------------------------------------------------------------------

S, U, V, M = 6, 5, 11, 16


def random_cell(activation: Any, seed: int = 0) -> RecurrentCell:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, std: float) -> Tensor:
        return std * torch.randn(*shape, generator=generator, dtype=torch.float64)

    gates: dict[str, Any] = {}
    gain = 0.5
    if activation == "swiglu":  # quadratic in the state for large states: smaller, so that it does not blow up
        gain = 0.2
        gates = {"gate_state": draw(M, S, std=0.2), "gate_input": draw(M, U, std=0.4), "gate_bias": draw(M, std=1)}
    return RecurrentCell(
        activation=activation, state_matrix=draw(S, S, std=0.5 * S**-0.5), input_matrix=draw(S, U, std=0.3),
        bias=draw(S, std=0.3), down=draw(S, M, std=gain * M**-0.5), up_state=draw(M, S, std=S**-0.5),
        up_input=draw(M, U, std=U**-0.5), up_bias=draw(M, std=0.3), initial=draw(S, std=1), **gates,
    )  # fmt: skip


@pytest.fixture(scope="module")
def task() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (3, N), the cell's inputs (V, U) and a readout (V, S)."""
    generator = torch.Generator().manual_seed(5)
    inputs, readout = (torch.randn(V, width, generator=generator, dtype=torch.float64) for width in (U, S))
    return random_tokens(3, N, vocabulary=V), inputs, readout


@torch.no_grad()
def cell_error(cell: RecurrentCell, task: tuple[Tensor, Tensor, Tensor], **options: Any) -> float:
    tokens, inputs, readout = task
    expected = cell.run(inputs[tokens]) @ readout.T
    assert expected.std() > 0.3
    return (logits_of(emulate_rnn(cell, inputs, readout, **options), tokens) - expected).abs().max().item()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
def test_random_cells_are_carried_out_to_1e_6(activation: str, seed: int, task: tuple[Tensor, Tensor, Tensor]):
    assert cell_error(random_cell(activation, seed), task) < 1e-6


def test_the_state_is_carried_over_the_whole_sequence():
    """A counter: the state at i is the number of ones so far, which needs every update since the first."""
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    counter = RecurrentCell(
        activation="gelu", state_matrix=one, input_matrix=one, bias=zero[0], down=zero, up_state=zero, up_input=zero,
        up_bias=zero[0], initial=zero[0],
    )  # fmt: skip
    tokens = random_tokens(2, N, vocabulary=2)
    model = emulate_rnn(counter, torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]]), large=1e8)
    with torch.no_grad():
        assert_close(logits_of(model, tokens)[:, :, 1], tokens.cumsum(1).double(), 1e-6)


def test_the_error_falls_with_sharpness_and_with_the_large_coordinate(task: tuple[Tensor, Tensor, Tensor]):
    cell = random_cell("gelu")
    by_sharpness = [cell_error(cell, task, sharpness=sharpness, large=1e8) for sharpness in (5, 10, 20, 40)]
    assert by_sharpness[0] > 1e-2
    for n, sharp in enumerate((5, 10, 20)):  # as exp(-sharpness), which doubles
        assert by_sharpness[n + 1] < 1.5 * by_sharpness[n] * math.exp(-sharp) + 1e-12
    by_size = [cell_error(cell, task, large=large) for large in (1e3, 1e4, 1e5)]
    assert by_size[0] / by_size[1] == pytest.approx(100, rel=0.05)
    assert by_size[1] / by_size[2] == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@torch.no_grad()
def test_torch_cells(nonlinearity: str, task: tuple[Tensor, Tensor, Tensor]):
    torch.manual_seed(0)
    tokens, inputs, readout = task
    cell = nn.RNNCell(U, S, nonlinearity=nonlinearity).double()
    state, states = torch.zeros(3, S, dtype=torch.float64), []
    for i in range(N):
        state = cell(inputs[tokens[:, i]], state)
        states.append(state)
    expected = torch.stack(states, dim=1) @ readout.T

    def error(**options: Any) -> float:
        return (
            (logits_of(emulate_rnn(elman_cell(cell, **options), inputs, readout), tokens) - expected).abs().max().item()
        )

    assert error() < 1e-6
    if nonlinearity == "tanh":
        assert error(knots=8) > 100 * error(knots=32)


def test_shapes_that_fit_no_cell_are_refused(task: tuple[Tensor, Tensor, Tensor]):
    tokens, inputs, readout = task
    cell = random_cell("gelu")
    with pytest.raises(ValueError, match=r"must be \(V, 5\) and \(V, 6\)"):
        emulate_rnn(cell, inputs[:, 1:], readout)
    with pytest.raises(ValueError, match="sharpness is 0"):
        emulate_rnn(cell, inputs, readout, sharpness=0)
    with pytest.raises(ValueError, match="gate_bias is given"):
        RecurrentCell(**{**vars(cell), "gate_bias": torch.zeros(M)})
    with pytest.raises(ValueError, match=r"up_bias has shape \(3,\)"):
        RecurrentCell(**{**vars(cell), "up_bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="knots is 1"):
        elman_cell(nn.RNNCell(U, S), knots=1)
    assert tokens.shape == (3, N)
