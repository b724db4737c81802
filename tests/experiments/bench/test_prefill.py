"""`bench prefill`: the limit is the arithmetic that is said, and a prompt is read as generation reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recurformer.config import ModelConfig
from recurformer.experiments.bench import prefill
from recurformer.experiments.bench.prefill import PrefillSettings, bench_prefill, sequential_weights, streaming_limit

SMALL: dict[str, Any] = {
    "presets": ("nano",), "scans": ("tiled",), "length": 6, "dtype": "fp32", "repeats": 1, "warmup": 1,
}  # fmt: skip


@pytest.mark.parametrize("preset", ["300m-6", "300m-24"])
def test_the_limit_of_the_papers_shapes(preset: str):
    """22 D^2 L bytes a token in 16 bits: about 5,400 tokens a second at 3 TB/s, for both."""
    config = ModelConfig.preset(preset)
    limit = streaming_limit(config, torch.bfloat16, 3.0e12)
    assert limit == 3.0e12 / (22 * config.d_model**2 * config.n_layers)
    assert 5_300 < limit < 6_000
    assert streaming_limit(config, torch.float32, 3.0e12, batch_size=4) == 2 * limit


def test_weights_that_every_position_meets():
    assert sequential_weights(ModelConfig(d_model=64, n_heads=4)) == 11 * 64 * 64
    shared = ModelConfig(d_model=64, n_heads=4, n_kv_heads=1, activation="swiglu", d_mlp=100)
    assert sequential_weights(shared) == 64 * 64 + 3 * 64 * 100 + 2 * 64 * 16


def test_rows(monkeypatch: pytest.MonkeyPatch, text_of: Callable[..., str]):
    monkeypatch.setattr(prefill, "copy_bandwidth", lambda device: 1e9)
    results = bench_prefill(PrefillSettings(**{**SMALL, "scans": ("tiled", "auto", "engine")}, batch_size=2))
    tiled, auto, engine, standard = results["rows"]
    assert [row["path"] for row in results["rows"]] == ["tiled", "auto", "engine", "standard"]
    for row in (tiled, auto, engine):
        assert row["limit_tokens_per_s"] == 2 * 1e9 / (4 * 11 * 128 * 128 * 4)
        assert row["of_limit"] == pytest.approx(row["tokens_per_s"] / row["limit_tokens_per_s"])
        assert row["tokens_per_s"] == pytest.approx(12 / row["prefill_s"])
    assert "of_limit" not in standard
    assert json.loads(json.dumps(results))["rows"] == results["rows"]
    shown = text_of(prefill.show_prefill, results)
    assert "0.001 TB/s" in shown
    assert "Auto for nano is tiled: " in shown
    assert "Engine for nano: its step is plain: " in shown
    assert prefill.draw_prefill(results).startswith(b"\x89PNG")


def test_a_path_without_memory_is_a_row(monkeypatch: pytest.MonkeyPatch, text_of: Callable[..., str]):
    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(prefill, "_measure", fails)
    results = bench_prefill(PrefillSettings(**SMALL))
    assert [row["failed"] for row in results["rows"]] == ["no memory"] * 2
    assert "no memory" in text_of(prefill.show_prefill, results)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length is 0"),
        ({"dtype": "fp8"}, "dtype is 'fp8'"),
        ({"scans": ("tile",)}, "scans holds 'tile'; choose one of .*'engine'"),
        ({"presets": ("huge",)}, "unknown preset 'huge'"),
        ({"scans": (), "standard": False}, "nothing to measure"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_settings_that_make_no_measurement_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        PrefillSettings(**options)


def test_the_command(bench: Callable[..., tuple[int, str, str]], tmp_path: Path):
    small = ("--presets", "nano", "--scans", "tiled", "--length", 4, "--repeats", 1, "--warmup", 1, "--device", "cpu")
    code, _, _ = bench("prefill", *small, "--no-standard", "--out", tmp_path)
    assert code == 0
    (row,) = json.loads((tmp_path / "prefill.json").read_text())["rows"]
    assert row["path"] == "tiled"
    code, _, err = bench("prefill", "--presets", "huge", "--device", "cpu")
    assert (code, err.count("\n")) == (2, 1)
