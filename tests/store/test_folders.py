"""A saved model comes back bit for bit; a folder that can't be one is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import logits_of, random_tokens, tiny
from safetensors.torch import load_file, save_file

import recurformer
from recurformer import LanguageModel, ModelConfig
from recurformer.files import replacing
from recurformer.store.folders import FORMAT_VERSION


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    recurformer.save(tiny(layers="first:1"), tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes: Any) -> None:
    """Change entries of a folder's configuration; None removes one."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {}, {"tie_embeddings": True}, {"vocab_multiple": 64}, {"layers": ("standard", "recurrent")},
        {"activation": "swiglu", "attention_bias": True, "mlp_bias": True, "qk_norm": "none", "n_kv_heads": 2},
    ],
    ids=["untied", "tied", "padded-vocabulary", "hybrid", "swiglu-biases"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_model_comes_back_bit_for_bit(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path):
    model = tiny(scan="auto", dtype=dtype, **options).train()
    recurformer.save(model, tmp_path)
    back = recurformer.load(tmp_path)
    assert back.config == model.config
    assert not back.training
    assert all(p.requires_grad for p in back.parameters())
    expected, found = model.state_dict(), back.state_dict()
    assert list(expected) == list(found)
    for name, tensor in expected.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)
    tokens = random_tokens(2, 6)
    assert torch.equal(logits_of(back, tokens), logits_of(model, tokens))


def test_a_tied_model_is_stored_once(tmp_path: Path):
    recurformer.save(tiny(tie_embeddings=True), tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "embedding.weight" in names
    assert "head.weight" not in names


def test_loading_in_another_dtype(folder: Path):
    model = recurformer.load(folder, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.embedding.weight, recurformer.load(folder).embedding.weight.bfloat16())


def test_saving_again_replaces_and_leaves_nothing_else(folder: Path):
    other = tiny(seed=5, layers="first:1")
    recurformer.save(other, folder)
    assert torch.equal(recurformer.load(folder).embedding.weight, other.embedding.weight)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_the_configuration_file_is_flat(folder: Path):
    values = json.loads((folder / "config.json").read_text())
    header = {"model_type": "recurformer", "architectures": ["RecurformerForCausalLM"], "format_version": 1}
    assert values == {**header, **tiny(layers="first:1").config.to_dict()}


@pytest.mark.parametrize(
    "names", [("_orig_mod",), ("module",), ("_orig_mod", "module"), ("module", "_orig_mod")], ids=str
)
def test_wrappers_leave_no_trace_in_the_names(names: tuple[str, ...], tmp_path: Path):
    """torch.compile keeps the model as `_orig_mod`, DistributedDataParallel as `module`."""
    model = tiny()
    wrapped: Any = model
    for name in names:
        outer: Any = torch.nn.Module()
        outer.add_module(name, wrapped)
        wrapped = outer
    wrapped.config = model.config
    recurformer.save(wrapped, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_non_contiguous_parameters_are_saved(tmp_path: Path):
    model = tiny()
    model.head.weight = torch.nn.Parameter(torch.randn(32, 97).T)
    recurformer.save(model, tmp_path)
    assert torch.equal(recurformer.load(tmp_path).head.weight, model.head.weight)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_no_folder_and_an_empty_folder(tmp_path: Path):
    with pytest.raises(ValueError, match="absent is no folder"):
        recurformer.load(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"is no model folder: it has no config\.json"):
        recurformer.load(tmp_path)


def test_weights_missing(folder: Path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors; the folder is incomplete"):
        recurformer.load(folder)


@pytest.mark.parametrize("kept", [0, 5, 200, -1], ids=["empty", "in-the-length", "in-the-header", "one-byte-short"])
def test_truncated_weights(kept: int, folder: Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or no safetensors file"):
        recurformer.load(folder)


@pytest.mark.parametrize("text", ["", '{"model_type": "recurf', "\udcff"], ids=["empty", "cut", "binary"])
def test_truncated_configuration(text: str, folder: Path):
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json is not (valid JSON|UTF-8 text)"):
        recurformer.load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "llama"}', "not 'recurformer'; convert the model first: recurformer convert .*model-rec"),
        ("{}", "has no model_type, so it does not describe a model"),
        ("[1]", "holds a list, not a table"),
        ("null", "holds a NoneType, not a table"),
    ],
)
def test_foreign_configurations(text: str, message: str, folder: Path):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        recurformer.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": None}, "lacks d_model; it is incomplete"),
        ({"n_heads": None, "layers": None}, "lacks n_heads, layers"),
        ({"n_heads": 5}, "d_model 32 is not divisible by n_heads 5"),
        ({"d_model": "wide"}, "d_model is 'wide'"),
        ({"format_version": FORMAT_VERSION + 1}, "format_version 2; this version reads up to 1"),
        ({"format_version": "new"}, "format_version 'new'"),
        ({"activation": "relu"}, "activation is 'relu'"),
    ],
    ids=str,
)
def test_configurations_that_make_no_model(changes: dict[str, Any], message: str, folder: Path):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        recurformer.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_embeddings": True}, r"holds 'head\.weight', which its config\.json has no place for"),
        ({"n_layers": 3}, r"lacks 'layers\.2\.attention_norm\.weight', which its config\.json asks for"),
        (
            {"d_mlp": 64},
            r"'layers\.0\.down_proj\.weight' in .* has shape \(32, 128\), its config\.json says \(32, 64\)",
        ),
    ],
    ids=str,
)
def test_weights_of_another_configuration(changes: dict[str, Any], message: str, folder: Path):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        recurformer.load(folder)


def test_weights_of_another_project(folder: Path):
    save_file({"transformer.wte.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 'embedding\.weight'|holds 'transformer"):
        recurformer.load(folder)


def test_unknown_entries_of_other_tools_are_left_alone(folder: Path):
    edit_config(folder, torch_dtype="float32", transformers_version="5.0")
    assert recurformer.load(folder).config == ModelConfig(
        vocab_size=97, d_model=32, n_layers=2, n_heads=4, layers="first:1"
    )


# --- writing ---------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_old_model(folder: Path, monkeypatch: pytest.MonkeyPatch):
    before = recurformer.load(folder)

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("recurformer.store.folders.write_tensors", full_disk)
    with pytest.raises(OSError, match="No space left"):
        recurformer.save(tiny(seed=7, layers="first:1"), folder)
    assert torch.equal(recurformer.load(folder).embedding.weight, before.embedding.weight)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_model_of_another_kind_can_take_the_folder(folder: Path):
    model = LanguageModel(ModelConfig(vocab_size=5, d_model=8, n_layers=1, n_heads=1, layers="standard"))
    recurformer.save(model, folder)
    assert recurformer.load(folder).config == model.config
