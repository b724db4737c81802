"""The dry run: its memory against measured peaks, its time against the benchmarks, and that it writes nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from recurformer import cli
from recurformer.bench.memory import LiveTensors
from recurformer.bench.model import random_batches
from recurformer.config import ModelConfig
from recurformer.report import parameters
from recurformer.training import estimate
from recurformer.training.config import DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from recurformer.training.loop import World, gradient_step, make_model
from recurformer.training.optimizer import make_optimizer, set_rates

GPU = Path(__file__).parents[2] / "docs" / "figures" / "gpu"
CPU = torch.device("cpu")
OFFICIAL = {"norm": "layer", "qk_norm": "full"}
FACTOR = 1.3  # by which a measured peak and its estimate may differ


def run_of(window: int, model: dict[str, Any], **settings: Any) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(**model), data=DataConfig(window=window), **{"batch_size": 8, "device": "cpu", **settings}
    )


def measured_peak(config: TrainConfig) -> int:
    """Of two steps: only the second one meets the optimizer's state."""
    with LiveTensors() as tensors:
        model = make_model(config, CPU, None, World())
        optimizer = make_optimizer(model, config.optimizer)
        batches = random_batches(config, SimpleNamespace(seed=0, length=config.data.window))  # pyright: ignore[reportArgumentType]
        for _ in range(2):
            set_rates(optimizer, 0, config.optimizer, config.schedule)
            gradient_step(model, optimizer, next(batches), config, CPU, World())
            optimizer.step()
    return tensors.peak


@pytest.mark.parametrize(
    ("window", "model", "settings"),
    [
        (128, {"layers": "standard"}, {}),
        (128, {"layers": "standard", **OFFICIAL}, {"micro_batch_size": 2}),
        (128, {"layers": "standard", **OFFICIAL}, {"recompute": True}),
        (128, {"layers": "standard", "vocab_size": 32100, "n_layers": 2}, {"batch_size": 2}),
        (64, {"layers": "standard", "n_layers": 2}, {"precision": "fp64"}),
        (128, {"layers": "recurrent", "n_layers": 2, **OFFICIAL}, {}),
        (64, {"layers": "recurrent", "n_layers": 2}, {"micro_batch_size": 2}),
        (64, {"layers": "recurrent", "n_layers": 1, "d_model": 256}, {}),
        (64, {"layers": "first:1", "n_layers": 3}, {}),
        (64, {"layers": "first:1", "activation": "swiglu", "position": "rope", "n_kv_heads": 2}, {}),
    ],
    ids=str,
)
def test_memory_is_that_of_a_small_run(window: int, model: dict[str, Any], settings: dict[str, Any]) -> None:
    config = run_of(window, model, **settings)
    expected = estimate.estimate_memory(config, gpu=False, scan=estimate.scan_of(config, CPU)).total
    peak = measured_peak(config)
    assert peak / FACTOR <= expected <= peak * FACTOR, f"estimated {expected / 1e6:.1f} MB, measured {peak / 1e6:.1f}"


def stored() -> list[tuple[TrainConfig, dict[str, Any]]]:
    """The optimizer steps that were measured on an H100."""
    results = json.loads((GPU / "model.json").read_text())
    s, found = results["settings"], []
    for row in results["rows"]:
        config = TrainConfig(
            model=ModelConfig.preset(row["preset"], layers=row["layers"]), data=DataConfig(window=s["length"]),
            batch_size=s["tokens"] // s["length"], micro_batch_size=row["micro_batch_size"],
            recurrent_micro_batch_size=row["recurrent_micro_batch_size"], recompute=row["recompute"],
            precision=s["dtype"],
        )  # fmt: skip
        found.append((config, row))
    return found


def test_memory_is_that_of_the_benchmarks() -> None:
    """Within a tenth, and what did not fit is estimated not to."""
    rows = stored()
    assert len(rows) == 10
    for config, row in rows:
        expected = estimate.estimate_memory(config, gpu=True, scan="fused", device_bytes=estimate.H100_BYTES).total
        if "failed" in row:
            assert expected > estimate.H100_BYTES, row
        else:
            assert expected == pytest.approx(row["peak_bytes"], rel=0.1), row


def test_the_rate_of_an_h100_is_that_of_the_benchmarks() -> None:
    """Each kind of layers at the micro-batches that suit it."""
    rows = [(c, row) for c, row in stored() if row.get("fastest")]
    assert len(rows) == 4
    for config, row in rows:
        assert estimate.h100_seconds(config) == pytest.approx(row["step_s"], rel=0.05), row


def test_operations_are_counted() -> None:
    model = {"vocab_size": 512, "d_model": 64, "n_layers": 2, "layers": "first:1"}
    operations = estimate.step_operations(run_of(32, model))
    layer = parameters(ModelConfig(**model)) / 2 + 64 * 32
    tokens = 8 * 32
    assert operations == {"standard": 6 * tokens * (layer + 512 * 64), "recurrent": 6 * tokens * layer}


def table(e: estimate.Estimate) -> str:
    out = io.StringIO()
    estimate.show(e, Console(file=out, width=80))
    return out.getvalue()


def test_the_numbers_of_a_table() -> None:
    config = run_of(
        16,
        {"n_layers": 2, "d_model": 32, "vocab_size": 100, "layers": "first:1"},
        schedule=ScheduleConfig(steps=50), optimizer=OptimizerConfig(), micro_batch_size=4,
    )  # fmt: skip
    e = estimate.estimate(config)
    assert e.tokens == 50 * 8 * 16
    assert e.seconds == 50 * e.time.step
    assert 0 < e.time.step < 60
    count = parameters(config.model, embedding=True)
    assert e.checkpoint_bytes == 12 * count
    assert (e.memory.weights, e.memory.gradients, e.memory.optimizer) == (4 * count, 4 * count, 8 * count)
    text = table(e)
    assert max(map(len, text.splitlines())) <= 80
    for part in ("first:1", f"{count:,}", f"{parameters(config.model):,}", "6,400", "timed here: 2 steps of 4 seq",
                 "data/train is missing", "3 checkpoints"):  # fmt: skip
        assert part in text
    assert "more memory than is free" not in text


def test_what_is_too_large_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "time_steps", lambda *_: pytest.fail("it was timed"))
    monkeypatch.setattr(estimate, "product_rate", lambda *_: 1e12)
    monkeypatch.setattr(estimate, "available_bytes", lambda _: 2.0**30)
    config = TrainConfig(
        model=ModelConfig.preset("300m-6"), data=DataConfig(window=512), batch_size=512, precision="bf16", device="cpu"
    )
    e = estimate.estimate(config)
    operations = sum(estimate.step_operations(config).values())
    assert e.time.step == pytest.approx(operations / (1e12 * estimate.RATE_SHARE), rel=1e-6)
    text = " ".join(table(e).split())
    assert "no memory to time it: from 1e+03 GFLOP/s of a product here, at 40 %" in text
    assert "This is more memory than is free here" in text
    assert "one H100" in text


def test_timing_leaves_the_random_state_alone() -> None:
    config = run_of(8, {"n_layers": 1, "d_model": 16, "n_heads": 2})
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert estimate.time_steps(config, CPU, repeats=1) > 0
    assert torch.equal(torch.rand(3), expected)


def test_the_command_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = [f"--set={s}" for s in ("model.vocab_size=64", "model.d_model=16", "data.window=8", "batch_size=2")]
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--dry-run", "--out", "run", *small])
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    assert "data/train is missing" in out
    assert not err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "--out"),
        (["train", "--dry-run"], "data/train"),  # nothing says the vocabulary
        (["train", "--dry-run", "--set", "model.vocab_size=64", "--set", "scan=fused"], "fused"),
        (["train", "--dry-run", "--set", "model.vocab_size=64", "--set", "device=cuda:99"], "cuda:99"),
        (["train", "--dry-run", "--set", "model.vocab_size=64", "--set", "batch_sise=4"], "batch_size"),
    ],
    ids=["no out", "no vocabulary", "scan", "device", "setting"],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert said in err


def test_data_that_are_there_are_counted(tmp_path: Path) -> None:
    from recurformer.data import prepare

    (tmp_path / "text.txt").write_text("a" * 399)
    prepare([tmp_path / "text.txt"], tmp_path / "data", progress=False)
    line = estimate.describe_data(DataConfig(), str(tmp_path / "data"), 1000)
    assert line == f"400 tokens in {tmp_path / 'data'}, read 2.50 times"
    assert estimate.describe_data(DataConfig(), "nowhere") == "nowhere is missing"
