"""Checkpoints of the official code (geniucos/recurrent-transformer, a fork of OLMo), read into a `LanguageModel`.

The official code fuses projections (`att_proj` is q, k, v; `kv_proj` is k, v; `ff_proj` of a swiglu is up, gate), lists
the tensors that its blocks share once for every module that holds them, and prefixes names with whatever wrapped the
model. `canonical_name` undoes the last two, `parameter_names` the first.
"""

from __future__ import annotations

import dataclasses
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recurformer.config import Layers, ModelConfig, Vocabulary, Width
from recurformer.files import replacing, write_json
from recurformer.model import LanguageModel
from recurformer.reading import brief, build, check_regular, read_table
from recurformer.settings import Positive, Settings, shown, suggest
from recurformer.store.folders import assembled, plain_state_dict
from recurformer.store.weights import (
    Shape,
    StoredTensor,
    check_dtype,
    in_memory,
    open_tensors,
    parameter_shapes,
    write_tensors,
)

WEIGHT_FILES, CONFIG_FILES = ("model.pt", "model.safetensors"), ("config.yaml", "config.json")

# Every option of the official model configuration that changes the function, with the official default.
DEFAULTS: dict[str, Any] = {
    "d_model": 768,
    "n_heads": 12,
    "n_kv_heads": None,
    "n_layers": 12,
    "mlp_ratio": 4,
    "mlp_hidden_size": None,
    "vocab_size": 50257,
    "embedding_size": 50304,
    "block_type": "sequential",
    "activation_type": "swiglu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "rope": False,
    "rope_theta": 10000,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "layer_norm_type": "default",
    "layer_norm_with_affine": True,
    "layer_norm_eps": 1e-5,
    "include_bias": True,
    "bias_for_layer_norm": None,
    "weight_tying": True,
    "attention_dropout": 0.1,
    "residual_dropout": 0.1,
    "embedding_dropout": 0.1,
    "clip_qkv": None,
    "multi_query_attention": None,
    "embedding_layer_norm": False,
    "scale_logits": False,
    "norm_after": False,
}


@dataclass(frozen=True, kw_only=True)
class OfficialSizes(Settings):
    """Types and limits of the official options that are not among a few supported values."""

    d_model: Width
    n_heads: Width
    n_kv_heads: Width | None
    n_layers: Layers
    mlp_ratio: Width
    mlp_hidden_size: Width | None
    vocab_size: Vocabulary
    embedding_size: Vocabulary | None
    alibi: bool
    rope: bool
    rope_theta: Positive
    attention_layer_norm: bool
    layer_norm_eps: Positive
    include_bias: bool
    weight_tying: bool


# Options that change speed, precision or a fresh initialisation alone.
IGNORED = (
    "block_group_size", "bwd_mlp_chunks", "emb_init_std", "eos_token_id", "flash_attention", "init_cutoff_factor",
    "init_device", "init_fn", "init_std", "max_sequence_length", "pad_token_id", "precision", "rope_full_precision",
    "scale_emb_init", "tanh_norm_alpha", "tanh_trainable_alpha",
)  # fmt: skip

# The supported values of options that admit few, as (official value, ours).
BLOCK_TYPES = {
    "recurrent": "recurrent",
    "recurrent_autograd": "recurrent",
    "sequential": "standard",
    "llama": "standard",
}
ACTIVATIONS = {"gelu": "gelu", "swiglu": "swiglu"}
NORMS = {"default": "layer", "low_precision": "layer", "rms": "rms"}
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "block_type": tuple(BLOCK_TYPES),
    "activation_type": tuple(ACTIVATIONS),
    "layer_norm_type": tuple(NORMS),
    "attention_layer_norm_with_affine": (True,),
    "layer_norm_with_affine": (True,),
    "bias_for_layer_norm": (False,),
    "alibi_bias_max": (8.0,),
    "attention_dropout": (0.0,),
    "residual_dropout": (0.0,),
    "embedding_dropout": (0.0,),
    "clip_qkv": (None,),
    "multi_query_attention": (None, False),
    "embedding_layer_norm": (False,),
    "scale_logits": (False,),
    "norm_after": (False,),
}


def load_official(
    path_or_state_dict: str | Path | Mapping[str, Any],
    config: ModelConfig | Mapping[str, Any] | str | Path | None = None,
) -> LanguageModel:
    """Return the model of an official checkpoint, in evaluation mode, with parameters in the stored dtype.

    Args:
        path_or_state_dict: a folder as the official code writes it (`model.pt` or `model.safetensors`, with
            `config.yaml` or `config.json`), a `.pt` or `.safetensors` file, or a state dict with official names.
            Pickled files are read with `weights_only=True` alone.
        config: the official options (a dictionary, or a YAML or JSON file; a whole training configuration has them
            under `model`), or a ModelConfig. None: the configuration file beside the weights.

    Raises:
        ValueError: for an option, a tensor or a file that can't be read faithfully; it names what and why.
    """
    weights = path_or_state_dict
    if isinstance(weights, str | Path):
        path = Path(weights)
        if config is None:
            config = find_file(path if path.is_dir() else path.parent, CONFIG_FILES)
        weights = find_file(path, WEIGHT_FILES) if path.is_dir() else path
    if config is None:
        raise ValueError("a state dict does not say how many heads a model has; pass config=")
    source: object = "the official configuration"
    if isinstance(config, str | Path):
        source = config
        config = read_table(Path(config))
    if not isinstance(config, ModelConfig):
        config = model_config(config, source)
    found = read_tensors(weights) if isinstance(weights, Path) else tensors_in(weights)
    return assembled(config, our_tensors(found, config))


# --- configuration ---------------------------------------------------------------------------------------------------


def model_config(options: Mapping[str, Any], source: object = "the official configuration") -> ModelConfig:
    """Return the ModelConfig of a dictionary of official options. An option that is left out has the official default.

    Args:
        source: the file of the options, named in messages.

    Raises:
        ValueError: for an unknown option, or a value that changes the function in a way that we don't have.
    """
    given = supported_options(options, source)
    vocabulary, rows = given["vocab_size"], given["embedding_size"] or given["vocab_size"]
    if rows < vocabulary:
        raise ValueError(f"the official option embedding_size {rows} is below vocab_size {vocabulary}")
    width = given["mlp_hidden_size"] or given["mlp_ratio"] * given["d_model"]
    swiglu = given["activation_type"] == "swiglu"
    return ModelConfig(
        vocab_size=vocabulary,
        vocab_multiple=next(m for m in (1, 128, rows) if -(-vocabulary // m) * m == rows),
        d_model=given["d_model"],
        n_layers=given["n_layers"],
        n_heads=given["n_heads"],
        n_kv_heads=None if given["n_kv_heads"] in (None, given["n_heads"]) else given["n_kv_heads"],
        layers=BLOCK_TYPES[given["block_type"]],
        d_mlp=width // 2 if swiglu else width,
        activation=ACTIVATIONS[given["activation_type"]],  # pyright: ignore[reportArgumentType]
        position="alibi" if given["alibi"] else "rope",
        rope_theta=given["rope_theta"],
        norm=NORMS[given["layer_norm_type"]],  # pyright: ignore[reportArgumentType]
        norm_eps=given["layer_norm_eps"],
        qk_norm="full" if given["attention_layer_norm"] else "none",
        residual_scale="none",
        tie_embeddings=given["weight_tying"],
        attention_bias=given["include_bias"],
        mlp_bias=given["include_bias"],
        init="official",
    )


def supported_options(options: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Return all official options with their defaults filled in, checked one by one and together.

    Raises:
        ValueError: as `model_config` does.
    """
    options = options.get("model", options)
    if not isinstance(options, Mapping):
        raise ValueError(f"model in {source} is {shown(options)}, not a table of options")
    for name in options:
        if name not in DEFAULTS and name not in IGNORED:
            raise ValueError(f"unknown option {shown(name)} in {source}{suggest(str(name), [*DEFAULTS, *IGNORED])}")
    given = {**DEFAULTS, **options}
    for name, value in given.items():  # interpolations of the official YAML files, such as ${model.n_heads}
        if isinstance(value, str) and (reference := re.fullmatch(r"\$\{model\.(\w+)\}", value)):
            given[name] = given.get(reference[1], value)
    if given["bias_for_layer_norm"] is None:
        given["bias_for_layer_norm"] = given["include_bias"]
    given |= dataclasses.asdict(build(OfficialSizes, given, source))
    for name, supported in SUPPORTED.items():
        if given[name] not in supported:
            origin = "" if name in options else " by default"
            raise ValueError(
                f"the official option {name} is {shown(given[name])}{origin}; supported: "
                f"{', '.join(map(repr, supported))}"
            )
    if given["alibi"] == given["rope"]:
        both = given["alibi"]
        raise ValueError(
            f"the official options alibi and rope are both {both}; supported: one of them"
            + ("" if both else " (there are no learned position embeddings here)")
        )
    if given["include_bias"] and not given["weight_tying"]:
        raise ValueError(
            "the official option include_bias is True without weight_tying, which puts a bias on the output layer; "
            "supported: include_bias false, or weight_tying true"
        )
    return given


# --- tensors ---------------------------------------------------------------------------------------------------------


def canonical_name(name: str) -> str:
    """Return the one name of an official parameter, whichever wrapper or sharing module listed it.

    `module.transformer.blocks.0.graphed_callable.block.pre_attention_block.kv_proj.weight` (DDP, one CUDA graph a
    layer, a module that shares the tensor) is `transformer.blocks.0.kv_proj.weight`.
    """
    name = re.sub(r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", name)
    name = re.sub(r"\bblocks\.\d+\.graphed_callable\.blocks\.", "blocks.", name)  # one graph for all layers
    name = re.sub(r"\bgraphed_callable\.(block\.)?", "", name)
    name = re.sub(r"\b(pre|post)_attention_block\.", "", name)
    return name if name.startswith("transformer.") else f"transformer.{name}"


def parameter_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Return {canonical official name: names of our parameters that it holds, concatenated along dimension 0}.

    A checkpoint has some of these: q, k and v come fused as `att_proj`, as `q_proj` and `kv_proj`, or one by one.
    """
    parts = {
        "attn_norm": ("attention_norm",),
        "q_norm": ("q_norm",),
        "k_norm": ("k_norm",),
        "att_proj": ("q_proj", "k_proj", "v_proj"),
        "q_proj": ("q_proj",),
        "kv_proj": ("k_proj", "v_proj"),
        "k_proj": ("k_proj",),
        "v_proj": ("v_proj",),
        "attn_out": ("o_proj",),
        "ff_norm": ("mlp_norm",),
        "ff_proj": ("up_proj", "gate_proj") if config.activation == "swiglu" else ("up_proj",),
        "ff_out": ("down_proj",),
    }
    names: dict[str, tuple[str, ...]] = {"wte.weight": ("embedding.weight",), "ln_f.weight": ("norm.weight",)}
    if not config.tie_embeddings:
        names["ff_out.weight"] = ("head.weight",)
    for l in range(config.n_layers):
        for official, ours in parts.items():
            kinds = ("weight",) if official.endswith("norm") else ("weight", "bias")
            for kind in kinds:
                names[f"blocks.{l}.{official}.{kind}"] = tuple(f"layers.{l}.{name}.{kind}" for name in ours)
    return {f"transformer.{name}": ours for name, ours in names.items()}


def our_tensors(found: Mapping[str, StoredTensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return our state dict from official tensors. Names, shapes and types are checked before one is read.

    Raises:
        ValueError: for a tensor that is unknown, missing, of another shape or type, or listed twice with different
            values.
    """
    names, expected = parameter_names(config), parameter_shapes(config)
    places: list[tuple[str, StoredTensor, list[str]]] = []
    for listed, tensor in flatten_groups(found).items():
        name = canonical_name(listed)
        ours = [our_name for our_name in names.get(name, ()) if our_name in expected]
        if not ours:
            raise ValueError(f"unknown tensor {shown(listed)} in the official checkpoint{suggest(name, names)}")
        shape = (sum(expected[our_name][0] for our_name in ours), *expected[ours[0]][1:])
        if tensor.shape != shape:
            raise ValueError(f"{listed!r} has shape {shown(tensor.shape)}; the configuration asks for {shape}")
        check_dtype(listed, tensor)
        places.append((listed, tensor, ours))
    filled = {our_name for _, _, ours in places for our_name in ours}
    if missing := [name for name in expected if name not in filled]:
        raise ValueError(
            f"the official checkpoint lacks the tensors of {len(missing)} parameters, the first {missing[0]!r}; "
            "it is incomplete or of another configuration"
        )
    return _split(places, expected)


def _split(places: Iterable[tuple[str, StoredTensor, list[str]]], expected: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Return our parameters, read from (official name, tensor, our names of its parts)."""
    made, source = dict[str, Tensor](), dict[str, str]()
    for listed, tensor, ours in places:
        parts = tensor.read().split([expected[our_name][0] for our_name in ours])
        for our_name, part in zip(ours, parts, strict=True):
            if our_name in made and not torch.equal(made[our_name], part):
                raise ValueError(
                    f"{listed!r} and {source[our_name]!r} share one parameter but hold different values; "
                    "the checkpoint is damaged"
                )
            if our_name not in made:
                made[our_name], source[our_name] = part.clone() if len(ours) > 1 else part, listed
    return made


def flatten_groups(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors with `blocks.N` in place of `block_groups.G.I` (blocks wrapped in groups of equal size)."""
    places = [re.search(r"\bblock_groups\.(\d{1,5})\.(\d{1,5})\.", name) for name in tensors]
    size = 1 + max((int(place[2]) for place in places if place), default=0)
    return {
        name.replace(place[0], f"blocks.{int(place[1]) * size + int(place[2])}.") if place else name: tensor
        for (name, tensor), place in zip(tensors.items(), places, strict=True)
    }


# --- files -----------------------------------------------------------------------------------------------------------


def find_file(folder: Path, names: Iterable[str]) -> Path:
    """Return the first of `names` that a folder has."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder} has no {' or '.join(names)}")


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the state dict in a `.safetensors` or a pickled file. Nothing but tensors is ever unpickled.

    Raises:
        ValueError: when it is missing, damaged or no state dict.
    """
    try:
        size = check_regular(path)
        if path.suffix == ".safetensors":
            return open_tensors(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > size:  # PyTorch never compresses; a small file could unpack to any size
                raise ValueError(f"it unpacks to {unpacked:,} bytes, more than the file has")
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{path} can't be read as a state dict: {brief(error)}") from error
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{path} holds a {type(tensors).__name__}, not a state dict")
    return tensors_in(tensors, str(path))


def tensors_in(tensors: Mapping[Any, Any], source: str = "the state dict") -> dict[str, StoredTensor]:
    """Return the entries of a state dict; raise ValueError for one that is no dense tensor."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{shown(name)} in the official checkpoint is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{name!r} in the official checkpoint is no dense tensor; store it as one")
    return in_memory(tensors, source)


# --- back ------------------------------------------------------------------------------------------------------------


def save_official(model: LanguageModel, folder: str | Path) -> None:
    """Write a model as an official checkpoint: `config.json` and `model.safetensors`, with the official names.

    The official code itself reads a pickled `model.pt`, which is not written here: in its environment,
    `torch.save(safetensors.torch.load_file("model.safetensors"), "model.pt")` makes one. The depth scale of the
    residual branches goes into the output projections.

    Raises:
        ValueError: for every option that the official code does not have, such as layers of both kinds.
    """
    config, folder = model.config, Path(folder)
    options = official_options(config)
    ours = {name: tensor.detach() for name, tensor in plain_state_dict(model).items()}
    if config.branch_scale != 1:
        for name in ours:
            if "o_proj" in name or "down_proj" in name:
                ours[name] = ours[name] * config.branch_scale
    q, fused = ("q_proj", "kv_proj") if options["block_type"] == "recurrent" else ("", "att_proj")
    left_out = {"q_proj", "k_proj", "v_proj", "att_proj", "kv_proj"} - {q, fused}
    tensors = {
        official: torch.cat([ours[name] for name in names]).contiguous()
        for official, names in parameter_names(config).items()
        if official.split(".")[-2] not in left_out and all(name in ours for name in names)
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "model.safetensors") as temporary:
        write_tensors(tensors, temporary)
    write_json(folder / "config.json", options)


def official_options(config: ModelConfig) -> dict[str, Any]:
    """Return the official options of a model.

    Raises:
        ValueError: for an option that the official code does not have.
    """
    recurrent = "recurrent" in config.layer_kinds
    wanted = {
        "layers": (len(set(config.layer_kinds)) == 1, "its layers are all of one kind"),
        "position": (config.position == "alibi" or not recurrent, "its recurrent layers have 'alibi'"),
        "alibi_slopes": (config.position != "alibi" or config.alibi_slopes == "geometric", "it has 'geometric'"),
        "activation": (config.activation != "gelu_tanh", "it has 'gelu' and 'swiglu'"),
        "qk_norm": (config.qk_norm != "head", "it has 'full' and 'none'"),
        "n_kv_heads": (
            config.kv_heads == config.n_heads or not recurrent,
            "its recurrent layers have as many as heads",
        ),
        "head_dim": (config.head_width * config.n_heads == config.d_model, "it has d_model / n_heads"),
        "mlp_bias": (config.mlp_bias == config.attention_bias, "it has biases everywhere or nowhere"),
        "tie_embeddings": (config.tie_embeddings or not config.attention_bias, "with biases it must be true"),
    }
    if config.position == "none":
        wanted["position"] = (False, "it has 'alibi' and 'rope'")
    for name, (fits, why) in wanted.items():
        if not fits:
            raise ValueError(f"{name} is {shown(getattr(config, name))}, which the official code can't express: {why}")
    swiglu = config.activation == "swiglu"
    return {
        "d_model": config.d_model,
        "n_heads": config.n_heads,
        "n_kv_heads": None if config.kv_heads == config.n_heads else config.kv_heads,
        "n_layers": config.n_layers,
        "mlp_hidden_size": 2 * config.mlp_width if swiglu else config.mlp_width,
        "vocab_size": config.vocab_size,
        "embedding_size": config.padded_vocab_size,
        "block_type": "recurrent" if recurrent else "sequential",
        "activation_type": config.activation,
        "alibi": config.position == "alibi",
        "rope": config.position == "rope",
        "rope_theta": config.rope_theta,
        "attention_layer_norm": config.qk_norm == "full",
        "layer_norm_type": {"layer": "default", "rms": "rms"}[config.norm],
        "layer_norm_eps": config.norm_eps,
        "include_bias": config.attention_bias,
        "bias_for_layer_norm": False,
        "weight_tying": config.tie_embeddings,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
    }
