"""One process of several, as `torchrun` starts it: a list of training runs, with faults planted on demand.

    RANK=0 WORLD_SIZE=2 ... python one_of_several.py JOBS.json

A job is {"config": nested settings, "out": folder, and optionally "resume", "stop_at", "fault", "error"}. `fault` names a
function here; "error" is what the job must end with in one of the processes, a part of its message.
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

from recurformer import LanguageModel
from recurformer.training import EndedElsewhereError, TrainConfig, TrainingError, checkpoint, loop, train

RANK = int(os.environ.get("RANK", "0"))
gradient_step, save_parts, save_tensors, forward = (
    loop.gradient_step, checkpoint.save_parts, checkpoint._save_tensors, LanguageModel.forward
)  # fmt: skip
jump, clock = iter(range(10**9)), time.time


def at_step(step: int, act: Callable[[], None]) -> None:
    """Do something in the middle of a step, counted from 1 within the call: after its gradient, before its update."""
    count = iter(range(1, 10**9))

    def watched(*arguments: Any) -> Any:
        result = gradient_step(*arguments)
        if next(count) == step:
            act()
        return result

    loop.gradient_step = watched


def killed() -> None:
    """Process 1 dies in step 8."""
    if RANK == 1:
        at_step(8, lambda: os.kill(os.getpid(), signal.SIGKILL))


def raising() -> None:
    """Process 1 fails by itself in step 8."""

    def fail() -> None:
        raise KeyError("a mistake in the code")

    if RANK == 1:
        at_step(8, fail)


def terminated() -> None:
    """Process 1 is asked to stop in step 7."""
    if RANK == 1:
        at_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM))


def full_disk() -> None:
    """The checkpoint of step 10 finds no room: what process 0 writes alone, or the part of process 1."""

    def full(original: Callable[..., None], rank: int) -> Callable[..., None]:
        def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
            if "00000010" in str(path) and rank == RANK:
                path.with_suffix(".half").write_bytes(b"half")
                raise OSError(28, "No space left on device")
            original(tensors, path)

        return write

    checkpoint._save_tensors, checkpoint.save_parts = full(save_tensors, 0), full(save_parts, 1)


def nan() -> None:
    """The loss of process 1 is not a number in step 9."""
    count = iter(range(1, 10**9))

    def poisoned(self: LanguageModel, *arguments: Any, **options: Any) -> Any:
        output = forward(self, *arguments, **options)
        if self.training and next(count) == 9 and RANK == 1:
            assert output.loss is not None
            output.loss = output.loss + math.nan
        return output

    LanguageModel.forward = poisoned


def clock_jumps() -> None:
    """Each reading of the clock is an hour before the one before."""
    time.time = lambda: clock() - 3600.0 * next(jump)


def no_fault() -> None:
    """Everything as it was."""
    loop.gradient_step, checkpoint.save_parts, checkpoint._save_tensors = gradient_step, save_parts, save_tensors
    LanguageModel.forward, time.time = forward, clock


def main() -> None:
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    if len(jobs) > 1 and "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")  # once: the runs take what is there
    for job in jobs:
        no_fault()
        globals()[job.get("fault", "no_fault")]()
        inner, seen = loop.gradient_step, Path(f"{job['out']}.windows-{RANK}")

        def noted(*arguments: Any, inner: Any = inner, seen: Path = seen) -> Any:
            with seen.open("a") as file:
                file.write(json.dumps(arguments[2].window_ids.tolist()) + "\n")
            return inner(*arguments)

        loop.gradient_step = noted
        options = {name: job[name] for name in ("resume", "stop_at") if name in job}
        message = None
        try:
            train(TrainConfig.from_dict(job["config"]), job["out"], **options)
        except EndedElsewhereError:
            message = job.get("error")
        except (TrainingError, ValueError) as error:
            message = str(error)
        if message is not None:
            print(f"[{RANK}] {message}", file=sys.stderr)
        assert (job.get("error") or "") in (message or ""), message
        assert (message is None) == ("error" not in job), message


main()
