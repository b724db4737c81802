"""Models in folders: a flat `config.json` and `model.safetensors`, tokenizer files beside them. Never a pickle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recurformer.config import ModelConfig
from recurformer.files import replacing
from recurformer.model import LanguageModel
from recurformer.store.checkpoints import resolve
from recurformer.store.weights import CONFIG_FILE, WEIGHTS_FILE, read_weights, write_tensors

if TYPE_CHECKING:
    from recurformer.data.tokenizer import Tokenizer

FORMAT_VERSION = 1


def save(model: LanguageModel, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a model, and its tokenizer when given, into a folder (made if missing).

    Every file is written under a temporary name, synced and renamed: none is ever half-written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS_FILE) as temporary:
        write_tensors(plain_state_dict(model), temporary)
    save_description(model.config, folder, tokenizer)


def save_description(config: ModelConfig, folder: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write what belongs to a model's folder beside the weights."""
    header = {
        "model_type": "recurformer",
        "architectures": ["RecurformerForCausalLM"],
        "format_version": FORMAT_VERSION,
    }
    with replacing(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps({**header, **config.to_dict()}, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder)


def load(folder: str | Path, dtype: torch.dtype | None = None, device: Any = None) -> LanguageModel:
    """The model of a folder written by `save`, or of a training run's folder, in evaluation mode.

    Args:
        folder: the model's folder, or a run's (its best checkpoint is taken).
        dtype: of the parameters; None: as stored.
        device: None: the CPU.

    Raises:
        ValueError: for a folder that holds no such model, or a truncated or foreign file; it says which and why.
    """
    folder = resolve(folder)
    config = load_config(folder)
    path = folder / WEIGHTS_FILE
    weights = read_weights(folder)
    with torch.device("meta"):
        model = LanguageModel(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            raise ValueError(f"{path} lacks {name!r}, which its {CONFIG_FILE} asks for; the two do not belong together")
        if name not in expected:
            raise ValueError(f"{path} holds {name!r}, which its {CONFIG_FILE} has no place for")
        if tuple(weights[name].shape) != expected[name]:
            raise ValueError(
                f"{name!r} in {path} has shape {tuple(weights[name].shape)}, its {CONFIG_FILE} says {expected[name]}"
            )
    model.load_state_dict({name: w.to(device=device, dtype=dtype) for name, w in weights.items()}, assign=True)
    return model.requires_grad_(True).eval()


def load_config(folder: str | Path) -> ModelConfig:
    """The ModelConfig in a model folder's `config.json`."""
    path = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder} is no model folder: it has no {CONFIG_FILE}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(values, dict) or values.get("model_type") != "recurformer":
        found = values.get("model_type") if isinstance(values, dict) else None
        raise ValueError(f"{path} describes model_type {found!r}, not 'recurformer'; convert the model first")
    check_format_version(values.get("format_version", FORMAT_VERSION), path)
    names = [f.name for f in dataclasses.fields(ModelConfig)]
    if missing := [name for name in ("vocab_size", "d_model", "n_layers", "n_heads", "layers") if name not in values]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it is incomplete")
    return ModelConfig.from_dict({name: values[name] for name in names if name in values})


def check_format_version(version: Any, source: object) -> None:
    """Raise ValueError when a folder was written by a newer version than this one."""
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(f"{source} has format_version {version!r}; this version reads up to {FORMAT_VERSION}: upgrade")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer saved beside a model (or in a training run), or one named by file or as "bytes"."""
    from recurformer.data.tokenizer import load_tokenizer as load_by_name

    return load_by_name(str(folder) if not Path(folder).is_dir() else str(resolve(folder)))


def plain_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict under the names of the bare model, whatever wraps it (torch.compile, DDP)."""
    return {
        name.replace("_orig_mod.", "").removeprefix("module."): tensor for name, tensor in model.state_dict().items()
    }


def read_model_config(path: str | Path) -> ModelConfig:
    """The ModelConfig that a path means, by the rules of `resolve`."""
    return load_config(resolve(path))
