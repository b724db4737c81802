"""Llama-style models of Hugging Face, read into a `LanguageModel` and, without recurrent layers, written back.

A folder is read as it lies on disk, without the transformers library. The families share one maths: pre-norm with RMS,
half-split RoPE, SwiGLU, no residual scale. They differ in biases (Qwen2: on q, k and v), QK-norm (Qwen3) and defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from recurformer.config import LayerKind, Layers, ModelConfig, Vocabulary, Width
from recurformer.files import replacing, write_json
from recurformer.model import LanguageModel
from recurformer.reading import build, read_table
from recurformer.settings import Positive, Settings, shown, suggest
from recurformer.store.folders import assembled, plain_state_dict
from recurformer.store.weights import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    StoredTensor,
    check_dtype,
    find_weights,
    in_memory,
    parameter_shapes,
    write_tensors,
)


@dataclass(frozen=True, kw_only=True)
class LlamaOptions(Settings):
    """The options of a Hugging Face configuration that change the function, with the defaults of a Llama."""

    vocab_size: Vocabulary
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Width
    num_key_value_heads: Width | None = None
    head_dim: Width | None = None
    hidden_act: str = "silu"
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    tie_word_embeddings: bool | None = False
    attention_bias: bool | None = False
    mlp_bias: bool | None = False
    sliding_window: int | None = None
    use_sliding_window: bool | None = True
    max_position_embeddings: int | None = None
    quantization_config: dict[str, Any] | None = None


# Defaults of each model type that differ from a Llama's, for options that its configuration file leaves out.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 4096 * 32},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"use_sliding_window": False, "head_dim": 128},
}

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
    """Return a pretrained Llama, Mistral, Qwen2 or Qwen3 model as a `LanguageModel`, in evaluation mode.

    Its parameters have the stored dtype. Without recurrent layers it computes what the original computes. A recurrent
    layer has the same weights and another function: it needs further training.

    Args:
        path_or_hf_model: a folder as `save_pretrained` writes it (safetensors), or a transformers model.
        recurrent_layers: numbers of the layers, from 0, that become recurrent.

    Raises:
        ValueError: for another architecture, an option that we can't express (scaled RoPE, sliding windows shorter than
            the context, quantised weights, other activations), and files that do not fit; it names what and why.
    """
    if isinstance(path_or_hf_model, str | Path):
        folder = Path(path_or_hf_model)
        if not (folder / CONFIG_FILE).exists():
            raise ValueError(f"{folder} is no model folder: it has no {CONFIG_FILE}")
        options = read_table(folder / CONFIG_FILE)
        config = model_config(options, recurrent_layers, source=folder / CONFIG_FILE)
        found = find_weights(folder)
    else:
        config = model_config(path_or_hf_model.config.to_dict(), recurrent_layers)
        found = in_memory(plain_state_dict(path_or_hf_model), "the model")
    return assembled(config, our_tensors(found, config))


# --- configuration ---------------------------------------------------------------------------------------------------


def model_config(
    options: Mapping[str, Any], recurrent_layers: Iterable[int] = (), *, source: object = "the configuration"
) -> ModelConfig:
    """Return the ModelConfig of a Hugging Face configuration.

    Args:
        source: the file of the options, named in messages.

    Raises:
        ValueError: for a model type or an option that we can't express.
    """
    family = options.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(
            f"{source}: model_type is {shown(family)}; supported: {', '.join(map(repr, FAMILIES))}"
            f"{suggest(str(family), FAMILIES)}"
        )
    given = build(LlamaOptions, {**FAMILIES[family], **options}, source)

    def refuse(name: str, value: Any, why: str) -> NoReturn:
        raise ValueError(f"{source}: the {family} option {name} is {shown(value)}; {why}")

    if given.hidden_act not in ("silu", "swish"):
        refuse("hidden_act", given.hidden_act, "supported: 'silu'")
    if given.quantization_config:
        refuse("quantization_config", given.quantization_config, "save the model with unquantised weights")
    window = given.sliding_window if given.use_sliding_window else None
    longest = given.max_position_embeddings
    if window is not None and (longest is None or window < longest):
        refuse(
            "sliding_window", window,
            f"it is shorter than max_position_embeddings {longest}, and our layers attend to the whole past; "
            f"to use the model on at most {window} tokens, set max_position_embeddings to that",
        )  # fmt: skip
    try:
        return ModelConfig(
            vocab_size=given.vocab_size,
            d_model=given.hidden_size,
            n_layers=given.num_hidden_layers,
            n_heads=given.num_attention_heads,
            layers=layer_kinds(given.num_hidden_layers, recurrent_layers),
            n_kv_heads=given.num_key_value_heads,
            head_dim=given.head_dim,
            d_mlp=given.intermediate_size,
            activation="swiglu",
            position="rope",
            rope_theta=rope_theta(given, refuse),
            norm="rms",
            norm_eps=given.rms_norm_eps,
            qk_norm="head" if family == "qwen3" else "none",
            residual_scale="none",
            tie_embeddings=bool(given.tie_word_embeddings),
            attention_bias=family == "qwen2" or bool(given.attention_bias and family != "mistral"),
            mlp_bias=bool(given.mlp_bias and family == "llama"),
        )
    except ValueError as error:
        raise ValueError(f"{error} (from {source})") from None


def rope_theta(given: LlamaOptions, refuse: Callable[[str, Any, str], NoReturn]) -> float:
    """Return the base of the rotary wavelengths, from the place where the version of transformers keeps it.

    Args:
        refuse: raises ValueError for an option (name, value, reason). Scaled wavelengths are refused.
    """
    for name in ("rope_parameters", "rope_scaling"):
        scaling: dict[str, Any] | None = getattr(given, name)
        if scaling is None:
            continue
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default" or any(isinstance(value, Mapping) for value in scaling.values()):
            refuse(name, scaling, "supported: the default, unscaled RoPE of all layers alike")
        if scaling.get("partial_rotary_factor", 1.0) != 1.0:
            refuse(name, scaling, "supported: rotation of the whole head")
    if given.partial_rotary_factor not in (None, 1.0):
        refuse("partial_rotary_factor", given.partial_rotary_factor, "supported: rotation of the whole head")
    return (given.rope_parameters or {}).get("rope_theta") or given.rope_theta


def layer_kinds(n_layers: int, recurrent_layers: Iterable[int]) -> str | tuple[LayerKind, ...]:
    """Return the `layers` of a ModelConfig in which these layers, numbered from 0, are recurrent.

    Raises:
        ValueError: for a number that no layer has.
    """
    chosen = set(recurrent_layers)
    for number in chosen:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < n_layers:
            raise ValueError(f"recurrent_layers contains {shown(number)}; the layers are 0 to {n_layers - 1}")
    if len(chosen) in (0, n_layers):
        return "recurrent" if chosen else "standard"
    kinds: list[LayerKind] = ["recurrent" if l in chosen else "standard" for l in range(n_layers)]
    return tuple(kinds)


# --- tensors ---------------------------------------------------------------------------------------------------------


def parameter_name(name: str) -> str:
    """Return Hugging Face's name of one of our parameters.

    `layers.3.q_proj.weight` is `model.layers.3.self_attn.q_proj.weight`.
    """
    if name in AROUND:
        return AROUND[name]
    _, l, module, kind = name.split(".")
    return f"model.layers.{l}.{INSIDE[module]}.{kind}"


def our_tensors(found: Mapping[str, StoredTensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return our state dict from Hugging Face's tensors. All names, shapes and types are checked before one is read.

    Raises:
        ValueError: for a tensor that is missing, of another shape or type, or has no place.
    """
    names: dict[str, str] = {}
    absent: list[str] = []
    left = {name for name in found if not name.endswith("rotary_emb.inv_freq")}  # old files keep these
    if config.tie_embeddings:
        left.discard("lm_head.weight")  # the embedding again
    shapes = parameter_shapes(config)
    for ours, shape in shapes.items():
        theirs = parameter_name(ours)
        if theirs not in found:
            if ours.endswith("o_proj.bias"):  # Qwen2: attention biases, but none on the output
                absent.append(ours)
                continue
            raise ValueError(f"the model lacks the tensor {theirs!r}; it is incomplete or of another configuration")
        tensor = found[theirs]
        if tensor.shape != shape:
            raise ValueError(
                f"{theirs!r} in {tensor.source} has shape {shown(tensor.shape)}; the configuration asks for {shape}"
            )
        check_dtype(theirs, tensor)
        names[ours] = theirs
        left.discard(theirs)
    if left:
        raise ValueError(f"the model holds {shown(min(left))}, which a {type(config).__name__} has no place for")
    made = {ours: found[theirs].read() for ours, theirs in names.items()}
    zeros = {ours: torch.zeros(shapes[ours], dtype=made[ours.replace("o_proj", "q_proj")].dtype) for ours in absent}
    return {ours: made[ours] if ours in made else zeros[ours] for ours in shapes}


# --- back ------------------------------------------------------------------------------------------------------------


def save_llama(model: LanguageModel, folder: str | Path, eos_token_id: int | None = None) -> None:
    """Write a model without recurrent layers as a Llama (or, with QK-norm, a Qwen3) folder for transformers.

    The depth scale of the residual branches goes into the output projections; padding rows of the vocabulary are left
    out.

    Args:
        eos_token_id: where generation ends, written into the configuration.

    Raises:
        ValueError: for recurrent layers and every other option that these models do not have.
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
    write_json(folder / CONFIG_FILE, options)


def llama_options(config: ModelConfig) -> dict[str, Any]:
    """Return the Hugging Face configuration of a model.

    Raises:
        ValueError: for an option that neither a Llama nor a Qwen3 has.
    """
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
            raise ValueError(f"{name} is {shown(getattr(config, name))}, which can't be written as a Llama: {why}")
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
