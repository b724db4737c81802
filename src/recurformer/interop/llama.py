"""Llama-style models of Hugging Face, read into a `LanguageModel` and, without recurrent layers, written back.

A folder is read as it lies on disk, without the transformers library. The families share one maths: pre-norm with RMS,
half-split RoPE, SwiGLU, no residual scale. They differ in biases (Qwen2: on q, k and v), QK-norm (Qwen3) and defaults.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recurformer.config import LayerKind, ModelConfig
from recurformer.files import replacing
from recurformer.model import LanguageModel
from recurformer.settings import suggest
from recurformer.store.folders import plain_state_dict
from recurformer.store.weights import CONFIG_FILE, WEIGHTS_FILE, read_weights, write_tensors

# What a configuration file may leave out, by model type.
COMMON: dict[str, Any] = {
    "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "rope_scaling": None, "rope_parameters": None, "partial_rotary_factor": None, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "sliding_window": None, "max_position_embeddings": None,
    "quantization_config": None,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "mistral": {**COMMON, "num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 4096 * 32},
    "qwen2": {**COMMON, "use_sliding_window": False},
    "qwen3": {**COMMON, "use_sliding_window": False, "head_dim": 128},
}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# Our module names -> theirs, inside a layer and around the layers.
INSIDE = {
    "attention_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "up_proj": "mlp.up_proj",
    "gate_proj": "mlp.gate_proj",
    "down_proj": "mlp.down_proj",
}
AROUND = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


def load_llama(path_or_hf_model: str | Path | Any, recurrent_layers: Iterable[int] = ()) -> LanguageModel:
    """A pretrained Llama, Mistral, Qwen2 or Qwen3 model as a `LanguageModel`, in evaluation mode, in the stored dtype.

    Without recurrent layers it computes what the original computes. A recurrent layer has the same weights and another
    function: it needs further training.

    Args:
        path_or_hf_model: a folder as `save_pretrained` writes it (safetensors), or a transformers model.
        recurrent_layers: numbers of the layers, from 0, that become recurrent.

    Raises:
        ValueError: for another architecture, an option that we can't express (scaled RoPE, sliding windows shorter than
            the context, quantised weights, other activations), and files that do not fit; it names what and why.
    """
    if isinstance(path_or_hf_model, str | Path):
        folder = Path(path_or_hf_model)
        config = model_config(read_options(folder), recurrent_layers)
        tensors = read_weights(folder)
    else:
        config = model_config(path_or_hf_model.config.to_dict(), recurrent_layers)
        tensors = plain_state_dict(path_or_hf_model)
    with torch.device("meta"):
        model = LanguageModel(config)
    model.load_state_dict(convert(tensors, config, model.state_dict()), assign=True)
    return model.requires_grad_(True).eval()


def read_options(folder: Path) -> dict[str, Any]:
    """The configuration of a Hugging Face folder."""
    path = folder / CONFIG_FILE
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no model folder: it has no {CONFIG_FILE}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} holds a {type(options).__name__}, not a configuration")
    return options


# --- configuration ---------------------------------------------------------------------------------------------------


def model_config(options: Mapping[str, Any], recurrent_layers: Iterable[int] = ()) -> ModelConfig:
    """The ModelConfig of a Hugging Face configuration.

    Raises:
        ValueError: for a model type or an option that we can't express.
    """
    family = options.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"model_type is {family!r}; supported: {', '.join(map(repr, FAMILIES))}{suggest(str(family), FAMILIES)}"
        )
    if missing := [name for name in REQUIRED if name not in options]:
        raise ValueError(f"the {family} configuration lacks {', '.join(missing)}; it is incomplete")
    given = {**FAMILIES[family], **options}

    def refuse(name: str, value: Any, why: str) -> None:
        raise ValueError(f"the {family} option {name} is {value!r}; {why}")

    if given["hidden_act"] not in ("silu", "swish"):
        refuse("hidden_act", given["hidden_act"], "supported: 'silu'")
    if given["quantization_config"]:
        refuse("quantization_config", given["quantization_config"], "save the model with unquantised weights")
    theta = rope_theta(given, refuse)
    window = given["sliding_window"] if given.get("use_sliding_window", True) else None
    longest = given["max_position_embeddings"]
    if window is not None and (longest is None or window < longest):
        refuse(
            "sliding_window", window,
            f"it is shorter than max_position_embeddings {longest}, and our layers attend to the whole past; "
            f"to use the model on at most {window} tokens, set max_position_embeddings to that",
        )  # fmt: skip
    n_layers = given["num_hidden_layers"]
    biased = family == "qwen2" or bool(given["attention_bias"] and family != "mistral")
    return ModelConfig(
        vocab_size=given["vocab_size"],
        d_model=given["hidden_size"],
        n_layers=n_layers,
        n_heads=given["num_attention_heads"],
        layers=layer_kinds(n_layers, recurrent_layers),
        n_kv_heads=given["num_key_value_heads"],
        head_dim=given["head_dim"],
        d_mlp=given["intermediate_size"],
        activation="swiglu",
        position="rope",
        rope_theta=theta,
        norm="rms",
        norm_eps=given["rms_norm_eps"],
        qk_norm="head" if family == "qwen3" else "none",
        residual_scale="none",
        tie_embeddings=bool(given["tie_word_embeddings"]),
        attention_bias=biased,
        mlp_bias=bool(given["mlp_bias"] and family == "llama"),
    )


def rope_theta(given: Mapping[str, Any], refuse: Any) -> float:
    """The base of the rotary wavelengths, wherever the versions of transformers keep it; scaled ones are refused."""
    for name in ("rope_parameters", "rope_scaling"):
        scaling = given[name]
        if scaling is None:
            continue
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default" or any(isinstance(value, Mapping) for value in scaling.values()):
            refuse(name, scaling, "supported: the default, unscaled RoPE of all layers alike")
        if scaling.get("partial_rotary_factor", 1.0) != 1.0:
            refuse(name, scaling, "supported: rotation of the whole head")
    if given["partial_rotary_factor"] not in (None, 1.0):
        refuse("partial_rotary_factor", given["partial_rotary_factor"], "supported: rotation of the whole head")
    return (given["rope_parameters"] or {}).get("rope_theta") or given["rope_theta"]


def layer_kinds(n_layers: int, recurrent_layers: Iterable[int]) -> str | tuple[LayerKind, ...]:
    """The `layers` of a ModelConfig with these recurrent ones.

    Raises:
        ValueError: for a number that is no layer's.
    """
    chosen = set(recurrent_layers)
    for number in chosen:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < n_layers:
            raise ValueError(f"recurrent_layers contains {number!r}; the layers are 0 to {n_layers - 1}")
    if len(chosen) in (0, n_layers):
        return "recurrent" if chosen else "standard"
    kinds: list[LayerKind] = ["recurrent" if l in chosen else "standard" for l in range(n_layers)]
    return tuple(kinds)


# --- tensors ---------------------------------------------------------------------------------------------------------


def parameter_name(name: str) -> str:
    """Their name of one of our parameters: `layers.3.q_proj.weight` is `model.layers.3.self_attn.q_proj.weight`."""
    if name in AROUND:
        return AROUND[name]
    _, l, module, kind = name.split(".")
    return f"model.layers.{l}.{INSIDE[module]}.{kind}"


def convert(tensors: Mapping[str, Tensor], config: ModelConfig, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from Hugging Face's.

    Args:
        expected: the model's own state dict, for names and shapes.

    Raises:
        ValueError: for a tensor that is missing, of another shape, or has no place.
    """
    found: dict[str, Tensor] = {}
    left = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")}  # old files keep these
    if config.tie_embeddings:
        left.discard("lm_head.weight")  # the embedding again
    for ours, shape in ((name, tuple(tensor.shape)) for name, tensor in expected.items()):
        theirs = parameter_name(ours)
        if theirs not in tensors:
            if ours.endswith("o_proj.bias"):  # Qwen2: attention biases, but none on the output
                found[ours] = torch.zeros(shape, dtype=found[ours.replace("o_proj", "q_proj")].dtype)
                continue
            raise ValueError(f"the model lacks the tensor {theirs!r}; it is incomplete or of another configuration")
        if tuple(tensors[theirs].shape) != shape:
            raise ValueError(f"{theirs!r} has shape {tuple(tensors[theirs].shape)}; the configuration asks for {shape}")
        found[ours] = tensors[theirs].detach().clone()
        left.discard(theirs)
    if left:
        raise ValueError(f"the model holds {min(left)!r}, which a {type(config).__name__} has no place for")
    return found


# --- back ------------------------------------------------------------------------------------------------------------


def save_llama(model: LanguageModel, folder: str | Path, eos_token_id: int | None = None) -> None:
    """Write a model without recurrent layers as a Llama (or, with QK-norm, a Qwen3) folder for transformers.

    The depth scale of the residual branches goes into the output projections; padding rows of the vocabulary are left
    out.

    Args:
        eos_token_id: where generation ends, written into the configuration.

    Raises:
        ValueError: for recurrent layers and every other option that these models don't have.
    """
    config, folder = model.config, Path(folder)
    options = llama_options(config)
    scale, tensors = config.branch_scale, dict[str, Tensor]()
    for name, tensor in plain_state_dict(model).items():
        tensor = tensor.detach()
        if name in ("embedding.weight", "head.weight"):
            tensor = tensor[: config.vocab_size]
        elif "o_proj" in name or "down_proj" in name:
            tensor = tensor * scale if scale != 1 else tensor
        tensors[parameter_name(name)] = tensor.contiguous()
    options |= {"bos_token_id": None, "eos_token_id": eos_token_id}  # theirs would be 1 and 2
    options["dtype"] = str(model.embedding.weight.dtype).removeprefix("torch.")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS_FILE) as temporary:
        write_tensors(tensors, temporary)
    with replacing(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(options, indent=2) + "\n")


def llama_options(config: ModelConfig) -> dict[str, Any]:
    """The Hugging Face configuration of a model that a Llama or Qwen3 can be."""
    qwen3 = config.qk_norm == "head"
    wanted = {
        "layers": ("recurrent" not in config.layer_kinds, "a Llama has standard layers alone"),
        "activation": (config.activation == "swiglu", "a Llama has 'swiglu'"),
        "position": (config.position == "rope", "a Llama has 'rope'"),
        "norm": (config.norm == "rms", "a Llama has 'rms'"),
        "qk_norm": (config.qk_norm != "full", "a Llama has 'none', a Qwen3 'head'"),
        "mlp_bias": (not (qwen3 and config.mlp_bias), "with qk_norm 'head' it must be false"),
    }
    for name, (fits, why) in wanted.items():
        if not fits:
            raise ValueError(f"{name} is {getattr(config, name)!r}, which can't be written as a Llama: {why}")
    options = {
        "architectures": ["Qwen3ForCausalLM" if qwen3 else "LlamaForCausalLM"],
        "model_type": "qwen3" if qwen3 else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
    }
    return options if qwen3 else {**options, "mlp_bias": config.mlp_bias}
