"""Models in folders: a flat `config.json` and `model.safetensors`, tokenizer files beside them. Never a pickle."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from recurformer.config import ModelConfig
from recurformer.model import LanguageModel

if TYPE_CHECKING:
    from recurformer.data.tokenizer import Tokenizer

FORMAT_VERSION = 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"  # of shards, as Hugging Face writes it
PARTS = "shard-*.safetensors"  # of tensors, one file for each of the processes that have written them


def save(model: LanguageModel, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a model, and its tokenizer when given, into a folder (made if missing).

    Every file is written under a temporary name, synced and renamed: none is ever half-written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().contiguous() for name, tensor in plain_state_dict(model).items()}
    with replacing(folder / WEIGHTS_FILE) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
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


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, on the CPU: of `model.safetensors`, of the shards in Hugging Face's index, or of the
    parts that the processes of a run have written."""
    path = folder / WEIGHTS_FILE
    if path.is_file():
        return _read_safetensors(path)
    if any(folder.glob(PARTS)):
        return read_parts(folder)
    index = folder / INDEX_FILE
    if not index.is_file():
        raise ValueError(f"{folder} has a {CONFIG_FILE} but no {WEIGHTS_FILE}; the folder is incomplete")
    try:
        shards = json.loads(index.read_text())["weight_map"]
        files = sorted({folder / Path(name).name for name in shards.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error}); copy or save it again") from error
    return {name: tensor for file in files for name, tensor in _read_safetensors(file).items()}


def read_parts(folder: Path) -> dict[str, torch.Tensor]:
    """Whole tensors, on the CPU, of what several processes have written, each its own part."""
    from torch.distributed import checkpoint

    try:
        reader = checkpoint.HuggingFaceStorageReader(str(folder))
        found = reader.read_metadata().state_dict_metadata
        tensors = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in found.items()}  # pyright: ignore[reportAttributeAccessIssue]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    except (SafetensorError, OSError, checkpoint.CheckpointException) as error:
        raise ValueError(f"a part in {folder} is truncated or no safetensors file ({error})") from error
    return tensors


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); copy or save it again") from error


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


def resolve(folder: str | Path) -> Path:
    """The model folder meant by a path: itself, the one inside a checkpoint, or the best checkpoint's of a run."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give a model's or a training run's folder")
    if (folder / "checkpoints").is_dir() or (folder / "manifest.json").is_file():
        from recurformer.training.checkpoint import resolve_model_folder

        return resolve_model_folder(folder)
    return folder


def plain_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict under the names of the bare model, whatever wraps it (torch.compile, DDP)."""
    return {
        name.replace("_orig_mod.", "").removeprefix("module."): tensor for name, tensor in model.state_dict().items()
    }


class replacing:  # noqa: N801 (reads as a verb)
    """`with replacing(path) as temporary:` write `temporary`; it is synced and takes the name `path`, or vanishes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.temporary.unlink(missing_ok=True)
            return
        with open(self.temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(self.temporary, self.path)
        sync_folder(self.path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
