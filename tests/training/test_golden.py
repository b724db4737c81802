"""The loss curve of a tiny model in float64 on one thread: a change that means to change nothing reproduces it.

`RECURFORMER_WRITE_GOLDEN=1 pytest tests/training/test_golden.py` writes it anew, after a change that is meant.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from recurformer.training import train

GOLDEN = Path(__file__).with_name("golden.json")


@pytest.mark.parametrize("scan", ["reference", "auto"])
@pytest.mark.parametrize("packing", ["concat", "documents"])
def test_the_loss_curve_is_the_recorded_one(tiny, tmp_path, records, scan, packing):
    shape = {"d_model": 16, "n_heads": 2, "n_layers": 3, "layers": ["recurrent", "standard", "recurrent"]}
    config = tiny(
        precision="fp64", scan=scan, model=shape, data__packing=packing, optimizer__lr=0.01, schedule__steps=24,
        micro_batch_size=3, evaluation__every=8,
    )  # fmt: skip
    train(config, tmp_path / "run", quiet=True)
    curve = {
        "training loss": [r["loss"] for r in records(tmp_path / "run", "train")],
        "gradient norm": [r["grad_norm"] for r in records(tmp_path / "run", "train")],
        "validation loss": [r["validation_loss"] for r in records(tmp_path / "run", "evaluation")],
    }
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("RECURFORMER_WRITE_GOLDEN") and scan == "reference":
        GOLDEN.write_text(json.dumps({**golden, packing: curve}, indent=1) + "\n")
        return
    for name, values in golden[packing].items():
        assert curve[name] == pytest.approx(values, abs=1e-9, rel=0), name
