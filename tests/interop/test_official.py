"""Official checkpoints: parity with what the official code computed, and what can't be read is refused by name."""

from __future__ import annotations

import json
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import FIXTURES, assert_close, every_scan, gradients, relative_rms
from safetensors.torch import load_file, save_file
from torch import Tensor

from recurformer import LanguageModel, ModelConfig
from recurformer.interop import load_official
from recurformer.interop.official import canonical_name, model_config, parameter_names

RECURRENT, TRANSFORMER = FIXTURES / "official-recurrent", FIXTURES / "official-transformer"
both_kinds = pytest.mark.parametrize("folder", [RECURRENT, TRANSFORMER], ids=lambda folder: folder.name)


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return torch.load(RECURRENT / "model.pt", weights_only=True)


@pytest.fixture
def options() -> dict[str, Any]:
    return json.loads((RECURRENT / "config.json").read_text())


def same_parameters(one: LanguageModel, other: LanguageModel) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return one.config == other.config and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- parity ----------------------------------------------------------------------------------------------------------


@every_scan
@both_kinds
def test_logits_loss_and_every_gradient_match_the_official_code(folder: Path, scan: str):
    model, expected = load_official(folder), load_file(folder / "expected.safetensors")
    model.scan = scan
    tokens = expected["tokens"]
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
    out = model(tokens, targets=targets)
    assert out.logits is not None
    assert out.loss is not None
    assert out.logits.shape == (3, 37, 90)
    assert_close(out.logits, expected["logits"][..., :90], 1e-5)
    assert_close(out.loss, expected["loss"].squeeze(), 2e-6)

    ours, names = gradients(model, out.loss), parameter_names(model.config)
    official = {key.removeprefix("grad/"): grad for key, grad in expected.items() if key.startswith("grad/")}
    checked = set()
    for name, grad in official.items():
        assert relative_rms(torch.cat([ours[our_name] for our_name in names[name]]), grad) <= 1e-4, name
        checked.update(names[name])
    assert checked == ours.keys()


def test_a_recurrent_checkpoint_read_as_standard_layers_is_far_off():
    expected = load_file(RECURRENT / "expected.safetensors")
    config = load_official(RECURRENT).config
    standard = ModelConfig.from_dict({**config.to_dict(), "layers": "standard"})
    logits = load_official(RECURRENT / "model.pt", standard)(expected["tokens"]).logits
    assert (logits - expected["logits"][..., :90]).abs().max() > 4


def test_the_configuration_is_translated(options: dict[str, Any]):
    assert model_config(options) == ModelConfig(
        vocab_size=90, vocab_multiple=96, d_model=96, n_layers=3, n_heads=6, d_mlp=384, layers="recurrent",
        activation="gelu", position="alibi", alibi_slopes="geometric", norm="layer", norm_eps=1e-5, qk_norm="full",
        residual_scale="none", init="official",
    )  # fmt: skip


# --- what else the official code writes ------------------------------------------------------------------------------


def test_a_whole_training_configuration_in_yaml(tmp_path: Path, options: dict[str, Any]):
    shutil.copy(RECURRENT / "model.pt", tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"run_name": "rt", "seed": 0, "model": options}))
    assert same_parameters(load_official(tmp_path), load_official(RECURRENT))
    assert same_parameters(load_official(tmp_path / "model.pt"), load_official(RECURRENT))
    assert same_parameters(load_official(RECURRENT, tmp_path / "config.yaml"), load_official(RECURRENT))


def test_references_between_options_are_followed(options: dict[str, Any]):
    assert model_config({**options, "n_kv_heads": "${model.n_heads}"}) == model_config(options)


def test_a_safetensors_file(tmp_path: Path, weights: dict[str, Tensor], options: dict[str, Any]):
    save_file({name: tensor.clone() for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(options))
    assert same_parameters(load_official(tmp_path), load_official(RECURRENT))
    assert same_parameters(load_official(tmp_path / "model.safetensors", options), load_official(RECURRENT))


@pytest.mark.parametrize(
    "listed",
    [
        "transformer.blocks.1.kv_proj.weight",
        "blocks.1.kv_proj.weight",
        "module.transformer.blocks.1.kv_proj.weight",
        "_orig_mod.transformer.blocks.1._orig_mod.kv_proj.weight",
        "module._orig_mod.transformer.blocks.1.pre_attention_block.kv_proj.weight",
        "_fsdp_wrapped_module.transformer.blocks.1._fsdp_wrapped_module.kv_proj.weight",
        "transformer.blocks.1.graphed_callable.kv_proj.weight",
        "transformer.blocks.1.graphed_callable.block.pre_attention_block.kv_proj.weight",
        "transformer.blocks.0.graphed_callable.blocks.1.pre_attention_block.kv_proj.weight",
    ],
)
def test_wrappers_and_graphs_rename_nothing(listed: str):
    assert canonical_name(listed) == "transformer.blocks.1.kv_proj.weight"


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: f"module.{name}",
        lambda name: name.removeprefix("transformer."),
        lambda name: name.replace("blocks.", "blocks.0.graphed_callable.blocks."),
        lambda name: name.replace("blocks.", "block_groups.0."),
    ],
    ids=["ddp", "bare", "one-graph", "grouped"],
)
def test_renamed_checkpoints_load_alike(renamed: Any, weights: dict[str, Tensor], options: dict[str, Any]):
    changed = {renamed(name): tensor for name, tensor in weights.items()}
    assert same_parameters(load_official(changed, options), load_official(RECURRENT))


def test_groups_of_several_blocks_are_counted_through(weights: dict[str, Tensor], options: dict[str, Any]):
    places = {0: "block_groups.0.0.", 1: "block_groups.0.1.", 2: "block_groups.1.0."}
    changed = {}
    for name, tensor in weights.items():
        for block, place in places.items():
            name = name.replace(f"blocks.{block}.", place)
        changed[name] = tensor
    assert same_parameters(load_official(changed, options), load_official(RECURRENT))


def test_projections_fused_split_and_one_by_one_load_alike(weights: dict[str, Tensor], options: dict[str, Any]):
    unique = {canonical_name(name): tensor for name, tensor in weights.items()}
    fused, single = dict(unique), dict(unique)
    for l in range(3):
        q, kv = (f"transformer.blocks.{l}.{name}_proj.weight" for name in ("q", "kv"))
        fused[f"transformer.blocks.{l}.att_proj.weight"] = torch.cat([fused.pop(q), fused.pop(kv)])
        keys, values = single.pop(kv).split(96)
        single[f"transformer.blocks.{l}.k_proj.weight"], single[f"transformer.blocks.{l}.v_proj.weight"] = keys, values
    for tensors in (fused, single):
        assert same_parameters(load_official(tensors, options), load_official(RECURRENT))


def test_grouped_heads_rope_swiglu_biases_and_tied_embeddings(options: dict[str, Any]):
    changed = {
        **options, "block_type": "sequential", "alibi": False, "rope": True, "n_kv_heads": 2, "n_layers": 1,
        "activation_type": "swiglu", "include_bias": True, "weight_tying": True, "layer_norm_type": "rms",
    }  # fmt: skip
    torch.manual_seed(0)
    shapes = {
        "wte.weight": (96, 96), "ln_f.weight": (96,),
        "blocks.0.attn_norm.weight": (96,), "blocks.0.ff_norm.weight": (96,),
        "blocks.0.q_norm.weight": (96,), "blocks.0.k_norm.weight": (32,),
        "blocks.0.att_proj.weight": (160, 96), "blocks.0.att_proj.bias": (160,),
        "blocks.0.attn_out.weight": (96, 96), "blocks.0.attn_out.bias": (96,),
        "blocks.0.ff_proj.weight": (384, 96), "blocks.0.ff_proj.bias": (384,),
        "blocks.0.ff_out.weight": (96, 192), "blocks.0.ff_out.bias": (96,),
    }  # fmt: skip
    w = {f"transformer.{name}": torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    model = load_official(w, changed)
    assert model.config.kv_heads == 2
    assert model.config.mlp_width == 192

    def part(name: str) -> Tensor:
        return w[f"transformer.{name}"]

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def rotate(x: Tensor) -> Tensor:  # (N, heads, 16)
        angles = torch.arange(x.shape[0])[:, None] * 10000.0 ** (-torch.arange(0, 16, 2).double() / 16)
        cos, sin = (f(torch.cat([angles, angles], -1))[:, None] for f in (torch.cos, torch.sin))
        half = torch.cat([-x[..., 8:], x[..., :8]], -1)
        return x * cos + half * sin

    tokens = torch.tensor([3, 80, 11, 5])
    x = part("wte.weight")[tokens]
    fused = rms(x, part("blocks.0.attn_norm.weight")) @ part("blocks.0.att_proj.weight").T + part(
        "blocks.0.att_proj.bias"
    )
    q, k, v = fused.split([96, 32, 32], -1)
    q = rotate(rms(q, part("blocks.0.q_norm.weight")).view(4, 6, 16))
    k = rotate(rms(k, part("blocks.0.k_norm.weight")).view(4, 2, 16)).repeat_interleave(3, 1)
    v = v.view(4, 2, 16).repeat_interleave(3, 1)
    scores = torch.einsum("ihc,jhc->hij", q, k) / 4 + torch.full((4, 4), float("-inf")).triu(1)
    a = torch.einsum("hij,jhc->ihc", scores.softmax(-1), v).flatten(1)
    x = x + a @ part("blocks.0.attn_out.weight").T + part("blocks.0.attn_out.bias")
    inner = rms(x, part("blocks.0.ff_norm.weight")) @ part("blocks.0.ff_proj.weight").T + part("blocks.0.ff_proj.bias")
    up, gate = inner.chunk(2, -1)
    x = x + (F.silu(gate) * up) @ part("blocks.0.ff_out.weight").T + part("blocks.0.ff_out.bias")
    logits = rms(x, part("ln_f.weight")) @ part("wte.weight").T
    ours = model(tokens[None]).logits
    assert ours is not None
    assert_close(ours[0], logits[:, :90], 1e-10)


def test_the_stored_dtype_is_kept(weights: dict[str, Tensor], options: dict[str, Any]):
    model = load_official({name: tensor.bfloat16() for name, tensor in weights.items()}, options)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training


def test_loading_copies(weights: dict[str, Tensor], options: dict[str, Any]):
    before = weights["transformer.wte.weight"].clone()
    with torch.no_grad():
        load_official(weights, options).embedding.weight.zero_()
    assert torch.equal(weights["transformer.wte.weight"], before)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("norm_after", True), ("bias_for_layer_norm", True), ("clip_qkv", 8.0), ("layer_norm_type", "tanh"),
        ("multi_query_attention", True), ("scale_logits", True), ("attention_dropout", 0.1),
        ("residual_dropout", 0.1), ("embedding_dropout", 0.2), ("embedding_layer_norm", True),
        ("activation_type", "relu"), ("block_type", "mamba"), ("alibi_bias_max", 16.0),
        ("layer_norm_with_affine", False), ("attention_layer_norm_with_affine", False),
    ],
)  # fmt: skip
def test_unsupported_options_are_refused_by_name_and_value(name: str, value: Any, options: dict[str, Any]):
    with pytest.raises(ValueError, match=rf"option {name} is {value!r}; supported: "):
        load_official(RECURRENT, {**options, name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope": True}, "alibi and rope are both True"),
        ({"alibi": False}, "no learned position embeddings"),
        ({"include_bias": True}, "include_bias is True without weight_tying"),
        ({"embedding_size": 64}, "embedding_size 64 is below vocab_size 90"),
        ({"bias_for_layer_norm": None, "include_bias": True}, "option bias_for_layer_norm is True"),
        ({"n_head": 6}, "unknown option 'n_head'.*did you mean 'n_heads'"),
    ],
    ids=["two-positions", "no-positions", "output-bias", "few-rows", "norm-bias", "unknown"],
)
def test_combinations_without_a_counterpart_are_refused(changes: dict[str, Any], message: str, options: dict[str, Any]):
    with pytest.raises(ValueError, match=message):
        model_config({**options, **changes})


def test_a_missing_option_has_the_official_default(options: dict[str, Any]):
    del options["residual_dropout"]
    with pytest.raises(ValueError, match=r"residual_dropout is 0\.1 by default; supported: 0\.0"):
        model_config(options)


def test_a_state_dict_without_its_configuration(weights: dict[str, Tensor]):
    with pytest.raises(ValueError, match="pass config="):
        load_official(weights)


def test_unknown_tensors(weights: dict[str, Tensor], options: dict[str, Any]):
    weights["transformer.blocks.0.attn_gate.weight"] = torch.zeros(96)
    with pytest.raises(ValueError, match=r"unknown tensor 'transformer\.blocks\.0\.attn_gate\.weight'"):
        load_official(weights, options)


@pytest.mark.parametrize("name", ["attn_out.bias", "gate_proj.weight", "q_norm.bias"])
def test_tensors_that_the_configuration_has_no_place_for(
    name: str, weights: dict[str, Tensor], options: dict[str, Any]
):
    weights[f"transformer.blocks.0.{name}"] = torch.zeros(96)
    with pytest.raises(ValueError, match="unknown tensor"):
        load_official(weights, options)


def test_a_block_too_many(weights: dict[str, Tensor], options: dict[str, Any]):
    with pytest.raises(ValueError, match=r"unknown tensor 'transformer\.blocks\.2\."):
        load_official(weights, {**options, "n_layers": 2})


def test_missing_tensors(weights: dict[str, Tensor], options: dict[str, Any]):
    for name in [name for name in weights if "blocks.1" in name and "ff_norm" in name]:
        del weights[name]
    with pytest.raises(ValueError, match=r"lacks .* 1 parameters, the first 'layers\.1\.mlp_norm\.weight'"):
        load_official(weights, options)


def test_duplicates_that_disagree(weights: dict[str, Tensor], options: dict[str, Any]):
    weights["transformer.blocks.1.pre_attention_block.kv_proj.weight"] = torch.zeros(192, 96)
    with pytest.raises(
        ValueError, match=r"'transformer\.blocks\.1\.pre_attention_block\.kv_proj\.weight' and .*differ"
    ):
        load_official(weights, options)


def test_tensors_of_another_shape(weights: dict[str, Tensor], options: dict[str, Any]):
    with pytest.raises(ValueError, match=r"has shape \(96, 384\); the configuration asks for \(96, 512\)"):
        load_official(weights, {**options, "mlp_hidden_size": 512})


def test_values_that_are_no_tensors(weights: dict[str, Any], options: dict[str, Any]):
    weights["transformer.ln_f.weight"] = [1.0] * 96
    with pytest.raises(ValueError, match="is a list, not a tensor"):
        load_official(weights, options)


def test_folders_and_files_that_hold_no_checkpoint(tmp_path: Path, options: dict[str, Any]):
    with pytest.raises(ValueError, match=r"has no config\.yaml or config\.json"):
        load_official(tmp_path)
    with pytest.raises(ValueError, match=r"has no model\.pt or model\.safetensors"):
        load_official(tmp_path, options)
    with pytest.raises(ValueError, match=r"absent\.pt can't be read"):
        load_official(tmp_path / "absent.pt", options)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_official(RECURRENT / "model.pt", tmp_path / "config.json")
    (tmp_path / "config.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="holds a list, not a table"):
        load_official(RECURRENT / "model.pt", tmp_path / "config.yaml")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list, not a state dict"):
        load_official(tmp_path / "list.pt", options)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_truncated_files(tmp_path: Path, name: str, weights: dict[str, Tensor], options: dict[str, Any]):
    path = tmp_path / name
    if name.endswith(".pt"):
        torch.save(weights, path)
    else:
        save_file({key: tensor.clone() for key, tensor in weights.items()}, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="can't be read as a state dict"):
        load_official(path, options)


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_pickled_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]):
    monkeypatch.chdir(tmp_path)
    torch.save({"transformer.wte.weight": Payload()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="can't be read as a state dict"):
        load_official(tmp_path / "model.pt", options)
    assert not (tmp_path / "executed").exists()


# --- hostile files ----------------------------------------------------------------------------------------------------

WIDE = [10**9, 10**30, 1e30, -1, 0, 1.5, "64", "x" * 10_000, [64], {"a": 1}, True, float("nan")]


@pytest.mark.parametrize("name", ["d_model", "n_heads", "n_layers", "mlp_ratio", "mlp_hidden_size", "n_kv_heads"])
@pytest.mark.parametrize("value", WIDE, ids=lambda value: str(value)[:12])
def test_sizes_without_sense_are_named(name: str, value: Any, options: dict[str, Any]):
    start = time.process_time()
    with pytest.raises(ValueError, match=f"the official configuration: {name} is ") as error:
        model_config({**options, name: value})
    assert time.process_time() - start < 1
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": []}, "rope_theta is"), ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small'"),
        ({"alibi": "yes"}, "alibi is 'yes'"), ({"weight_tying": [True]}, "weight_tying is"),
        ({"block_type": ["recurrent"]}, "block_type is"), ({"block_type": "x" * 10_000}, "block_type is 'xxx"),
        ({"x" * 10_000: 1}, "unknown option 'xxx"), ({5: 1}, "unknown option 5"), ({"model": [1]}, "not a table of"),
        ({"n_heads": "${model.nothing}"}, "n_heads is '"), ({"vocab_size": 2**40}, "vocab_size is"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_values_of_the_wrong_type_are_named(changes: dict[Any, Any], message: str, options: dict[str, Any]):
    with pytest.raises(ValueError, match=message) as error:
        model_config({**options, **changes})
    assert len(str(error.value)) < 600


def test_files_that_would_take_the_memory(tmp_path: Path, options: dict[str, Any], weights: dict[str, Tensor]):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(ValueError, match=r"bomb\.pt can't be read as a state dict: it unpacks to 10,000,000 bytes"):
        load_official(tmp_path / "bomb.pt", options)
    (tmp_path / "zero.pt").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"zero\.pt can't be read as a state dict: .* no regular file"):
        load_official(tmp_path / "zero.pt", options)
    for strange in (torch.eye(3).to_sparse(), torch.empty(2**20, 2**20, device="meta")):
        with pytest.raises(
            ValueError, match=r"'transformer\.wte\.weight' in the official checkpoint is no dense tensor"
        ):
            load_official({**weights, "transformer.wte.weight": strange}, options)
    wide = torch.zeros(1).expand(2**20, 2**20)  # a few bytes in the file
    torch.save({**weights, "transformer.wte.weight": wide}, tmp_path / "wide.pt")
    with pytest.raises(ValueError, match=r"has shape \(1048576, 1048576\); the configuration asks for"):
        load_official(tmp_path / "wide.pt", options)
    for text in ("[" * 100_000, "- " * 100_000, "a: &a [*a]"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config\.yaml nests lists or tables more than 64 deep"):
            load_official(weights, tmp_path / "config.yaml")
