"""Several processes that train one model: what they exchange, and how they end together.

`torchrun` starts the processes. They exchange two kinds of data:

- *gradients* (DDP) or gradients and weights (FSDP), over NCCL between GPUs and over gloo between CPUs;
- a few *numbers* a step, always over gloo between CPUs: the targets of the step, the losses, and signals. This
  exchange waits for no GPU, and it notices at once when a process is gone.

An *agreed* end: all processes leave after the same step, and one of them says why. Any other end: one process died or
failed by itself. Each process that notices stops at once, but never in the middle of a checkpoint.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from recurformer.hardware import is_out_of_memory
from recurformer.model import LanguageModel
from recurformer.reading import brief
from recurformer.training.run import TrainingError
from recurformer.training.sharding import buckets, in_one_piece, shard
from recurformer.training.torchrun import torchrun_environment

if TYPE_CHECKING:
    from recurformer.training.config import TrainConfig

T = TypeVar("T")

FOREVER = timedelta(days=365)


class EndedElsewhereError(TrainingError):
    """All processes end here, and another process says why."""


class OneProcess:
    """The processes that share one step: this one alone. `SeveralProcesses` overrides every method.

    Gradients are summed over all processes, and divided by the targets of the whole step. The split into processes and
    micro-batches therefore does not change the update.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        sharded: whether weights, gradients and optimizer state are split over the processes (FSDP).
    """

    rank, size, sharded = 0, 1, False

    def gather(self, *numbers: float) -> list[tuple[float, ...]]:
        """Return the numbers of every process, in the order of ranks."""
        return [numbers]

    def sum(self, number: int) -> int:
        """Return the sum of a number over the processes."""
        return sum(int(one) for (one,) in self.gather(number))

    def first(self, number: int) -> int:
        """Return the number of the first process."""
        return int(self.gather(number)[0][0])

    def together(self, work: Callable[[], T], *, alone: bool = False) -> T:
        """Run `work` in every process and return its result; go on only if it succeeded in all of them.

        Args:
            alone: run it in the first process only. The others wait, and get None.

        Raises:
            EndedElsewhereError: when another process failed. That process raises its own error.
        """
        return work()

    def end(self, error: Exception, speaker: int = 0) -> NoReturn:
        """End in all processes, for a reason that all of them know. The process `speaker` raises the error, the others
        raise EndedElsewhereError."""
        raise error

    def place(self, model: LanguageModel, device: torch.device) -> LanguageModel:
        """Return a model on the device, with equal weights in all processes. It comes from the CPU of each process."""
        return model.to(device)

    def sum_gradients(self, model: LanguageModel) -> None:
        """Replace each gradient by its sum over the processes."""

    def whole(self, model: LanguageModel) -> LanguageModel | None:
        """Return a model that the first process can run alone; None in the others."""
        return model

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Return a context whose work is finished even when another process is gone."""
        yield


@contextmanager
def join_processes(config: TrainConfig, device: torch.device) -> Iterator[OneProcess]:
    """Join the processes that torchrun has started, for as long as the block runs.

    An exception that is not agreed ends this process here, with its message on stderr and code 2. Leaving the block
    in the usual way would wait for the other processes, and they wait for this one.

    Raises:
        ValueError: when the processes cannot share a batch.
        TrainingError: when the processes do not find each other.
    """
    rank, size, _ = torchrun_environment()
    config.share(size)
    if size == 1:
        yield OneProcess()
        return
    several = SeveralProcesses(rank, size, device, config)
    try:
        yield several
    except BaseException as error:
        if not several.agreed:
            several.abort(error)
        several.leave()
        raise
    several.leave()


# --- several processes ----------------------------------------------------------------------------------------------


class SeveralProcesses(OneProcess):
    """This process as one of several.

    A thread of each process listens to the next process. When that connection breaks without a farewell, the next
    process is gone. This process then ends, even if its main thread waits inside a library for numbers that will never
    come. So all processes end, one after another.
    """

    def __init__(self, rank: int, size: int, device: torch.device, config: TrainConfig) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.sharded = config.parallel == "fsdp"
        self.agreed = False
        self._ending = threading.RLock()  # taken to write a checkpoint, and to end the process
        backend, timeout = "gloo", timedelta(seconds=config.timeout)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        self._owner = not dist.is_initialized()
        try:
            if self._owner:
                store = meet(rank, size, timeout)
                dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
            self._numbers: Any = dist.new_group(backend="gloo", timeout=timeout)
            self._watch: Any = dist.new_group(backend="gloo", timeout=FOREVER)
        except RuntimeError as error:
            raise TrainingError(
                f"process {rank} of {size} did not find the others within {config.timeout:g} s ({_line(error)}); check "
                "MASTER_ADDR and MASTER_PORT, or raise timeout"
            ) from error
        self._listener = threading.Thread(target=self._listen, name="other processes", daemon=True)
        self._listener.start()

    # --- numbers ---

    def gather(self, *numbers: float) -> list[tuple[float, ...]]:
        mine = torch.tensor(numbers, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            dist.all_gather(everyone, mine, group=self._numbers)
        except RuntimeError as error:  # gloo: a connection was closed, or the timeout has passed
            raise TrainingError(
                f"process {self.rank} waited in vain for the others ({_line(error)}). Checkpoints written before are "
                "whole; continue with --resume"
            ) from error
        return [tuple(one.tolist()) for one in everyone]

    def together(self, work: Callable[[], T], *, alone: bool = False) -> T:
        result: Any = None
        error: Exception | None = None
        try:
            if self.rank == 0 or not alone:
                result = work()
        except Exception as raised:
            error = raised
        failed = [rank for rank, (wrong,) in enumerate(self.gather(error is not None)) if wrong]
        if failed:
            self.end(error or EndedElsewhereError(), failed[0])
        return result

    def end(self, error: Exception, speaker: int = 0) -> NoReturn:
        self.agreed = True
        if self.rank == speaker:
            raise error
        raise EndedElsewhereError(f"process {speaker} has ended the run and says why")

    # --- model and gradients ---

    def place(self, model: LanguageModel, device: torch.device) -> LanguageModel:
        if self.sharded:
            return shard(model, device)
        model.to(device)
        for tensors in buckets([p.detach() for p in model.parameters()]):
            in_one_piece(tensors, lambda flat: dist.broadcast(flat, 0))
        return model

    def sum_gradients(self, model: LanguageModel) -> None:
        if self.sharded:
            return  # FSDP has summed them as they were made
        for tensors in buckets([p.grad for p in model.parameters() if p.grad is not None]):
            in_one_piece(tensors, dist.all_reduce)

    def whole(self, model: LanguageModel) -> LanguageModel | None:
        if not self.sharded:
            return model if self.rank == 0 else None
        weights = {}
        for name, tensor in model.state_dict().items():
            full = tensor.full_tensor()
            if self.rank == 0:
                weights[name] = full
        if self.rank > 0:
            return None
        with torch.device("meta"):
            found = LanguageModel(model.config)
        found.load_state_dict(weights, assign=True)
        found.scan = model.scan
        return found.eval()

    # --- the end ---

    @contextmanager
    def saving(self) -> Iterator[None]:
        with self._ending:
            yield

    def _listen(self) -> None:
        following = (self.rank + 1) % self.size
        try:
            dist.recv(torch.empty(1), src=following, group=self._watch)
        except RuntimeError:
            self.abort(TrainingError(
                f"process {following} of {self.size} has gone, so process {self.rank} stops too. Checkpoints written "
                "before are whole; continue with --resume"
            ))  # fmt: skip

    def abort(self, error: BaseException) -> NoReturn:
        """End this process as soon as the checkpoint that it is writing is on disk."""
        if isinstance(error, RuntimeError) and not isinstance(error, TrainingError):
            time.sleep(1)  # a connection broke inside PyTorch: the listener may know why, and says it better
        with self._ending:
            if is_out_of_memory(error):
                print(
                    f"recurformer: error: process {self.rank} of {self.size} is out of memory ({brief(error)}); lower "
                    "micro_batch_size, recurrent_micro_batch_size, evaluation.batch_size or data.window, or set "
                    "recompute",
                    file=sys.stderr,
                )
            elif isinstance(error, ValueError | TrainingError):
                print("recurformer: error: " + " ".join(str(error).split()), file=sys.stderr)
            else:
                traceback.print_exception(error)
                print(
                    f"recurformer: error: process {self.rank} of {self.size} failed. Checkpoints written before are "
                    "whole; continue with --resume",
                    file=sys.stderr,
                )
            sys.stderr.flush()
            os._exit(2)

    def leave(self) -> None:
        """Part from the other processes after an agreed end."""
        dist.send(torch.zeros(1), dst=(self.rank - 1) % self.size, group=self._watch)
        self._listener.join()
        if self._owner:
            dist.destroy_process_group()
        else:
            dist.destroy_process_group(self._numbers)
            dist.destroy_process_group(self._watch)


def meet(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Return a store that these processes alone have.

    With --max-restarts, torchrun gives new processes the store of the dead ones, which holds dead addresses. The number
    of restarts cannot name a fresh part of the store, because each machine counts its own. So the first process
    names a part after itself, and every other process waits until the first one has seen it there.

    Raises:
        RuntimeError: when the processes do not meet in time.
    """
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    me, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set("first", me)
        store.set(f"{me}/all", " ".join(store.get(f"{me}/{other}").decode() for other in range(1, size)))
        return dist.PrefixStore(me, store)
    while time.monotonic() < deadline:
        first = store.get("first").decode()  # may be a process that has died
        store.set(f"{first}/{rank}", me)
        with suppress(RuntimeError):
            store.wait([f"{first}/all"], timedelta(seconds=1))
            if me in store.get(f"{first}/all").decode().split():
                return dist.PrefixStore(first, store)
        time.sleep(0.05)
    raise RuntimeError(f"no sign of process 0 in {timeout.total_seconds():g} s")


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
