"""Weights on disk: all of a tensor or none of it, checked from the headers before anything is built."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

import recurformer
from recurformer import LanguageModel, ModelConfig
from recurformer.interop import convert, load_llama, load_official, save_llama, save_official
from recurformer.store.weights import find_weights, open_parts, open_tensors, parameter_shapes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    recurformer.save(tiny(), tmp_path / "model")
    return tmp_path / "model"


def write_part(tensors: dict[str, tuple[list[int], Tensor]], path: Path) -> None:
    """Write pieces of tensors, each with its place in the whole, as the processes of an FSDP run do."""
    places = {name: {"saved_offsets": offsets} for name, (offsets, _) in tensors.items()}
    pieces = {name: piece.contiguous() for name, (_, piece) in tensors.items()}
    save_file(pieces, path, metadata={"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0"})


def split(folder: Path, processes: int = 3) -> list[Path]:
    """Replace a folder's weights by the parts of several processes, rows of each tensor in turn; return the parts."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    made: list[Path] = []
    for rank in range(processes):
        pieces: dict[str, tuple[list[int], Tensor]] = {}
        for name, tensor in weights.items():
            rows = -(-len(tensor) // processes)
            if rank * rows < len(tensor):
                pieces[name] = ([rank * rows] + [0] * (tensor.dim() - 1), tensor[rank * rows : (rank + 1) * rows])
        made.append(folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors")
        write_part(pieces, made[-1])
    return made


def shard(folder: Path) -> list[Path]:
    """Replace a folder's weights by two shards with Hugging Face's index; return the shards."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    places = {name: files[number % 2].name for number, name in enumerate(sorted(weights))}
    for file in files:
        save_file({name: weights[name] for name, place in places.items() if place == file.name}, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return files


def edit_index(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    change(values["weight_map"])
    path.write_text(json.dumps(values))


def same(model: LanguageModel, other: LanguageModel) -> bool:
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


# --- parts and shards -------------------------------------------------------------------------------------------------


def test_parts_and_shards_make_up_the_model(folder: Path, tmp_path: Path):
    recurformer.save(tiny(), tmp_path / "other")
    split(folder)
    shard(tmp_path / "other")
    assert same(recurformer.load(folder), tiny())
    assert same(recurformer.load(tmp_path / "other"), tiny())


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_part_is_noticed(folder: Path, tmp_path: Path, lost: int):
    split(folder)[lost].unlink()
    with pytest.raises(ValueError, match=r"a part is missing|has shape|lacks"):
        recurformer.load(folder)
    with pytest.raises(ValueError, match=r"a part is missing|has shape|lacks"):
        convert(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kept", [(0, 2), (1, 2), (0, 1)])
def test_parts_of_an_optimizer_must_be_complete(tmp_path: Path, kept: tuple[int, ...]):
    rows = torch.arange(12.0).view(6, 2)
    for n in range(3):
        write_part({"exp_avg/a": ([2 * n, 0], rows[2 * n : 2 * n + 2])}, tmp_path / f"shard-{n}.safetensors")
    files = sorted(tmp_path.glob("shard-*"))
    assert torch.equal(open_parts(files)["exp_avg/a"].read(), rows)
    if kept == (0, 1):  # the last rows: another shape, which the optimizer of the model refuses
        assert open_parts(files[:2])["exp_avg/a"].shape == (4, 2)
    else:
        with pytest.raises(ValueError, match=r"do not make up 'exp_avg/a' of shape \(6, 2\): a part is missing"):
            open_parts([files[n] for n in kept])


def test_parts_must_not_overlap(tmp_path: Path):
    write_part({"a": ([0], torch.zeros(2))}, tmp_path / "shard-1.safetensors")
    write_part({"a": ([1], torch.zeros(2))}, tmp_path / "shard-2.safetensors")
    write_part({"a": ([3], torch.zeros(1))}, tmp_path / "shard-3.safetensors")
    with pytest.raises(ValueError, match="a part is missing"):
        open_parts(sorted(tmp_path.iterdir()))
    write_part({"a": ([3], torch.zeros(1, dtype=torch.float64))}, tmp_path / "shard-1.safetensors")
    with pytest.raises(ValueError, match="a part is missing or of another checkpoint"):
        open_parts(sorted(tmp_path.iterdir()))


@pytest.mark.parametrize(
    "places",
    [
        "[]", "{}", '{"b": 1}', '{"a": {"saved_offsets": "0"}}', '{"a": {"saved_offsets": [-1]}}',
        '{"a": {"saved_offsets": [1e300]}}', "[" * 5000, "nonsense",
    ],
)  # fmt: skip
def test_parts_that_do_not_say_where_they_belong(tmp_path: Path, places: str):
    path = tmp_path / "shard-1.safetensors"
    save_file({"a": torch.zeros(2)}, path, metadata={"DCP_SHARDING_INFO": places})
    if places in ("[]", "{}"):  # as whole tensors have it
        assert open_parts([path])["a"].shape == (2,)
    else:
        with pytest.raises(ValueError, match=r"does not say where 'a' belongs|not valid JSON|64 deep"):
            open_parts([path])


def test_the_index_of_shards_is_believed_only_as_far_as_it_is_right(folder: Path):
    files = shard(folder)
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    for change, message in (
        (lambda places: places.update({"norm.weight": "../other.safetensors"}), "shards must lie beside it"),
        (lambda places: places.update({"norm.weight": "/dev/zero"}), "shards must lie beside it"),
        (lambda places: places.update({"norm.weight": 5}), "shards must lie beside it"),
        (lambda places: places.update({"norm.weight": "model.st"}), r"model\.st is missing"),
        (lambda places: places.update({"more": files[0].name}), "lacks 'more'"),
        (lambda places: places.pop("norm.weight"), r"lacks 'norm\.weight'"),
        (lambda places: places.clear(), "has no weight_map"),
    ):
        index.write_text(good)
        edit_index(folder, change)
        with pytest.raises(ValueError, match=message):
            recurformer.load(folder)
    index.write_text(good)
    files[1].unlink()
    with pytest.raises(ValueError, match=f"{files[1].name} is missing"):
        recurformer.load(folder)
    files[1].symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=f"{files[1].name} is no regular file"):
        recurformer.load(folder)


# --- types and shapes -------------------------------------------------------------------------------------------------

WRONG = [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn]
STANDARD: dict[str, Any] = {"layers": "standard", "activation": "swiglu", "position": "rope", "qk_norm": "none"}


@pytest.mark.parametrize("dtype", WRONG, ids=str)
def test_weights_of_another_type_are_refused(folder: Path, tmp_path: Path, dtype: torch.dtype):
    save_llama(tiny(**STANDARD), tmp_path / "llama")
    save_official(tiny(qk_norm="none"), tmp_path / "official")
    for place, read in (
        (folder, recurformer.load),
        (tmp_path / "llama", load_llama),
        (tmp_path / "official", load_official),
    ):
        file = place / "model.safetensors"
        weights = load_file(file)
        name = sorted(weights)[-1]
        save_file({**weights, name: weights[name].to(dtype)}, file)
        with pytest.raises(ValueError, match=f"{re.escape(name)}' in .* has type .*convert it to one of these"):
            read(place)
    torch.save({name: tensor.to(dtype) for name, tensor in weights.items()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"has type .*convert it to one of these"):
        load_official(tmp_path / "model.pt", tmp_path / "official" / "config.json")


SHAPES: list[dict[str, Any]] = [
    {},
    {"layers": "first:1", "n_layers": 3, "n_kv_heads": 2},
    {"activation": "swiglu", "attention_bias": True, "mlp_bias": True, "qk_norm": "full", "norm": "layer"},
    {"qk_norm": "none", "tie_embeddings": True, "vocab_multiple": 64, "head_dim": 6, "d_mlp": 40, "n_kv_heads": 1},
    {"qk_norm": "full", "n_kv_heads": 2, "mlp_bias": True, "position": "none"},
]


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_shapes_follow_from_the_configuration(options: dict[str, Any]):
    state = tiny(**options).state_dict()
    assert list(parameter_shapes(tiny(**options).config).items()) == [
        (name, tuple(t.shape)) for name, t in state.items()
    ]


def test_presets_have_the_parameters_that_they_say():
    for name in ("nano", "150m-12"):
        config = ModelConfig.preset(name)
        shapes = parameter_shapes(config)
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) == config.num_parameters(embedding=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layers": 4096}, {"n_layers": 10**6}, {"d_model": 2**20}, {"d_model": 10**9}, {"vocab_size": 2**31 - 1},
        {"d_mlp": 10**30}, {"n_heads": 10**6},
    ],
)  # fmt: skip
def test_huge_configurations_cost_little(folder: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    monkeypatch.setattr("recurformer.store.folders.LanguageModel", None)  # nothing is built
    start = time.process_time()
    with pytest.raises(ValueError, match=r"lacks|has shape|is \d+; it must be|divisible"):
        recurformer.load(folder)
    assert time.process_time() - start < 2


# --- files ------------------------------------------------------------------------------------------------------------


def test_loaded_weights_are_copies(folder: Path, tmp_path: Path):
    recurformer.save(tiny(), tmp_path / "shards")
    recurformer.save(tiny(), tmp_path / "parts")
    save_llama(tiny(**STANDARD), tmp_path / "llama")
    files = [folder / "model.safetensors", tmp_path / "llama" / "model.safetensors"]
    files += [*shard(tmp_path / "shards"), *split(tmp_path / "parts")]
    loaded = [recurformer.load(place) for place in (folder, tmp_path / "shards", tmp_path / "parts")]
    loaded.append(load_llama(tmp_path / "llama"))
    before = [[p.detach().clone() for p in model.parameters()] for model in loaded]
    for file in files:
        size = file.stat().st_size
        with file.open("rb+") as opened:  # in place, as cp does
            opened.write(b"\0" * size)
    for model, parameters in zip(loaded, before, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize(
    "head", [b"", b"\xff" * 8, (2**40).to_bytes(8, "little"), (20).to_bytes(8, "little") + b"{" * 20]
)
def test_files_that_are_no_safetensors(tmp_path: Path, head: bytes):
    (tmp_path / "a").write_bytes(head)
    with pytest.raises(ValueError, match="is truncated or no safetensors file"):
        open_tensors(tmp_path / "a")


def test_a_huge_header_is_not_read(tmp_path: Path):
    with (tmp_path / "a").open("wb") as file:
        file.write((2**30).to_bytes(8, "little"))
        file.truncate(2**31)
    with pytest.raises(ValueError, match="has a header of 1,073,741,824 bytes; at most"):
        open_tensors(tmp_path / "a")


def test_a_folder_without_weights(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has a config\.json but no model\.safetensors"):
        find_weights(tmp_path)
