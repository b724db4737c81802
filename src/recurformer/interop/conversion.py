"""Model folders of one kind into folders of another: the `convert` command."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import SafetensorError

from recurformer.config import ModelConfig
from recurformer.data.tokenizer import has_tokenizer, load_tokenizer
from recurformer.files import appearing
from recurformer.interop.llama import layer_kinds, load_llama, save_llama
from recurformer.interop.official import load_official, save_official
from recurformer.interop.tokenizer import write_tokenizer
from recurformer.model import LanguageModel
from recurformer.reading import brief, check_regular, read_table
from recurformer.settings import shown
from recurformer.store import folders
from recurformer.store.checkpoints import resolve
from recurformer.store.weights import CONFIG_FILE

if TYPE_CHECKING:
    from recurformer.data.tokenizer import Tokenizer

Target = Literal["recurformer", "hf", "llama", "official"]
# The files that a Hugging Face folder keeps beside the model. They are copied, then the tokenizer is written over them.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.*", "*.model", "recurformer_tokenizer.json",
)  # fmt: skip


def convert(
    source: str | Path,
    destination: str | Path,
    to: Target = "recurformer",
    *,
    layers: str | None = None,
    tokenizer: str | None = None,
    dtype: torch.dtype | None = None,
) -> ModelConfig:
    """Read a model of any known kind and write it as another. The tokenizer goes with it.

    Args:
        source: a model's or a run's folder of ours; a Llama-style folder (`load_llama`); an official checkpoint, as a
            folder or a file (`load_official`).
        destination: a folder that is missing or empty. It appears when it is complete, and not before.
        to: "recurformer"; "hf": the same, with all that transformers needs; "llama" (`save_llama`); "official"
            (`save_official`).
        layers: change the kinds of the layers: "recurrent", "standard", "first:K", or the numbers of the recurrent
            ones, as "0,5". None: as they are.
        tokenizer: as `recurformer.load_tokenizer` takes it; None: the one beside the source.
        dtype: of the written parameters; None: as stored.

    Returns:
        The configuration of the model as written.

    Raises:
        ValueError: for a source of an unknown kind, a destination in the way, or an option that the target can't
            express.
        OSError: when the destination cannot be written (a full disk). Nothing is left behind then.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists and is not an empty folder; choose another destination")
    with appearing(destination) as folder:  # first: a second process with this destination is refused at once
        model, beside = read(Path(source))
        if layers is not None:
            model = with_layers(model, layers)
        if dtype is not None:
            model = model.to(dtype)
        words = find_tokenizer(beside if tokenizer is None else tokenizer)
        if words is not None and words.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {words.vocab_size} ids, the model {model.config.vocab_size}; give the model's own "
                "with --tokenizer"
            )
        if tokenizer is None and beside is not None:
            copy_companions(beside, folder)
        if words is not None:
            write_tokenizer(words, folder, for_transformers=to in ("hf", "llama"))
        if to == "recurformer":
            folders.save(model, folder)
        elif to == "hf":
            save_hf(model, folder, words)
        elif to == "llama":
            save_llama(model, folder, eos_token_id=words and words.eos_id)
        else:
            save_official(model, folder)
    return model.config


def read(source: Path) -> tuple[LanguageModel, Path | None]:
    """Return the model of a path, and the folder where its tokenizer may lie.

    Raises:
        ValueError: when it is no model of a known kind.
    """
    if source.is_file():
        return load_official(source), None
    folder = resolve(source)
    options = folder / CONFIG_FILE
    kind = read_table(options).get("model_type") if options.exists() else None
    if kind == "recurformer":
        return folders.load(folder), folder
    return (load_official(folder) if kind in (None, "olmo") else load_llama(folder)), folder


def copy_companions(source: Path, destination: Path) -> None:
    """Copy the files that a Hugging Face folder keeps beside the model.

    Raises:
        ValueError: for a link that leads out of the folder, and for a device or a pipe. A folder from elsewhere must
            not be able to name any file of this machine.
    """
    root = source.resolve()
    inside = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for file in sorted({file for pattern in COMPANIONS for file in source.glob(pattern)}):
        target = file.resolve()
        if not any(target.is_relative_to(folder) for folder in inside):  # Hugging Face's cache links to its blobs
            raise ValueError(
                f"{file} is a link to {shown(str(target))}, outside of its folder; put a copy in its place"
            )
        check_regular(file)
        shutil.copyfile(file, destination / file.name)


def with_layers(model: LanguageModel, layers: str) -> LanguageModel:
    """Return a model of the same weights with other kinds of layers."""
    kinds: object = layers
    if layers and all(part.strip().isdecimal() for part in layers.split(",")):
        kinds = layer_kinds(model.config.n_layers, map(int, layers.split(",")))
    config = dataclasses.replace(model.config, layers=kinds)  # pyright: ignore[reportArgumentType]
    return folders.assembled(config, model.state_dict())


def find_tokenizer(source: str | Path | None) -> Tokenizer | None:
    """Return the tokenizer that is named, or that lies in a folder; None when the folder has none."""

    if source is None or (isinstance(source, Path) and not has_tokenizer(source)):
        return None
    return load_tokenizer(source)


def save_hf(model: LanguageModel, folder: Path, tokenizer: Tokenizer | None) -> None:
    """Write our folder with a generation configuration."""
    try:
        from recurformer import hf
    except ImportError as error:
        raise ValueError(str(error)) from error
    made = hf.RecurformerForCausalLM.from_model(model)
    if tokenizer is not None and made.generation_config is not None:
        pad = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
        made.generation_config.eos_token_id, made.generation_config.pad_token_id = tokenizer.eos_id, pad
    try:
        made.save_pretrained(folder)
    except SafetensorError as error:  # no subclass of OSError
        raise OSError(f"the model could not be written: {brief(error)}") from error
