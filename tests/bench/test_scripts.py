"""The shell scripts ask for commands that exist."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from recurformer import cli

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SECTIONS = ("layer", "wide", "stack", "long", "model", "prefill", "decode", "traffic")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

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


def test_every_command_of_the_gpu_script_is_one(tmp_path: Path) -> None:
    code, commands, stderr = run(tmp_path, OFFICIAL="/checkout")
    assert len(commands) == len(SECTIONS) + 2  # decode and traffic are two each
    for command in commands:
        assert command[:3] == ["-m", "recurformer", "bench"]
        name, *options = command[3:]
        verb = cli.bench.commands[name]
        with verb.make_context(name, options) as context:  # fails on an unknown option
            assert isinstance(context, click.Context)
    official = [command[command.index("--official") + 1] for command in commands if "--official" in command]
    assert official == ["/checkout"] * 2
    assert (code, stderr) == (1, "failed: prefill\n")  # one failure stops nothing, and is told at the end


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


def test_the_scripts_parse() -> None:
    for script in sorted(BENCHMARKS.glob("*.sh")):
        subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
        assert script.stat().st_mode & 0o100
    inner = (BENCHMARKS / "smoke.sh").read_text().split("<<'PYTHON'\n")[1].split("\nPYTHON")[0]
    compile(inner, "smoke.sh", "exec")
