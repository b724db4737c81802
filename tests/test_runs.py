"""The recipes in runs/: every file parses and is the model it says; grids expand; launching goes on, and stops; results
become tables and a picture."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from recurformer.config import PRESETS, ModelConfig
from recurformer.training import read_train_config, train

RUNS = Path(__file__).parents[1] / "runs"
PAPER = sorted(RUNS.glob("*.toml"))
BYTES = sorted((RUNS / "bytes").glob("*.toml"))
RESULTS = sorted((RUNS / "results").glob("*.toml"))
GRIDS = sorted(RUNS.rglob("grids/*.toml"))


def script(path: str) -> ModuleType:
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(f"runs_{name}", RUNS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


launcher, evaluation, results = script("launch.py"), script("evaluate.py"), script("results/report.py")


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", PAPER, ids=lambda file: file.stem)
def test_a_run_of_the_paper(file: Path) -> None:
    config = read_train_config(file)
    preset, _, kind = file.stem.rpartition("-")
    layers = {"recurrent": "recurrent", "transformer": "standard"}[kind]
    assert config.model == ModelConfig.preset(preset, layers=layers)
    size = {"150m": 151e6, "300m": 302e6}[preset.partition("-")[0]]
    # 1408/22/5632/6 has 142.8M and 1408/22/5632/12 285.5M: the labels are the paper's.
    assert config.model.num_parameters() == pytest.approx(size, rel=0.06)
    assert config.batch_size * config.data.window == 262_144
    assert config.schedule.steps == {"150m": 12_500, "300m": 25_000}[preset.partition("-")[0]]
    assert (config.schedule.warmup_fraction, config.schedule.start_fraction, config.schedule.final_fraction) == (
        0.4, 0.1, 0.1,
    )  # fmt: skip
    o = config.optimizer
    assert (o.beta1, o.eps, o.weight_decay, o.grad_clip, config.precision) == (0.9, 1e-8, 0.0, 1.0, "bf16")


def test_the_run_on_bytes_has_the_models_of_the_page() -> None:
    (file,) = BYTES
    config = read_train_config(file)
    assert config.model.num_parameters() == pytest.approx(3.15e6, rel=0.005)
    assert (config.schedule.steps, config.batch_size * config.data.window) == (1000, 8192)
    found = json.loads((RUNS.parent / "docs" / "figures" / "gpu" / "bytes.json").read_text())["runs"]
    page = (RUNS.parent / "docs" / "what-recurrence-buys.md").read_text()
    for name, options in (("default", "default"), ("the paper's", "official")):
        last = {r["layers"]: r["validation"][-1] for r in found if (r["options"], r["precision"]) == (options, "fp32")}
        assert {point["step"] for point in last.values()} == {config.schedule.steps}
        losses = [last[layers]["loss"] for layers in ("SSSS", "RSSS", "RRRR")]
        cells = [*losses, losses[0] - losses[1], losses[0] - losses[2]]
        assert f"| {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |" in page


def test_every_shape_of_the_paper_has_its_runs() -> None:
    shapes = [name for name in PRESETS if name.startswith(("150m", "300m"))]
    assert {f.stem for f in PAPER} == {f"{shape}-{kind}" for shape in shapes for kind in ("recurrent", "transformer")}


def test_a_run_of_the_paper_fits_an_80_gb_gpu() -> None:
    from recurformer.training.memory import H100_BYTES, estimate_memory

    for file in PAPER:
        config = read_train_config(file)
        scan = "none" if config.model.layers == "standard" else "fused"
        total = estimate_memory(config, gpu=True, scan=scan, device_bytes=H100_BYTES).total
        assert total < 0.9 * H100_BYTES, file


def test_the_models_of_the_results_are_matched() -> None:
    configs = {file.stem: read_train_config(file) for file in RESULTS}
    assert set(configs) == {"transformer-8", "transformer-4", "recurrent-8", "recurrent-4", "first-1", "first-2"}
    counts = {name: config.model.num_parameters() for name, config in configs.items()}
    assert all(count == pytest.approx(19.3e6, rel=0.02) for count in counts.values())
    assert max(counts.values()) / min(counts.values()) < 1.02
    assert configs["first-1"].model.layers == "first:1"
    assert configs["first-2"].model.recurrent_depth == configs["first-2"].model.n_layers // 4
    alike = [{**c.to_dict(), "model": None} for c in configs.values()]
    assert all(other == alike[0] for other in alike)  # the same tokens in the same order under the same recipe
    assert configs["first-1"].schedule.steps * 128 * 512 >= 60e6


# --- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", GRIDS, ids=lambda file: f"{file.parents[1].name}-{file.stem}")
def test_a_grid_is_one(file: Path) -> None:
    grid = launcher.read_grid(file)
    assert launcher._configs(file, grid)
    for key in ("best_of", "as_long_as"):
        assert key not in grid or (file.parent / grid[key]).is_file()


def test_the_grid_of_the_paper(tmp_path: Path) -> None:
    runs = launcher.expand(RUNS / "grids" / "paper.toml", tmp_path)
    assert len(runs) == len({run.folder for run in runs}) == 10 * 3 * 2
    (run,) = [r for r in runs if r.name == "300m-6-recurrent-lr3.16e-3-beta2-0.99"]
    assert run.folder == tmp_path / "paper" / run.name
    config = read_train_config(run.config, run.settings)
    assert (config.optimizer.lr, config.optimizer.beta2) == (3.16e-3, 0.99)
    assert len(launcher.expand(RUNS / "grids" / "table1.toml", tmp_path)) == 30
    few = launcher.expand(RUNS / "grids" / "paper.toml", tmp_path, ["seed=1"], ["300m-6-*-lr0.01-*"])
    assert len(few) == 4
    assert all(run.settings[-1] == "seed=1" for run in few)


def test_the_grid_of_learning_rates_is_short(tmp_path: Path) -> None:
    runs = launcher.expand(RUNS / "results" / "grids" / "lr.toml", tmp_path)
    assert len(runs) == 18
    configs = [read_train_config(run.config, run.settings) for run in runs]
    assert {c.optimizer.lr for c in configs} == {1e-3, 3.16e-3, 1e-2}
    assert all(c.schedule.steps * c.batch_size * c.data.window == pytest.approx(15e6, rel=0.01) for c in configs)


def test_a_slurm_array(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--out", "o", "--slurm", str(tmp_path), "--gpus", "8", "--at-once", "4"]
    arguments = [str(RUNS / "grids" / "table1.toml"), *options, "--slurm-options", "--partition=gpu --time=24:00:00"]
    assert launcher.main(arguments) == 0
    commands = [shlex.split(line) for line in (tmp_path / "commands.txt").read_text().splitlines()]
    assert len(commands) == 30
    assert commands[0][1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=8"]
    text = (tmp_path / "array.sh").read_text()
    for line in ("--array=1-30%4", "--partition=gpu", "--time=24:00:00", "--gpus-per-node=8", "--signal=TERM@120"):
        assert f"#SBATCH {line}\n" in text
    # As SLURM would: the task's own line is run.
    (tmp_path / "commands.txt").write_text("echo one\necho 'task two'\n")
    shown = subprocess.run(
        ["bash", "-c", f"srun() {{ \"$@\"; }}; {text}"], env={"SLURM_ARRAY_TASK_ID": "2", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout == "task two\n"
    assert "30 runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("configs = [", "cannot be read"),
        ("config = []", "'config'"),
        ("axes = {}", "names no configs"),
        ('configs = ["absent.toml"]', "no such file"),
        ('configs = ["c.toml"]\nbest_of = "other.toml"', "no finished run"),
        ('configs = ["c.toml"]\nas_long_as = "other.toml"', "no finished run"),
        ('configs = ["c.toml"]\nas_long_as = "axes.toml"', "without axes"),
    ],
    ids=["text", "key", "no configs", "no file", "best of nothing", "as long as nothing", "as long as several"],
)
def test_bad_grids(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text("[model]\nvocab_size = 256\n")
    (tmp_path / "other.toml").write_text('configs = ["c.toml"]\n')
    (tmp_path / "axes.toml").write_text('configs = ["c.toml"]\n[axes]\nseed = [0, 1]\n')
    (tmp_path / "grid.toml").write_text(text)
    assert launcher.main([str(tmp_path / "grid.toml"), "--out", str(tmp_path / "out"), "--list"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


# --- from a grid to a picture ----------------------------------------------------------------------------------------

CONFIG = """
batch_size = 2
[model]
vocab_size = 256
d_model = 16
n_heads = 2
n_layers = 2
layers = "{layers}"
[data]
train = "{place}/data"
validation = "{place}/data"
window = 16
[schedule]
steps = 4
[evaluation]
every = 2
batches = 1
[sample]
tokens = 0
[log]
every = 1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, the grids of runs/results in small, and all runs but one of the grid "main"."""
    from recurformer.data import prepare

    place = tmp_path_factory.mktemp("runs")
    (place / "text.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    prepare([place / "text.txt"], place / "data", progress=False)
    (place / "grids").mkdir()
    for name, layers in (("slow", "recurrent"), ("transformer-2", "standard")):
        (place / f"{name}.toml").write_text(CONFIG.format(layers=layers, place=place))
    for file in (RUNS / "results" / "grids").glob("*.toml"):
        grid = tomllib.loads(file.read_text())
        lines = ['configs = ["../*.toml"]' if file.stem != "equal-time" else 'configs = ["../transformer-*.toml"]']
        lines += [f'{key} = "{grid[key]}"' for key in ("best_of", "as_long_as") if key in grid]
        if file.stem == "lr":
            lines += ["[axes]", '"optimizer.lr" = [1e-4, 1e-2]', "[set]", '"schedule.steps" = 2']
        elif file.stem == "seeds":
            lines += ["[axes]", '"seed+data.seed" = [1, 2]']
        else:
            lines += ["[evaluate]", f'data = ["{place}/data"]', f'tasks = "{place}/tasks"']
        (place / "grids" / file.name).write_text("\n".join(lines))
    (place / "tasks").mkdir()
    item = {"context": "It was the", "choices": [" best", " worst"], "label": 0}
    (place / "tasks" / "times.jsonl").write_text("".join(json.dumps(item) + "\n" for _ in range(3)))
    for run in launcher.expand(place / "grids" / "lr.toml", place / "out"):
        train(read_train_config(run.config, run.settings), run.folder, quiet=True)
    for run in launcher.expand(place / "grids" / "main.toml", place / "out", only=["slow"]):
        train(read_train_config(run.config, run.settings), run.folder, quiet=True)
    return place


def test_the_best_settings_go_on(place: Path) -> None:
    """A higher rate is better where there are two steps."""
    slow, fast = launcher.expand(place / "grids" / "main.toml", place / "out")
    assert (slow.name, fast.name) == ("slow", "transformer-2")
    assert fast.settings == ("optimizer.lr=0.01",)
    assert slow.finished
    assert not fast.finished
    first, second = launcher.expand(place / "grids" / "seeds.toml", place / "out", only=["slow"])
    assert (first.name, second.name) == ("slow-seed1", "slow-seed2")
    assert first.settings == ("optimizer.lr=0.01", "seed=1", "data.seed=1")


def test_launching_goes_on_where_it_was_and_evaluates(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = place / "out"
    code = launcher.main([str(place / "grids" / "main.toml"), "--out", str(out), "--jobs", "2"])
    shown = capfd.readouterr().out
    assert code == 0, shown
    assert "slow: finished before" in shown
    assert "2 of 2 runs are finished" in shown
    assert "4/4" in (out / "main" / "transformer-2.log").read_text()
    for name in ("slow", "transformer-2"):
        found = json.loads((out / "main" / name / "evaluation.json").read_text())
        assert found["step"] == 4
        assert 4 < found["data"]["loss"] < 6
        assert found["tasks"][0]["items"] == 3
        assert (
            evaluation.evaluate_run(out / "main" / name, [f"{place}/data"], f"{place}/tasks", 2, None, "cpu") == found
        )

    # The Transformer's steps in the other's time, and the picture of all of it.
    for name, seconds in (("slow", 3.0), ("transformer-2", 1.0)):  # a loaded machine may measure anything
        file = out / "main" / name / "metrics.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()]
        records = [{**r, "seconds": seconds * r["step"]} if "seconds" in r else r for r in records]
        file.write_text("".join(json.dumps(r) + "\n" for r in records))
    (run,) = launcher.expand(place / "grids" / "equal-time.toml", out)
    assert run.name == "transformer-2-as-long-as-slow"
    assert run.settings == ("optimizer.lr=0.01", "schedule.steps=12")
    grid = place / "grids" / "equal-time.toml"
    assert launcher.expand(grid, out, only=["transformer-2"]) == launcher.expand(grid, out, only=[run.name]) == [run]
    with pytest.raises(ValueError, match="as-long-as-fast"):
        launcher.expand(grid, out, only=["transformer-2-as-long-as-fast"])
    train(read_train_config(run.config, run.settings), run.folder, quiet=True)
    assert results.main([str(out), "--docs", str(place / "docs")]) == 0
    text = capfd.readouterr().out
    assert "| recurrent, 2 x 16 |" in text
    assert "| transformer-2-as-long-as-slow |" in text
    assert "| times |" in text
    picture = place / "docs" / "figures" / "results.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    assert results.main(["--docs", str(place / "docs")]) == 0  # from the extract alone
    assert picture.is_file()
    assert capfd.readouterr().out == text


def test_time_that_is_up_saves_and_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two processes, for which torchrun ends with 1."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    more = ["--set", "schedule.steps=100000", "--set", "evaluation.every=100000", "--set", "log.every=1"]
    arguments = [str(place / "grids" / "main.toml"), "--out", str(place / "other"), "--only", "transformer-2", *more]
    (place / "other").mkdir()
    (place / "other" / "lr").symlink_to(place / "out" / "lr")
    run = place / "other" / "main" / "transformer-2"

    def clock() -> float:  # the time is up once a step is made
        metrics = run / "metrics.jsonl"
        return 1e6 if metrics.is_file() and '"train"' in metrics.read_text() else 0.0

    monkeypatch.setattr(launcher, "time", SimpleNamespace(monotonic=clock, sleep=time.sleep))
    assert launcher.main([*arguments, "--minutes", "1", "--gpus", "2"]) == 1
    shown = capfd.readouterr()
    assert "transformer-2: stopped and saved" in shown.out, shown
    assert "on 2 processes" in shown.err
    assert "0 of 1 runs are finished" in shown.out
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    steps = int(checkpoint.name.removeprefix("step-"))
    end = [f"schedule.steps={steps + 1}", f"evaluation.every={steps + 1}"]
    config = read_train_config(run / "config.json", end)
    assert train(config, run, resume=True, allow_change=["schedule.steps"], quiet=True).step == steps + 1


@pytest.mark.parametrize(
    ("broken", "begun", "left_out"),
    [
        ({"a"}, ["a-seed0", "b-seed0", "b-seed1", "b-seed2"], 2),  # b runs all the same
        ({"a", "b"}, ["a-seed0", "b-seed0"], 2),  # one cause for all: nothing is repeated
        (set(), ["a-seed0", "a-seed1", "a-seed2", "b-seed0", "b-seed1", "b-seed2"], 0),
    ],
    ids=["one configuration", "all", "none"],
)
def test_a_failure_is_not_repeated(
    broken: set[str], begun: list[str], left_out: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Each run is a process that fails at once, or writes a step first."""
    seen: list[str] = []

    def command(run: Any, gpus: int = 1) -> list[str]:
        seen.append(run.name)
        if run.config.stem in broken:
            return [sys.executable, "-S", "-c", "raise SystemExit(2)"]
        text = json.dumps({"event": "train", "step": 1})
        run.folder.mkdir(parents=True)
        (run.folder / "metrics.jsonl").write_text(text + "\n")
        return [sys.executable, "-S", "-c", "raise SystemExit(2)"]  # as after a loss that is not finite

    monkeypatch.setattr(launcher.Run, "command", command)
    runs = [
        launcher.Run(f"{name}-seed{seed}", Path(f"{name}.toml"), (), tmp_path / f"{name}-seed{seed}")
        for name in "ab"
        for seed in range(3)
    ]
    assert launcher.launch(runs, 1, None, 1)
    assert seen == begun
    shown = capsys.readouterr().out
    assert shown.count("are left out") == bool(broken)
    assert f"{left_out} more runs of a.toml are left out" in shown or not broken
    assert ("correct the cause" in shown) == (len(broken) == 2)


def test_a_signal_ends_an_evaluation_by_the_launcher(tmp_path: Path) -> None:
    """And leaves no process behind."""
    mark = tmp_path / "mark"
    script = f"import time, pathlib; pathlib.Path({str(mark)!r}).touch(); time.sleep(60)"

    def interrupt() -> None:
        while not mark.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert launcher.wait_for([sys.executable, "-S", "-c", script]) == -signal.SIGTERM
    thread.join()


@pytest.mark.parametrize("change", ["no evaluation", "an earlier evaluation"])
def test_a_run_without_its_last_evaluation_is_not_finished(change: str, place: Path, tmp_path: Path) -> None:
    (run,) = launcher.expand(place / "grids" / "main.toml", place / "out", only=["slow"])
    shutil.copytree(run.folder, tmp_path / "slow")
    copy = launcher.Run("slow", run.config, (), tmp_path / "slow")
    assert copy.finished
    file = tmp_path / "slow" / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    last = 0 if change == "no evaluation" else 4
    kept = [r for r in records if r["event"] != "evaluation" or r["step"] < last]
    file.write_text("".join(json.dumps(r) + "\n" for r in kept))
    assert copy.finished is None


@pytest.mark.parametrize(
    ("code", "saved", "said"),
    [
        (0, False, "finished"),
        (0, True, "finished"),
        (143, True, "stopped and saved"),
        (1, True, "stopped and saved"),
        (1, False, "failed (1)"),
        (-15, False, "stopped before its first step"),
    ],
)
def test_how_a_run_ended(code: int, saved: bool, said: str) -> None:
    assert launcher._ending(code, saved) == said


def test_a_dry_run_is_that_of_the_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def run(command: list[str]) -> int:
        seen.append(command)
        return 0

    monkeypatch.setattr(launcher, "wait_for", run)
    grid = str(RUNS / "grids" / "table1.toml")
    assert (
        launcher.main([grid, "--out", str(tmp_path), "--only", "300m-6-recurrent-*", "--gpus", "8", "--dry-run"]) == 0
    )
    assert seen
    assert all(command[-3:] == ["--dry-run", "--processes", "8"] for command in seen)


# --- the numbers of the extract --------------------------------------------------------------------------------------


def record(step: int, seconds: float, loss: float = 3.0, norm: float = 1.0) -> dict[str, Any]:
    return {"step": step, "seconds": seconds, "loss": loss, "grad_norm": norm, "tokens": 100 * step}


def test_seconds_leave_compilation_out() -> None:
    records = [record(1, 30.0), record(2, 31.0), record(3, 32.0), record(4, 45.0), record(6, 47.0)]
    seconds, median = results.step_seconds(records)
    assert median == 1.0
    assert seconds == [1.0, 1.0, 1.0, 1.0, 2.0]


def test_seconds_of_runs_that_shared_a_gpu(tmp_path: Path, place: Path) -> None:
    """Steps 3 and 4 were made alone: they time all, and a run without such steps is timed by its own."""
    records = [record(1, 30.0), record(2, 32.0), record(3, 33.0), record(4, 34.2), record(6, 40.2)]
    seconds, median = results.step_seconds(records, [[3, 3], [4, 4]])
    assert median == pytest.approx(1.1)
    assert seconds == pytest.approx([1.1, 1.1, 1.1, 1.1, 2.2])

    shutil.copytree(place / "out" / "main" / "slow", tmp_path / "main" / "slow")
    shutil.copytree(place / "out" / "main" / "slow", tmp_path / "main" / "other")
    (tmp_path / "main" / "alone.json").write_text('{"slow": [[2, 3]]}')
    other, slow = results.extract(tmp_path)["main"]
    assert slow["alone"] == [{"steps": [2, 3], "step_s": slow["step_s"]}]
    assert slow["gpu_s"] == pytest.approx(4 * slow["step_s"])
    assert [point["gpu_s"] for point in slow["validation"]] == pytest.approx(
        [n * slow["step_s"] for n in (0, 2, 4)], abs=1e-3
    )
    assert (slow["start_s"], other["alone"]) == (None, [])
    assert other["start_s"] is not None

    elsewhere = {"step_s": 0.25, "of": "the same model on another machine"}
    (tmp_path / "main" / "alone.json").write_text(json.dumps({"slow": elsewhere}))
    _, slow = results.extract(tmp_path)["main"]
    assert (slow["alone"], slow["step_s"], slow["gpu_s"], slow["start_s"]) == ([elsewhere], 0.25, 1.0, None)


def test_a_run_that_was_stopped_early_has_no_norms() -> None:
    found = results.stability(
        [record(1, 1.0), record(2, 2.0)], 1.0, {"steps": 10, "warmup_fraction": 0.4, "warmup_steps": 0}
    )
    assert (found["norm_median"], found["norm_max"], found["clipped"]) == (None, None, None)
    assert results.training([record(n + 1, n, loss=n) for n in range(50)]) == [{"tokens": 4000, "loss": 19.5}]


def test_the_page_says_what_was_measured() -> None:
    docs = RUNS.parent / "docs"
    page = (docs / "results.md").read_text()
    assert "(figures/results.png)" in page
    found = json.loads((docs / "figures" / "gpu" / "results.json").read_text())
    parts = [part.splitlines() for part in results.tables(found).strip().split("\n\n")]
    runs = [part for part in parts if "params" in part[0]]
    for rows in parts:
        for row in rows[2:] if rows not in runs else []:
            assert row in page, row
    for row in [row for rows in runs for row in rows[2:]]:
        name, _, _, _, speed, seconds, _, _, *scores = (cell.strip() for cell in row.strip("| ").split("|"))
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {name.split()[0]} |") and speed in line]
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        assert all(score in cells for score in scores if score != "-"), row
        assert seconds in cells, row


def test_whole_texts_are_compared_with_the_same_model_and_with_the_transformer_alike() -> None:
    def run(name: str, loss: float) -> dict[str, Any]:
        return {"name": name, "final": {"validation": {"loss": loss}}}

    found = {
        "main": [run("first-1", 3.5), run("transformer-8", 3.0), {"name": "first-2", "final": None}],
        "seeds": [run("first-1-seed1", 3.75), run("transformer-8-seed1", 3.25), run("first-2-seed1", 4.0)],
    }
    assert results.compared(found)[1:-1] == [
        ["first-1", "3.5000", "", "+0.5000"],
        ["transformer-8", "3.0000", "", ""],
        ["first-1-seed1", "3.7500", "+0.2500", "+0.5000"],
        ["transformer-8-seed1", "3.2500", "+0.2500", ""],
        ["first-2-seed1", "4.0000", "", "+0.7500"],
    ]
    assert results.compared({"lr": []}) == []


def test_spikes_and_norms() -> None:
    losses = [3.0] * 150
    losses[120], losses[130], losses[50] = 3.7, 3.4, 9.0  # the last one is before there is a window
    records = [record(n + 1, float(n), loss, norm=0.5 + (n == 149)) for n, loss in enumerate(losses)]
    schedule = {"steps": 150, "warmup_fraction": 0.4, "warmup_steps": None}
    found = results.stability(records, 1.0, schedule)
    assert (found["spikes"], found["largest_rise"]) == (1, pytest.approx(0.7))
    assert (found["norm_median"], found["norm_max"]) == (0.5, 1.5)
    assert found["clipped"] == pytest.approx(1 / 90)


def test_a_folder_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert results.main(["--docs", str(tmp_path)]) == 2
    assert evaluation.main([str(tmp_path), "--data", "x"]) == 2
