"""Models in folders: a flat `config.json` and `model.safetensors`, tokenizer files beside them. Never a pickle."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from recurformer.config import ModelConfig
from recurformer.data.tokenizer import load_tokenizer as load_by_name
from recurformer.files import replacing, write_json
from recurformer.model import LanguageModel
from recurformer.reading import check_format_version, read_table
from recurformer.settings import shown
from recurformer.store.checkpoints import resolve
from recurformer.store.weights import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    StoredTensor,
    check_dtype,
    find_weights,
    parameter_shapes,
    write_tensors,
)

if TYPE_CHECKING:
    from recurformer.data.tokenizer import Tokenizer

T = TypeVar("T")
FORMAT_VERSION = 1
HF_PREFIX = "model."  # of the weights' names in the class for Hugging Face
REQUIRED = ("vocab_size", "d_model", "n_layers", "n_heads", "layers")


# --- writing ----------------------------------------------------------------------------------------------------------


def save(model: LanguageModel, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a model, and its tokenizer when given, into a folder, which is made if it is missing.

    Every file is written under another name, made durable and renamed: none is ever half-written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS_FILE) as temporary:
        write_tensors(plain_state_dict(model), temporary)
    save_description(model.config, folder, tokenizer)


def save_description(config: ModelConfig, folder: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write the files of a model's folder that are not weights: its configuration, and its tokenizer when given."""
    header = {
        "model_type": "recurformer",
        "architectures": ["RecurformerForCausalLM"],
        "format_version": FORMAT_VERSION,
    }
    write_json(folder / CONFIG_FILE, {**header, **config.to_dict()})
    if tokenizer is not None:
        tokenizer.save(folder)


def plain_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict under the names of the bare model, whatever wraps it (torch.compile, DDP)."""
    return {
        name.replace("_orig_mod.", "").removeprefix("module."): tensor for name, tensor in model.state_dict().items()
    }


def bare_names(tensors: Mapping[str, T]) -> dict[str, T]:
    """Return tensors under the names of the bare model. The Hugging Face model puts "model." before each name."""
    wrapped = all(name.startswith(HF_PREFIX) for name in tensors)
    return {name.removeprefix(HF_PREFIX) if wrapped else name: tensor for name, tensor in tensors.items()}


# --- reading ----------------------------------------------------------------------------------------------------------


def load(folder: str | Path, dtype: torch.dtype | None = None, device: Any = None) -> LanguageModel:
    """Return the model of a folder written by `save`, or of a training run's folder, in evaluation mode.

    Its weights are copies: the files may change afterwards.

    Args:
        folder: the model's folder, or a run's (its best checkpoint is taken).
        dtype: of the parameters; None: as stored.
        device: of the parameters; None: the CPU.

    Raises:
        ValueError: for a folder that holds no such model, and for a truncated or foreign file. The message names it.
    """
    folder = resolve(folder)
    config = load_config(folder)
    found = bare_names(find_weights(folder))
    check_weights(found, config, folder)
    return assembled(config, {name: tensor.read().to(device, dtype) for name, tensor in found.items()})


def assembled(config: ModelConfig, weights: Mapping[str, torch.Tensor]) -> LanguageModel:
    """Return a model of these weights in evaluation mode. They are not copied."""
    with torch.device("meta"):
        model = LanguageModel(config)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(True).eval()


def check_weights(found: Mapping[str, StoredTensor], config: ModelConfig, folder: Path) -> None:
    """Raise ValueError when tensors are not those of a model of this configuration. No tensor is read for it."""
    expected = parameter_shapes(config)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise ValueError(
                f"{folder} lacks {name!r}, which its {CONFIG_FILE} asks for; copy or save the folder again"
            )
        tensor = found[name]
        if name not in expected:
            raise ValueError(f"{tensor.source} holds {shown(name)}, which its {CONFIG_FILE} has no place for")
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{name!r} in {tensor.source} has shape {shown(tensor.shape)}, its {CONFIG_FILE} says {expected[name]}"
            )
        check_dtype(name, tensor)


def load_config(folder: str | Path) -> ModelConfig:
    """Return the ModelConfig that a path means: of a model's folder, a checkpoint or a training run (`resolve`).

    Raises:
        ValueError: for a folder without a model, another kind of model, and a damaged or newer `config.json`.
    """
    folder = resolve(folder)
    path = folder / CONFIG_FILE
    if not path.exists():
        raise ValueError(f"{folder} is no model folder: it has no {CONFIG_FILE}")
    values = read_table(path)
    kind = values.get("model_type")
    if kind is None:
        raise ValueError(f"{path} has no model_type, so it does not describe a model; give a model's or a run's folder")
    if kind != "recurformer":
        command = shlex.join(["recurformer", "convert", str(folder), f"{folder.name}-recurformer"])
        raise ValueError(
            f"{path} describes a model of type {shown(kind)}, not 'recurformer'; convert the model first: {command}"
        )
    check_format_version(values.get("format_version", FORMAT_VERSION), FORMAT_VERSION, path)
    if missing := [name for name in REQUIRED if name not in values]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it is incomplete")
    names = [f.name for f in dataclasses.fields(ModelConfig)]
    try:
        return ModelConfig.from_dict({name: values[name] for name in names if name in values})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Return the tokenizer saved beside a model or in a training run, or one named by file or as "bytes"."""

    return load_by_name(str(folder) if not Path(folder).is_dir() else str(resolve(folder)))
