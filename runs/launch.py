"""Launches the runs of a grid: here, one after the other, or as a SLURM array. Nothing that is finished is done twice.

    python runs/launch.py runs/grids/paper.toml --list              what there is, one command a run
    python runs/launch.py runs/grids/paper.toml --dry-run           what each run costs
    python runs/launch.py runs/grids/paper.toml --out out           run, or go on with, all of them here
    python runs/launch.py runs/grids/paper.toml --slurm jobs        write a SLURM array; --submit hands it in

A grid is a TOML file:

    configs = ["../300m-*.toml"]        # configuration files, relative to the grid; each is a run by itself
    best_of = "lr.toml"                 # optional: each takes the axes' values of its best finished run in this grid
    as_long_as = "main.toml"            # optional: each gets the steps that take as long as each other run of this grid
    [axes]                              # every combination of these settings is a run; "a+b" sets two to one value
    "optimizer.lr" = [1e-3, 3.16e-3, 1e-2]
    [set]                               # settings of every run
    "schedule.steps" = 100
    [evaluate]                          # optional: what finished runs are evaluated on, by runs/evaluate.py
    data = ["data/validation"]
    tasks = "data/zero-shot"

Run R of grid G trains in OUT/G/R. A run that was stopped goes on with its last checkpoint.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recurformer.report import Run as Finished
from recurformer.report import load_runs
from recurformer.store.runs import METRICS
from recurformer.training.run import CONFIG

HERE = Path(__file__).parent
KEYS = {"configs", "best_of", "as_long_as", "axes", "set", "evaluate"}


@dataclass(frozen=True)
class Run:
    """One run of a grid."""

    name: str
    config: Path
    settings: tuple[str, ...]  # NAME=VALUE each
    folder: Path

    def arguments(self, *more: str) -> list[str]:
        """Of `recurformer`."""
        changes = [word for setting in self.settings for word in ("--set", setting)]
        return ["train", "--config", str(self.config), *changes, "--out", str(self.folder), *more]

    def command(self, gpus: int = 1) -> list[str]:
        """That trains it, or goes on with it."""
        python = [sys.executable, "-m"]
        if gpus > 1:
            python += ["torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", "-m"]
        return [*python, "recurformer", *self.arguments("--resume")]

    @property
    def newest(self) -> str:
        """The name of its last checkpoint, "" before there is one."""
        return max((path.name for path in (self.folder / "checkpoints").glob("step-*")), default="")

    @property
    def finished(self) -> Finished | None:
        """What it has recorded, once its last step is made."""
        if not all((self.folder / name).is_file() for name in (CONFIG, METRICS)):
            return None
        (found,) = load_runs([self.folder])
        step = max((record["step"] for record in found.records), default=0)
        done = step == found.config["schedule"]["steps"] and (self.folder / "checkpoints" / f"step-{step:08d}").is_dir()
        return found if done else None


# --- from a grid to its runs -----------------------------------------------------------------------------------------


def read_grid(file: Path) -> dict[str, Any]:
    """A grid's file.

    Raises:
        ValueError: for a file that is none, or a key that means nothing.
    """
    try:
        grid = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"the grid {file} cannot be read: {error}") from None
    if unknown := grid.keys() - KEYS:
        raise ValueError(f"the grid {file} has {sorted(unknown)[0]!r}; it may have {', '.join(sorted(KEYS))}")
    if not isinstance(grid.get("configs"), list):
        raise ValueError(f"the grid {file} names no configs; give a list of files")
    return grid


def expand(file: Path, out: Path, settings: Sequence[str] = (), only: Sequence[str] = ()) -> list[Run]:
    """The runs of a grid, in the order of its file.

    Args:
        file: the grid.
        out: where runs are.
        settings: NAME=VALUE of every run, after those of the grid.
        only: patterns with * and ?, of which a run's name or its configuration's has to match one.

    Raises:
        ValueError: for a grid that cannot be read, names no file, or waits for another grid's runs.
    """
    grid, runs = read_grid(file), []
    fixed = [_setting(name, value) for name, value in grid.get("set", {}).items()]
    for config in _configs(file, grid):
        for words, changes in _variants(grid.get("axes", {})):
            name = "-".join([config.stem, *words])
            patterns = [p for p in only if fnmatch.fnmatch(name, p) or fnmatch.fnmatch(config.stem, p)]
            longer = [p for p in only if p.startswith(f"{name}-as-long-as-")]
            if only and not patterns and not longer:
                continue  # before anything waits for other runs
            best = _best(file.parent / grid["best_of"], config, out) if "best_of" in grid else []
            times = _times(file.parent / grid["as_long_as"], config, out) if "as_long_as" in grid else [([], [])]
            for more, steps in times:
                whole = "-".join([name, *more])
                if longer and not patterns and not any(fnmatch.fnmatch(whole, p) for p in longer):
                    continue
                every = (*fixed, *best, *changes, *steps, *settings)
                runs.append(Run(whole, config, every, out / file.stem / whole))
    if not runs:
        raise ValueError(f"no run of {file}{f' is called {chr(32).join(only)}' if only else ''}; --list names them")
    return runs


def _configs(file: Path, grid: dict[str, Any]) -> list[Path]:
    found: list[Path] = []
    for pattern in grid["configs"]:
        matches = sorted(path for path in file.parent.glob(pattern) if path.is_file())
        if not matches:
            raise ValueError(f"the grid {file} names {pattern!r}, and there is no such file")
        found += [Path(os.path.relpath(path.resolve())) for path in matches]
    return list(dict.fromkeys(found))


def _variants(axes: dict[str, list[Any]]) -> Iterator[tuple[list[str], list[str]]]:
    """For each combination of the axes' values: words for the name, and settings."""
    for values in itertools.product(*axes.values()):
        words, changes = [], []
        for names, value in zip(axes, values, strict=True):
            word = names.split("+")[0].rpartition(".")[2]
            words.append(f"{word}{'-' if word[-1].isdigit() else ''}{_short(value)}")
            changes += [_setting(name, value) for name in names.split("+")]
        yield words, changes


def _setting(name: str, value: Any) -> str:
    return f"{name}={value if isinstance(value, str) else _short(value)}"


def _short(value: Any) -> str:
    """0.00316 as 3.16e-3."""
    if isinstance(value, float) and value and abs(value) < 0.01:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return json.dumps(value)


def _best(file: Path, config: Path, out: Path) -> list[str]:
    """The axes' settings of the best run of a configuration in another grid."""
    names = [name for names in read_grid(file).get("axes", {}) for name in names.split("+")]
    candidates = [run for run in expand(file, out) if run.config == config]
    losses = {run: found.events("evaluation")[-1]["validation_loss"] for run in candidates if (found := run.finished)}
    if not losses:
        raise ValueError(f"the grid {file} has no finished run of {config.stem} in {out / file.stem}; launch it first")
    best = min(losses, key=lambda run: losses[run])
    if len(losses) < len(candidates):
        print(f"{config.stem}: best of {len(losses)} of {len(candidates)} runs of {file.stem}", file=sys.stderr)
    return [setting for setting in best.settings if setting.partition("=")[0] in names]


def _times(file: Path, config: Path, out: Path) -> list[tuple[list[str], list[str]]]:
    """For each longer run of another grid: words for the name, and the steps that take a configuration as long."""
    grid = read_grid(file)
    if "axes" in grid:
        raise ValueError(f"the grid {file} has several runs of a configuration; as_long_as needs one without axes")
    runs = [Run(c.stem, c, (), out / file.stem / c.stem) for c in _configs(file, grid)]
    finished = {run.config: found for run in runs if (found := run.finished)}
    if config not in finished:
        raise ValueError(f"the grid {file} has no finished run of {config.stem} in {out / file.stem}; launch it first")
    step, found = step_seconds(finished[config]), []
    for other, its in finished.items():
        steps = round(step_seconds(its) * its.config["schedule"]["steps"] / step)
        if other != config and steps > finished[config].config["schedule"]["steps"]:
            found.append(([f"as-long-as-{other.stem}"], [f"schedule.steps={steps}"]))
    return found


def step_seconds(run: Finished) -> float:
    """Median seconds of a step: without compilation, graph capture, evaluation and saving."""
    records = run.events("train")
    pairs = itertools.pairwise([{"step": 0, "seconds": 0.0}, *records])
    return statistics.median((b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairs)


# --- launching -------------------------------------------------------------------------------------------------------


def launch(runs: Sequence[Run], jobs: int, minutes: float | None, gpus: int) -> bool:
    """Train what is not finished, `jobs` at a time; False when it was told to stop before the end.

    After `minutes` no run begins any more, and those under way are asked to save and stop.
    """
    began, stopped = time.monotonic(), False
    waiting = [run for run in runs if run.finished is None]
    for run in runs:
        if run not in waiting:
            print(f"{run.name}: finished before", flush=True)
    working: dict[Run, subprocess.Popen[bytes]] = {}
    asked: dict[Run, str] = {}  # to stop, when this was the newest checkpoint

    def stop(*_: object) -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            print("stopping: each run saves after its step; the same command goes on", flush=True)
            for run, process in working.items():
                asked[run] = run.newest
                process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    with ExitStack() as files:
        while working or (waiting and not stopped):
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                stop()
            while waiting and len(working) < jobs and not stopped:
                run = waiting.pop(0)
                print(f"{run.name}: {shlex.join(run.command(gpus))}", flush=True)
                log = None
                if jobs > 1:
                    run.folder.parent.mkdir(parents=True, exist_ok=True)
                    log = files.enter_context(run.folder.with_name(f"{run.name}.log").open("ab"))
                # A group of its own: Ctrl-C is for the launcher, which passes it on once.
                working[run] = subprocess.Popen(run.command(gpus), stdout=log, stderr=log, process_group=0)
            for run, process in list(working.items()):
                if process.poll() is not None:
                    del working[run]
                    saved = run in asked and run.newest > asked[run]
                    print(f"{run.name}: {_ending(process.returncode, saved)}, {_clock(began)}", flush=True)
            time.sleep(0.2)
    for number, handler in before.items():
        signal.signal(number, handler)
    return not stopped


def _ending(code: int, saved: bool) -> str:
    """What became of a run; of several processes torchrun says 1 whatever they say, so what they saved counts."""
    if saved and code:
        return "stopped and saved"
    return {0: "finished", 143: "stopped and saved", -15: "stopped before its first step"}.get(code, f"failed ({code})")


def _clock(began: float) -> str:
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    return f"{minutes}:{seconds:02d} since the launch"


def evaluate(grid: dict[str, Any], runs: Sequence[Run]) -> int:
    """Evaluate the finished runs, all in one process; its exit code."""
    wanted = grid.get("evaluate", {})
    folders = [str(run.folder) for run in runs if run.finished]
    if not wanted or not folders:
        return 0
    options = [word for data in wanted.get("data", []) for word in ("--data", data)]
    options += ["--tasks", wanted["tasks"]] if "tasks" in wanted else []
    return subprocess.run([sys.executable, str(HERE / "evaluate.py"), *folders, *options], check=False).returncode


ARRAY = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=1-{count}{limit}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --output={folder}/%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
{options}
# Line n of commands.txt is run n. Two minutes before the time is up SLURM sends SIGTERM: the run saves and ends with
# {code}, and `sbatch` of this same file goes on with what is not finished.
cd {here}
srun bash -c "exec $(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {folder}/commands.txt)"
"""


def write_array(runs: Sequence[Run], name: str, folder: Path, gpus: int, at_once: int | None, options: str) -> Path:
    """A folder with commands.txt, one run a line, and array.sh, which is for `sbatch`; the latter."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "commands.txt").write_text("".join(shlex.join(run.command(gpus)) + "\n" for run in runs))
    text = ARRAY.format(
        name=f"recurformer-{name}", count=len(runs), limit=f"%{at_once}" if at_once else "", gpus=gpus,
        code="143" if gpus == 1 else "1, torchrun's code for every such end",
        folder=folder, here=shlex.quote(os.getcwd()),
        options="".join(f"#SBATCH {option}\n" for option in shlex.split(options)),
    )  # fmt: skip
    script = folder / "array.sh"
    script.write_text(text)
    return script


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("grid", type=Path, metavar="GRID")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where runs are (default: out)")
    add("--only", action="append", default=[], metavar="NAME", help="these runs or configurations; * matches anything")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of every run, as recurformer train")
    add(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time, their output in OUT/GRID/RUN.log (default: 1)"
    )
    add("--minutes", type=float, metavar="M", help="save and stop after so many; the same command goes on")
    add("--gpus", type=int, default=1, metavar="N", help="of each run, through torchrun (default: 1)")
    add("--list", action="store_true", help="print each run's command, and do nothing")
    add("--dry-run", action="store_true", help="print what each run would cost, and do nothing")
    add("--slurm", type=Path, metavar="DIR", help="write a SLURM array there instead of running")
    add("--submit", action="store_true", help="hand the array in with sbatch")
    add("--at-once", type=int, metavar="N", help="tasks of the array at a time")
    add("--slurm-options", default="", metavar="TEXT", help="of sbatch, as '--partition=gpu --time=24:00:00'")
    given = parser.parse_args(arguments)
    try:
        grid = read_grid(given.grid)
        runs = expand(given.grid, given.out, given.set, given.only)
        if given.list:
            for run in runs:
                print(shlex.join(["recurformer", *run.arguments("--resume")]))
            return 0
        if given.dry_run:
            options = ["--dry-run", "--processes", str(given.gpus)]
            return max(
                subprocess.run([sys.executable, "-m", "recurformer", *run.arguments(*options)], check=False).returncode
                for run in runs
            )
        if given.slurm or given.submit:
            script = write_array(
                runs, given.grid.stem, given.slurm or given.out / given.grid.stem / "slurm", given.gpus, given.at_once,
                given.slurm_options,
            )  # fmt: skip
            print(f"{script}: {len(runs)} runs")
            return subprocess.run(["sbatch", str(script)], check=False).returncode if given.submit else 0
        whole = launch(runs, given.jobs, given.minutes, given.gpus)
        code = evaluate(grid, runs) if whole else 0  # which takes minutes: not when it was told to stop
        left = [run.name for run in runs if run.finished is None]
        print(f"{len(runs) - len(left)} of {len(runs)} runs are finished")
        return 1 if left or code else 0
    except (ValueError, OSError) as error:
        print(f"launch.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
