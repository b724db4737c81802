"""Every choice is checked where it is made, and the named shapes are what they say."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
import torch

from recurformer import LanguageModel, ModelConfig
from recurformer.config import PRESETS

# --- what is refused -------------------------------------------------------------------------------------------------


def build(**options: Any) -> ModelConfig:
    """A ModelConfig of values that the type checker would refuse."""
    return ModelConfig(**options)


WHOLE_NUMBERS = (
    "vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_mlp", "vocab_multiple",
)  # fmt: skip
CHOICES = {
    "activation": ("gelu", "gelu_tanh", "swiglu"),
    "position": ("alibi", "rope", "none"),
    "alibi_slopes": ("geometric", "interleaved"),
    "norm": ("rms", "layer"),
    "qk_norm": ("head", "full", "none"),
    "residual_scale": ("depth", "none"),
    "init": ("fan_in", "official"),
}


@pytest.mark.parametrize("name", WHOLE_NUMBERS)
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4"], ids=repr)
def test_sizes_are_whole_numbers_of_at_least_one(name: str, value: Any):
    with pytest.raises(ValueError, match=f"{name} is {value!r}; it must be a whole number of at least 1"):
        build(**{name: value})


@pytest.mark.parametrize("name", ["vocab_size", "d_model", "n_layers", "n_heads", "vocab_multiple"])
def test_sizes_without_a_default_rule_cannot_be_none(name: str):
    with pytest.raises(ValueError, match=f"{name} is None"):
        build(**{name: None})


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_listed_when_another_is_given(name: str):
    for choice in CHOICES[name]:
        assert getattr(build(**{name: choice}), name) == choice
    listed = ", ".join(map(repr, CHOICES[name]))
    for value in ("bogus", 3, None):
        with pytest.raises(ValueError, match=f"{name} is {value!r}; choose one of {listed}"):
            build(**{name: value})


@pytest.mark.parametrize("value", [["gelu"], {}], ids=repr)
def test_unhashable_choices_are_refused_too(value: Any):
    with pytest.raises(ValueError, match="activation is"):
        ModelConfig(activation=value)


def test_the_nearest_choice_is_suggested():
    with pytest.raises(ValueError, match="did you mean 'swiglu'"):
        build(activation="swigl")


@pytest.mark.parametrize("name", ["tie_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("value", [1, "true", None], ids=repr)
def test_switches_are_true_or_false(name: str, value: Any):
    with pytest.raises(ValueError, match=f"{name} is {value!r}; it must be true or false"):
        build(**{name: value})


# Name, smallest and largest value, and both as a message shows them.
CONSTANTS = {
    "norm_eps": (1e-12, 1.0, "of at least 1e-12 and at most 1.0"),
    "rope_theta": (1.0, 1e12, "of at least 1.0 and at most 1,000,000,000,000.0"),
    "embedding_std": (1e-6, 1e6, "of at least 1e-06 and at most 1,000,000.0"),
}


@pytest.mark.parametrize("name", CONSTANTS)
@pytest.mark.parametrize(
    "value", [0, -1.0, float("inf"), float("nan"), True, "1e-5", 5e-324, 1e-13, 1e16, 1e308], ids=repr
)
def test_constants_without_sense_are_refused(name: str, value: Any):
    with pytest.raises(ValueError, match=f"{name} is {re.escape(repr(value))}; it must be a finite number"):
        build(**{name: value})
    with pytest.raises(ValueError, match=CONSTANTS[name][2]):
        ModelConfig.from_dict({name: value})


@pytest.mark.parametrize("name", ["rope_theta", "norm_eps"])
def test_constants_are_given(name: str):
    with pytest.raises(ValueError, match=f"{name} is None; it must be a finite number"):
        build(**{name: None})


@pytest.mark.parametrize("scan", ["reference", "tiled", "wavefront"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize(("name", "end"), [(name, end) for name in CONSTANTS for end in (0, 1)])
def test_the_ends_of_the_range_of_constants_give_finite_numbers(name: str, end: int, norm: str, scan: str):
    value = CONSTANTS[name][end]
    config = ModelConfig(vocab_size=50, d_model=16, n_layers=3, n_heads=2, position="rope", norm=norm, **{name: value})  # pyright: ignore[reportArgumentType]
    torch.manual_seed(0)
    model = LanguageModel(config)
    model.scan = scan
    tokens = torch.randint(50, (2, 40))
    loss = model(tokens, targets=tokens).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_deviation_of_the_embedding_may_be_none():
    assert build(embedding_std=1).embedding_std == 1.0
    assert build(embedding_std=None).embedding_std is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 130}, "d_model 130 is not divisible by n_heads 4"),
        ({"n_kv_heads": 3}, "n_heads 4 is not divisible by n_kv_heads 3"),
        ({"n_kv_heads": 8}, "n_heads 4 is not divisible by n_kv_heads 8"),
        ({"position": "rope", "head_dim": 7}, "rotates pairs, but head_dim is 7"),
        ({"position": "rope", "d_model": 12}, "rotates pairs, but head_dim is 3"),
        ({"layers": "first:5"}, "layers is 'first:5'; K in 'first:K' must be from 0 to n_layers 4"),
        ({"layers": "first:"}, "layers is 'first:'"),
        ({"layers": "first:-1"}, "layers is 'first:-1'"),
        ({"layers": "first:²"}, "layers is 'first:²'"),
        ({"layers": "last:1"}, "layers is 'last:1'; choose 'recurrent', 'standard', 'first:K'"),
        ({"layers": 3}, "layers is 3; choose"),
        ({"embedding_std": 0.5, "tie_embeddings": True}, "embedding_std is 0.5, and tie_embeddings"),
        ({"layers": ("recurrent",)}, "layers lists 1 kinds, but n_layers is 4"),
        ({"layers": ("recurrent",) * 3 + ("linear",)}, "layers contains 'linear'"),
        ({"layers": ["recurrent"] * 3 + [["standard"]]}, "layers contains"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_combinations_that_make_no_model(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**options)


def test_unknown_settings_are_named_with_the_nearest():
    with pytest.raises(ValueError, match="unknown model setting 'n_layer'; did you mean 'n_layers'"):
        ModelConfig.from_dict({"n_layer": 3})
    with pytest.raises(ValueError, match=r"unknown model setting 'xyzzy'$"):
        ModelConfig.preset("nano", xyzzy=1)


def test_a_configuration_is_frozen_and_keyword_only():
    config = ModelConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        ModelConfig(256)  # pyright: ignore[reportCallIssue]
    assert hash(config) == hash(ModelConfig())


def test_the_defaults():
    assert ModelConfig().to_dict() == {
        "vocab_size": 256, "d_model": 128, "n_layers": 4, "n_heads": 4, "layers": "recurrent", "n_kv_heads": None,
        "head_dim": None, "d_mlp": None, "activation": "gelu", "position": "alibi", "alibi_slopes": "geometric",
        "rope_theta": 10000.0, "norm": "rms", "norm_eps": 1e-5, "qk_norm": "head", "residual_scale": "depth",
        "tie_embeddings": False, "vocab_multiple": 1, "attention_bias": False, "mlp_bias": False, "init": "fan_in",
        "embedding_std": None,
    }  # fmt: skip


def test_every_setting_is_documented():
    assert all(len(field.metadata["doc"]) > 10 for field in dataclasses.fields(ModelConfig))


# --- what follows from the choices -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "kinds"),
    [
        ("recurrent", "rrr"), ("standard", "sss"), ("first:0", "sss"), ("first:1", "rss"), ("first:3", "rrr"),
        (("standard", "recurrent", "standard"), "srs"), (["recurrent", "standard", "standard"], "rss"),
    ],
    ids=str,
)  # fmt: skip
def test_kinds_of_layers(layers: Any, kinds: str):
    config = ModelConfig(n_layers=3, layers=layers)
    assert "".join(kind[0] for kind in config.layer_kinds) == kinds
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert [layer.kind[0] for layer in LanguageModel(config).layers] == list(kinds)  # pyright: ignore[reportIndexIssue]


def test_widths_follow_from_the_model_width_unless_given():
    config = ModelConfig(d_model=96, n_heads=6, n_kv_heads=2)
    assert (config.head_width, config.mlp_width, config.kv_heads) == (16, 384, 2)
    config = ModelConfig(d_model=97, n_heads=6, head_dim=10, d_mlp=50)
    assert (config.head_width, config.mlp_width, config.kv_heads) == (10, 50, 6)


@pytest.mark.parametrize(
    ("vocabulary", "multiple", "rows"), [(97, 1, 97), (97, 128, 128), (128, 128, 128), (129, 128, 256)]
)
def test_rows_are_padded_up_to_a_multiple(vocabulary: int, multiple: int, rows: int):
    config = ModelConfig(vocab_size=vocabulary, vocab_multiple=multiple)
    assert config.padded_vocab_size == rows
    model = LanguageModel(config)
    assert model.embedding.weight.shape == model.head.weight.shape == (rows, 128)
    logits = model(torch.zeros(1, 2, dtype=torch.long)).logits
    assert logits is not None
    assert logits.shape == (1, 2, vocabulary)


def test_the_residual_scale_is_one_over_the_root_of_the_depth():
    assert ModelConfig(n_layers=16).branch_scale == 0.25
    assert ModelConfig(n_layers=16, residual_scale="none").branch_scale == 1.0


def test_cache_bytes_of_a_token():
    assert ModelConfig(n_layers=3, n_heads=6, n_kv_heads=2, head_dim=10).kv_bytes_per_token() == 2 * 3 * 2 * 10 * 2
    twelve, six = (ModelConfig.preset(name).kv_bytes_per_token() for name in ("150m-12", "150m-6"))
    assert six / twelve == pytest.approx(0.6875)  # fewer and wider layers: about 30 % less


# --- parameter counts ------------------------------------------------------------------------------------------------


def count_by_formula(c: ModelConfig) -> int:
    """Parameters outside the embedding and the output layer."""
    D, H, G, K, F_ = c.d_model, c.n_heads, c.kv_heads, c.head_width, c.mlp_width
    matrices = 3 if c.activation == "swiglu" else 2
    attention = 2 * D * H * K + 2 * D * G * K + c.attention_bias * (H * K + 2 * G * K + D)
    mlp = matrices * D * F_ + c.mlp_bias * ((matrices - 1) * F_ + D)
    norms = 2 * D + {"head": 2 * K, "full": H * K + G * K, "none": 0}[c.qk_norm]
    return c.n_layers * (attention + mlp + norms) + D


PRESET_COUNTS = {  # without and with embedding and output layer
    "nano": (787_840, 853_376),
    "tiny": (10_622_592, 10_819_200),
    "small": (34_416_896, 34_744_576),
    "150m-12": (151_045_120, 216_843_264),
    "150m-6": (142_772_608, 233_245_056),
    "300m-24": (302_089_216, 367_887_360),
    "300m-12": (285_543_808, 376_016_256),
    "300m-6": (302_041_088, 433_637_376),
}


def test_every_preset_is_counted():
    assert PRESET_COUNTS.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESET_COUNTS)
def test_presets_have_their_parameter_counts_in_every_kind(name: str):
    without, everything = PRESET_COUNTS[name]
    for layers in ("recurrent", "standard", "first:1"):
        config = ModelConfig.preset(name, layers=layers)
        with torch.device("meta"):
            model = LanguageModel(config)
        assert count_by_formula(config) == model.num_parameters() == without
        assert model.num_parameters(embedding=True) == everything
        assert everything - without == 2 * config.padded_vocab_size * config.d_model


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "swiglu", "d_mlp": 100}, {"n_kv_heads": 2, "head_dim": 20, "qk_norm": "full"},
        {"qk_norm": "none"}, {"attention_bias": True, "mlp_bias": True},
        {"activation": "swiglu", "mlp_bias": True, "n_kv_heads": 1, "attention_bias": True}, {"tie_embeddings": True},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_parameter_counts_follow_the_formula(options: dict[str, Any]):
    model = LanguageModel(ModelConfig(n_layers=2, **options))
    assert model.num_parameters() == count_by_formula(model.config)
    outside = (1 if model.config.tie_embeddings else 2) * 256 * 128
    assert model.num_parameters(embedding=True) == model.num_parameters() + outside
    assert model.num_parameters(embedding=True) == sum(p.numel() for p in model.parameters())


PAPER_SHAPES = {
    "150m-12": (1024, 16, 4096, 12), "150m-6": (1408, 22, 5632, 6), "300m-24": (1024, 16, 4096, 24),
    "300m-12": (1408, 22, 5632, 12), "300m-6": (2048, 32, 8192, 6),
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER_SHAPES)
def test_the_papers_shapes_come_with_the_official_options(name: str):
    config = ModelConfig.preset(name)
    assert (config.d_model, config.n_heads, config.mlp_width, config.n_layers) == PAPER_SHAPES[name]
    assert (config.vocab_size, config.padded_vocab_size) == (32100, 32128)
    assert (config.norm, config.qk_norm, config.residual_scale, config.init) == ("layer", "full", "none", "official")
    assert (config.position, config.alibi_slopes, config.activation) == ("alibi", "geometric", "gelu")
    assert (config.tie_embeddings, config.attention_bias, config.mlp_bias) == (False, False, False)
    assert config.layer_kinds == ("recurrent",) * config.n_layers


def test_presets_take_overrides_and_unknown_ones_are_listed():
    config = ModelConfig.preset("300m-6", layers="first:2", vocab_size=50)
    assert config.layer_kinds == ("recurrent",) * 2 + ("standard",) * 4
    assert config.padded_vocab_size == 128
    with pytest.raises(ValueError, match=r"unknown preset '300m-7'; choose one of nano, tiny.*; did you mean '300m-"):
        ModelConfig.preset("300m-7")
