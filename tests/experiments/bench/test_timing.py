"""Timing, peak memory and the helpers of GPU benchmarks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recurformer import attention
from recurformer.config import ModelConfig
from recurformer.experiments.bench import common, timing
from recurformer.experiments.bench.timing import (
    Times,
    build_model,
    copy_bandwidth,
    forget_compiled,
    peak_memory_of,
    time_runs,
)
from recurformer.model import Layer

CPU = torch.device("cpu")


def test_the_median_counts_after_warm_up_and_preparing_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0, 90, 100, 103, 200, 201, 300, 302])  # of each run: begin, end
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    order: list[Any] = []

    def prepare(number: int):
        order.append(number)
        return lambda: order.append("run")

    times = time_runs(prepare, CPU, repeats=3, warmup=1)
    assert times.runs == (3, 1, 2)
    assert times.to_dict("step") == {
        "step_s": 2, "step_fastest_s": 1, "step_slowest_s": 3, "step_runs_s": [3, 1, 2],
    }  # fmt: skip
    assert order == [0, "run", 1, "run", 2, "run", 3, "run"]


def test_peak_memory_begins_at_what_existed_before():
    before = torch.zeros(10_000)
    with peak_memory_of(CPU) as peak:
        one = before + 1
        del one
        two = torch.ones(500)
    assert peak.bytes == 40_000
    assert two.sum() == 500


def test_copies_read_and_write(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "time_runs", lambda *_, **__: Times((0.5,)))
    assert copy_bandwidth(CPU) == 2 * timing.COPY_BYTES["cpu"] / 0.5
    monkeypatch.undo()
    assert 1e8 < copy_bandwidth(CPU, repeats=2) < 1e13


def test_models_are_built_as_asked():
    config = ModelConfig(n_layers=2, d_model=16, n_heads=2)
    for compiled, expected in ((None, False), (True, True)):
        model = build_model(config, CPU, "tiled", compiled, recompute=True)
        assert (model.scan, model.recompute) == ("tiled", "standard")
        for layer in model.layers:
            assert isinstance(layer, Layer)
            assert layer.compiled == expected
    assert not any(p.is_meta for p in model.parameters())


def test_compiled_functions_are_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", lambda function: lambda *arguments: function(*arguments))
    first = attention.compiled(abs)
    assert attention.compiled(abs) is first
    forget_compiled()
    assert attention.compiled(abs) is not first
    attention.compiled.cache_clear()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.0001234, "0.123"), (0.0123456, "12.3"), (1.2345, "1,234"), (120.0, "120,000")],
)
def test_milliseconds(seconds: float | None, text: str):
    assert common.milliseconds(seconds) == text


def test_spread():
    row = {"step_s": 0.02, "step_fastest_s": 0.01, "step_slowest_s": 0.04}
    assert common.spread(row, "step") == "10.0..40.0"
    assert common.spread(row, "step", 2) == "5.0..20.0"
    assert common.spread({}, "step") == "-"


def test_bars_are_a_picture():
    picture = common.draw_bars([("ms", {"one": 1.0, "another": 20.0}, 5.0), ("GiB", {}, None)], "title")
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 5000
