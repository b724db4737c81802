"""Model folders of one kind into folders of another: the `convert` command."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from recurformer.config import ModelConfig
from recurformer.files import appearing
from recurformer.interop.llama import layer_kinds, load_llama, save_llama
from recurformer.interop.official import load_official, save_official
from recurformer.model import LanguageModel
from recurformer.store import folders

if TYPE_CHECKING:
    from recurformer.data.tokenizer import Tokenizer

Target = Literal["recurformer", "hf", "llama", "official"]
# What a Hugging Face folder keeps beside the model: copied as it is.
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
    """Read a model of any kind that we know and write it as another. The tokenizer goes with it.

    Args:
        source: a model's or a run's folder of ours; a Llama-style folder (`load_llama`); an official checkpoint, as a
            folder or a file (`load_official`).
        destination: a folder that is missing or empty. It appears when it is complete, and not before.
        to: "recurformer"; "hf": the same and all that transformers wants beside it; "llama" (`save_llama`); "official"
            (`save_official`).
        layers: change the kinds of the layers: "recurrent", "standard", "first:K", or the numbers of the recurrent
            ones, as "0,5". None: as they are.
        tokenizer: as `recurformer.load_tokenizer` takes it; None: the one beside the source.
        dtype: of the written parameters; None: as stored.

    Returns:
        The configuration of the model as written.

    Raises:
        ValueError: for a source that is none of these, a destination in the way, or what the target can't express.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists and is not an empty folder; choose another destination")
    model, beside = read(Path(source))
    if layers is not None:
        model = with_layers(model, layers)
    if dtype is not None:
        model = model.to(dtype)
    words = find_tokenizer(beside if tokenizer is None else tokenizer)
    if words is not None and words.vocab_size > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {words.vocab_size} ids, the model {model.config.vocab_size}; they differ")
    with appearing(destination) as folder:
        if tokenizer is None and beside is not None:
            for file in (file for pattern in COMPANIONS for file in beside.glob(pattern)):
                shutil.copyfile(file, folder / file.name)
        if words is not None:
            words.save(folder)
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
    """The model of a path, and the folder where its tokenizer may lie.

    Raises:
        ValueError: when it is no model that we know.
    """
    if source.is_file():
        return load_official(source), None
    folder = folders.resolve(source)
    options = folder / folders.CONFIG_FILE
    try:
        kind = json.loads(options.read_text(encoding="utf-8")).get("model_type") if options.is_file() else None
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{options} is no configuration ({error})") from error
    if kind == "recurformer":
        return folders.load(folder), folder
    return (load_official(folder) if kind in (None, "olmo") else load_llama(folder)), folder


def with_layers(model: LanguageModel, layers: str) -> LanguageModel:
    """The same weights with other kinds of layers."""
    kinds: object = layers
    if layers and all(part.strip().isdigit() for part in layers.split(",")):
        kinds = layer_kinds(model.config.n_layers, map(int, layers.split(",")))
    config = dataclasses.replace(model.config, layers=kinds)  # pyright: ignore[reportArgumentType]
    with torch.device("meta"):
        changed = LanguageModel(config)
    changed.load_state_dict(model.state_dict(), assign=True)
    return changed.eval()


def find_tokenizer(source: str | Path | None) -> Tokenizer | None:
    """The tokenizer that is named, or that lies in a folder; None when there is none there."""
    from recurformer.data.tokenizer import has_tokenizer, load_tokenizer

    if source is None or (isinstance(source, Path) and not has_tokenizer(source)):
        return None
    return load_tokenizer(source)


def save_hf(model: LanguageModel, folder: Path, tokenizer: Tokenizer | None) -> None:
    """Our folder with a generation configuration and, for AutoTokenizer, the tokenizer in Hugging Face's form."""
    try:
        from recurformer import hf
    except ImportError as error:
        raise ValueError(str(error)) from error
    made = hf.RecurformerForCausalLM.from_model(model)
    if tokenizer is not None and made.generation_config is not None:
        pad = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
        made.generation_config.eos_token_id, made.generation_config.pad_token_id = tokenizer.eos_id, pad
    made.save_pretrained(folder)
    if tokenizer is not None and tokenizer.kind != "sentencepiece" and not (folder / "tokenizer_config.json").is_file():
        hf.load_tokenizer(folder).save_pretrained(folder)
