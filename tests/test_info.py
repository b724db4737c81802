"""Facts of a model and of the machine, without torch where none is needed."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LAYER_OPTIONS

from recurformer import LanguageModel, ModelConfig, info


@pytest.mark.parametrize("tied", [False, True], ids=["two tables", "one table"])
@pytest.mark.parametrize("options", LAYER_OPTIONS.values(), ids=LAYER_OPTIONS)
def test_parameters_are_counted_without_a_model(options: dict[str, Any], tied: bool) -> None:
    shape: dict[str, Any] = {"vocab_size": 97, "vocab_multiple": 8, "d_model": 32, "n_layers": 3, "n_heads": 4}
    config = ModelConfig(**{**shape, **options}, tie_embeddings=tied)
    with torch.device("meta"):
        model = LanguageModel(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    outside = (1 if tied else 2) * 104 * config.d_model
    assert config.num_parameters(embedding=True) == model.num_parameters(embedding=True) == count
    assert config.num_parameters() == model.num_parameters() == count - outside


def test_a_cpu_by_name_chooses_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for files, platform, possible in (
        ((), "linux", False),
        (("/proc/nowhere",), "linux", False),
        ((str(Path(__file__)),), "linux", True),  # a driver's file
        ((), "darwin", True),
        ((), "win32", True),
    ):
        monkeypatch.setattr(info, "GPU_FILES", files)
        monkeypatch.setattr(info.sys, "platform", platform)
        assert info.gpu_is_possible() is possible
    monkeypatch.undo()
    monkeypatch.setattr(info, "GPU_FILES", ())
    info.devices.cache_clear()
    by_name = info.describe("300m-6", "first:2")
    monkeypatch.setattr(info, "devices", lambda: [torch.device("cpu")])
    assert info.describe("300m-6", "first:2") == by_name
    assert list(by_name["scan"]) == ["cpu"]


def test_the_version_of_torch_is_known_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert info.environment()["versions"]["torch"] == torch.__version__
    real = metadata.version

    def version(name: str) -> str:
        if name == "torch":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(info.metadata, "version", version)
    assert info.environment()["versions"]["torch"] == torch.__version__
