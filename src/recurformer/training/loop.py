"""The training loop. `train` reads from top to bottom: prepare, then evaluate, sample, save, step, log until done."""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import recurformer
from recurformer.evaluation import check_vocabulary, evaluate
from recurformer.model import IGNORE, LanguageModel, Layer
from recurformer.training.checkpoint import (
    Checkpoint,
    TrainingState,
    newest_checkpoint,
    read_rng,
    remove_outdated,
    resolve_model_folder,
    restore_rng,
    write_checkpoint,
)
from recurformer.training.config import TrainConfig, open_tokens
from recurformer.training.logging import Metrics, Screen, import_logger, machine, say_on_stderr
from recurformer.training.optimizer import (
    clip_gradients,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_rates,
)
from recurformer.training.run import check_resumable, lock, write_run_config

if TYPE_CHECKING:
    from recurformer.data import Batch, TokenDataset
    from recurformer.data.tokenizer import Tokenizer


class TrainingError(RuntimeError):
    """A run that cannot go on. What was saved before is whole; the message says how to continue."""


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


@dataclass(frozen=True)
class World:
    """The processes that share one step. Gradients are sums over all of them, divided by the number of targets of the
    whole step, so the split into processes and micro-batches does not change the update."""

    rank: int = 0
    size: int = 1

    def sum(self, number: int) -> int:
        """The sum of a number over the processes."""
        return number

    def sum_gradients(self, model: LanguageModel) -> None:
        """Add up the gradients of the processes, in place."""


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    allow_change: Sequence[str] = (),
    stop_at: int | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Train a model, or continue training it.

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
        at once.

    Raises:
        ValueError: before any work, for a setting, data or a folder that does not fit.
        NonFiniteError: loss or gradient norm is not finite; raised before the optimizer step.
        TrainingError: a checkpoint could not be written.
    """
    from recurformer.data import TrainingWindows

    out = Path(out)
    say = (lambda message: None) if quiet else say_on_stderr

    # --- what can be refused is refused here, before anything is written ---------------------------------------------
    device = pick_device(config)
    data = open_tokens(config.data, config.data.train)
    held_out = None if config.data.validation is None else open_tokens(config.data, config.data.validation)
    for dataset in filter(None, (data, held_out)):
        check_vocabulary(config.model.vocab_size, dataset)
    tokenizer = data.tokenizer()
    windows = TrainingWindows(data, config.data.window, config.data.seed, config.data.packing)
    for name in config.log.loggers:
        import_logger(name)
    changes = check_resumable(config, out, resume, allow_change)
    world = World()

    with ExitStack() as stack:
        stack.enter_context(lock(out))
        folder = out / "checkpoints"
        resumed = checkpoint = newest_checkpoint(folder, say) if resume else None

        # --- model, optimizer, and everything a checkpoint brings back -----------------------------------------------
        torch.manual_seed(config.seed)
        model = make_model(config, device, checkpoint)
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
            del tensors
            restore_rng(rng)
        folder.mkdir(exist_ok=True)
        write_run_config(config, out)
        if resume:
            origin = f"checkpoint {checkpoint.path.name}" if checkpoint else "the start: there is no checkpoint yet"
            say(f"resuming {out} from {origin}" + "".join(f"\n  {change}" for change in changes))
        steps = config.schedule.steps
        if state.step >= steps:
            say(f"{out} is finished: step {state.step} of {steps}. More steps: --set schedule.steps=N "
                "--allow-change schedule.steps")  # fmt: skip
            return TrainResult(state.step, True, None, state.validation_loss, checkpoint and checkpoint.path, None)

        metrics = Metrics(out, config, state if checkpoint else None)
        stack.callback(metrics.close)
        metrics.write("resume" if checkpoint else "start", state.step, changes=changes, **machine(device))
        parameters = model.num_parameters(embedding=True)
        say(f"{parameters:,} parameters, {data.n_tokens:,} training tokens, {steps} steps on {device}")
        stop = stack.enter_context(stop_signals(quiet))
        screen = stack.enter_context(Screen(steps, state.step, quiet))
        batches = step_batches(windows, config, state.position, world)
        loss = None
        logged_tokens, logged_seconds, logged_step = state.tokens, state.seconds, state.step

        def advice() -> str:
            last = f"the last good checkpoint is {checkpoint.path}" if checkpoint else "there is no checkpoint yet"
            return f"{last}; resume with a lower optimizer.lr or optimizer.grad_clip (--allow-change)"

        while True:
            stopping = stop.requested or (stop_at is not None and state.step >= stop_at)

            # --- evaluate and sample: at the start, every so many steps, at the end; never twice at one step ----------
            due = state.step % config.evaluation.every == 0 or state.step == steps
            if held_out is not None and due and state.evaluated != state.step and not stop.requested:
                evaluation = evaluate_model(model, held_out, config, device)
                if not math.isfinite(evaluation.loss):
                    raise NonFiniteError(f"the validation loss at step {state.step} is {evaluation.loss}; {advice()}")
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
                if config.sample.tokens and (text := sample_text(model, tokenizer, config, device)) is not None:
                    metrics.write("sample", state.step, prompt=config.sample.prompt, text=text)
                    screen.say(f"  sample: {text!r}")

            # --- save ------------------------------------------------------------------------------------------------
            due = (state.step % config.checkpoint_every == 0 and state.step > 0) or state.step == steps or stopping
            if due and (checkpoint is None or checkpoint.step != state.step):
                checkpoint = save(folder, state, model, optimizer, tokenizer, checkpoint)
                # What this process wrote or resumed from, it trusts; a newer folder may have been found damaged.
                remove_outdated(folder, config.checkpoint.keep_last, [c.path for c in (resumed, checkpoint) if c])
            if state.step == steps or stopping:
                break

            # --- one step --------------------------------------------------------------------------------------------
            began = time.perf_counter()
            batch = next(batches)
            rate = set_rates(optimizer, state.step, config.optimizer, config.schedule)
            loss, norm, targets = gradient_step(model, optimizer, batch, config, device, world)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NonFiniteError(
                    f"step {state.step + 1}: loss {loss}, gradient norm {norm}, from the windows "
                    f"{batch.window_ids.tolist()}; the weights were not touched. " + advice()
                )
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
            reason = signal.Signals(stop.requested).name if stop.requested else f"step {stop_at} was asked for"
            screen.say(f"stopped at step {state.step} ({reason}); continue with --resume")
        path = checkpoint and checkpoint.path
        return TrainResult(state.step, state.step >= steps, loss, state.validation_loss, path, stop.requested)


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
        (loss in nats per target, norm of the gradient before clipping, number of targets), over all processes.
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


def autocast(config: TrainConfig, device: torch.device) -> Any:
    """bf16 products where the configuration asks for them."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if config.precision == "bf16" else nullcontext()


def evaluate_model(model: LanguageModel, dataset: TokenDataset, config: TrainConfig, device: torch.device) -> Any:
    """Loss on held-out data, in the precision of the training."""
    size = config.evaluation.batch_size or config.micro_batch_size or config.batch_size
    with autocast(config, device):
        return evaluate(
            model, dataset, window=config.data.window, batch_size=size, max_batches=config.evaluation.batches
        )


def sample_text(
    model: LanguageModel, tokenizer: Tokenizer | None, config: TrainConfig, device: torch.device
) -> str | None:
    """A continuation of the prompt; None for data without a tokenizer. Leaves all random states alone."""
    if tokenizer is None:
        return None
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


def make_model(config: TrainConfig, device: torch.device, checkpoint: Checkpoint | None) -> LanguageModel:
    """The model in training mode with the weights of the checkpoint, of `init_from` or newly drawn (on the CPU, so that
    they depend on the seed alone)."""
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    model = LanguageModel(config.model).to(dtype)
    model.scan = config.scan
    compiled = device.type == "cuda" if config.compile is None else config.compile
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.compiled, layer.recompute = compiled, config.recompute
    source = checkpoint.model if checkpoint else config.init_from and resolve_model_folder(config.init_from)
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
    return model.to(device).train()


def pick_device(config: TrainConfig) -> torch.device:
    """The device of the configuration.

    Raises:
        ValueError: when it is not here.
    """
    if config.device == "auto":
        name = "cuda" if torch.cuda.is_available() and config.precision != "fp64" else "cpu"
        return torch.device(name)
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device is {config.device!r}, which cannot be used here ({str(error).splitlines()[0]}); "
            'choose "auto" or "cpu"'
        ) from None
    return device


def save(
    folder: Path,
    state: TrainingState,
    model: LanguageModel,
    optimizer: torch.optim.AdamW,
    tokenizer: Tokenizer | None,
    previous: Checkpoint | None,
) -> Checkpoint:
    """Write a checkpoint; a full disk ends the run with the one before intact."""
    try:
        return write_checkpoint(
            folder,
            state,
            lambda path: recurformer.save(model, path, tokenizer=tokenizer),
            optimizer_tensors(optimizer, model),
            read_rng(),
        )
    except Exception as error:  # safetensors has an error type of its own for a full disk
        free = shutil.disk_usage(folder).free
        raise TrainingError(
            f"the checkpoint of step {state.step} could not be written to {folder} ({error}; {free / 2**20:,.0f} MiB "
            f"free). {f'{previous.path.name} is intact' if previous else 'There is none yet'}; make room and --resume"
        ) from error


class StopRequest:
    """Which signal asked to stop; None while none did."""

    requested: int | None = None


@contextmanager
def stop_signals(quiet: bool) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; the second one has its usual effect. Outside the main thread
    Python handles no signals, and nothing is changed."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, _: Any) -> None:
        if request.requested is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        request.requested = number
        if not quiet:  # not print: the signal may have come in the middle of another one
            os.write(2, f"\n{signal.Signals(number).name}: saving after this step; once more to abort\n".encode())

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
