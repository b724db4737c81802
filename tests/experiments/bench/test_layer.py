"""`bench layer`: what is measured is what is said, a path without memory is a row, official blocks are built right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close

from recurformer.choose import GPU_SCANS
from recurformer.experiments.bench import layer, official
from recurformer.experiments.bench.common import machine
from recurformer.experiments.bench.layer import LayerSettings, bench_layer
from recurformer.scan.algorithms import SCANS

SMALL: dict[str, Any] = {
    "batch_size": 2, "length": 8, "d_model": 16, "n_heads": 2, "dtype": "fp32", "repeats": 2, "warmup": 1,
}  # fmt: skip
CPU_SCANS = tuple(name for name in SCANS if name not in (*GPU_SCANS, *layer.STACK_SCANS))


@pytest.mark.parametrize(("length", "name"), [(128, "wavefront"), (8, "tiled")])
def test_the_note_names_the_scan_that_runs(length: int, name: str):
    settings = LayerSettings(**{**SMALL, "length": length}, stack=2, scans=("auto",))
    assert layer._ours(settings, "auto", torch.device("cpu")).how.startswith(f"{name}, ")


def test_every_path_in_both_passes(text_of: Callable[..., str]):
    calls: list[tuple[str, int, int]] = []
    results = bench_layer(LayerSettings(**{**SMALL, "scans": (*CPU_SCANS, "auto")}), lambda *call: calls.append(call))
    paths = [*CPU_SCANS, "auto", "standard"]
    assert [row["path"] for row in results["rows"]] == paths
    assert json.loads(json.dumps(results))["rows"] == results["rows"]
    for row in results["rows"]:
        for part in ("forward", "both"):
            assert row[f"{part}_fastest_s"] <= row[f"{part}_s"] <= row[f"{part}_slowest_s"]
            assert len(row[f"{part}_runs_s"]) == 2
            assert row[f"{part}_position_us"] == pytest.approx(1e6 * row[f"{part}_s"] / 8)
        assert row["parameters"] == 12 * 16 * 16 + 4 * 16
        assert row["both_peak_bytes"] > row["forward_peak_bytes"] > 4 * row["parameters"]  # the weights are in it
    assert any(note.startswith("auto: tiled, ") for note in results["notes"])
    total = 2 * len(paths)
    assert [call[1:] for call in calls] == [(n, total) for n in range(total)]
    shown = text_of(layer.show_layer, results)
    assert "B 2, N 8, D 16, H 2, fp32, cpu." in shown
    assert "1.00x" in shown
    assert layer.draw_layer(results).startswith(b"\x89PNG")


def test_a_stack_counts_one_layer():
    settings = LayerSettings(**SMALL, scans=("tiled",), stack=3, backward=False)
    recurrent, standard = bench_layer(settings)["rows"]
    for row in (recurrent, standard):
        assert row["layers"] == 3
        assert row["forward_layer_s"] == row["forward_s"] / 3
        assert row["forward_position_us"] == pytest.approx(1e6 * row["forward_s"] / 3 / 8)
        assert "both_s" not in row


def test_inputs_rotate_over_one_pool():
    settings = LayerSettings(**SMALL, inputs=3)
    take = layer._pool(settings, torch.device("cpu"))
    first, second, again = take(0), take(1), take(3)
    assert first.shape == (2, 8, 16)
    assert first.requires_grad
    assert torch.equal(first, again)
    assert torch.equal(first[1], second[0])
    assert not torch.equal(first, second)


def test_gradients_reach_weights_and_inputs():
    """`work` runs a whole backward pass."""
    settings = LayerSettings(**SMALL)
    subject = layer._ours(settings, "tiled", torch.device("cpu"))
    x = subject.inputs(0)
    z = subject.forward(x)
    z.backward(torch.ones_like(z))
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0
    alone = subject.forward(x.detach())
    assert_close(alone, z.detach())


def test_a_path_without_memory_is_a_row(monkeypatch: pytest.MonkeyPatch, text_of: Callable[..., str]):
    original = layer._ours

    def fails(s: Any, name: str, device: Any) -> Any:
        if name == "reference":
            raise torch.OutOfMemoryError("no")
        return original(s, name, device)

    monkeypatch.setattr(layer, "_ours", fails)
    results = bench_layer(LayerSettings(**SMALL, scans=("reference", "tiled")))
    assert [row.get("failed") for row in results["rows"]] == ["no memory", None, None]
    assert "no memory" in text_of(layer.show_layer, results)
    assert layer.draw_layer(results).startswith(b"\x89PNG")


def test_the_widest_numbers_fit(text_of: Callable[..., str]):
    times = {f"_{n}": 0.9876 for n in ("s", "fastest_s", "slowest_s", "layer_s")} | {"_position_us": 1234.5}
    row = {f"{part}{name}": value for part in ("forward", "both") for name, value in times.items()}
    row |= {"both_peak_bytes": 21.5 * 2**30, "layers": 1}
    paths = ("wavefront", "standard", "official standard")
    results = {
        "settings": {**vars(LayerSettings())}, "machine": machine(), "notes": ["auto: fused, fast"],
        "rows": [{"path": path, **row} for path in paths],
    }  # fmt: skip
    assert "987.6..987.6" in text_of(layer.show_layer, results)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be a whole number of at least 1"),
        ({"stack": 0}, "stack is 0"),
        ({"inputs": 0}, "inputs is 0"),
        ({"dtype": "fp8"}, "dtype is 'fp8'; choose one of 'fp32', 'bf16'"),
        ({"scans": ("tile",)}, "scans holds 'tile'; choose one of 'auto'.*did you mean 'tiled'"),
        ({"scans": (), "standard": False}, "nothing to measure"),
        ({"d_model": 30, "n_heads": 4}, "d_model 30 is not divisible by n_heads 4"),
        ({"official": "folder"}, "need an NVIDIA GPU, and device is 'cpu'"),
        ({"official": "folder", "device": "cuda", "dtype": "fp32"}, "official blocks run in bf16"),
        ({"official": "folder", "device": "cuda", "n_kv_heads": 2}, "official blocks run in bf16"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_settings_that_make_no_measurement_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LayerSettings(**options)


# --- the official code -----------------------------------------------------------------------------------------------

PACKAGE = {
    "__init__.py": "from .config import *\n",
    "config.py": """
import enum
from dataclasses import dataclass
from omegaconf import OmegaConf as om
from google.api_core.retry import Retry
from cached_path.schemes import SchemeClient, add_scheme_client

class Client(SchemeClient):
    errors = SchemeClient.errors + (ValueError,)

retry = Retry(timeout=1.0)

@retry
def fetch():
    return 5

BlockType = enum.Enum("BlockType", "recurrent sequential")
ActivationType = enum.Enum("ActivationType", "gelu")
LayerNormType = enum.Enum("LayerNormType", "default")
InitFnType = enum.Enum("InitFnType", "mitchell")

class ModelConfig:
    def __init__(self, **fields):
        self.__dict__.update(fields)
""",
    "model.py": """
import torch
from .config import fetch

class Block(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.kind, self.linear = config.block_type.name, torch.nn.Linear(config.d_model, config.mlp_hidden_size)
        self.biases = []

    def forward(self, x, attention_bias=None):
        self.biases.append(attention_bias)
        return x + self.linear(x).mean(-1, keepdim=True), None

class OLMo(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        self.config = config
        self.transformer = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([Block(config)])})
""",
    "efficient_utils.py": """
from olmo.model import OLMo

def alibi_attention_bias(model, run, length):
    return (run.model.max_sequence_length, length)

def cuda_capture_block(block, run, bias):
    raise AssertionError("not on a CPU")
""",
}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the official package's interface, which imports much that is not installed."""
    import sys

    (tmp_path / "olmo").mkdir()
    for name, text in PACKAGE.items():
        (tmp_path / "olmo" / name).write_text(text)
    for name in [name for name in sys.modules if name.partition(".")[0] == "olmo"]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "olmo"]:
        del sys.modules[name]


def test_official_blocks_are_built_and_called_as_their_own_benchmark_does(checkout: Path):
    import sys

    before = list(sys.path)
    efficient = torch.backends.cuda.mem_efficient_sdp_enabled()
    for kind, bias in (("recurrent", (8, 8)), ("sequential", None)):
        block = official.load_block(checkout, kind, 2, 8, 16, 4, torch.device("cpu"))
        assert block.forward(torch.ones(2, 8, 16)).shape == (2, 8, 16)
        assert block.module.biases == [bias]
        assert block.module.kind == kind
        assert sum(p.numel() for p in block.module.parameters()) == 64 * 16 + 64
    assert sys.modules["olmo.config"].fetch() == 5  # pyright: ignore[reportAttributeAccessIssue]
    assert sys.path == before
    assert "omegaconf" not in sys.modules
    assert not [name for name, module in sys.modules.items() if isinstance(module, official.StandIn)]
    assert torch.backends.cuda.mem_efficient_sdp_enabled() == efficient


def test_official_rows(checkout: Path, monkeypatch: pytest.MonkeyPatch, text_of: Callable[..., str]):
    monkeypatch.setattr(layer, "OFFICIAL_DEVICES", ("cpu",))
    settings = LayerSettings(**{**SMALL, "dtype": "bf16"}, scans=("tiled",), stack=2, official=str(checkout))
    results = bench_layer(settings)
    rows = {row["path"]: row for row in results["rows"]}
    assert list(rows) == ["tiled", "standard", "official", "official standard"]
    assert rows["official"]["layers"] == 1
    assert rows["official"]["both_position_us"] > 0
    shown = " ".join(text_of(layer.show_layer, results).split())
    assert "Official standard: plain, no ALiBi." in shown
    assert "its rows are one layer" in shown


def test_folders_that_are_no_checkout(checkout: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"has no olmo/efficient_utils\.py; give a checkout of https://"):
        official.load_package(tmp_path / "elsewhere")
    (checkout / "olmo" / "model.py").write_text("import no_such_package_at_all\n")
    with pytest.raises(ValueError, match=r"does not import: ModuleNotFoundError.*no_such_package_at_all"):
        official.load_package(checkout)


def test_another_package_of_the_name_is_not_taken_for_it(checkout: Path, tmp_path: Path):
    official.load_package(checkout)
    (tmp_path / "second" / "olmo").mkdir(parents=True)
    (tmp_path / "second" / "olmo" / "efficient_utils.py").write_text("")
    with pytest.raises(ValueError, match="another package olmo is loaded already"):
        official.load_package(tmp_path / "second")


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command(bench: Callable[..., tuple[int, str, str]], tmp_path: Path):
    small = ("--batch-size", 2, "--length", 4, "--d-model", 16, "--n-heads", 2, "--repeats", 1, "--warmup", 1)
    code, out, _ = bench("layer", *small, "--scans", "tiled, reference", "--device", "cpu", "--out", tmp_path / "new")
    assert code == 0
    results = json.loads((tmp_path / "new" / "layer.json").read_text())
    assert results["settings"]["scans"] == ["tiled", "reference"]
    assert results["settings"]["dtype"] == "bf16"
    assert (tmp_path / "new" / "layer.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "new" / "layer.png") in out
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (("--scans", "tile"), "did you mean 'tiled'"),
        (("--official", tmp_path), "NVIDIA GPU"),
        (("--out", tmp_path / "file"), "file"),
    ):
        code, _, err = bench("layer", "--device", "cpu", *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
