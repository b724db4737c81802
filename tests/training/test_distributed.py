"""Two processes train as one does, on CPUs over gloo; and what happens when one of them, or their disk, fails.

Most runs are made by one pair of processes (`pair`), for starting it takes longer than a run. All processes are started
at once (`begun`), for most of the time one waits for another.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative_rms

from recurformer import LanguageModel, ModelConfig, load
from recurformer.data import prepare
from recurformer.store.checkpoints import TrainingState, list_checkpoints, newest_checkpoint
from recurformer.store.runs import read_metrics
from recurformer.training import TrainConfig, TrainingError, loop, sharding, train, validation
from recurformer.training import distributed as parallel
from recurformer.training.config import EvaluationConfig, OptimizerConfig
from recurformer.training.optimizer import make_optimizer

pytestmark = pytest.mark.xdist_group("processes")  # one worker, or the pair would start in each

SCRIPT = Path(__file__).with_name("one_of_several.py")
WINDOW = 12
CLOSE = 1e-9  # float64: the order of sums


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 1 to 29 bytes, so that windows have unequal numbers of targets."""
    folder = tmp_path_factory.mktemp("processes")
    text = "The quick brown fox jumps over the lazy dog; a jackdaw loves my big sphinx of quartz. " * 8
    for name, count in {"train": 40, "validation": 9}.items():
        documents = [text[n * 17 : n * 17 + 1 + (n * 7) % 29] for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
        prepare([folder / f"{name}.jsonl"], folder / name, progress=False)
    return folder


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Nested settings of a small run in float64, saved every five steps."""
    tables: dict[str, Any] = {
        "model": {"d_model": 16, "n_heads": 2, "n_layers": 2, "layers": "standard"},
        "data": {"train": str(folder / "train"), "validation": "none", "window": WINDOW, "packing": "documents"},
        "schedule": {"steps": 12},
        "evaluation": {"every": 3, "batch_size": 2, "batches": 3},
        "checkpoint": {"every": 5, "keep_last": 9},
        "sample": {"tokens": 0},
        "log": {"every": 1},
        "batch_size": 4,
        "device": "cpu",
        "precision": "fp64",
        "timeout": 60.0,
    }
    for name, value in changes.items():
        tables[name] = {**tables.get(name, {}), **value} if isinstance(value, dict) else value
    return tables


# What one process must do like two. Of the first shape, some matrices do not split evenly.
EVALUATED = {"schedule": {"steps": 5}, "checkpoint": {"every": 5}}
SHAPES: dict[str, dict[str, Any]] = {
    "recurrent": {"model": {"layers": "recurrent", "d_model": 18, "d_mlp": 21, "head_dim": 9}, "micro_batch_size": 1},
    "hybrid": {
        "micro_batch_size": 1,
        "recurrent_micro_batch_size": 2,
        "model": {"layers": "first:1", "tie_embeddings": True},
    },
    "frozen": {
        "trained": "recurrent",
        "model": {"layers": "first:1"},
        "optimizer": {"grad_clip": 0.1},
        "evaluation": {"batch_size": "none", "batches": 1},
    },
}


def start(size: int, file: Path) -> list[subprocess.Popen[str]]:
    """The processes of a job file, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if size > 1:
        environment |= {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(file)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]], timeout: float) -> tuple[list[int], list[str]]:
    """Exit codes and what was said, of processes that must end by themselves."""
    said = []
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def write_jobs(file: Path, jobs: list[dict[str, Any]]) -> Path:
    file.write_text(json.dumps(jobs))
    return file


@pytest.fixture(scope="module")
def begun(folder: Path) -> Iterator[dict[str, list[subprocess.Popen[str]]]]:
    """Two processes that do everything below, one job after the other, and one that does its part; and what needs
    processes of its own."""
    one: list[dict[str, Any]] = []
    two: list[dict[str, Any]] = []

    def add(to: list[dict[str, Any]], name: str, config: dict[str, Any], **more: Any) -> None:
        to.append({"config": config, "out": str(folder / name), **more})

    for name, shape in SHAPES.items():
        validation = {"validation": str(folder / "validation")}
        merged = {**EVALUATED, **shape, "data": validation, "sample": {"tokens": 2 if name == "recurrent" else 0}}
        add(one, f"{name}-one", settings(folder, **merged), fault="no_targets")
        for way in ("ddp", "fsdp"):
            add(two, f"{name}-{way}", settings(folder, **merged, parallel=way), fault="no_targets")
    add(one, "whole", settings(folder))
    add(one, "one-two", settings(folder), stop_at=6)
    add(two, "one-two", settings(folder, parallel="fsdp"), resume=True, fault="waiting")
    for way, other in (("ddp", "fsdp"), ("fsdp", "ddp")):
        config = settings(folder, parallel=way)
        add(two, f"two-one-{way}", config, stop_at=6)
        add(two, f"{way}-{other}", config, stop_at=6)
        add(two, f"{way}-{other}", settings(folder, parallel=other), resume=True)
        full = "step 10 could not be written"
        add(two, f"full-{way}", config, fault="full_disk", error=full)
        add(two, f"full-{way}", config, resume=True)
        add(two, f"damaged-{way}", config, stop_at=6)
        add(two, f"damaged-{way}", config, resume=True, fault="damaged")
    add(two, "terminated", settings(folder), fault="terminated")
    add(two, "terminated", settings(folder), resume=True)
    add(two, "nan", settings(folder), fault="nan", error="step 9: loss nan")
    add(two, "nan", settings(folder), resume=True)
    add(two, "clock", settings(folder, micro_batch_size=4), fault="clock_jumps")
    add(two, "clock", settings(folder), error="is not empty; --resume continues a run")
    add(two, "apart", settings(folder), fault="apart", error="put it on a file system that all machines see")
    add(two, "killed", settings(folder), fault="killed")  # the last one
    failing = {"config": settings(folder, parallel="fsdp"), "out": str(folder / "failing"), "fault": "failing"}
    (file := folder / "restarted.json").write_text(json.dumps(settings(folder)))
    restarted: dict[str, Any] = {"out": str(folder / "restarted"), "fault": "killed_while_saving"}
    restarted["command"] = ["train", "--config", str(file), "--out", restarted["out"], "--resume"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    started = {
        "pair": start(1, write_jobs(folder / "one.json", one)) + start(2, write_jobs(folder / "two.json", two)),
        "failing": start(2, write_jobs(folder / "failing.json", [failing])),
        "torchrun": [
            subprocess.Popen(
                [*torchrun, str(SCRIPT), str(write_jobs(folder / "torchrun.json", [restarted]))],
                env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        ],
    }  # fmt: skip
    yield started
    for process in itertools.chain(*started.values()):
        process.terminate()  # torchrun passes it on
        process.wait(60)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="module")
def pair(begun: dict[str, list[subprocess.Popen[str]]]) -> str:
    """What the first of two processes said in all of their jobs."""
    codes, said = finish(begun["pair"], 200)
    assert codes == [0, 2, -signal.SIGKILL], "\n\n".join(said)
    return said[1]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load(sorted((run / "checkpoints").glob("step-*"))[-1] / "model").state_dict()


def distance(a: Path, b: Path) -> float:
    """The largest difference between the last weights of two runs, or between their losses, norms and counts."""
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    worst = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    pairs = list(zip(numbers(a), numbers(b), strict=True))
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        worst = max(worst, *(abs(ours[name] - theirs[name]) for name in ours))
    assert len(pairs) >= 5
    assert worst == worst
    return worst


def numbers(run: Path) -> list[dict[str, float]]:
    kept = ("step", "loss", "grad_norm", "lr", "tokens", "validation_loss", "bits_per_byte")
    events = ("train", "evaluation")
    return [{k: v for k, v in r.items() if k in kept} for r in read_metrics(run) if r["event"] in events]


def windows(run: Path, rank: int | str) -> list[list[int]]:
    file = run.with_name(f"{run.name}.windows-{rank}")
    return [json.loads(line) for line in file.read_text().splitlines()]


def both(run: Path) -> list[list[int]]:
    """The windows of each step that two processes made, side by side."""
    return [first + second for first, second in zip(windows(run, 0), windows(run, 1), strict=True)]


# --- two train as one -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pair")
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_processes_train_as_one(folder, shape, way):
    assert distance(folder / f"{shape}-{way}", folder / f"{shape}-one") < CLOSE
    assert both(folder / f"{shape}-{way}") == windows(folder / f"{shape}-one", "one")
    counts = [r["tokens"] for r in read_metrics(folder / f"{shape}-{way}") if r["event"] == "train"]
    assert len({b - a for a, b in zip([0, *counts], counts, strict=False)}) > 2  # unequal steps, one half empty
    held_out = [r["step"] for r in read_metrics(folder / f"{shape}-{way}") if r["event"] == "evaluation"]
    assert held_out == [0, 3, 5]


@pytest.mark.usefixtures("pair")
def test_samples_are_drawn_once_and_alike(folder):
    samples = [
        [r for r in read_metrics(folder / f"recurrent-{who}") if r["event"] == "sample"]
        for who in ("one", "ddp", "fsdp")
    ]
    assert len(samples[0]) == 3
    assert samples[0] == samples[1] == samples[2]


@pytest.mark.usefixtures("pair")
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_one_process_writes(folder, way):
    records = read_metrics(folder / f"recurrent-{way}")
    (beginning,) = [r for r in records if r["event"] == "start"]
    assert (beginning["processes"], beginning["parallel"]) == (2, way)
    files = [p for p in (folder / f"recurrent-{way}" / "checkpoints").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".json", ".safetensors"}  # no pickles
    parts = {p.name for p in files if p.name.startswith("shard-")}
    assert len(parts) == (2 if way == "fsdp" else 0)


# --- resuming on another number of processes ------------------------------------------------------------------------


@pytest.mark.usefixtures("pair")
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_one_process_goes_on_where_two_stopped(folder, way, monkeypatch):
    run, seen, original = folder / f"two-one-{way}", [], loop.gradient_step

    def noted(*arguments: Any) -> Any:
        seen.append(arguments[2].window_ids.tolist())
        return original(*arguments)

    monkeypatch.setattr(loop, "gradient_step", noted)
    result = train(TrainConfig.from_dict(settings(folder)), run, resume=True, quiet=True)
    assert result.finished
    assert both(run) + seen == windows(folder / "whole", "one")
    assert distance(run, folder / "whole") < CLOSE


@pytest.mark.usefixtures("pair")
def test_two_processes_go_on_where_one_stopped(folder):
    run = folder / "one-two"
    begun = windows(run, "one")
    assert len(begun) == 6
    assert begun + both(run) == windows(folder / "whole", "one")
    assert distance(run, folder / "whole") < CLOSE


@pytest.mark.usefixtures("pair")
@pytest.mark.parametrize("name", ["ddp-fsdp", "fsdp-ddp"])
def test_the_way_to_share_may_change(folder, name):
    assert both(folder / name) == windows(folder / "whole", "one")
    assert distance(folder / name, folder / "whole") < CLOSE


# --- failures -------------------------------------------------------------------------------------------------------


def steps_of(run: Path) -> list[int]:
    complete, damaged = list_checkpoints(run / "checkpoints")
    assert not damaged
    assert [p for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []
    return [c.step for c in complete]


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("what", ["full", "damaged"])
def test_checkpoints_that_fail_cost_only_their_steps(folder, pair, what, way):
    run = folder / f"{what}-{way}"
    assert distance(run, folder / "whole") < CLOSE
    # What is too short goes when a later one is whole; a changed bit shows only to who reads every byte.
    assert steps_of(run) == ([5, 6, 10, 12] if (what, way) == ("damaged", "fsdp") else [5, 10, 12])
    if what == "damaged":
        assert "step-00000006 is truncated or damaged; going back to the one before it" in pair
        assert both(run)[5] == both(run)[6]  # step 6 was made twice


@pytest.mark.usefixtures("pair")
def test_a_signal_to_one_process_stops_all_after_the_same_step(folder, pair):
    run = folder / "terminated"
    assert "stopped at step 7 (SIGTERM); continue with --resume" in pair
    assert steps_of(run) == [5, 7, 10, 12]
    assert both(run) == windows(folder / "whole", "one")
    assert distance(run, folder / "whole") < CLOSE


@pytest.mark.usefixtures("pair")
def test_a_loss_that_is_not_finite_in_one_process_stops_all(folder):
    run = folder / "nan"
    assert distance(run, folder / "whole") < CLOSE
    assert both(run)[9] == both(run)[5]  # resumed from step 5
    assert len(both(run)) == 9 + 7


@pytest.mark.usefixtures("pair")
def test_folders_that_are_not_shared_are_refused_before_anything_is_written(folder):
    for rank in range(2):
        assert [p.name for p in (folder / f"apart-{rank}" / "run").iterdir()] == [".lock"]


def test_an_end_in_a_save_is_no_error_of_the_disk(tmp_path):
    """Such as a connection that breaks, or a save that takes longer than the others wait."""

    class Away(parallel.OneProcess):
        def together(self, work: Callable[[], Any], *, alone: bool = False) -> Any:
            return None

    class Lost(parallel.OneProcess):
        def together(self, work: Callable[[], Any], *, alone: bool = False) -> Any:
            work()
            raise TrainingError("process 0 waited in vain")

    model = LanguageModel(ModelConfig(vocab_size=8, d_model=8, n_heads=1, n_layers=1))
    optimizer = make_optimizer(model, OptimizerConfig())
    with pytest.raises(TrainingError, match=r"^process 0 waited in vain$"):
        loop.save(tmp_path, TrainingState(step=3, dataset=""), model, optimizer, None, None, Lost())
    with pytest.raises(TrainingError, match=r"MiB free.*There is none yet"):  # a folder that is no more
        loop.save(tmp_path / "gone" / "gone", TrainingState(step=3, dataset=""), model, optimizer, None, None, Away())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "is out of memory (CUDA out of"),
        (MemoryError("no room"), "is out of memory (no room); lower micro_batch_size"),
        (ValueError("two\nlines"), "error: two lines"),
        (TypeError("a mistake"), "process 1 of 2 failed"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_how_a_process_that_fails_by_itself_ends(error, said, monkeypatch, capsys):
    class Second(parallel.SeveralProcesses):
        def __init__(self) -> None:
            self.rank, self.size, self._ending = 1, 2, threading.RLock()

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(parallel.os, "_exit", leave)
    monkeypatch.setattr(parallel.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit, match="2"):
        Second().abort(error)
    shown = capsys.readouterr().err
    assert said in shown
    assert ("Traceback" in shown or "TypeError" in shown) == isinstance(error, TypeError)


@pytest.mark.usefixtures("pair")
def test_micro_batches_that_are_larger_than_a_share_are_said(folder, pair):
    assert "micro_batch_size is 4, but each of 2 processes has only 2 of a step's 4 sequences, and takes 2" in pair
    sizes = {}
    for run in ("clock", "hybrid-ddp", "whole"):
        (beginning,) = [r for r in read_metrics(folder / run) if r["event"] == "start"]
        sizes[run] = beginning["micro_batch_size"], beginning["recurrent_micro_batch_size"]
    assert sizes == {"clock": (2, None), "hybrid-ddp": (1, 2), "whole": (4, None)}


@pytest.mark.parametrize(
    ("evaluated", "micro", "batch", "expected"),
    [
        (None, None, 32, (4, 24)),
        (None, 16, 32, (4, 12)),
        (None, 12, 40, (4, 9)),
        (None, 2, 32, (2, 3)),
        (6, 2, 32, (6, 3)),
    ],
)
def test_an_evaluation_takes_no_more_at_once_than_a_step(monkeypatch, evaluated, micro, batch, expected):
    """And as many sequences as on one process, of which each has an eighth of a step's."""
    world = parallel.OneProcess()
    world.size = 8
    seen: dict[str, Any] = {}
    monkeypatch.setattr(validation, "evaluate", lambda model, data, **options: seen.update(options))
    config = TrainConfig(
        model=ModelConfig(vocab_size=8), evaluation=EvaluationConfig(batch_size=evaluated, batches=3),
        micro_batch_size=micro, batch_size=batch,
    )  # fmt: skip
    nothing: Any = None
    validation.evaluate_model(nothing, nothing, config, torch.device("cpu"), world)
    assert (seen["batch_size"], seen["max_batches"]) == expected
    assert seen["batch_size"] * seen["max_batches"] == 3 * (evaluated or micro or batch)


@pytest.mark.usefixtures("pair")
def test_a_clock_that_goes_backwards_changes_nothing(folder):
    assert distance(folder / "clock", folder / "whole") < CLOSE
    for run in ("clock", "whole"):
        seconds = [r["seconds"] for r in read_metrics(folder / run) if r["event"] == "train"]
        assert seconds == sorted(seconds)
        assert 0 < seconds[0] < seconds[-1] < 100


def goes_on(run: Path, folder: Path) -> None:
    """A run that ended in step 8 has one whole checkpoint, from which it becomes what it would have been."""
    assert steps_of(run) == [5]
    assert newest_checkpoint(run / "checkpoints") is not None  # every byte is as written
    assert train(TrainConfig.from_dict(settings(folder)), run, resume=True, quiet=True).finished
    assert distance(run, folder / "whole") < CLOSE


def test_when_one_process_is_killed_the_other_says_so_and_stops(folder, pair):
    assert re.search(r"process (1 of 2 has gone|0 waited in vain).* whole; continue with --resume\n$", pair)
    killed, ended = (float((folder / name).read_text()) for name in ("killed.time-1", "killed.time-0"))
    assert 0 < ended - killed < 10
    goes_on(folder / "killed", folder)


@pytest.mark.usefixtures("pair")
def test_when_one_process_fails_by_itself_the_other_stops(folder, begun):
    codes, said = finish(begun["failing"], 60)
    assert codes == [2, 2], said
    assert "KeyError: 'a mistake in the code'" in said[1]
    assert "process 1 of 2 failed" in said[1]
    assert re.search(r"process (1 of 2 has gone|0 waited in vain).* whole; continue with --resume\n$", said[0])
    goes_on(folder / "failing", folder)


# --- the command, refusals ------------------------------------------------------------------------------------------


def test_torchrun_starts_the_command_again_when_a_process_dies_in_a_save(folder, pair, begun):
    """The checkpoint that was being written is finished, and no error of the disk is made up."""
    codes, (said,) = finish(begun["torchrun"], 120)
    assert codes == [0], said
    assert re.search(r"process (1 of 2 has gone|0 waited in vain).* whole; continue with --resume\n", said)
    assert "could not be written" not in said
    assert "from checkpoint step-00000010" in said
    assert said.count("step 12/12") == 1  # said by one process
    run = folder / "restarted"
    assert steps_of(run) == [5, 10, 12]
    assert both(run) == windows(folder / "whole", "one")
    assert distance(run, folder / "whole") < CLOSE
    assert (run / "plots" / "curves.png").is_file()


@pytest.mark.parametrize(
    ("variables", "changes", "message"),
    [
        ({"WORLD_SIZE": "2"}, {}, r"WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({}, {"batch_size": 3}, "batch_size 3 is not divisible by 2 processes"),
        ({}, {"device": "cuda:1"}, r"device is 'cuda:1', but there are 2 processes"),
        ({}, {"device": "cuda"}, "more processes on this machine than its 0 GPUs"),
    ],
)
def test_what_does_not_fit_is_refused_by_each_process(folder, tmp_path, monkeypatch, variables, changes, message):
    if torch.cuda.is_available() and changes.get("device") == "cuda":
        pytest.skip("there is a GPU")
    complete = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name in complete:
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables or complete).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        train(TrainConfig.from_dict(settings(folder, **changes)), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_gradients_are_summed_in_pieces_of_one_dtype(monkeypatch):
    monkeypatch.setattr(sharding, "BUCKET_BYTES", 100)
    tensors = [torch.full((n, 2), float(n)) for n in (5, 7, 1, 40)] + [torch.ones(3, dtype=torch.float64)]
    groups = list(sharding.buckets(tensors))
    assert [len(group) for group in groups] == [2, 1, 1, 1]
    assert [t for group in groups for t in group] == tensors
    before = [t.clone() for t in tensors]
    for group in groups:
        sharding.in_one_piece(group, lambda flat: flat.mul_(2))
    assert all(torch.equal(t, 2 * b) for t, b in zip(tensors, before, strict=True))


# --- GPUs -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("layers", ["recurrent", "first:1"])
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_gpus_train_as_one(folder, tmp_path, way, layers):
    """Losses and norms of four steps to 1e-3, weights to a relative RMS of 1e-3: the scans' float32 sums differ."""
    model = {"d_model": 64, "n_heads": 4, "n_layers": 2, "layers": layers}
    for size, name in ((1, "one"), (2, "two")):
        config = settings(
            folder, model=model, precision="fp32", device="cuda", parallel=way, batch_size=8, micro_batch_size=2,
            schedule={"steps": 4}, data={"validation": str(folder / "validation")},
        )  # fmt: skip
        jobs = [{"config": config, "out": str(tmp_path / name)}]
        codes, said = finish(start(size, write_jobs(tmp_path / f"{name}.json", jobs)), 250)
        assert codes == [0] * size, said
    for ours, theirs in zip(numbers(tmp_path / "one"), numbers(tmp_path / "two"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert a.keys() == b.keys()
    for name in a:
        assert relative_rms(a[name], b[name]) < 1e-3, name


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_a_killed_process_ends_one_that_waits_for_its_gpu(folder, tmp_path):
    config = settings(folder, precision="fp32", device="cuda", timeout=300.0)
    job = {"config": config, "out": str(tmp_path / "run"), "fault": "killed"}
    codes, said = finish(start(2, write_jobs(tmp_path / "job.json", [job])), 250)
    assert codes == [2, -signal.SIGKILL], said
    assert re.search(r"process (1 of 2 has gone|0 waited in vain).* whole; continue with --resume", said[0])
    killed, ended = (float((tmp_path / f"run.time-{rank}").read_text()) for rank in (1, 0))
    assert 0 < ended - killed < 10
    assert steps_of(tmp_path / "run") == [5]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_one_gpu_goes_on_where_two_stopped(folder, tmp_path, way):
    """The same windows in the same order; losses to 1e-3."""
    model = {"d_model": 64, "n_heads": 4, "n_layers": 2, "layers": "first:1"}
    config = settings(folder, model=model, precision="fp32", device="cuda", parallel=way, batch_size=8)
    stopped, whole = tmp_path / "run", tmp_path / "whole"
    for size, jobs in (
        (2, [{"config": config, "out": str(stopped), "stop_at": 6}]),
        (1, [{"config": config, "out": str(stopped), "resume": True}, {"config": config, "out": str(whole)}]),
    ):
        codes, said = finish(start(size, write_jobs(tmp_path / "jobs.json", jobs)), 250)
        assert codes == [0] * size, said
    assert both(stopped) + windows(stopped, "one") == windows(whole, "one")
    for ours, theirs in zip(numbers(stopped), numbers(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
