"""`bench decode`: the limit is the arithmetic that is said, and a row is a step of the engine at its context."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recurformer.config import ModelConfig
from recurformer.experiments.bench import decode
from recurformer.experiments.bench.decode import DecodeSettings, bench_decode, limit_seconds, model_config, weight_bytes
from recurformer.generation.engine import DecodeEngine
from recurformer.model import LanguageModel

SMALL: dict[str, Any] = {
    "models": ("nano:recurrent", "nano:first:1"), "batch_sizes": (1, 2), "contexts": (6, 4), "tokens": 3,
    "dtype": "fp32", "repeats": 1, "warmup": 1,
}  # fmt: skip


def test_the_bytes_of_the_papers_shapes():
    """12 D^2 L for both layers' kinds, the output layer, and the cache, each once."""
    wide, deep = ModelConfig.preset("300m-6"), ModelConfig.preset("300m-24", layers="standard")
    assert weight_bytes(wide, torch.bfloat16) == 2 * (6 * 12 * 2048**2 + 32128 * 2048)
    assert weight_bytes(deep, torch.bfloat16) == 2 * (24 * 12 * 1024**2 + 32128 * 1024)
    at_32k = [limit_seconds(config, torch.bfloat16, 1, 32768, 1.0) for config in (deep, wide)]
    assert at_32k[1] == weight_bytes(wide, torch.bfloat16) + 32768 * 6 * 2048 * 2 * 2
    assert at_32k[0] / at_32k[1] == pytest.approx(1.65, abs=0.02)
    many = [limit_seconds(config, torch.bfloat16, 64, 2048, 1.0) for config in (deep, wide)]
    assert many[0] / many[1] == pytest.approx(1.88, abs=0.02)


def test_weights_that_every_token_meets():
    shared = ModelConfig(
        vocab_size=97,
        vocab_multiple=64,
        d_model=64,
        n_heads=4,
        n_kv_heads=1,
        n_layers=3,
        activation="swiglu",
        d_mlp=100,
    )
    matrices = 2 * 64 * 64 + 2 * 64 * 16 + 3 * 64 * 100
    assert weight_bytes(shared, torch.float32) == 4 * (3 * matrices + 128 * 64)
    model = LanguageModel(shared)
    assert weight_bytes(shared, torch.float32) == 4 * sum(
        p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name != "embedding.weight"
    )


def test_rows(monkeypatch: pytest.MonkeyPatch, text_of: Callable[..., str]):
    monkeypatch.setattr(decode, "copy_bandwidth", lambda device: 1e9)
    seen: list[tuple[str, int, int]] = []
    results = bench_decode(DecodeSettings(**SMALL), lambda *said: seen.append(said))
    rows = results["rows"]
    assert [(row["model"], row["batch_size"], row["context"]) for row in rows] == [
        (name, B, n) for name in SMALL["models"] for B in (1, 2) for n in (4, 6)
    ]
    for row in rows:
        assert row["step"] == "plain"
        config = model_config(row["model"])
        assert row["kv_bytes_per_token"] == 2 * 4 * 128 * 4
        assert row["kv_bytes"] == row["batch_size"] * row["context"] * row["kv_bytes_per_token"]
        assert row["limit_s"] == (weight_bytes(config, torch.float32) + row["kv_bytes"]) / 1e9
        assert row["of_limit"] == pytest.approx(row["step_s"] / row["limit_s"])
        assert row["tokens_per_s"] == pytest.approx(row["batch_size"] / row["step_s"])
    assert json.loads(json.dumps(results))["rows"] == rows
    shown = text_of(decode.show_decode, results)
    assert "nano:first:1" in shown
    assert "0.001 TB/s" in shown
    assert shown.count("Auto is plain: ") == 1
    assert decode.draw_decode(results).startswith(b"\x89PNG")
    assert seen[-1][1:] == (8, 8)


def test_the_widest_rows_fit_the_table(text_of: Callable[..., str]):
    row = {
        "model": "300m-24:recurrent", "step": "HF generate", "batch_size": 256, "context": 32768, "step_s": 2.3456789,
        "kv_bytes_per_token": 196608, "kv_bytes": 256 * 32768 * 196608, "limit_s": 0.5437, "of_limit": 22.7,
        "tokens_per_s": 123456.0,
    }  # fmt: skip
    machine = {"versions": {"python": "3"}, "cpu": "x", "devices": {}, "threads": 1, "date": "today"}
    settings = {"dtype": "bf16", "device": "cuda", "repeats": 5, "tokens": 16}
    results = {"settings": settings, "machine": machine, "copy_bytes_per_s": 3e12, "rows": [row], "notes": []}
    assert "2,346" in text_of(decode.show_decode, results)


def test_a_run_ends_at_its_context(monkeypatch: pytest.MonkeyPatch):
    lengths: list[int] = []
    step = DecodeEngine.step

    def noted(self: DecodeEngine, *arguments: Any, **options: Any) -> torch.Tensor:
        lengths.append(self.length + 1)
        return step(self, *arguments, **options)

    monkeypatch.setattr(DecodeEngine, "step", noted)
    chosen = {**SMALL, "models": ("nano",), "batch_sizes": (1,), "contexts": (6,)}
    (row,) = bench_decode(DecodeSettings(**chosen))["rows"]
    assert lengths == [4, 5, 6] * 3
    assert row["context"] == 6


def test_what_has_no_room_is_a_row(monkeypatch: pytest.MonkeyPatch, text_of: Callable[..., str]):
    monkeypatch.setattr(decode, "free_bytes", lambda device: 2 * 5 * 4096)
    results = bench_decode(DecodeSettings(**{**SMALL, "models": ("nano",)}))
    assert [row.get("failed") for row in results["rows"]] == [None, None, None, "no room"]
    assert results["rows"][-1]["free_bytes"] == 40960
    assert "no room" in text_of(decode.show_decode, results)

    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(decode, "_time_steps", fails)
    results = bench_decode(DecodeSettings(**{**SMALL, "models": ("nano",)}))
    assert {row["failed"] for row in results["rows"]} == {"no room"}
    assert decode.draw_decode(results).startswith(b"\x89PNG")


def test_beside_hugging_face(text_of: Callable[..., str]):
    pytest.importorskip("transformers")
    chosen = {**SMALL, "models": ("nano",), "batch_sizes": (1,), "contexts": (40,), "tokens": 8}
    results = bench_decode(DecodeSettings(**chosen, huggingface=True))
    assert [row["step"] for row in results["rows"]] == ["plain", "generate", "HF generate"]
    for row in results["rows"]:
        assert ("step_s" in row) != ("failed" in row)
    assert "HF generate" in text_of(decode.show_decode, results)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_sizes": (1, 0)}, "batch_sizes holds 0"),
        ({"contexts": ()}, "contexts is empty"),
        ({"contexts": (64, 2)}, "the context 2 is shorter than the 16 tokens"),
        ({"dtype": "fp8"}, "dtype is 'fp8'"),
        ({"steps": ("fast",)}, "steps holds 'fast'; choose one of 'auto'"),
        ({"models": ("huge:recurrent",)}, "unknown preset 'huge'"),
        ({"models": ("nano:recursive",)}, "layers is 'recursive'"),
        ({"models": ()}, "models is empty"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_settings_that_make_no_measurement_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DecodeSettings(**options)


def test_the_command(bench: Callable[..., tuple[int, str, str]], tmp_path: Path):
    small = (
        "--models", "nano:standard", "--batch-sizes", 1, "--contexts", "4,5", "--tokens", 2, "--dtype", "fp32",
        "--repeats", 1, "--warmup", 1, "--device", "cpu",
    )  # fmt: skip
    code, out, _ = bench("decode", *small, "--step", "plain", "--out", tmp_path)
    assert code == 0
    assert "nano:standard" in out
    assert len(json.loads((tmp_path / "decode.json").read_text())["rows"]) == 2
    code, _, err = bench("decode", *small, "--models", "huge")
    assert (code, err.count("\n")) == (2, 1)
