"""The training loop: `train` opens a run, then evaluates, saves and steps until the run ends.

`Run` holds what a run is made of and where it is. Each of its methods is one stage of the loop.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from recurformer.evaluation import InterruptedEvaluationError
from recurformer.model import LanguageModel
from recurformer.store.checkpoints import Checkpoint, TrainingState, remove_outdated
from recurformer.training.config import TrainConfig
from recurformer.training.distributed import OneProcess, join_processes
from recurformer.training.logging import Metrics, NoMetrics, Screen, device_facts, say_on_stderr
from recurformer.training.memory import scan_of
from recurformer.training.optimizer import set_rates
from recurformer.training.run import FolderLock, TrainingError, check_resumable, check_shared, lock, write_run_config
from recurformer.training.saving import all_finite, save
from recurformer.training.signals import ECHO_SECONDS, StopRequest, stop_signals
from recurformer.training.start import RunData, find_checkpoint, open_data, start_training
from recurformer.training.steps import gradient_step
from recurformer.training.torchrun import training_device
from recurformer.training.validation import evaluate_model, sample_text

if TYPE_CHECKING:
    from recurformer.data import Batch, TrainingWindows


class NonFiniteError(TrainingError):
    """Loss, gradient norm or weights were NaN or infinite. No checkpoint holds them."""


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended."""

    step: int  # updates made since the start of the run
    finished: bool  # the last step of the schedule is made, and evaluated where there are data to evaluate on
    loss: float | None  # training loss of the last step made by this call, nats per target
    validation_loss: float | None  # of the last evaluation, nats per token
    checkpoint: Path | None  # the newest one
    signal: int | None  # the signal that ended the call early


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    allow_change: Sequence[str] = (),
    stop_at: int | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Train a model, or continue training it. Under `torchrun` every process makes the same call, and all of them
    share each step.

    Args:
        config: everything that decides the result.
        out: the run's folder: config.json, metrics.jsonl, checkpoints/.
        resume: continue from the newest intact checkpoint (from the start when there is none yet). On a CPU with the
            same number of threads the result is bit for bit that of the undisturbed run.
        allow_change: names of settings in which `config` may differ from the run's; see `run.check_resumable`. The new
            value holds from the next step on.
        stop_at: save and return at this step, as after a signal.
        quiet: write nothing on stderr.

    Returns:
        TrainResult, the same in every process. SIGINT, SIGTERM, SIGHUP and SIGUSR1 end the call early: within one step
        or one batch of an evaluation, and after a checkpoint. A second SIGINT or SIGTERM aborts at once.

    Raises:
        ValueError: before any work, for a setting, data or a folder that does not fit.
        NonFiniteError: loss, gradient norm or weights are not finite; raised before the update or the checkpoint.
        TrainingError: a checkpoint could not be written, or the run's folder is gone.
        EndedElsewhereError: another process has raised one of these.
    """
    with ExitStack() as stack:
        run = open_run(stack, config, Path(out), resume=resume, allow_change=allow_change, stop_at=stop_at, quiet=quiet)
        if run.nothing_is_left():
            run.say_that_it_is_finished()
            return run.result()
        run.begin(stack)
        while True:
            if run.should_evaluate():
                run.evaluate()
            if run.should_save():
                run.save()
            if run.ends_here():
                break
            run.step()
            if run.should_record():
                run.log()
        run.say_why_it_stops()
        return run.result()


@dataclass(kw_only=True)
class Run:
    """A run under way: what it is made of, and where it is."""

    config: TrainConfig
    out: Path
    device: torch.device
    processes: OneProcess
    data: RunData
    model: LanguageModel
    optimizer: torch.optim.AdamW
    state: TrainingState  # step, place in the data, counts: what a checkpoint keeps
    lock: FolderLock | None  # None in processes that write nothing
    changes: list[str]  # settings that differ from those of the run that is resumed
    stop_at: int | None
    quiet: bool

    checkpoint: Checkpoint | None = None  # the newest one that this call wrote or resumed from
    trusted: list[Path] = field(default_factory=list)  # checkpoints that this call wrote or resumed from
    loss: float | None = None  # of the last step
    grad_norm: float = math.nan  # of the last step, before clipping
    rate: float = math.nan  # learning rate of the last step
    signal: int | None = None  # the signal that ends the run, known to all processes

    # Filled in by `begin`.
    metrics: Metrics | NoMetrics = field(default_factory=NoMetrics)
    screen: Screen = field(init=False)
    stop: StopRequest = field(default_factory=StopRequest)
    batches: Iterator[Batch] = field(init=False)
    last_record: TrainingState = field(init=False)  # the state when the training loss was last recorded

    # --- the beginning ----------------------------------------------------------------------------------------------

    def begin(self, stack: ExitStack) -> None:
        """Open records, progress line, signals and batches; write what the run starts or goes on with."""
        if self.processes.rank == 0:
            self.metrics = Metrics(self.out, self.config, self.state if self.checkpoint else None)
            stack.callback(self.metrics.close)
        sizes = self.micro_batch_sizes()
        size = self.processes.size
        parallel = self.config.parallel if size > 1 else None
        facts = {**device_facts(self.device), "processes": size, "parallel": parallel, **sizes}
        event = "resume" if self.checkpoint else "start"
        self.metrics.write(event, self.state.step, changes=self.changes, **facts)
        parameters, tokens = self.model.num_parameters(embedding=True), self.data.training.n_tokens
        where = f"{self.device}" if size == 1 else f"{size} processes ({parallel}, {self.device.type})"
        self.say(f"{parameters:,} parameters, {tokens:,} training tokens, {self.last_step} steps on {where}")
        self.stop = stack.enter_context(stop_signals(self.quiet, ECHO_SECONDS if size > 1 else 0.0))
        self.screen = stack.enter_context(Screen(self.last_step, self.state.step, self.quiet))
        self.batches = step_batches(self.data.windows, self.config, self.state.position, self.processes)
        self.last_record = copy(self.state)

    def micro_batch_sizes(self) -> dict[str, int | None]:
        """Return the sequences that this process takes at once. Say so where its share of a step is smaller."""
        mine, size = self.config.share(self.processes.size), self.processes.size
        sizes = {name: getattr(mine, name) for name in ("micro_batch_size", "recurrent_micro_batch_size")}
        for name, taken in sizes.items():
            if taken != getattr(self.config, name):
                self.say(
                    f"{name} is {getattr(self.config, name)}, but each of {size} processes has only {mine.batch_size} "
                    f"of a step's {self.config.batch_size} sequences, and takes {taken} at once"
                )
        return {**sizes, "micro_batch_size": mine.micro_batch_size or mine.batch_size}

    # --- where the run is -------------------------------------------------------------------------------------------

    @property
    def last_step(self) -> int:
        """The last step of the schedule."""
        return self.config.schedule.steps

    def at_the_end(self) -> bool:
        """Return whether the last step is made."""
        return self.state.step >= self.last_step

    def nothing_is_left(self) -> bool:
        """Return whether the last step is made and evaluated: a signal may have come between the two."""
        return self.at_the_end() and (self.data.validation is None or self.state.evaluated == self.state.step)

    def asked_to_stop(self) -> bool:
        """Return whether a signal or `stop_at` ends the run at this step."""
        return self.signal is not None or (self.stop_at is not None and self.state.step >= self.stop_at)

    def ends_here(self) -> bool:
        """Return whether no further step is made."""
        return self.at_the_end() or self.asked_to_stop()

    # --- evaluate and sample ----------------------------------------------------------------------------------------

    def should_evaluate(self) -> bool:
        """Return whether to evaluate: at the start, every so many steps and at the end, never twice at one step."""
        regular = self.state.step % self.config.evaluation.every == 0 or self.at_the_end()
        is_new = self.state.evaluated != self.state.step
        return regular and is_new and self.data.validation is not None and self.signal is None

    def evaluate(self) -> None:
        """Measure the validation loss, record it, and draw a sample. A signal ends it after a batch, unrecorded."""
        assert self.data.validation is not None
        try:
            evaluation = evaluate_model(
                self.model, self.data.validation, self.config, self.device, self.processes, self.look_for_signals
            )
        except InterruptedEvaluationError:
            return
        state, loss = self.state, evaluation.loss
        if not math.isfinite(loss):
            self.end_diverged(f"the validation loss at step {state.step} is {loss}; {self.advice()}")
        state.evaluated, state.validation_loss = state.step, loss
        bits = evaluation.to_dict()["bits_per_byte"]  # None for raw shards, which do not know their text
        self.record("evaluation", validation_loss=loss, bits_per_byte=bits, tokens=state.tokens, seconds=state.seconds)
        shown = "" if bits is None else f", {bits:.3f} bits per byte"
        self.screen.say(f"step {state.step}: validation loss {loss:.4f}{shown}")
        if self.config.sample.tokens:
            self.sample()

    def sample(self) -> None:
        """Draw a sample of text and record it, where the data have a tokenizer."""
        text = sample_text(
            self.model, self.data.tokenizer, self.config, self.device, self.processes,
            interrupted=lambda: self.stop.signal is not None,
        )  # fmt: skip
        if text is not None:
            self.metrics.write("sample", self.state.step, prompt=self.config.sample.prompt, text=text)
            self.screen.say(f"  sample: {text!r}")

    # --- save -------------------------------------------------------------------------------------------------------

    def should_save(self) -> bool:
        """Return whether to save: every so many steps, at the end, and before the run stops; once at one step."""
        regular = self.state.step % self.config.checkpoint_every == 0 and self.state.step > 0
        if not (regular or self.ends_here()):
            return False
        saved = self.checkpoint
        # The last step's checkpoint may have been written before its evaluation, by a call that a signal ended.
        lacks_loss = self.at_the_end() and saved is not None and saved.validation_loss is None
        return saved is None or saved.step != self.state.step or (lacks_loss and self.nothing_is_left())

    def save(self) -> None:
        """Write a checkpoint, unless weights are not finite; remove the checkpoints that are no longer kept."""
        if not all_finite(self.model, self.optimizer, self.processes):
            self.end_diverged(f"weights or optimizer state are not finite at step {self.state.step}; {self.advice()}")
        self.check_folder()
        with self.processes.saving():
            self.checkpoint = save(
                self.folder, self.state, self.model, self.optimizer, self.data.tokenizer, self.checkpoint,
                self.processes,
            )  # fmt: skip
            keep = self.config.checkpoint.keep_last
            self.trusted = [*self.trusted, self.checkpoint.path][-keep:]
            if self.processes.rank == 0:
                # Newer checkpoints than the one resumed from were found damaged; they must not displace good ones.
                remove_outdated(self.folder, keep, self.trusted)

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints."""
        return self.out / "checkpoints"

    # --- step -------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Make one optimizer step, unless its loss or gradient norm is not finite."""
        config, state = self.config, self.state
        began = time.perf_counter()
        batch = next(self.batches)
        self.rate = set_rates(self.optimizer, state.step, config.optimizer, config.schedule)
        part, self.grad_norm, targets = gradient_step(
            self.model, self.optimizer, batch, config, self.device, self.processes
        )
        # Losses are exchanged anyway. Signals go with them, so that all processes stop after the same step.
        parts, signals = zip(*self.processes.gather(part, self.stop.signal or 0), strict=True)
        self.loss, self.signal = sum(parts), first_signal(signals)
        if not (math.isfinite(self.loss) and math.isfinite(self.grad_norm)):
            self.end_at_batch(parts)
        self.optimizer.step()
        state.step += 1
        state.position += config.batch_size
        state.tokens += targets
        state.seconds += time.perf_counter() - began
        self.screen.advance(state.step)

    def end_at_batch(self, parts: Sequence[float]) -> NoReturn:
        """End a run whose loss or gradient norm is not finite; name the windows that led to it."""
        wrong = [rank for rank, part in enumerate(parts) if not math.isfinite(part)]
        ranks = wrong or range(self.processes.size)
        seen = windows_of(self.data.windows, self.config, self.state.position, self.processes, ranks)
        whose = f" of process {', '.join(map(str, wrong))}" if wrong and self.processes.size > 1 else ""
        self.end_diverged(
            f"step {self.state.step + 1}: loss {self.loss}, gradient norm {self.grad_norm}, from the windows "
            f"{seen}{whose}; the weights were not touched. {self.advice()}"
        )

    def end_diverged(self, message: str) -> NoReturn:
        """End the run in all processes."""
        self.processes.end(NonFiniteError(message))

    def advice(self) -> str:
        """Return how to go on after a loss that is not finite."""
        last = self.checkpoint
        where = f"the last good checkpoint is {last.path}" if last else "there is no checkpoint yet"
        return f"{where}; resume with a lower optimizer.lr or optimizer.grad_clip (--allow-change)"

    # --- log --------------------------------------------------------------------------------------------------------

    def should_record(self) -> bool:
        """Return whether the training loss of this step is recorded."""
        return self.state.step % self.config.log.every == 0 or self.at_the_end()

    def log(self) -> None:
        """Record the last step, and the speed since the last record."""
        state, last = self.state, self.last_record
        seconds = state.seconds - last.seconds
        speed = (state.tokens - last.tokens) / max(seconds, 1e-9)
        self.record(
            "train",
            loss=self.loss,
            lr=self.rate,
            grad_norm=self.grad_norm,
            tokens=state.tokens,
            tokens_per_second=round(speed, 1),
            seconds=round(state.seconds, 3),
        )
        left = (self.last_step - state.step) * seconds / (state.step - last.step)
        assert self.loss is not None
        self.screen.train(state.step, self.loss, speed, left)
        self.last_record = copy(state)

    def record(self, event: str, **values: Any) -> None:
        """Write one record. All processes make this call, and the first one writes."""
        self.check_folder()
        self.metrics.write(event, self.state.step, **values)

    def check_folder(self) -> None:
        """Raise TrainingError in all processes when the run's folder was removed or replaced."""
        self.processes.together(lambda: self.lock and self.lock.check(), alone=True)

    # --- the end ----------------------------------------------------------------------------------------------------

    def look_for_signals(self) -> bool:
        """Return whether any process was asked to stop. All processes make this call together."""
        self.signal = first_signal([one for (one,) in self.processes.gather(self.stop.signal or 0)])
        return self.signal is not None

    def say(self, message: str) -> None:
        """Write a line on stderr before there is a screen."""
        if not self.quiet:
            say_on_stderr(message)

    def say_that_it_is_finished(self) -> None:
        """Say why this call does nothing."""
        self.say(
            f"{self.out} is finished: step {self.state.step} of {self.last_step}. More steps: "
            "--set schedule.steps=N --allow-change schedule.steps"
        )

    def say_why_it_stops(self) -> None:
        """Name the signal or the step that ends this call before the run is finished."""
        if not self.nothing_is_left():
            why = f"step {self.stop_at} was asked for" if self.signal is None else signal.Signals(self.signal).name
            self.screen.say(f"stopped at step {self.state.step} ({why}); continue with --resume")

    def result(self) -> TrainResult:
        """Return how this call ended."""
        path = self.checkpoint.path if self.checkpoint else None
        step, finished = self.state.step, self.nothing_is_left()
        return TrainResult(step, finished, self.loss, self.state.validation_loss, path, self.signal)


def open_run(
    stack: ExitStack,
    config: TrainConfig,
    out: Path,
    *,
    resume: bool,
    allow_change: Sequence[str],
    stop_at: int | None,
    quiet: bool,
) -> Run:
    """Open a run in all processes. Everything that can be refused is refused before anything is written.

    Args:
        stack: holds the folder and the connection between processes for as long as the run lasts.
    """
    device = training_device(config)
    processes = stack.enter_context(join_processes(config, device))
    quiet = quiet or processes.rank > 0
    say: Callable[[str], None] = (lambda message: None) if quiet else say_on_stderr
    # A scan that the device lacks is refused here: no step is needed to find out.
    share, together = config.share(processes.size), not processes.sharded
    processes.together(lambda: scan_of(share, device, together))
    data = processes.together(lambda: open_data(config, out if resume else None))
    changes = processes.together(lambda: check_resumable(config, out, resume, allow_change), alone=True)
    folder_lock = processes.together(lambda: stack.enter_context(lock(out)), alone=True)
    key = processes.first(folder_lock.key if folder_lock else 0)
    processes.together(lambda: check_shared(out, key))
    checkpoint = find_checkpoint(out / "checkpoints", say, processes) if resume else None
    model, optimizer, state = processes.together(lambda: start_training(config, device, data, checkpoint, processes))
    if processes.rank == 0:
        write_run_config(config, out)  # first: a folder with a configuration can be resumed
        (out / "checkpoints").mkdir(exist_ok=True)
    if resume:
        origin = f"checkpoint {checkpoint.path.name}" if checkpoint else "the start: there is no checkpoint yet"
        say(f"resuming {out} from {origin}" + "".join(f"\n  {change}" for change in changes or ()))
    return Run(
        config=config, out=out, device=device, processes=processes, data=data, model=model, optimizer=optimizer,
        state=state, lock=folder_lock, changes=changes or [], stop_at=stop_at, quiet=quiet, checkpoint=checkpoint,
        trusted=[checkpoint.path] if checkpoint else [],
    )  # fmt: skip


def step_batches(
    windows: TrainingWindows, config: TrainConfig, position: int, processes: OneProcess
) -> Iterator[Batch]:
    """Yield this process's share of each step's sequences, from a place in the data on, without end."""
    return windows.iterate(position, config.batch_size, processes.rank, processes.size, config.data.workers)


def windows_of(
    windows: TrainingWindows, config: TrainConfig, position: int, processes: OneProcess, ranks: Iterable[int]
) -> list[int]:
    """Return the windows that some processes have read for the step at a place in the data."""
    share = config.batch_size // processes.size
    return [windows.window_id(position + rank * share + number) for rank in ranks for number in range(share)]


def first_signal(signals: Iterable[float]) -> int | None:
    """Return the first number that is not 0; None without one."""
    return next((int(number) for number in signals if number), None)
