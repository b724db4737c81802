"""Small models and strict comparisons, shared by all tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch
from torch import Tensor

from recurformer import LanguageModel, ModelConfig
from recurformer.choose import GPU_SCANS
from recurformer.model import Layer
from recurformer.scan.algorithms import SCANS

FIXTURES = Path(__file__).parent / "fixtures"
V = 97  # vocabulary of the tiny models

# Every exact algorithm that runs on a CPU, present and future.
CPU_SCANS = tuple(name for name in SCANS if name not in GPU_SCANS)
every_scan = pytest.mark.parametrize("scan", CPU_SCANS)

# What the maths of one layer can be asked for, by name: every scan is held to all of it.
LAYER_OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "grouped-heads": {"n_kv_heads": 2},
    "one-kv-head": {"n_kv_heads": 1, "head_dim": 12},
    "one-head": {"n_heads": 1, "head_dim": 8},
    "interleaved-slopes": {"d_model": 24, "n_heads": 6, "alibi_slopes": "interleaved"},
    "geometric-slopes": {"d_model": 24, "n_heads": 6},
    "rope": {"position": "rope", "rope_theta": 100.0},
    "rope-full-grouped": {"position": "rope", "qk_norm": "full", "n_kv_heads": 2},
    "no-positions": {"position": "none"},
    "layer-norm": {"norm": "layer", "norm_eps": 1e-3},
    "layer-norm-full": {"norm": "layer", "qk_norm": "full"},
    "no-qk-norm": {"qk_norm": "none"},
    "gelu-tanh": {"activation": "gelu_tanh"},
    "swiglu": {"activation": "swiglu", "d_mlp": 40},
    "no-residual-scale": {"residual_scale": "none"},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "swiglu-biases-layer": {"activation": "swiglu", "mlp_bias": True, "attention_bias": True, "norm": "layer"},
    "biases-no-qk-norm": {"attention_bias": True, "qk_norm": "none", "position": "none"},
}

# Largest absolute difference that counts as equal, by dtype.
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-10}


def tiny(
    *, scan: str = "reference", dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> LanguageModel:
    """2 layers, D 32, H 4, V 97, weights drawn with std 0.3: a fresh initialisation is too weak to show errors."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"vocab_size": V, "d_model": 32, "n_layers": 2, "n_heads": 4}
    model = LanguageModel(ModelConfig(**{**shape, **overrides}))
    model.scan = scan
    return strong(model).to(dtype).eval()


def strong(model: LanguageModel, std: float = 0.3) -> LanguageModel:
    """Redraw every parameter: normal with `std`, around 1 for norms."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, std)
    return model


def random_tokens(*shape: int, seed: int = 1, vocabulary: int = V) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def layer_of(model: LanguageModel, index: int) -> Layer:
    """One layer of a model."""
    layer = model.layers[index]
    assert isinstance(layer, Layer)
    return layer


def count_evaluations(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of a layer each time the model evaluates one by itself."""
    calls: list[int] = []
    for n in range(len(model.layers)):
        maths = layer_of(model, n).maths
        counted = lambda dtype, n=n, maths=maths: (calls.append(n), maths(dtype))[1]  # noqa: E731
        monkeypatch.setattr(layer_of(model, n), "maths", counted)
    return calls


def logits_and_loss(model: LanguageModel, tokens: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Logits and loss of a call; targets are random unless given."""
    options.setdefault("targets", random_tokens(*tokens.shape, seed=2))
    out = model(tokens, **options)
    assert out.logits is not None
    assert out.loss is not None
    return out.logits, out.loss


def logits_of(model: LanguageModel, tokens: Tensor, **options: Any) -> Tensor:
    """The logits of a call."""
    logits = model(tokens, **options).logits
    assert logits is not None
    return logits


def loss_of(model: LanguageModel, tokens: Tensor, **options: Any) -> Tensor:
    """The loss of a call; targets are random unless given."""
    return logits_and_loss(model, tokens, **options)[1]


def gradients(model: LanguageModel, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of `loss` for every parameter, by name; zeros where it does not depend on one."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, grads, strict=True)}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Same shape, no NaN or infinity, and a largest absolute difference of at most `tolerance` (default: CLOSE)."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    assert torch.isfinite(expected).all()
    tolerance = CLOSE[torch.promote_types(actual.dtype, expected.dtype)] if tolerance is None else tolerance
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance, f"differs by {difference:.3g}, more than {tolerance:g}"


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of what is expected."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    assert torch.isfinite(expected).all()
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-30)).item()


def assert_all_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float | None = None) -> None:
    """`assert_close` of two dictionaries, entry by entry."""
    assert actual.keys() == expected.keys()
    for name in expected:
        try:
            assert_close(actual[name], expected[name], tolerance)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def script_of(path: Path) -> ModuleType:
    """A script that belongs to no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands_of(group: click.Group) -> dict[tuple[str, ...], click.Command]:
    """The words of a command line -> its command, for every command below a group and for the groups themselves."""
    found: dict[tuple[str, ...], click.Command] = {}
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found[(name,)] = command
        if isinstance(command, click.Group):
            found |= {(name, *words): inner for words, inner in commands_of(command).items()}
    return found
