"""The stability benchmark: what is called a bound bounds, what is measured is what is said."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import layer_of
from rich.console import Console

from recurformer import cli
from recurformer.experiments.bench import stability
from recurformer.experiments.bench.stability import Elman, StabilitySettings
from recurformer.experiments.tasks.text import quickstart_bytes

SMALL: dict[str, Any] = {
    "d_model": 16, "n_layers": 1, "n_heads": 2, "length": 24, "sequences": 2, "probes": 4, "steps": 2, "batch_size": 2,
    "uniform_width": 64, "depths": (1,), "widths": (16,), "rates": (1e-3,), "grid_steps": 2, "grid_length": 8,
}  # fmt: skip
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return stability.bench_stability(StabilitySettings(**SMALL))


def test_the_direct_path_and_the_power_law_bound_one_uniform_layer(results: dict[str, Any]):
    gains = {name: torch.tensor(values) for name, values in results["uniform"]["gains"].items()}
    assert all(values.shape == (24,) for values in gains.values())
    # At distances 0 and 1 there is no other path than the direct one.
    assert torch.allclose(gains["recurrent"][-2:], gains["direct"][-2:], rtol=1e-9, atol=0)
    assert (gains["recurrent"][:-1] > 0.95 * gains["direct"][:-1]).all()
    assert (gains["recurrent"] < gains["bound"] * 1.05).all()
    assert torch.allclose(gains["recurrent"][4:], gains["predicted"][4:], rtol=0.25)
    # A standard layer has one path alone, whose gain does not depend on the distance.
    earlier = gains["standard"][:-1]
    assert earlier.max() / earlier.min() < 1.5


def test_attention_of_the_uniform_layer_is_uniform():
    model = stability.uniform_layer(16, 2, "standard", 0)
    layout = model.layout(5)
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    layer = layer_of(model, 0)
    maths = layer.maths()
    v = maths.pairs(maths.attention_input(x), None)[1]
    mean = v.cumsum(2) / torch.arange(1, 6)[:, None]
    assert torch.allclose(layer(x, layout), maths.outputs(x, mean), atol=1e-12)


def test_rows_and_numbers(results: dict[str, Any]):
    assert [(row["model"], row["trained"]) for row in results["models"]] == [
        (name, trained) for name in ("recurrent", "standard", "Elman") for trained in (False, True)
    ]
    assert all(len(row["gains"]) == 24 for row in results["models"])
    assert [row["layers"] for row in results["training"]] == ["recurrent", "standard"]
    assert all(len(row["norms"]) == 2 and row["diverged_at"] is None for row in results["training"])
    out = io.StringIO()
    stability.show_stability(results, Console(file=out, width=80))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "…" not in out.getvalue()
    assert stability.draw_stability(results).startswith(PNG)


def test_the_foil_is_torchs_cell():
    torch.manual_seed(0)
    foil, cell = Elman(8), torch.nn.RNN(8, 8, batch_first=True)
    cell.load_state_dict(
        {
            "weight_ih_l0": foil.input.weight, "weight_hh_l0": foil.state.weight, "bias_ih_l0": foil.input.bias,
            "bias_hh_l0": torch.zeros(8),
        }
    )  # fmt: skip
    x = torch.randn(2, 6, 8)
    with torch.no_grad():
        assert torch.allclose(foil.states(x), cell(x)[0], atol=1e-6)
    tokens = quickstart_bytes("train")[:12].view(2, 6)
    assert foil.forward(tokens, tokens).loss is not None


def test_spikes_are_counted():
    assert stability.spikes([1.0] * 19 + [9.0]) == 0  # too early to tell
    assert stability.spikes([1.0] * 20 + [3.9, 4.1, 1.0, 9.0]) == 2


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--d-model", "16", "--n-layers", "1", "--n-heads", "2", "--length", "8", "--steps", "1"]
    options += ["--uniform-width", "16", "--no-training", "--out", str(tmp_path)]
    for arguments, code in ((options, 0), (["--length", "1"], 2)):
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", "stability", *arguments])
        assert stop.value.code == code
    assert "length is 1; it must be a whole number of at least 2" in capsys.readouterr().err
    assert json.loads((tmp_path / "stability.json").read_text())["training"] == []
    assert (tmp_path / "stability.png").read_bytes().startswith(PNG)
