"""The start of a run: its data, its model, and all that a checkpoint brings back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import recurformer
from recurformer.data import TrainingWindows
from recurformer.data.tokenizer import has_tokenizer, load_tokenizer
from recurformer.data.vocabulary import check_vocabulary
from recurformer.evaluation import locate
from recurformer.model import LanguageModel, Layer
from recurformer.store.checkpoints import Checkpoint, TrainingState, checkpoint_at, newest_checkpoint, resolve
from recurformer.training.checkpoint import restore_rng
from recurformer.training.config import TrainConfig, open_tokens
from recurformer.training.distributed import OneProcess
from recurformer.training.logging import import_logger
from recurformer.training.optimizer import load_optimizer_tensors, make_optimizer

if TYPE_CHECKING:
    from recurformer.data import TokenDataset, TrainingWindows
    from recurformer.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class RunData:
    """The tokens that a run learns from and is evaluated on."""

    training: TokenDataset
    validation: TokenDataset | None
    tokenizer: Tokenizer | None  # None: raw shards have none
    windows: TrainingWindows  # of the training tokens, in the run's order


def open_data(config: TrainConfig, run: Path | None = None) -> RunData:
    """Open a run's data, and import its loggers: what is missing is refused before anything is written.

    Args:
        run: folder of a run that goes on. Relative paths of data also hold from the folders above it.

    Raises:
        ValueError: for data that are missing, damaged or of another tokenizer than the model, and for a missing logger.
    """

    data = config.data
    if run is not None:
        found = None if data.validation is None else locate(data.validation, run)
        data = replace(data, train=locate(data.train, run), validation=found)
    training = open_tokens(data, "train")
    tokenizer = training.tokenizer()
    check_vocabulary(training, config.model.vocab_size, *starting_tokenizer(config))
    validation = None
    if data.validation is not None:
        validation = open_tokens(data, "validation")
        check_vocabulary(validation, config.model.vocab_size, tokenizer, data.train)
    for name in config.log.loggers:
        import_logger(name)
    windows = TrainingWindows(training, data.window, data.seed, data.packing)
    return RunData(training, validation, tokenizer, windows)


def starting_tokenizer(config: TrainConfig) -> tuple[Tokenizer | None, Path | None]:
    """Return the tokenizer beside the model that training starts from, and its folder; None where there is none."""

    if config.init_from is None or not Path(config.init_from).is_dir():  # a resumed run no longer needs it
        return None, None
    folder = resolve(config.init_from)
    return (load_tokenizer(folder), folder) if has_tokenizer(folder) else (None, None)


def find_checkpoint(folder: Path, say: Callable[[str], None], processes: OneProcess) -> Checkpoint | None:
    """Return the newest intact checkpoint, as the first process sees it; None when there is none."""
    found = processes.together(lambda: newest_checkpoint(folder, say), alone=True)
    step = processes.first(found.step if found else -1)
    return found if found or step < 0 else checkpoint_at(folder, step)


def start_training(
    config: TrainConfig, device: torch.device, data: RunData, checkpoint: Checkpoint | None, processes: OneProcess
) -> tuple[LanguageModel, torch.optim.AdamW, TrainingState]:
    """Return model, optimizer and state as the checkpoint has them, or new ones without a checkpoint.

    Raises:
        ValueError: when the checkpoint belongs to other data or to another model.
    """
    torch.manual_seed(config.seed)
    model = make_model(config, device, checkpoint, processes)
    optimizer = make_optimizer(model, config.optimizer)
    if checkpoint is None:
        return model, optimizer, TrainingState(dataset=data.training.fingerprint)
    state, tensors, rng = checkpoint.read()
    if state.dataset != data.training.fingerprint:
        raise ValueError(
            f"data.train {config.data.train!r} holds other tokens than the run was trained on (fingerprint "
            f"{data.training.fingerprint} instead of {state.dataset}); point it to the same data or start a new run"
        )
    load_optimizer_tensors(optimizer, model, tensors)
    restore_rng(rng)
    return model, optimizer, state


def make_model(
    config: TrainConfig, device: torch.device, checkpoint: Checkpoint | None, processes: OneProcess
) -> LanguageModel:
    """Return the model in training mode, with the weights of the checkpoint, of `init_from`, or new ones.

    New weights are drawn on the CPU, so they depend on the seed alone.

    Raises:
        ValueError: when the weights have other shapes than the model.
    """
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    model = LanguageModel(config.model).to(dtype)
    model.scan = config.scan
    compiled = device.type == "cuda" if config.compile is None else config.compile
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.compiled = compiled
    model.recompute = "standard" if config.recompute else "none"
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
    return processes.place(model, device).train()
