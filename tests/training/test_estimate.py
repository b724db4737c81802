"""The dry run: its memory against measured peaks, its time against the benchmarks, and that it writes nothing."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from recurformer import cli
from recurformer.config import ModelConfig
from recurformer.experiments.bench.memory import LiveTensors
from recurformer.experiments.bench.model import random_batches
from recurformer.hardware import HAS_TRITON
from recurformer.scan.fused.memory import affordable_save
from recurformer.training import estimate, read_train_config, timing
from recurformer.training import memory as memory_of_step
from recurformer.training.config import DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from recurformer.training.distributed import OneProcess
from recurformer.training.optimizer import make_optimizer, set_rates
from recurformer.training.start import make_model
from recurformer.training.steps import gradient_step

GPU = Path(__file__).parents[2] / "docs" / "figures" / "gpu"
RUNS = Path(__file__).parents[2] / "runs"
GIB = 2**30
CPU = torch.device("cpu")
OFFICIAL = {"norm": "layer", "qk_norm": "full"}
FACTOR = 1.3  # by which a measured peak and its estimate may differ


def run_of(window: int, model: dict[str, Any], **settings: Any) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(**model), **{"data": DataConfig(window=window), "batch_size": 8, "device": "cpu", **settings}
    )


def measured_peak(config: TrainConfig) -> int:
    """Of two steps: only the second one meets the optimizer's state."""
    with LiveTensors() as tensors:
        model = make_model(config, CPU, None, OneProcess())
        optimizer = make_optimizer(model, config.optimizer)
        batches = random_batches(config, SimpleNamespace(seed=0, length=config.data.window))  # pyright: ignore[reportArgumentType]
        for _ in range(2):
            set_rates(optimizer, 0, config.optimizer, config.schedule)
            gradient_step(model, optimizer, next(batches), config, CPU, OneProcess())
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
    expected = memory_of_step.estimate_memory(config, gpu=False, scan=memory_of_step.scan_of(config, CPU)).total
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
        expected = memory_of_step.estimate_memory(
            config, gpu=True, scan="fused", device_bytes=memory_of_step.H100_BYTES
        ).total
        if "failed" in row:
            assert expected > memory_of_step.H100_BYTES, row
        else:
            assert expected == pytest.approx(row["peak_bytes"], rel=0.1), row


def test_memory_of_layers_side_by_side_is_that_of_the_benchmark() -> None:
    """A stack of 12 at a batch of 64, without an optimizer; within a tenth."""
    (found,) = [f for f in json.loads((GPU / "layer.json").read_text()) if f["settings"]["stack"] == 12]
    s = found["settings"]
    assert (s["batch_size"], s["length"], s["d_model"], s["n_heads"], s["dtype"]) == (64, 512, 1024, 16, "bf16")
    (measured,) = [row["both_peak_bytes"] for row in found["rows"] if row["path"] == "wavefront"]
    model = {"n_layers": 12, "d_model": 1024, "n_heads": 16, "layers": "recurrent", "vocab_size": 256}
    config = run_of(512, model, batch_size=64, precision="bf16")
    scan = memory_of_step.h100_scan(config)
    assert scan == "wavefront"
    memory = memory_of_step.estimate_memory(config, gpu=True, scan=scan, device_bytes=memory_of_step.H100_BYTES)
    assert (memory.total - memory.optimizer) / GIB == pytest.approx(measured / GIB, rel=0.1)


def test_memory_of_a_wide_layer_is_that_of_the_benchmark() -> None:
    """D 1408, where more is kept; without an optimizer, within a tenth."""
    (found,) = [f for f in json.loads((GPU / "layer.json").read_text()) if f["settings"]["d_model"] == 1408]
    s = found["settings"]
    assert (s["batch_size"], s["length"], s["n_heads"], s["stack"], s["dtype"]) == (512, 512, 22, 1, "bf16")
    model = {"n_layers": 1, "d_model": 1408, "n_heads": 22, "layers": "recurrent", "vocab_size": 256}
    config = run_of(512, model, batch_size=512, precision="bf16")
    memory = memory_of_step.estimate_memory(config, gpu=True, scan="fused", device_bytes=memory_of_step.H100_BYTES)
    assert memory.total - memory.optimizer == pytest.approx(found["rows"][0]["both_peak_bytes"], rel=0.1)


@pytest.mark.parametrize(
    ("settings", "together", "scan"),
    [
        (["micro_batch_size=128"], True, "wavefront"),
        (["micro_batch_size=128"], False, "fused"),
        (["micro_batch_size=256"], True, "fused"),
        (["micro_batch_size=128", "recompute=true"], True, "fused"),
        (["micro_batch_size=128", "scan=tiled"], True, "tiled"),
        (["micro_batch_size=128", "model.layers=first:1"], True, "fused"),
        (["micro_batch_size=128", "model.layers=standard"], True, "none"),
    ],
    ids=str,
)
def test_an_h100_that_is_not_here_takes_the_scan_that_one_takes(settings: list[str], together: bool, scan: str) -> None:
    config = read_train_config(RUNS / "300m-24-recurrent.toml", settings)
    assert memory_of_step.h100_scan(config, together) == scan
    if (
        config.scan == "auto" and HAS_TRITON and not torch.cuda.is_available()
    ):  # with which the device needs not be here
        assert memory_of_step.scan_of(config, torch.device("cuda"), together) == scan


@pytest.mark.parametrize(("run", "free", "expected"), [("300m-6-recurrent", 60, 55.5), ("150m-12-recurrent", 40, 45.8)])
def test_what_the_fused_scan_keeps_depends_on_all_of_the_memory(
    run: str, free: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks `affordable_save`, which does not know what is free; and a step that finds no room is not timed."""

    def no_room(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(estimate, "training_device", lambda _: torch.device("cuda"))
    for module in (estimate, timing):
        monkeypatch.setattr(module, "scan_of", lambda *_, **__: "fused")
    monkeypatch.setattr(memory_of_step, "total_memory", lambda _: memory_of_step.H100_BYTES)
    monkeypatch.setattr(timing, "product_rate", lambda *_: 1e15)
    monkeypatch.setattr(timing, "time_steps", no_room)
    config = read_train_config(RUNS / f"{run}.toml")
    m, rows = config.model, config.batch_size * config.data.window
    assert affordable_save(m, 2 * rows, torch.device("cuda"), memory_of_step.H100_BYTES) == "pairs"
    assert affordable_save(m, 2 * rows, torch.device("cuda"), free * GIB) == "minimal"
    for there in (free, 79.0):
        monkeypatch.setattr(estimate, "available_bytes", lambda _, there=there: there * GIB)
        e = estimate.estimate(config)
        assert e.memory.total / GIB == pytest.approx(expected, abs=0.1)
        assert e.time.how.startswith("no memory to time it")


def test_the_rate_of_an_h100_is_that_of_the_benchmarks() -> None:
    """Each kind of layers at the micro-batches that suit it."""
    rows = [(c, row) for c, row in stored() if row.get("fastest")]
    assert len(rows) == 4
    for config, row in rows:
        assert timing.h100_seconds(config) == pytest.approx(row["step_s"], rel=0.05), row


def test_operations_are_counted() -> None:
    model = {"vocab_size": 512, "d_model": 64, "n_layers": 2, "layers": "first:1"}
    operations = timing.step_operations(run_of(32, model))
    layer = ModelConfig(**model).num_parameters() / 2 + 64 * 32
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
    count = config.model.num_parameters(embedding=True)
    assert e.checkpoint_bytes == 12 * count
    assert (e.memory.weights, e.memory.gradients, e.memory.optimizer) == (4 * count, 4 * count, 8 * count)
    text = table(e)
    assert max(map(len, text.splitlines())) <= 80
    for part in ("first:1", f"{count:,}", f"{config.model.num_parameters():,}", "6,400", "timed here: 2 steps of 4 seq",
                 "data/train is missing", "3 checkpoints"):  # fmt: skip
        assert part in text
    assert "more memory than is free" not in text


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_several_processes_share_each_step(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "time_steps", lambda config, _: 0.5 * config.batch_size)
    config = run_of(
        16, {"n_layers": 2, "d_model": 32, "vocab_size": 100, "layers": "first:1"},
        batch_size=16, micro_batch_size=8, recurrent_micro_batch_size=16, parallel=way,
    )  # fmt: skip
    one, four = estimate.estimate(config), estimate.estimate(config, 4)
    assert (one.time.step, four.time.step) == (8.0, 2.0)
    assert four.tokens == one.tokens
    assert four.seconds == one.seconds / 4
    alone = estimate.estimate(config.share(4)).memory
    assert (four.memory.standard, four.memory.recurrent) == (alone.standard, alone.recurrent)
    assert four.memory.standard == one.memory.standard / 2
    assert four.memory.optimizer == one.memory.optimizer // (4 if way == "fsdp" else 1)
    assert four.checkpoint_bytes == pytest.approx(one.checkpoint_bytes, abs=4)
    text = " ".join(table(four).split())
    assert max(map(len, table(four).splitlines())) <= 80
    assert f"processes 4 {way}, 4 sequences of a step each" in text
    assert "kept at 4 sequences; attention" in text
    assert "what processes exchange" in text
    assert ("split over 4" in text) == (way == "fsdp")
    with pytest.raises(ValueError, match="batch_size 16 is not divisible by 3 processes"):
        estimate.estimate(config, 3)


def test_what_is_too_large_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "time_steps", lambda *_: pytest.fail("it was timed"))
    monkeypatch.setattr(timing, "product_rate", lambda *_: 1e12)
    monkeypatch.setattr(estimate, "available_bytes", lambda _: 2.0**30)
    config = TrainConfig(
        model=ModelConfig.preset("300m-6"), data=DataConfig(window=512), batch_size=512, precision="bf16", device="cpu"
    )
    e = estimate.estimate(config)
    operations = sum(timing.step_operations(config).values())
    assert e.time.step == pytest.approx(operations / (1e12 * timing.RATE_SHARE), rel=1e-6)
    text = " ".join(table(e).split())
    assert "no memory to time it: from 1e+03 GFLOP/s of a product here, at 40 %" in text
    assert text.endswith("This is more memory than is free here: lower micro_batch_size.")  # nothing to recompute
    assert "one H100" in text
    hybrid = dataclasses.replace(config, model=ModelConfig.preset("300m-6", layers="first:1"))
    assert table(estimate.estimate(hybrid)).rstrip().endswith("lower micro_batch_size, or set recompute.")


def test_timing_leaves_the_random_state_alone() -> None:
    config = run_of(8, {"n_layers": 1, "d_model": 16, "n_heads": 2})
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert timing.time_steps(config, CPU, repeats=1) > 0
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
    monkeypatch.setattr(timing, "time_steps", lambda *_: 1.0)
    tiny = ["--set=model.d_model=16", "--set=model.n_layers=1", "--set=data.window=8", "--set=batch_size=2"]
    for options, vocabulary in (([], "256"), (["--set=model.preset=150m-6", "--set=model.n_heads=2"], "32,100")):
        with pytest.raises(SystemExit) as stop:  # nothing says the vocabulary
            cli.main(["train", "--dry-run", *options, *tiny])
        assert stop.value.code == 0
        assert f"with them; vocabulary {vocabulary}" in capsys.readouterr().out
    for rank, said in (("0", True), ("1", False)):  # one process speaks for all
        several = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        for name, value in several.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", "--dry-run", *small])
        assert stop.value.code == 0
        assert ("ddp, 1 sequences of a step each" in capsys.readouterr().out) == said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "--out"),
        (["train", "--dry-run", "--set", "model.vocab_size=64", "--set", "scan=fused"], "fused"),
        (["train", "--dry-run", "--set", "model.vocab_size=64", "--set", "device=cuda:99"], "cuda:99"),
        (["train", "--dry-run", "--set", "model.vocab_size=64", "--set", "batch_sise=4"], "batch_size"),
        (["train", "--dry-run", "--set", "model.vocab_size=64", "--processes", "5"], "not divisible by 5 processes"),
        (["train", "--out", "run", "--processes", "2"], "torchrun --nproc-per-node"),
    ],
    ids=["no out", "scan", "device", "setting", "share", "processes"],
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


def test_names_of_folders_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "time_steps", lambda *_: 1.0)
    config = run_of(8, {"n_layers": 1, "d_model": 16, "n_heads": 2}, data=DataConfig(train="[b]none[/b]", window=8))
    assert "[b]none[/b] is missing" in table(estimate.estimate(config))


def test_data_that_are_there_are_counted(tmp_path: Path) -> None:
    from recurformer.data import prepare

    (tmp_path / "text.txt").write_text("a" * 399)
    prepare([tmp_path / "text.txt"], tmp_path / "data", progress=False)
    line = estimate.describe_data(DataConfig(train=str(tmp_path / "data")), "train", 1000)
    assert line == f"400 tokens in {tmp_path / 'data'}, read 2.50 times"
    assert estimate.describe_data(DataConfig(train="nowhere"), "train") == "nowhere is missing"
