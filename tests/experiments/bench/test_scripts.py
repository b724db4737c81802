"""The shell scripts ask for commands that exist; the profile of kernels adds up, and needs a GPU."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest
import torch
from helpers import commands_of, script_of

from recurformer import cli

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SECTIONS = ("layer", "wide", "stack", "long", "model", "prefill", "decode", "traffic")

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

PYTHON = """#!{python}
import json, sys
if sys.argv[1] == "-":
    print(sys.argv[2])  # every scan is known
else:
    with open({log!r}, "a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\\n")
    sys.exit("prefill" in sys.argv)
"""


def run(tmp_path: Path, *arguments: str, **variables: str) -> tuple[int, list[list[str]], str]:
    """Exit code of gpu.sh, the commands it ran, and stderr."""
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text(PYTHON.format(python=sys.executable, log=str(log)))
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), **variables}
    command = ["bash", str(BENCHMARKS / "gpu.sh"), str(tmp_path / "out"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)
    return done.returncode, [json.loads(line) for line in log.read_text().splitlines()], done.stderr


@needs_bash
def test_every_command_of_the_gpu_script_is_one(tmp_path: Path) -> None:
    code, commands, stderr = run(tmp_path, OFFICIAL="/checkout")
    assert len(commands) == len(SECTIONS) + 2  # decode and traffic are two each
    for command in commands:
        assert command[:3] == ["-m", "recurformer", "bench"]
        name, *options = command[3:]
        verb = commands_of(cli.cli)["bench", name]
        with verb.make_context(name, options) as context:  # fails on an unknown option
            assert isinstance(context, click.Context)
    official = [command[command.index("--official") + 1] for command in commands if "--official" in command]
    assert official == ["/checkout"] * 2
    assert (code, stderr) == (1, "failed: prefill\n")  # one failure stops nothing, and is told at the end


@needs_bash
def test_sections_are_chosen_by_name(tmp_path: Path) -> None:
    code, commands, _ = run(tmp_path, "model", "layer")
    assert code == 0
    assert [command[3] for command in commands] == ["model", "layer"]
    text = (BENCHMARKS / "gpu.sh").read_text()
    assert f"sections: {' '.join(SECTIONS)};" in text


def test_the_script_for_several_gpus_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one process; with two, what they tell each other is tested in `tests/training/test_distributed.py`."""
    model = ["--preset", "nano", "--layers", "first:1", "--precision", "fp32"]
    shape = [*model, "--tokens", "32", "--length", "8", "--micro-batch-size", "2"]
    options = [*shape, "--device", "cpu", "--repeats", "1", "--warmup", "0", "--out", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", ["ddp.py", *options])
    runpy.run_path(str(BENCHMARKS / "ddp.py"), run_name="__main__")
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (row["processes"], row["tokens"], row["micro_batch_size"]) == (1, 32, 2)
    assert row["tokens_per_s"] == pytest.approx(32 / row["step_s"])
    assert f"{row['tokens_per_s']:,.0f} tokens/s, 1.00x" in capsys.readouterr().out


@needs_bash
def test_the_scripts_parse() -> None:
    for script in sorted(BENCHMARKS.glob("*.sh")):
        subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
        assert script.stat().st_mode & 0o100
    inner = (BENCHMARKS / "smoke.sh").read_text().split("<<'PYTHON'\n")[1].split("\nPYTHON")[0]
    compile(inner, "smoke.sh", "exec")


# --- kernels.py ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profiler() -> ModuleType:
    return script_of(BENCHMARKS / "kernels.py")


def test_a_table_of_kernels_adds_up(profiler: ModuleType) -> None:
    times = {"attend": [10.0, 30.0], "gemm<" + "x" * 200: [500.0], "fill": [1.0], "copy": [2.0]}
    heading, *rows = profiler.table(times, 4, 2)
    assert heading.split() == ["launches", "ms", "us", "each", "us/pos", "kernel"]
    assert [row.split(maxsplit=4) for row in rows] == [
        ["1", "0.50", "500.0", "125.00", "gemm<" + "x" * 95],
        ["2", "0.04", "20.0", "10.00", "attend"],
        ["2", "0.00", "1.5", "0.75", "2 others"],
        ["5", "0.54", "108.6", "135.75", "all"],
    ]
    assert profiler.table({}, 4, 2)[1].split() == ["0", "0.00", "0.0", "0.00", "all"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is no NVIDIA GPU here"),
        (("--batch-size", "0"), "batch_size is 0; it must be a whole number of at least 1"),
        (
            ("--stack", "1", "--scan", "wavefront"),
            "scans holds 'wavefront' and stack is 1; wavefront takes a stack",
        ),
    ],
)
def test_kernels_need_a_gpu(
    profiler: ModuleType, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments, profiler.kernels, "kernels.py")
    said = capsys.readouterr()
    assert (stop.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert re.search(message, said.err)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_kernels_are_seen_in_both_passes(profiler: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    shape = (
        "--batch-size",
        "4",
        "--length",
        "24",
        "--d-model",
        "64",
        "--n-heads",
        "2",
        "--repeats",
        "1",
        "--most",
        "100",
    )
    with pytest.raises(SystemExit) as stop:
        cli.main(shape, profiler.kernels, "kernels.py")
    assert stop.value.code == 0
    forward, both = capsys.readouterr().out.split("\nboth: ")
    for name, launches in (("attend_leaf", 32), ("finished_rows", 32)):  # a chunk of 32 positions, once in each pass
        for part in (forward, both):
            assert re.search(rf"^ +{launches} .*  {name}$", part, re.MULTILINE), part
    assert "leaf_gradient" in both
    assert "leaf_gradient" not in forward
