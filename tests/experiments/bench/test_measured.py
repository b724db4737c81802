"""`bench traffic --measure`: the profiler's output is read right, and the fits tell N log N from N^2."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recurformer.experiments.bench import profiled, traffic
from recurformer.experiments.bench.traffic import GROWTHS, MeasureSettings, counted, fit, measure_traffic
from recurformer.scan.reference import reference_scan
from recurformer.scan.schedule import Schedule, attention_traffic

LENGTHS = (256, 512, 1024, 2048, 4096)

LOG = """==PROF== Connected to process 7 (/usr/bin/python3)
==PROF== Profiling "range" - 0: 0%....50%....100% - 1 pass
==PROF== Disconnected from process 7
"ID","Process ID","Process Name","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","python3","push(int, ""x"")","Command line profiler metrics","dram__bytes.sum","byte","1,234,567"
"0","7","python3","push","Command line profiler metrics","gpu__time_duration.sum","ns","5"
"1","7","python3","pull","Command line profiler metrics","dram__bytes.sum","Mbyte","2.50"
==WARNING== the end
"""


def test_the_profilers_log_is_read():
    assert counted(LOG) == [1_234_567.0, 2_500_000.0]
    assert counted("==ERROR== nothing\n") == []
    assert counted("") == []


def test_a_fit_finds_its_own_curve():
    a, b, c = 5e6, 3e4, 700.0
    measured = [a + b * n + c * n * math.log2(n) for n in LENGTHS]
    found = fit(LENGTHS, measured, GROWTHS["n_log_n"])
    assert found.coefficients == pytest.approx((a, b, c), rel=1e-6)
    assert found.residual < 1e-9
    assert found.fitted == pytest.approx(measured)


def test_the_fits_tell_the_growths_apart():
    """A curve that bends like one is missed by the other, beyond the 10 % that count as a fit."""
    squared = [1e3 * n * n for n in LENGTHS]
    assert fit(LENGTHS, squared, GROWTHS["n_squared"]).residual < 1e-9
    assert fit(LENGTHS, squared, GROWTHS["n_log_n"]).residual > 0.1
    modelled = [float(attention_traffic(Schedule(n), 16, 16, 64).bytes) for n in LENGTHS]
    assert fit(LENGTHS, modelled, GROWTHS["n_log_n"]).residual < 1e-3


def test_the_residual_is_the_largest_relative_one():
    measured = [float(n) for n in (100, 200, 400, 800)]
    found = fit((1, 2, 4, 8), [*measured[:-1], 880.0], GROWTHS["n_squared"])
    worst = max(abs(f / m - 1) for f, m in zip(found.fitted, [*measured[:-1], 880.0], strict=True))
    assert found.residual == pytest.approx(worst)
    assert 0 < found.residual < 0.1


PROFILER = """#!{python}
import json, sys

arguments = sys.argv[1:]
settings = json.loads(arguments[-1])
log = arguments[arguments.index("--log-file") + 1]
assert arguments[-3:-1] == ["-m", "recurformer.experiments.bench.profiled"], arguments
assert arguments[arguments.index("--metrics") + 1] == "dram__bytes.sum"
assert arguments[arguments.index("--replay-mode") + 1] == settings["replay"]
{body}
"""

WRITES = """
N = settings["length"]
columns = ["ID", "Metric Name", "Metric Unit", "Metric Value"]
rows = [columns, ["0", "dram__bytes.sum", "byte", f"{1000 * N:,}"], ["1", "dram__bytes.sum", "byte", f"{500 * N}"]]
with open(log, "w") as file:
    file.write("==PROF== Connected\\n")
    file.writelines(",".join('"%s"' % value for value in row) + "\\n" for row in rows)
"""

FAILS = """
with open(log, "w") as file:
    file.write("==PROF== Connected\\n==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\\n")
sys.exit(1)
"""


@pytest.fixture
def ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program named ncu on the PATH, and nothing else."""

    def install(body: str) -> None:
        program = tmp_path / "ncu"
        program.write_text(PROFILER.format(python=sys.executable, body=body))
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    return install


SMALL: dict[str, Any] = {"lengths": (16, 32, 64, 128), "batch_size": 1, "n_heads": 2, "head_dim": 8, "scan": "tiled"}


def test_kernels_are_summed_for_each_length(ncu: Callable[[str], None], text_of: Callable[..., str]):
    ncu(WRITES)
    calls: list[tuple[str, int, int]] = []
    results = measure_traffic(MeasureSettings(**SMALL), lambda *call: calls.append(call))
    for row in results["rows"]:
        N = row["length"]
        assert row["measured_bytes"] == 1500 * N
        assert row["modelled_bytes"] == attention_traffic(Schedule(N), 1, 2, 8, None, 2).bytes
        assert row["fitted_bytes"] == pytest.approx(1500 * N)
    assert [row["length"] for row in results["rows"]] == [16, 32, 64, 128]
    assert results["fits"]["n_log_n"]["residual"] < 1e-9
    assert calls == [(f"N {N}", n, 4) for n, N in enumerate((16, 32, 64, 128))]
    assert json.loads(json.dumps(results))["rows"] == results["rows"]
    shown = text_of(traffic.show_measured, results)
    assert "largest residual 0.0 %" in shown
    assert traffic.draw_measured(results).startswith(b"\x89PNG")


def test_what_the_profiler_complains_of_is_said(ncu: Callable[[str], None], bench: Callable[..., tuple[int, str, str]]):
    ncu(FAILS)
    code, _, err = bench("traffic", "--measure", "--scan", "tiled")
    assert (code, err.count("\n")) == (2, 1)
    assert "ncu read no dram__bytes.sum for N 256: ==ERROR== ERR_NVGPUCTRPERM" in err


def test_a_profiler_that_hangs_is_stopped(ncu: Callable[[str], None]):
    ncu("import time; time.sleep(30)")
    with pytest.raises(ValueError, match="took more than 1 seconds for N 16"):
        measure_traffic(MeasureSettings(**SMALL, timeout_s=1.0))


def test_no_profiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bench: Callable[..., tuple[int, str, str]]):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, err = bench("traffic", "--measure", "--scan", "tiled")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "ncu (NVIDIA Nsight Compute) is not on the PATH" in err


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("scan", ["tiled", "reference"])
def test_the_profiled_process_runs_pure_tiling(scan: str, backward: bool, monkeypatch: pytest.MonkeyPatch):
    seen: list[dict[str, Any]] = []
    real = profiled.pure_tiling(scan, 5)

    def watched(*arguments: Any, **options: Any) -> Any:
        z, *pairs = real(*arguments, **options)
        seen.append({"shape": tuple(z.shape), "dtype": arguments[1].compute_dtype, "gradients": z.requires_grad})
        return z, *pairs

    monkeypatch.setattr(profiled, "pure_tiling", lambda name, length: watched)
    settings = {"length": 5, "batch_size": 2, "n_heads": 2, "head_dim": 8, "scan": scan, "backward": backward}
    profiled.main(settings, torch.device("cpu"))
    assert seen == [{"shape": (2, 5, 16), "dtype": torch.bfloat16, "gradients": backward}] * 3


def test_pure_tiling_asks_for_it():
    assert profiled.pure_tiling("tiled", 100).keywords == {"chunk": None, "leaf": 1}  # pyright: ignore[reportFunctionMemberAccess]
    assert profiled.pure_tiling("fused", 100).keywords == {"chunk": 128, "leaf": 1}  # pyright: ignore[reportFunctionMemberAccess]
    assert profiled.pure_tiling("reference", 100) is reference_scan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (256, 512, 1024, 1024)}, "needs at least four different ones"),
        ({"lengths": ()}, "lengths is empty"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"scan": "tile"}, "scan is 'tile'; choose one of .*did you mean 'tiled'"),
        ({"replay": "range"}, "replay is 'range'; choose one of 'app-range', 'kernel'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_settings_that_make_no_measurement_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MeasureSettings(**{"scan": "tiled", **options})


def test_options_of_the_model_do_not_go_with_a_measurement(bench: Callable[..., tuple[int, str, str]]):
    code, _, err = bench("traffic", "--measure", "--scan", "tiled", "--leaf", 4)
    assert (code, err.count("\n")) == (2, 1)
    assert "drop" in err


# --- what the page says ----------------------------------------------------------------------------------------------

DOCS = Path(__file__).parents[3] / "docs"


def stored(name: str) -> Any:
    return json.loads((DOCS / "figures" / "gpu" / name).read_text())


def test_the_page_has_the_layers_that_were_measured():
    page = (DOCS / "benchmarks.md").read_text().splitlines()
    shapes: set[tuple[int, ...]] = set()
    for found in stored("layer.json"):
        for row in found["rows"]:
            layers = row["layers"]
            cells = [
                "{:.1f} ({:.1f} to {:.1f})".format(
                    *(1e3 * row[f"{part}_{which}"] / layers for which in ("s", "fastest_s", "slowest_s"))
                )
                for part in ("forward", "both")
            ]
            wanted = f"{' | '.join(cells)} | {row['both_peak_bytes'] / 2**30:.1f} GiB"
            assert any(wanted in line and row["path"] in line for line in page), wanted
        shapes.add(tuple(found["settings"][name] for name in ("batch_size", "length", "d_model", "stack")))
    assert shapes == {(512, 512, 1024, 1), (512, 512, 1408, 1), (128, 2048, 1024, 1), (64, 512, 1024, 12)}


def test_the_page_has_the_traffic_that_was_measured():
    page, found = (DOCS / "benchmarks.md").read_text(), stored("traffic.json")
    assert "(figures/traffic-measured.png)" in page
    for row in found["rows"]:
        measured, modelled, off = row["measured_bytes"], row["modelled_bytes"], row["fitted_bytes"]
        cells = (
            row["length"],
            measured / 1e6,
            measured / row["length"] / 1e6,
            modelled / 1e6,
            100 * (off / measured - 1),
        )
        assert "| {} | {:,.0f} | {:.2f} | {:,.0f} | {:+.1f} % |".format(*cells) in page, cells
    growth, square = (found["fits"][name]["residual"] for name in ("n_log_n", "n_squared"))
    assert f"largest residual is {100 * growth:.1f} %" in page
    assert f"fits them to {100 * square:.1f} %" in page
