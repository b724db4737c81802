"""Launch the runs of a grid: here, one after another, or as a SLURM array. Finished runs are left alone.

    python runs/launch.py runs/grids/paper.toml --list              print one command a run
    python runs/launch.py runs/grids/paper.toml --dry-run           print the cost of each run
    python runs/launch.py runs/grids/paper.toml --out out           train all runs here, or go on with them
    python runs/launch.py runs/grids/paper.toml --slurm jobs        write a SLURM array; --submit submits it

A grid is a TOML file:

    configs = ["../300m-*.toml"]        # configuration files, relative to the grid; one run each
    best_of = "lr.toml"                 # optional: each takes the axes' values of its best finished run there
    as_long_as = "main.toml"            # optional: each gets steps that take as long as each other run there
    [axes]                              # every combination of these settings is a run; "a+b": one value for both
    "optimizer.lr" = [1e-3, 3.16e-3, 1e-2]
    [set]                               # settings of every run
    "schedule.steps" = 100
    [evaluate]                          # optional: the data on which runs/evaluate.py evaluates finished runs
    data = ["data/validation"]
    tasks = "data/zero-shot"

Run R of grid G trains in OUT/G/R. A run that was stopped goes on from its last checkpoint. When a run fails before its
first step, the other runs of its configuration are left out. After two such configurations in a row no run begins.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recurformer.report import Run as Finished
from recurformer.report import load_runs
from recurformer.store.runs import METRICS, read_metrics
from recurformer.training.run import CONFIG
from recurformer.training.signals import stop_numbers

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
        """Return the arguments of `recurformer` that train it."""
        changes = [word for setting in self.settings for word in ("--set", setting)]
        return ["train", "--config", str(self.config), *changes, "--out", str(self.folder), *more]

    def command(self, gpus: int = 1) -> list[str]:
        """Return the command that trains it, or goes on with it."""
        python = [sys.executable, "-m"]
        if gpus > 1:
            python += ["torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", "-m"]
        return [*python, "recurformer", *self.arguments("--resume")]

    @property
    def newest(self) -> str:
        """The name of its newest checkpoint, "" before there is one."""
        return max((path.name for path in (self.folder / "checkpoints").glob("step-*")), default="")

    @property
    def finished(self) -> Finished | None:
        """Its records, once its last step is made and evaluated; None before."""
        if not all((self.folder / name).is_file() for name in (CONFIG, METRICS)):
            return None
        (found,) = load_runs([self.folder])
        step = max((record["step"] for record in found.records), default=0)
        made = step >= found.config["schedule"]["steps"]
        saved = (self.folder / "checkpoints" / f"step-{step:08d}").is_dir()
        evaluated = [record["step"] for record in found.events("evaluation")]
        return found if made and saved and (found.config["data"]["validation"] is None or step in evaluated) else None

    @property
    def has_stepped(self) -> bool:
        """Whether it has recorded a step."""
        try:
            return self.newest != "" or any(record["event"] == "train" for record in read_metrics(self.folder))
        except (ValueError, KeyError, TypeError):
            return True  # its records are damaged, so it has some


# --- from a grid to its runs -----------------------------------------------------------------------------------------


def read_grid(file: Path) -> dict[str, Any]:
    """Return the table of a grid's file.

    Raises:
        ValueError: for a file that is no grid, or an unknown key.
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
    """Return the runs of a grid, in the order of its file.

    Args:
        file: the grid.
        out: the folder of all grids' runs.
        settings: NAME=VALUE of every run; they override the grid's.
        only: patterns with * and ?. A run is taken when its name or its configuration's matches one of them.

    Raises:
        ValueError: for a grid that cannot be read or names no file, and for one that needs unfinished runs of another.
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
    """Yield words for the name, and settings, for each combination of the axes' values."""
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
    """Return 0.00316 as 3.16e-3."""
    if isinstance(value, float) and value and abs(value) < 0.01:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return json.dumps(value)


def _best(file: Path, config: Path, out: Path) -> list[str]:
    """Return the axes' settings of the best run of a configuration in another grid."""
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
    """Return words for the name, and the number of steps that take as long, for each longer run of another grid."""
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
    """Return the median seconds of a step. It leaves out compilation, graph capture, evaluation and saving."""
    records = run.events("train")
    pairs = itertools.pairwise([{"step": 0, "seconds": 0.0}, *records])
    return statistics.median((b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairs)


# --- launching -------------------------------------------------------------------------------------------------------


@dataclass
class Launch:
    """Runs under way: which ones wait, which ones train, and why none begins any more."""

    waiting: list[Run]
    gpus: int
    log_files: bool  # each run writes to OUT/GRID/RUN.log instead of the screen
    working: dict[Run, subprocess.Popen[bytes]] = field(default_factory=dict)
    stop_requests: dict[Run, str] = field(
        default_factory=dict
    )  # run that was asked to stop -> its newest checkpoint then
    failed: list[Path] = field(default_factory=list)  # configurations of the last runs that failed before a step
    stopped: bool = False
    began: float = field(default_factory=lambda: time.monotonic())

    def start(self) -> None:
        """Start the next run."""
        run = self.waiting.pop(0)
        command = run.command(self.gpus)
        print(f"{run.name}: {shlex.join(command)}", flush=True)
        with ExitStack() as files:
            log = None
            if self.log_files:
                run.folder.parent.mkdir(parents=True, exist_ok=True)
                log = files.enter_context(run.folder.with_name(f"{run.name}.log").open("ab"))
            # A process group of its own: Ctrl-C reaches the launcher alone, which passes it on once.
            self.working[run] = subprocess.Popen(command, stdout=log, stderr=log, process_group=0)

    def look(self) -> None:
        """Report the runs that have ended."""
        for run, process in list(self.working.items()):
            if process.poll() is None:
                continue
            del self.working[run]
            saved = run in self.stop_requests and run.newest > self.stop_requests[run]
            print(f"{run.name}: {_ending(process.returncode, saved)}, {_clock(self.began)}", flush=True)
            if process.returncode > 0 and not saved and run not in self.stop_requests and not run.has_stepped:
                self.count_failure(run)
            else:
                self.failed = []

    def count_failure(self, run: Run) -> None:
        """Leave out the runs that would fail like this one: the others of its configuration, then all of them."""
        if self.failed:
            print("two configurations failed before their first step, so no further run begins; correct the cause and "
                  "repeat the command", flush=True)  # fmt: skip
            self.waiting.clear()
            return
        self.failed = [run.config]
        alike = [other for other in self.waiting if other.config == run.config]
        if alike:
            print(f"{run.name} failed before its first step: {len(alike)} more runs of {run.config} are left out",
                  flush=True)  # fmt: skip
            self.waiting = [other for other in self.waiting if other not in alike]

    def stop(self, *_: object) -> None:
        """Begin no run any more, and ask those under way to save and stop."""
        if self.stopped:
            return
        self.stopped = True
        print("stopping: each run saves after its step; the same command goes on", flush=True)
        for run, process in self.working.items():
            self.stop_requests[run] = run.newest
            process.send_signal(signal.SIGTERM)


def launch(runs: Sequence[Run], jobs: int, minutes: float | None, gpus: int) -> bool:
    """Train the runs that are not finished, `jobs` at a time.

    After `minutes` no run begins any more, and those under way are asked to save and stop.

    Returns:
        False when a signal or `minutes` ended it early.
    """
    waiting = [run for run in runs if run.finished is None]
    for run in runs:
        if run not in waiting:
            print(f"{run.name}: finished before", flush=True)
    at_work = Launch(waiting, gpus, log_files=jobs > 1)
    with handling(at_work.stop):
        while at_work.working or (at_work.waiting and not at_work.stopped):
            if minutes is not None and time.monotonic() - at_work.began > 60 * minutes:
                at_work.stop()
            while at_work.waiting and len(at_work.working) < jobs and not at_work.stopped:
                at_work.start()
            at_work.look()
            time.sleep(0.2)
    return not at_work.stopped


@contextmanager
def handling(handler: Callable[..., Any]) -> Iterator[None]:
    """Call `handler` for every signal that stops a run (Ctrl-C, SIGTERM, a closed terminal, SLURM's warning)."""
    before = {number: signal.signal(number, handler) for number in stop_numbers()}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def wait_for(command: Sequence[str]) -> int:
    """Run a command and return its exit code. A signal to the launcher ends the command, too."""
    process: subprocess.Popen[bytes] | None = None

    def end(*_: object) -> None:
        if process is not None:
            process.send_signal(signal.SIGTERM)

    with handling(end):
        process = subprocess.Popen(command, process_group=0)
        return process.wait()


def _ending(code: int, saved: bool) -> str:
    """Return how a run ended. torchrun exits with 1 after any end but success, so a new checkpoint counts as well."""
    if saved and code:
        return "stopped and saved"
    return {0: "finished", 143: "stopped and saved", -15: "stopped before its first step"}.get(code, f"failed ({code})")


def _clock(began: float) -> str:
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    return f"{minutes}:{seconds:02d} since the launch"


def evaluate(grid: dict[str, Any], runs: Sequence[Run]) -> int:
    """Evaluate the finished runs in one process, and return its exit code."""
    wanted = grid.get("evaluate", {})
    folders = [str(run.folder) for run in runs if run.finished]
    if not wanted or not folders:
        return 0
    options = [word for data in wanted.get("data", []) for word in ("--data", data)]
    options += ["--tasks", wanted["tasks"]] if "tasks" in wanted else []
    return wait_for([sys.executable, str(HERE / "evaluate.py"), *folders, *options])


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
# {code}. `sbatch` of this same file goes on with the runs that are not finished.
cd {here}
srun bash -c "exec $(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {folder}/commands.txt)"
"""


def write_array(runs: Sequence[Run], name: str, folder: Path, gpus: int, at_once: int | None, options: str) -> Path:
    """Write commands.txt (one run a line) and array.sh (for `sbatch`) into a folder; return the path of array.sh."""
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
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("grid", type=Path, metavar="GRID")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="folder of all runs (default: out)")
    add(
        "--only",
        action="append",
        default=[],
        metavar="NAME",
        help="only these runs or configurations; * matches anything",
    )
    add(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="setting of every run, as in recurformer train"
    )
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs at a time; above 1, each writes to OUT/GRID/RUN.log (default: 1)",
    )
    add("--minutes", type=float, metavar="M", help="save and stop after M minutes; the same command goes on")
    add("--gpus", type=int, default=1, metavar="N", help="GPUs of each run, through torchrun (default: 1)")
    add("--list", action="store_true", help="print each run's command, and run none")
    add("--dry-run", action="store_true", help="print the cost of each run, and run none")
    add("--slurm", type=Path, metavar="DIR", help="write a SLURM array there instead of running")
    add("--submit", action="store_true", help="submit the array with sbatch")
    add("--at-once", type=int, metavar="N", help="tasks of the array at a time")
    add("--slurm-options", default="", metavar="TEXT", help="options of sbatch, as '--partition=gpu --time=24:00:00'")
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
            commands = [[sys.executable, "-m", "recurformer", *run.arguments(*options)] for run in runs]
            return next((code for command in commands if (code := wait_for(command))), 0)
        if given.slurm or given.submit:
            script = write_array(
                runs, given.grid.stem, given.slurm or given.out / given.grid.stem / "slurm", given.gpus, given.at_once,
                given.slurm_options,
            )  # fmt: skip
            print(f"{script}: {len(runs)} runs")
            return subprocess.run(["sbatch", str(script)], check=False).returncode if given.submit else 0
        whole = launch(runs, given.jobs, given.minutes, given.gpus)
        code = evaluate(grid, runs) if whole else 0  # it takes minutes: not after a signal
        left = [run.name for run in runs if run.finished is None]
        print(f"{len(runs) - len(left)} of {len(runs)} runs are finished")
        return 1 if left or code else 0
    except (ValueError, OSError) as error:
        print(f"launch.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
