"""A corpus of 30 windows and a model of two small layers: a run of 20 steps sees 2.5 epochs in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recurformer import load
from recurformer.data import prepare
from recurformer.store.runs import read_metrics
from recurformer.training import TrainConfig

WINDOW, WINDOWS = 16, 30
TEXT = "The quick brown fox jumps over the lazy dog; a jackdaw loves my big sphinx of quartz. " * 12


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with prepared `train` (WINDOWS windows) and `validation` tokens, one byte each."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, text in {"train": TEXT[: WINDOW * WINDOWS], "validation": TEXT[100:300]}.items():
        (folder / f"{name}.txt").write_text(text)
        prepare([folder / f"{name}.txt"], folder / name, progress=False)
    return folder


@pytest.fixture
def values(corpus: Path) -> Callable[..., dict[str, Any]]:
    """The nested dictionaries of a tiny run; keywords change settings, `optimizer__lr=1` means optimizer.lr."""

    def make(**changes: Any) -> dict[str, Any]:
        tables: dict[str, Any] = {
            "model": {"d_model": 16, "n_heads": 2, "n_layers": 2, "layers": "first:1"},
            "data": {"train": str(corpus / "train"), "validation": str(corpus / "validation"), "window": WINDOW},
            "schedule": {"steps": 20},
            "evaluation": {"every": 5, "batches": 2},
            "sample": {"tokens": 0},
            "log": {"every": 1},
            "batch_size": 4,
            "device": "cpu",
        }
        for key, value in changes.items():
            *sections, name = key.split("__")
            table = tables
            for section in sections:
                table = table.setdefault(section, {})
            table[name] = value
        return tables

    return make


@pytest.fixture
def tiny(values: Callable[..., dict[str, Any]]) -> Callable[..., TrainConfig]:
    """`values` as a TrainConfig."""
    return lambda **changes: TrainConfig.from_dict(values(**changes))


@pytest.fixture(scope="session")
def weights() -> Callable[[Path], dict[str, torch.Tensor]]:
    """A function: the weights of a run's newest checkpoint."""

    def read(run: Path) -> dict[str, torch.Tensor]:
        return load(sorted((run / "checkpoints").glob("step-*"))[-1] / "model").state_dict()

    return read


@pytest.fixture(scope="session")
def records() -> Callable[[Path, str], list[dict[str, Any]]]:
    """A function: the records of one event in a run's metrics, without the clock."""

    def read(run: Path, event: str) -> list[dict[str, Any]]:
        clocks = ("seconds", "tokens_per_second")
        return [{k: v for k, v in r.items() if k not in clocks} for r in read_metrics(run) if r["event"] == event]

    return read


@pytest.fixture(scope="session")
def same_weights() -> Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], bool]:
    """A function: whether two state dicts are equal, bit for bit."""

    def compare(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    return compare
