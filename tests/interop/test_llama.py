"""Pretrained Llama-style models: the same function without recurrent layers, the same weights with them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import V, assert_close, logits_of, random_tokens, strong, tiny
from torch import Tensor

from recurformer import ModelConfig
from recurformer.interop import load_llama, save_llama
from recurformer.interop.llama import model_config

transformers = pytest.importorskip("transformers")

SHAPE: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, all heads, tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama, biases, wide heads": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama, another base and eps": ("Llama", {"rope_theta": 500000.0, "rms_norm_eps": 0.1}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window as long as the context": ("Mistral", {"sliding_window": 64}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 10}),
    "qwen3, biases": ("Qwen3", {"attention_bias": True, "head_dim": 8}),
}
every_model = pytest.mark.parametrize(("family", "options"), MODELS.values(), ids=MODELS)
TOKENS = random_tokens(2, 21)


def original(family: str = "Llama", **options: Any) -> Any:
    """A transformers model of random weights, biases included, large enough to show errors."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**{**SHAPE, **options})
    )
    return strong(model.eval(), 0.2)


def theirs(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


@every_model
def test_without_recurrent_layers_the_logits_are_the_originals(family: str, options: dict[str, Any], tmp_path: Path):
    model = original(family, **options)
    ours = load_llama(model)
    assert ours.config.layers == "standard"
    assert_close(logits_of(ours, TOKENS), theirs(model), 1e-4)
    assert theirs(model).std() > 0.5
    assert not ours.training
    assert all(p.requires_grad for p in ours.parameters())

    model.save_pretrained(tmp_path, max_shard_size="20KB")
    from_folder = load_llama(tmp_path)
    assert from_folder.config == ours.config
    assert all(torch.equal(p, q) for p, q in zip(from_folder.parameters(), ours.parameters(), strict=True))


def test_left_padding_and_decoding():
    model = original()
    ours, mask = load_llama(model), torch.ones(2, 21, dtype=torch.long)
    mask[0, :9] = 0
    out = model.generate(TOKENS, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(
        out, ours.generate(TOKENS, 20, attention_mask=mask, temperature=0.0, eos_token_id=2, pad_token_id=0)
    )


def test_recurrent_layers_have_the_same_weights_and_another_function():
    model = original()
    standard, retrofit = load_llama(model), load_llama(model, recurrent_layers=(0, 2))
    assert retrofit.config.layer_kinds == ("recurrent", "standard", "recurrent")
    assert all(torch.equal(p, q) for p, q in zip(standard.parameters(), retrofit.parameters(), strict=True))
    difference = (logits_of(retrofit, TOKENS) - theirs(model)).abs()
    assert difference[:, 0].max() < 1e-4  # the first position sees its own temporary pair alone
    assert difference[:, 1:].amax(-1).min() > 0.01
    assert load_llama(model, recurrent_layers=range(3)).config.layers == "recurrent"


def test_loading_copies_and_keeps_the_dtype():
    model = original("Qwen2").bfloat16()
    ours = load_llama(model)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        ours.embedding.weight.zero_()
    assert model.get_input_embeddings().weight.abs().sum() > 0


# --- older and newer configuration files -----------------------------------------------------------------------------

OPTIONS = {"model_type": "llama", **SHAPE}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 10000.0),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, 5e5),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
    ],
)
def test_the_base_of_rope_wherever_it_stands(options: dict[str, Any], expected: float):
    assert model_config({**OPTIONS, **options}).rope_theta == expected


def test_defaults_of_old_files():
    bare = {name: value for name, value in OPTIONS.items() if name != "num_key_value_heads"}
    assert model_config(bare).kv_heads == 4
    assert model_config(bare).norm_eps == 1e-6
    assert model_config(bare).tie_embeddings is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'; supported: 'llama', 'mistral', 'qwen2', 'qwen3'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling is .*'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .*'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters is .*'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "all layers alike"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"model_type": "mistral", "sliding_window": 32}, "sliding_window is 32; .* max_position_embeddings 64"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 32}, "sliding_window is 32"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_cannot_be_expressed_is_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        model_config({**OPTIONS, **options})


def test_an_incomplete_configuration():
    with pytest.raises(ValueError, match="lacks hidden_size"):
        model_config({name: value for name, value in OPTIONS.items() if name != "hidden_size"})


@pytest.mark.parametrize("layers", [(3,), (-1,), (0, True)])
def test_layers_that_are_none(layers: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"recurrent_layers contains .*; the layers are 0 to 2"):
        model_config(OPTIONS, layers)


def test_files_that_do_not_fit(tmp_path: Path):
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        load_llama(tmp_path)
    original().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    options = json.loads(path.read_text())
    for change, message in (
        ({"hidden_size": 64}, "has shape .* asks for"),
        ({"num_hidden_layers": 4}, "lacks the tensor 'model.layers.3"),
        ({"num_hidden_layers": 2}, "holds 'model.layers.2"),
    ):
        path.write_text(json.dumps({**options, **change}))
        with pytest.raises(ValueError, match=message):
            load_llama(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_llama(tmp_path)


# --- back ------------------------------------------------------------------------------------------------------------


@every_model
def test_a_model_goes_back_to_transformers(family: str, options: dict[str, Any], tmp_path: Path):
    model = original(family, **options)
    save_llama(load_llama(model), tmp_path)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_close(theirs(again.eval()), theirs(model), 1e-4)


@pytest.mark.parametrize("qk_norm", ["none", "head"])
def test_models_of_ours_with_a_depth_scale_and_a_padded_vocabulary(qk_norm: str, tmp_path: Path):
    model = tiny(layers="standard", activation="swiglu", position="rope", qk_norm=qk_norm, vocab_multiple=64)
    save_llama(model, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.vocab_size == V
    assert_close(theirs(again), logits_of(model, TOKENS), 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "first:1"}, "layers is 'first:1', .*standard layers alone"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"position": "alibi"}, "position is 'alibi'"),
        ({"norm": "layer"}, "norm is 'layer'"),
        ({"qk_norm": "full"}, "qk_norm is 'full'"),
        ({"mlp_bias": True}, "mlp_bias is True"),
    ],
)
def test_what_is_no_llama_is_not_written(options: dict[str, Any], message: str, tmp_path: Path):
    standard: dict[str, Any] = {"layers": "standard", "activation": "swiglu", "position": "rope"}
    with pytest.raises(ValueError, match=message):
        save_llama(tiny(**{**standard, **options}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_configuration_in_full():
    assert model_config({**OPTIONS, "model_type": "qwen2"}, (0,)) == ModelConfig(
        vocab_size=V, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_mlp=48, activation="swiglu", position="rope",
        layers=("recurrent", "standard", "standard"), norm="rms", norm_eps=1e-6, qk_norm="none", residual_scale="none",
        attention_bias=True,
    )  # fmt: skip


# --- hostile files ----------------------------------------------------------------------------------------------------

WIDE = [10**9, 10**30, 1e30, -1, 0, 1.5, "64", "x" * 10_000, [64], {"a": 1}, True, float("nan")]


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"])
@pytest.mark.parametrize("value", WIDE, ids=lambda value: str(value)[:12])
def test_sizes_without_sense_are_named(name: str, value: Any):
    if (name, value) == ("vocab_size", 10**9):
        return  # a vocabulary may be that large; the tensors then have other shapes
    start = time.process_time()
    with pytest.raises(ValueError, match=f"the configuration: {name} is ") as error:
        model_config({**OPTIONS, name: value})
    assert time.process_time() - start < 1
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "options",
    [
        {"rope_theta": "x"}, {"rope_theta": 5e-400}, {"rope_scaling": [1]}, {"rope_scaling": "linear"},
        {"rms_norm_eps": []},
        {"rope_parameters": {"rope_theta": {"a": 1}}}, {"rope_parameters": {"rope_theta": "x"}},
        {"hidden_act": ["silu"]},
        {"tie_word_embeddings": "yes"}, {"attention_bias": [True]}, {"sliding_window": "x", "use_sliding_window": True},
        {"max_position_embeddings": 1e30}, {"quantization_config": "x" * 10_000}, {"model_type": ["llama"]},
        {"model_type": {}}, {"model_type": "x" * 10_000}, {"rope_parameters": {"a": "x" * 10_000, "rope_type": "yarn"}},
    ],
    ids=lambda options: str(options)[:40],
)  # fmt: skip
def test_values_of_the_wrong_type_are_named(options: dict[str, Any]):
    with pytest.raises(
        ValueError, match=next(iter(options)).replace("rope_parameters", "rope_(parameters|theta)")
    ) as error:
        model_config({**OPTIONS, **options})
    assert len(str(error.value)) < 600


def test_a_huge_model_is_refused_before_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_llama(tiny(layers="standard", activation="swiglu", position="rope", qk_norm="none"), tmp_path)
    path = tmp_path / "config.json"
    options = json.loads(path.read_text())
    monkeypatch.setattr("recurformer.store.folders.LanguageModel", None)
    for change in ({"num_hidden_layers": 4096}, {"hidden_size": 2**20}, {"vocab_size": 2**31 - 1}):
        path.write_text(json.dumps({**options, **change}))
        start = time.process_time()
        with pytest.raises(ValueError, match=r"lacks the tensor|has shape"):
            load_llama(tmp_path)
        assert time.process_time() - start < 2
    for text in ("[" * 100_000, '{"a":' * 100_000, "[1]", " " * 2_000_000):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json .*(64 deep|holds a list|has 2,000,000 bytes)"):
            load_llama(tmp_path)
