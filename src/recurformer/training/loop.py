"""The training loop. `train` reads from top to bottom: prepare, then evaluate, sample, save, step, log until done."""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import recurformer
from recurformer.evaluation.perplexity import check_vocabulary, evaluate
from recurformer.loss import IGNORE
from recurformer.model import LanguageModel, Layer
from recurformer.store.checkpoints import (
    Checkpoint,
    TrainingState,
    checkpoint_at,
    newest_checkpoint,
    remove_outdated,
    resolve,
    write_checkpoint,
)
from recurformer.store.folders import plain_state_dict, save_description
from recurformer.training.checkpoint import read_rng, restore_rng, write_shared_checkpoint
from recurformer.training.config import TrainConfig, open_tokens
from recurformer.training.distributed import World, pick_device, processes
from recurformer.training.logging import Metrics, NoMetrics, Screen, import_logger, machine, say_on_stderr
from recurformer.training.optimizer import (
    clip_gradients,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_rates,
)
from recurformer.training.run import TrainingError, check_resumable, check_shared, lock, write_run_config

if TYPE_CHECKING:
    from recurformer.data import Batch, TokenDataset, TrainingWindows
    from recurformer.data.tokenizer import Tokenizer


ECHO = 5.0  # seconds in which a signal may come again: to all processes, and from torchrun that passes it on


class NonFiniteError(TrainingError):
    """Loss or gradient norm was NaN or infinite. No weight was touched by that step."""


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended."""

    step: int  # updates made since the start of the run
    finished: bool  # step is the last one of the schedule
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
    """Train a model, or continue training it. Under `torchrun` every process calls this alike; they share each step.

    Args:
        config: everything that decides the result.
        out: the run's folder: config.json, metrics.jsonl, checkpoints/.
        resume: continue from the newest intact checkpoint (from the start when there is none yet). On a CPU with the
            same number of threads the result is bit for bit that of the undisturbed run.
        allow_change: names of settings in which `config` may differ from the run's; see `run.check_resumable`. The new
            value holds from the next step on.
        stop_at: save and return at this step, as after a signal.
        quiet: nothing on stderr.

    Returns:
        TrainResult: SIGINT and SIGTERM end the call early, after the step at hand and a checkpoint; a second one aborts
        at once. The same in every process.

    Raises:
        ValueError: before any work, for a setting, data or a folder that does not fit.
        NonFiniteError: loss or gradient norm is not finite; raised before the optimizer step.
        TrainingError: a checkpoint could not be written.
        EndedElsewhereError: another process has raised one of these.
    """
    from recurformer.data import TrainingWindows

    out = Path(out)
    device = pick_device(config)

    with ExitStack() as stack:
        world = stack.enter_context(processes(config, device))
        quiet = quiet or world.rank > 0
        say = (lambda message: None) if quiet else say_on_stderr

        # --- what can be refused is refused here, before anything is written -----------------------------------------
        def read_data() -> tuple[TokenDataset, TokenDataset | None, Tokenizer | None, TrainingWindows]:
            data = open_tokens(config.data, config.data.train)
            held_out = None if config.data.validation is None else open_tokens(config.data, config.data.validation)
            for dataset in filter(None, (data, held_out)):
                check_vocabulary(config.model.vocab_size, dataset)
            windows = TrainingWindows(data, config.data.window, config.data.seed, config.data.packing)
            for name in config.log.loggers:
                import_logger(name)
            return data, held_out, data.tokenizer(), windows

        data, held_out, tokenizer, windows = world.together(read_data)
        changes = world.together(lambda: check_resumable(config, out, resume, allow_change), alone=True)
        held = world.together(lambda: stack.enter_context(lock(out)), alone=True)
        mark = world.first(held or 0)
        world.together(lambda: check_shared(out, mark))
        folder = out / "checkpoints"
        resumed = checkpoint = find_checkpoint(folder, say, world) if resume else None

        # --- model, optimizer, and everything a checkpoint brings back -----------------------------------------------
        def prepare() -> tuple[LanguageModel, torch.optim.AdamW, TrainingState]:
            torch.manual_seed(config.seed)
            model = make_model(config, device, checkpoint, world)
            optimizer = make_optimizer(model, config.optimizer)
            state = TrainingState(dataset=data.fingerprint)
            if checkpoint is not None:
                state, tensors, rng = checkpoint.read()
                if state.dataset != data.fingerprint:
                    raise ValueError(
                        f"data.train {config.data.train!r} holds other tokens than the run was trained on (fingerprint "
                        f"{data.fingerprint} instead of {state.dataset}); point it to the same data or start a new run"
                    )
                load_optimizer_tensors(optimizer, model, tensors)
                restore_rng(rng)
            return model, optimizer, state

        model, optimizer, state = world.together(prepare)
        metrics: Metrics | NoMetrics = NoMetrics()
        if world.rank == 0:
            folder.mkdir(exist_ok=True)
            write_run_config(config, out)
        if resume:
            origin = f"checkpoint {checkpoint.path.name}" if checkpoint else "the start: there is no checkpoint yet"
            say(f"resuming {out} from {origin}" + "".join(f"\n  {change}" for change in changes or ()))
        steps = config.schedule.steps
        if state.step >= steps:
            say(f"{out} is finished: step {state.step} of {steps}. More steps: --set schedule.steps=N "
                "--allow-change schedule.steps")  # fmt: skip
            return TrainResult(state.step, True, None, state.validation_loss, checkpoint and checkpoint.path, None)

        if world.rank == 0:
            metrics = Metrics(out, config, state if checkpoint else None)
            stack.callback(metrics.close)
        about = {**machine(device), "processes": world.size, "parallel": config.parallel if world.size > 1 else None}
        mine = config.share(world.size)
        at_once = {name: getattr(mine, name) for name in ("micro_batch_size", "recurrent_micro_batch_size")}
        for name, size in at_once.items():
            if size != getattr(config, name):
                say(f"{name} is {getattr(config, name)}, but each of {world.size} processes has only {mine.batch_size} "
                    f"of a step's {config.batch_size} sequences, and takes {size} at once")  # fmt: skip
        about |= {**at_once, "micro_batch_size": mine.micro_batch_size or mine.batch_size}
        metrics.write("resume" if checkpoint else "start", state.step, changes=changes, **about)
        parameters = model.num_parameters(embedding=True)
        where = f"{device}" if world.size == 1 else f"{world.size} processes ({config.parallel}, {device.type})"
        say(f"{parameters:,} parameters, {data.n_tokens:,} training tokens, {steps} steps on {where}")
        stop = stack.enter_context(stop_signals(quiet, ECHO if world.size > 1 else 0.0))
        screen = stack.enter_context(Screen(steps, state.step, quiet))
        batches = step_batches(windows, config, state.position, world)
        loss = asked = None  # asked: the signal that ends the call
        logged_tokens, logged_seconds, logged_step = state.tokens, state.seconds, state.step

        def advice() -> str:
            last = f"the last good checkpoint is {checkpoint.path}" if checkpoint else "there is no checkpoint yet"
            return f"{last}; resume with a lower optimizer.lr or optimizer.grad_clip (--allow-change)"

        while True:
            stopping = asked is not None or (stop_at is not None and state.step >= stop_at)

            # --- evaluate and sample: at the start, every so many steps, at the end; never twice at one step ----------
            due = state.step % config.evaluation.every == 0 or state.step == steps
            if held_out is not None and due and state.evaluated != state.step and asked is None:
                evaluation = evaluate_model(model, held_out, config, device, world)
                if not math.isfinite(evaluation.loss):
                    message = f"the validation loss at step {state.step} is {evaluation.loss}; {advice()}"
                    world.end(NonFiniteError(message))
                state.evaluated, state.validation_loss = state.step, evaluation.loss
                metrics.write(
                    "evaluation",
                    state.step,
                    validation_loss=evaluation.loss,
                    bits_per_byte=evaluation.to_dict()["bits_per_byte"],  # None where it is unknown: NaN is no JSON
                    tokens=state.tokens,
                    seconds=state.seconds,
                )
                bits = evaluation.bits_per_byte  # NaN for raw shards, which do not know their text
                bits = f", {bits:.3f} bits per byte" if math.isfinite(bits) else ""
                screen.say(f"step {state.step}: validation loss {evaluation.loss:.4f}{bits}")
                if config.sample.tokens and (text := sample_text(model, tokenizer, config, device, world)) is not None:
                    metrics.write("sample", state.step, prompt=config.sample.prompt, text=text)
                    screen.say(f"  sample: {text!r}")

            # --- save ------------------------------------------------------------------------------------------------
            due = (state.step % config.checkpoint_every == 0 and state.step > 0) or state.step == steps or stopping
            if due and (checkpoint is None or checkpoint.step != state.step):
                with world.saving():
                    checkpoint = save(folder, state, model, optimizer, tokenizer, checkpoint, world)
                    if world.rank == 0:
                        # What this run wrote or resumed from, it trusts; a newer folder may have been found damaged.
                        kept = [c.path for c in (resumed, checkpoint) if c]
                        remove_outdated(folder, config.checkpoint.keep_last, kept)
            if state.step == steps or stopping:
                break

            # --- one step --------------------------------------------------------------------------------------------
            began = time.perf_counter()
            batch = next(batches)
            rate = set_rates(optimizer, state.step, config.optimizer, config.schedule)
            share, norm, targets = gradient_step(model, optimizer, batch, config, device, world)
            # Losses are exchanged anyway, and with them whether a process was asked to stop: all do after one step.
            shares, requests = zip(*world.gather(share, stop.requested or 0), strict=True)
            loss = sum(shares)
            asked = next((int(number) for number in requests if number), None)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                wrong = [rank for rank, part in enumerate(shares) if not math.isfinite(part)]
                seen = windows_of(windows, config, state.position, world, wrong or range(world.size))
                whose = f" of process {', '.join(map(str, wrong))}" if wrong and world.size > 1 else ""
                message = f"step {state.step + 1}: loss {loss}, gradient norm {norm}, from the windows {seen}{whose}"
                world.end(NonFiniteError(f"{message}; the weights were not touched. {advice()}"))
            optimizer.step()
            state.step += 1
            state.position += config.batch_size
            state.tokens += targets
            state.seconds += time.perf_counter() - began

            # --- log -------------------------------------------------------------------------------------------------
            screen.advance(state.step)
            if state.step % config.log.every == 0 or state.step == steps:
                seconds = state.seconds - logged_seconds
                speed = (state.tokens - logged_tokens) / max(seconds, 1e-9)
                metrics.write(
                    "train",
                    state.step,
                    loss=loss,
                    lr=rate,
                    grad_norm=norm,
                    tokens=state.tokens,
                    tokens_per_second=round(speed, 1),
                    seconds=round(state.seconds, 3),
                )
                left = (steps - state.step) * seconds / (state.step - logged_step)
                screen.train(state.step, loss, speed, left)
                logged_tokens, logged_seconds, logged_step = state.tokens, state.seconds, state.step

        if stopping and state.step < steps:
            reason = signal.Signals(asked).name if asked is not None else f"step {stop_at} was asked for"
            screen.say(f"stopped at step {state.step} ({reason}); continue with --resume")
        path = checkpoint and checkpoint.path
        return TrainResult(state.step, state.step >= steps, loss, state.validation_loss, path, asked)


# --- the parts ------------------------------------------------------------------------------------------------------


def gradient_step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: TrainConfig,
    device: torch.device,
    world: World,
) -> tuple[float, float, int]:
    """Leave in `.grad` the clipped gradient of the mean loss over *all* targets of the step, however they fall on
    micro-batches and processes.

    Returns:
        (this process's part of the loss in nats per target, norm of the gradient before clipping, number of targets);
        the latter two, and the sum of the first, are those of the step.
    """
    targets = world.sum(int((batch.targets != IGNORE).sum()))
    optimizer.zero_grad(set_to_none=True)
    losses: list[Tensor] = []

    def there(part: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: to_device(tensor, device) for name, tensor in part.items()}

    def backward(part: dict[str, Tensor], after: tuple[int, Tensor] | None = None) -> None:
        # The model's loss is a mean over the part's own targets; the step's loss weighs the parts by their targets.
        share = int((part["targets"] != IGNORE).sum()) / max(1, targets)
        with autocast(config, device):
            loss = model(**there(part), return_logits=False, after=after).loss
        assert loss is not None
        loss = loss * share
        loss.backward()
        losses.append(loss.detach())

    size = config.micro_batch_size or len(batch.tokens)
    for part in micro_batches(batch, config.recurrent_micro_batch_size or size):
        parts = micro_batches(part, size)
        if config.recurrent_micro_batch_size is None:
            for few in parts:
                backward(few)
            continue
        # The recurrent layers at the bottom take the whole part at once, the layers above them `size` sequences.
        depth = config.model.recurrent_depth
        inputs: dict[str, Any] = {name: tensor for name, tensor in there(part).items() if name != "targets"}
        with autocast(config, device):
            x = model.residual_stream(**inputs, depth=depth)
        entries = [entry.requires_grad_(x.requires_grad) for entry in x.detach().split(size)]
        for few, entry in zip(parts, entries, strict=True):
            backward(few, (depth, entry))
        if x.requires_grad:
            x.backward(torch.cat([entry.grad for entry in entries if entry.grad is not None]))
    world.sum_gradients(model)
    norm = clip_gradients(model.parameters(), config.optimizer.grad_clip)
    loss, norm = torch.stack(
        [torch.stack(losses).sum().double(), norm.double()]
    ).tolist()  # the step's one synchronisation
    return loss, norm, targets


def micro_batches(batch: Batch | dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """The model's inputs, at most `size` sequences at a time."""
    if not isinstance(batch, dict):
        batch = {name: getattr(batch, name) for name in ("tokens", "targets", "attention_mask", "document_ids")}
    for start in range(0, len(batch["tokens"]), size):
        yield {name: tensor[start : start + size] for name, tensor in batch.items() if tensor is not None}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy there. From pinned memory it is queued behind the work under way; from other memory it waits for it."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def step_batches(windows: Any, config: TrainConfig, position: int, world: World) -> Iterator[Batch]:
    """This process's share of each step's sequences, from a place in the data on, without end."""
    return windows.iterate(position, config.batch_size, world.rank, world.size, config.data.workers)


def windows_of(
    windows: TrainingWindows, config: TrainConfig, position: int, world: World, ranks: Iterable[int]
) -> list[int]:
    """The windows that some processes have read for the step at a place in the data."""
    share = config.batch_size // world.size
    return [windows.window_id(position + rank * share + number) for rank in ranks for number in range(share)]


def autocast(config: TrainConfig, device: torch.device) -> Any:
    """bf16 products where the configuration asks for them."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if config.precision == "bf16" else nullcontext()


def evaluate_model(
    model: LanguageModel, dataset: TokenDataset, config: TrainConfig, device: torch.device, world: World
) -> Any:
    """Loss on held-out data, in the precision of the training."""
    size, batches = config.evaluation.batch_size, config.evaluation.batches
    if size is None:  # each process has room for its share of a step; together they are as many as ever
        whole, share = config.micro_batch_size or config.batch_size, config.batch_size // world.size
        parts = next(n for n in range(1, whole + 1) if whole % n == 0 and whole <= n * share)
        size, batches = whole // parts, batches and batches * parts
    with autocast(config, device):
        return evaluate(
            model,
            dataset,
            window=config.data.window,
            batch_size=size,
            max_batches=batches,
            world=world,
        )


def sample_text(
    model: LanguageModel, tokenizer: Tokenizer | None, config: TrainConfig, device: torch.device, world: World
) -> str | None:
    """A continuation of the prompt, drawn by the first process; None in the others, and for data without a tokenizer.
    Leaves all random states alone."""
    if tokenizer is None or (whole := world.whole(model)) is None:
        return None
    model = whole
    prompt = tokenizer.encode(config.sample.prompt) or [tokenizer.eos_id or 0]
    was_training = model.training
    model.eval()
    with torch.no_grad(), autocast(config, device):
        tokens = model.generate(
            torch.tensor([prompt], device=device),
            config.sample.tokens,
            temperature=config.sample.temperature,
            seed=config.sample.seed,
        )
    model.train(was_training)
    return tokenizer.decode(tokens[0, len(prompt) :].tolist())


def make_model(config: TrainConfig, device: torch.device, checkpoint: Checkpoint | None, world: World) -> LanguageModel:
    """The model in training mode with the weights of the checkpoint, of `init_from` or newly drawn (on the CPU, so that
    they depend on the seed alone)."""
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    model = LanguageModel(config.model).to(dtype)
    model.scan = config.scan
    compiled = device.type == "cuda" if config.compile is None else config.compile
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.compiled, layer.recompute = compiled, config.recompute
    source = checkpoint.model if checkpoint else config.init_from and resolve(config.init_from)
    if source:
        weights = recurformer.load(source).state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for name in sorted(shapes.keys() | weights.keys()):
            found = tuple(weights[name].shape) if name in weights else None
            if found != shapes.get(name):
                raise ValueError(f"{source} has {name} of shape {found}, the model {shapes.get(name)}; change [model]")
        model.load_state_dict(weights)
    if config.trained == "recurrent":
        model.requires_grad_(False)
        for layer, kind in zip(model.layers, config.model.layer_kinds, strict=True):
            layer.requires_grad_(kind == "recurrent")
    return world.place(model, device).train()


def save(
    folder: Path,
    state: TrainingState,
    model: LanguageModel,
    optimizer: torch.optim.AdamW,
    tokenizer: Tokenizer | None,
    previous: Checkpoint | None,
    world: World,
) -> Checkpoint:
    """Write a checkpoint; a full disk ends the run with the one before intact.

    The random states are the first process's. No step draws from them, so they are not missed in the others.
    """
    tensors = optimizer_tensors(optimizer, model)

    def write() -> Checkpoint:
        return write_checkpoint(
            folder, state, lambda path: recurformer.save(model, path, tokenizer=tokenizer), tensors, read_rng()
        )

    def describe(path: Path) -> None:
        save_description(config=model.config, folder=path, tokenizer=tokenizer)

    try:
        if world.sharded:
            weights = plain_state_dict(model)
            made = write_shared_checkpoint(folder, state, describe, weights, tensors, read_rng(), world)
        else:
            made = world.together(write, alone=True)
        return made or checkpoint_at(folder, state.step)
    except TrainingError:  # the others' end, or that they are gone: the disk has nothing to do with it
        raise
    except Exception as error:  # safetensors has an error type of its own for a full disk
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
        raise TrainingError(
            f"the checkpoint of step {state.step} could not be written to {folder} ({error}; {free / 2**20:,.0f} MiB "
            f"free). {f'{previous.path.name} is intact' if previous else 'There is none yet'}; make room and --resume"
        ) from error


def find_checkpoint(folder: Path, say: Callable[[str], None], world: World) -> Checkpoint | None:
    """The newest intact checkpoint, as the first process sees it."""
    found = world.together(lambda: newest_checkpoint(folder, say), alone=True)
    step = world.first(found.step if found else -1)
    return found if found or step < 0 else checkpoint_at(folder, step)


class StopRequest:
    """Which signal asked to stop; None while none did."""

    requested: int | None = None
    when = 0.0  # on the monotonic clock


@contextmanager
def stop_signals(quiet: bool, echo: float) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; one that comes over `echo` seconds later has its usual effect.
    Outside the main thread Python handles no signals, and nothing is changed."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, _: Any) -> None:
        if request.requested is not None:
            if time.monotonic() - request.when < echo:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        request.requested, request.when = number, time.monotonic()
        if not quiet:  # not print: the signal may have come in the middle of another one
            os.write(2, f"\n{signal.Signals(number).name}: saving after this step; once more to abort\n".encode())

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
