"""Benchmarks: what is counted and timed is what is said, tables fit, files are written, bad input is refused."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CPU_SCANS, gradients, loss_of, random_tokens, tiny
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from recurformer import cli
from recurformer.experiments import bench
from recurformer.experiments.bench import common, scan, traffic
from recurformer.experiments.bench.memory import LiveTensors, peak_memory
from recurformer.scan.schedule import Schedule, attention_traffic, naive_schedule
from recurformer.units import bytes_text

SMALL: dict[str, Any] = {"batch_size": 2, "d_model": 16, "n_layers": 1, "n_heads": 2, "repeats": 2, "vocab_size": 31}
PNG = b"\x89PNG\r\n\x1a\n"


def text_of(show: Any, results: dict[str, Any]) -> str:
    """Return the look of a table in a terminal of 80 columns; it must not be cut."""
    out = io.StringIO()
    show(results, Console(file=out, width=80))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "…" not in out.getvalue()
    return out.getvalue()


# --- peak memory -----------------------------------------------------------------------------------------------------


def test_live_tensors_are_counted_until_they_are_freed():
    kept = torch.zeros(1000)
    with LiveTensors() as count:
        assert kept.add_(1).view(10, 100).t().shape == (100, 10)  # nothing new
        assert (count.live, count.peak) == (0, 0)
        one = torch.ones(100)
        assert count.live == 400
        two = one.double()
        part = two[:3]
        assert count.live == 1200
        del two  # a view keeps all of it
        assert count.live == 1200
        del part, one
        assert (count.live, count.peak) == (0, 1200)
        sums = torch.stack([torch.ones(5), torch.ones(5)]).max(0)  # several results: values and indices
        assert count.live == 5 * 4 + 5 * 8
        assert sums.indices.dtype == torch.int64
    assert count.peak == 1200


def test_the_peak_of_a_training_step_is_the_allocators():
    """Beside the allocator's own log of a forward and backward pass, for every scan."""
    tokens = random_tokens(2, 9)
    for name in CPU_SCANS:
        if name == "fused":
            continue
        model = tiny(scan=name)

        def work(model: Any = model) -> None:
            gradients(model, loss_of(model, tokens))

        work()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as log:
            work()
        live = peak = 0
        assert log.profiler is not None
        assert log.profiler.kineto_results is not None
        for event in log.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
                peak = max(peak, live)
        assert peak > 30_000
        assert peak_memory(work) == pytest.approx(peak, rel=0.02)


# --- bench scan ------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan.util, "find_spec", lambda name: None)


@pytest.mark.usefixtures("without_peer")
def test_every_scan_and_the_standard_layer_are_measured():
    calls: list[tuple[str, int, int]] = []
    settings = scan.ScanSettings(lengths=(9, 4, 9), **SMALL)
    results = bench.bench_scan(settings, lambda *call: calls.append(call))
    paths = [*CPU_SCANS, "standard"]
    assert [(row["length"], row["path"]) for row in results["rows"]] == [(N, path) for N in (4, 9) for path in paths]
    assert json.loads(json.dumps(results))["rows"] == results["rows"]
    for row in results["rows"]:
        assert 0 < row["forward_s"] < row["total_s"]
        assert 0 < row["backward_s"] < row["total_s"]
        assert row["fastest_s"] <= row["total_s"] <= row["slowest_s"]
        assert row["tokens_per_s"] == pytest.approx(2 * row["length"] / row["total_s"])
        assert row["parameters"] == results["rows"][0]["parameters"]
        assert row["peak_bytes"] > 4 * row["parameters"]  # the gradients alone
    assert results["machine"]["versions"]["torch"] == torch.__version__
    assert results["machine"]["cpu"]
    assert results["machine"]["threads"] == torch.get_num_threads()
    assert results["notes"] == ["no row for the peer: the package recurrent-transformer-pytorch is not installed"]
    runs = 2 * len(paths) * (1 + 1 + 2)
    assert [call[1:] for call in calls] == [(n, runs) for n in range(runs)]
    shown = text_of(scan.show_scan, results)
    assert "not installed" in shown
    assert "medians of 2 after 1" in " ".join(shown.split())


@pytest.mark.usefixtures("without_peer")
def test_the_forward_alone_keeps_no_graph():
    settings = scan.ScanSettings(lengths=(16,), paths=("tiled", "standard"), **SMALL)
    both, alone = (
        scan.bench_scan(scan.ScanSettings(**{**vars(settings), "backward": backward})) for backward in (True, False)
    )
    for with_graph, without in zip(both["rows"], alone["rows"], strict=True):
        assert "backward_s" not in without
        assert without["total_s"] == without["forward_s"]
        assert without["peak_bytes"] < 0.7 * with_graph["peak_bytes"]
    assert " - " in text_of(scan.show_scan, alone)


@pytest.mark.usefixtures("without_peer")
def test_times_are_medians_of_turns_after_warm_up(monkeypatch: pytest.MonkeyPatch):
    """Scripted times: the warm-up does not count, paths take turns, and each part has its own median."""
    script = {
        "tiled": iter([(90, 90), (90, 90), (1, 7), (2, 5), (6, 1)]),
        "standard": iter([(9, 9)] * 2 + [(1, 1)] * 3),
    }
    order: list[str] = []

    def run(settings: Any, one: scan.Contestant, *_: Any) -> tuple[float, float]:
        order.append(one.name)
        return next(script[one.name])

    monkeypatch.setattr(scan, "_run", run)
    settings = scan.ScanSettings(lengths=(8,), paths=("tiled", "standard"), **{**SMALL, "repeats": 3, "warmup": 1})
    row = scan.bench_scan(settings)["rows"][0]
    assert (row["forward_s"], row["backward_s"], row["total_s"]) == (2, 5, 7)
    assert (row["fastest_s"], row["slowest_s"]) == (7, 8)
    assert row["tokens_per_s"] == 2 * 8 / 7
    assert order == ["tiled", "standard"] * 5


@pytest.mark.usefixtures("without_peer")
def test_threads_are_set_for_the_measurement_and_given_back():
    before = torch.get_num_threads()
    settings = scan.ScanSettings(lengths=(4,), paths=("standard",), threads=before + 1, **SMALL)
    results = scan.bench_scan(settings)
    assert results["settings"]["threads"] == results["machine"]["threads"] == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("without_peer")
def test_bfloat16():
    settings = scan.ScanSettings(lengths=(8,), paths=("tiled",), dtype="bf16", **SMALL)
    assert scan.bench_scan(settings)["rows"][0]["total_s"] > 0


PEER = """
import time
import torch

class RecurrentTransformer(torch.nn.Module):
    made = []

    def __init__(self, **options):
        super().__init__()
        self.made.append(options)
        self.weight = torch.nn.Parameter(torch.zeros(options["num_tokens"], options["dim"]))

    def forward(self, ids, labels, recurrent_mode):
        time.sleep(0.02 if recurrent_mode == "naive" else 0.001)
        return torch.nn.functional.embedding(ids, self.weight).square().mean()
"""


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package of the peer's name and interface."""
    (tmp_path / scan.PEER_MODULE).mkdir()
    (tmp_path / scan.PEER_MODULE / "__init__.py").write_text(PEER)
    (tmp_path / "recurrent_transformer_pytorch-1.2.3.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: recurrent-transformer-pytorch\nVersion: 1.2.3\n"
    (tmp_path / "recurrent_transformer_pytorch-1.2.3.dist-info" / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop(scan.PEER_MODULE, None)
    yield
    sys.modules.pop(scan.PEER_MODULE, None)


@pytest.mark.usefixtures("peer")
def test_the_peer_runs_in_its_faster_mode_at_our_widths_and_without_its_additions():
    settings = scan.ScanSettings(lengths=(8,), paths=("peer", "standard"), **SMALL)
    results = scan.bench_scan(settings)
    row = results["rows"][0]
    assert (row["path"], row["mode"]) == ("peer", "tiled")
    assert row["total_s"] < 0.02
    (options,) = sys.modules[scan.PEER_MODULE].RecurrentTransformer.made
    assert {name: options[name] for name in ("num_tokens", "dim", "depth", "heads", "dim_head")} == {
        "num_tokens": 31, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8,
    }  # fmt: skip
    assert options["recurrent"] is True
    assert options["block_size"] == 1
    assert not any(options[name] for name in ("attn_gate", "use_value_mlp", "use_intra_block_rnn"))
    assert results["machine"]["versions"][scan.PEER] == "1.2.3"
    assert "peer (tiled)" in text_of(scan.show_scan, results)


@pytest.mark.usefixtures("peer")
def test_the_peer_may_be_timed_less_often(monkeypatch: pytest.MonkeyPatch):
    """Choosing its mode is its warm-up; the others' runs stay as many."""
    calls: list[str] = []
    run = scan._run
    monkeypatch.setattr(
        scan, "_run", lambda settings, one, *given: calls.append(one.name) or run(settings, one, *given)
    )
    settings = scan.ScanSettings(lengths=(8,), paths=("peer", "standard"), peer_repeats=1, **{**SMALL, "repeats": 3})
    ticks: list[tuple[str, int, int]] = []
    results = bench.bench_scan(settings, lambda *tick: ticks.append(tick))
    assert calls.count("peer") == 2 + 1 + 1  # choice of two modes, memory, time
    assert calls.count("standard") == 1 + 1 + 3  # memory, warm-up, time
    assert [tick[1:] for tick in ticks] == [(n, len(ticks)) for n in range(len(ticks))]
    assert results["notes"][-1].endswith("timed 1 time")


def made_up(lengths: tuple[int, ...]) -> dict[str, Any]:
    """Results with numbers as wide as they get."""
    rows = [
        {
            "length": N, "path": path, **({"mode": "naive"} if path == "peer" else {}), "parameters": 10**8,
            "forward_s": 123.4567, "backward_s": 234.5678, "total_s": 358.0245, "fastest_s": 300.0, "slowest_s": 400.0,
            "tokens_per_s": 1234567.8, "peak_bytes": 123456789012,
        }
        for N in lengths for path in scan.PATHS
    ]  # fmt: skip
    settings = {**vars(scan.ScanSettings(lengths=lengths)), "threads": 128}
    return {"settings": settings, "machine": common.machine(), "rows": rows, "notes": ["a note"]}


@pytest.mark.parametrize("lengths", [(65536,), (256, 4096, 65536)], ids=["one", "several"])
def test_wide_numbers_fit_the_table_and_the_picture_is_one(lengths: tuple[int, ...]):
    results = made_up(lengths)
    shown = text_of(scan.show_scan, results)
    assert "358,024" in shown
    picture = scan.draw_scan(results)
    assert picture.startswith(PNG)
    assert len(picture) > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be a whole number of at least 1"),
        ({"repeats": 0}, "repeats is 0; it must be a whole number of at least 1"),
        ({"warmup": -1}, "warmup is -1; it must be a whole number of at least 0"),
        ({"threads": 0}, "threads is 0; it must be a whole number of at least 1"),
        ({"peer_repeats": 0}, "peer_repeats is 0; it must be a whole number of at least 1"),
        ({"lengths": ()}, "lengths is empty; give at least one"),
        ({"lengths": (4, 0)}, "lengths holds 0; each must be a whole number of at least 1"),
        ({"dtype": "fp8"}, "dtype is 'fp8'; choose one of 'fp32', 'bf16'"),
        ({"paths": ("tile",)}, "paths holds 'tile'; choose one of 'reference'.*did you mean 'tiled'"),
        ({"paths": ()}, "paths is empty; give at least one"),
        ({"d_model": 30}, "d_model 30 is not divisible by n_heads 4"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_settings_that_make_no_measurement_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        scan.ScanSettings(**options)


# --- bench traffic ---------------------------------------------------------------------------------------------------


def test_traffic_rows_are_the_model():
    settings = traffic.TrafficSettings(lengths=(100, 7), batch_size=3, n_heads=4, n_kv_heads=2, head_dim=8, leaf=4)
    rows = bench.bench_traffic(settings)["rows"]
    assert [row["length"] for row in rows] == [7, 100]
    for row in rows:
        for name, schedule in (("naive", naive_schedule(row["length"])), ("tiled", Schedule(row["length"], leaf=4))):
            expected = attention_traffic(schedule, 3, 4, 8, 2, 2)
            assert row[f"{name}_bytes"] == expected.bytes
            assert row[f"{name}_intensity"] == expected.intensity
            assert row["flops"] == expected.flops


def test_the_default_curves_part_as_n_squared_and_n_log_n():
    results = bench.bench_traffic(traffic.TrafficSettings())
    rows = {row["length"]: row for row in results["rows"]}
    assert list(rows) == [1 << e for e in range(6, 17)]
    assert rows[65536]["naive_bytes"] / rows[32768]["naive_bytes"] == pytest.approx(4, rel=1e-3)
    assert 2 < rows[65536]["tiled_bytes"] / rows[32768]["tiled_bytes"] < 2.15
    assert rows[65536]["naive_bytes"] / rows[65536]["tiled_bytes"] > 1000
    assert "1,007" in text_of(traffic.show_traffic, results)
    assert traffic.draw_traffic(results).startswith(PNG)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": ()}, "lengths is empty; give at least one"),
        ({"lengths": (0,)}, "lengths holds 0; each must be"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"n_kv_heads": 3}, "n_heads 16 is not divisible by n_kv_heads 3"),
        ({"leaf": 3}, "leaf is 3; it must be a power of two"),
        ({"chunk": 12}, "chunk is 12; it must be a power of two"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_settings_without_traffic_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        bench.bench_traffic(traffic.TrafficSettings(**options))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.98 KiB"), (1536, "1.50 KiB"), (150 * 2**20, "150 MiB"), (2**43, "8.00 TiB")],
)
def test_bytes_in_words(count: int, text: str):
    assert bytes_text(count) == text


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.usefixtures("without_peer")
def test_the_commands_write_their_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--batch-size", "2", "--d-model", "16", "--n-layers", "1", "--n-heads", "2", "--repeats", "1"]
    out = tmp_path / "new" / "folder"
    assert run("scan", "--length", "4", "--path", "tiled", *options, "--device", "cpu", "--out", str(out)) == 0
    results = json.loads((out / "scan.json").read_text())
    assert [row["path"] for row in results["rows"]] == ["tiled"]
    assert results["settings"]["lengths"] == [4]
    assert run("traffic", "--length", "64", "--length", "256", "--out", str(out)) == 0
    assert [row["length"] for row in json.loads((out / "traffic.json").read_text())["rows"]] == [64, 256]
    assert sorted(path.name for path in out.iterdir()) == ["scan.json", "scan.png", "traffic.json", "traffic.png"]
    for name in ("scan.png", "traffic.png"):
        assert (out / name).read_bytes().startswith(PNG)
        assert str(out / name) in capsys.readouterr().out or name == "traffic.png"


def test_bad_values_end_the_commands_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (["scan", "--path", "tile"], "did you mean 'tiled'"),
        (["scan", "--device", "abacus"], "abacus"),
        (["scan", "--out", str(tmp_path / "file")], "file"),
        (["traffic", "--leaf", "3"], "leaf is 3"),
    ):
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
