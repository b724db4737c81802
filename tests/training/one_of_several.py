"""One process of several, as `torchrun` starts it: a list of training runs, with faults planted on demand.

    RANK=0 WORLD_SIZE=2 ... python one_of_several.py JOBS.json

A job is {"config": nested settings, "out": folder} and optionally "resume", "stop_at", "fault" (the name of a function
here) and "error": what the job must end with in one of the processes, a part of its message. With "command", arguments
of `recurformer` that do the same, it is the last one.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from recurformer import LanguageModel, cli
from recurformer.store import checkpoints
from recurformer.training import EndedElsewhereError, TrainConfig, TrainingError, loop, train
from recurformer.training.distributed import SeveralProcesses

leave, sum_gradients = os._exit, SeveralProcesses.sum_gradients
RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
gradient_step, step_batches, forward = loop.gradient_step, loop.step_batches, LanguageModel.forward
write_tensors, write_data, clock = checkpoints.write_tensors, HuggingFaceStorageWriter.write_data, time.time
save = loop.save


def at_step(step: int, act: Callable[[], None]) -> None:
    """In process 1, do something in the middle of a step, counted from 1: after its gradient, before its update."""
    count = iter(range(1, 10**9))

    def watched(*arguments: Any) -> Any:
        result = gradient_step(*arguments)
        if next(count) == step and RANK == 1:
            act()
        return result

    loop.gradient_step = watched


def no_fault(out: str) -> None:
    """Everything as it was."""
    loop.gradient_step, loop.step_batches, LanguageModel.forward = gradient_step, step_batches, forward
    checkpoints.write_tensors, HuggingFaceStorageWriter.write_data, time.time = write_tensors, write_data, clock
    loop.save = save


def no_targets(out: str) -> None:
    """The second half of the third batch has nothing to learn: all that process 1 has, where there are two."""

    def batches(*arguments: Any) -> Any:
        for number, batch in enumerate(step_batches(*arguments)):
            if number == 2 and (SIZE == 1 or RANK == 1):
                batch.targets[len(batch.targets) // 2 if SIZE == 1 else 0 :] = -100
            yield batch

    loop.step_batches = batches


def killed(out: str) -> None:
    """Process 1 dies in step 8, when the other waits for its gradients. Both note when they come to their end."""
    count = iter(range(1, 10**9))

    def die(code: int = signal.SIGKILL) -> None:
        Path(f"{out}.time-{RANK}").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL) if RANK == 1 else leave(code)

    os._exit = die  # pyright: ignore[reportAttributeAccessIssue]

    def summed(self: SeveralProcesses, model: LanguageModel) -> None:
        if next(count) == 8 and RANK == 1:
            die()
        sum_gradients(self, model)

    SeveralProcesses.sum_gradients = summed


def killed_while_saving(out: str) -> None:
    """Process 1 dies when process 0 has begun to write the checkpoint of step 10; once, if torchrun restarts it."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        return
    begun = Path(f"{out}.saving")

    def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "00000010" in str(path):
            begun.touch()
            time.sleep(0.3)
        write_tensors(tensors, path)

    def die(folder: Path, state: Any, *arguments: Any) -> Any:
        while state.step == 10 and RANK == 1:
            time.sleep(0.01)
            if begun.exists():
                os.kill(os.getpid(), signal.SIGKILL)
        return save(folder, state, *arguments)

    checkpoints.write_tensors, loop.save = write, die


def apart(out: str) -> None:
    """Each process is in a folder of its own; in that of process 1, too, there was a run."""
    Path(folder := f"{out}-{RANK}").mkdir()
    os.chdir(folder)
    Path("run").mkdir()
    Path("run", ".lock").touch()


def waiting(out: str) -> None:
    """Begin when the process that is by itself is done."""
    while not Path(f"{out}.done").exists():
        time.sleep(0.05)


def failing(out: str) -> None:
    """Process 1 fails by itself in step 8."""

    def fail() -> None:
        raise KeyError("a mistake in the code")

    at_step(8, fail)


def terminated(out: str) -> None:
    """Process 1 is asked to stop in step 7, twice, as by SLURM and by torchrun."""

    def ask() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    at_step(7, ask)


def full_disk(out: str) -> None:
    """The checkpoint of step 10 finds no room: what process 0 writes alone, or the part of process 1."""

    def refuse(path: Path, rank: int) -> None:
        if "00000010" in str(path) and rank == RANK:
            (path / "half").write_bytes(b"half")
            raise OSError(28, "No space left on device")

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        refuse(path.parent, 0)
        write_tensors(tensors, path)

    def write(self: Any, *arguments: Any) -> Any:
        refuse(Path(self.path), 1)
        return write_data(self, *arguments)

    checkpoints.write_tensors = save
    HuggingFaceStorageWriter.write_data = write  # pyright: ignore[reportAttributeAccessIssue]


def nan(out: str) -> None:
    """A loss of process 1 is not a number in step 9 (of steps with one micro-batch)."""
    count = iter(range(1, 10**9))

    def poisoned(self: LanguageModel, *arguments: Any, **options: Any) -> Any:
        output = forward(self, *arguments, **options)
        if self.training and next(count) == 9 and RANK == 1:
            assert output.loss is not None
            output.loss = output.loss + math.nan
        return output

    LanguageModel.forward = poisoned


def damaged(out: str) -> None:
    """The newest checkpoint is cut short, and of one written in parts a bit has changed."""
    if RANK == 0:
        newest = sorted(Path(out, "checkpoints").glob("step-*"))[-1]
        parts = sorted(newest.glob("model/shard-*.safetensors"))
        file = parts[-1] if parts else newest / "training" / "optimizer.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data if parts else data[:-1]))
    torch.distributed.barrier()


def clock_jumps(out: str) -> None:
    """Each reading of the clock is an hour before the one before."""
    hours = iter(range(10**9))
    time.time = lambda: clock() - 3600.0 * next(hours)


def run(job: dict[str, Any]) -> None:
    """One job."""
    no_fault(job["out"])
    globals()[job.get("fault", "no_fault")](job["out"])
    inner, seen = loop.gradient_step, Path(f"{job['out']}.windows-{RANK if SIZE > 1 else 'one'}")

    def noted(*arguments: Any) -> Any:
        with seen.open("a") as file:
            file.write(json.dumps(arguments[2].window_ids.tolist()) + "\n")
        return inner(*arguments)

    loop.gradient_step = noted
    if "command" in job:
        cli.main(job["command"])
    options = {name: job[name] for name in ("resume", "stop_at") if name in job}
    message = None
    try:
        train(TrainConfig.from_dict(job["config"]), "run" if job.get("fault") == "apart" else job["out"], **options)
    except EndedElsewhereError:
        message = job.get("error")
    except (TrainingError, ValueError) as error:
        message = str(error)
    assert (message is None) == ("error" not in job), message
    assert job.get("error", "") in (message or ""), message
    if SIZE == 1:
        Path(f"{job['out']}.done").touch()


def main() -> None:
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    several = len(jobs) > 1 and SIZE > 1
    if several:
        torch.distributed.init_process_group("gloo")  # once: the runs take what is there
    for job in jobs:
        began = time.perf_counter()
        run(job)
        if RANK == 0:
            print(f"{Path(job['out']).name} {job.get('fault', '')}: {time.perf_counter() - began:.1f} s", flush=True)
    if several:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
