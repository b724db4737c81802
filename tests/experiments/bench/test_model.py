"""`bench model`: the step is the training's, candidates without memory are rows, ratios are against the Transformer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recurformer.experiments.bench import model
from recurformer.experiments.bench.model import Candidate, ModelSettings, bench_model, random_batches
from recurformer.experiments.bench.timing import Times

SMALL: dict[str, Any] = {
    "presets": ("nano",), "tokens": 32, "length": 8, "micro_batch_sizes": (1, 4), "dtype": "fp32", "repeats": 1,
    "warmup": 1, "kinds": ("recurrent", "standard", "first:1"),
}  # fmt: skip


def test_the_plan():
    settings = ModelSettings(**{**SMALL, "micro_batch_sizes": (2, 64, 128)}, recompute=(False, True))
    assert settings.models() == [("nano", "standard"), ("nano", "recurrent"), ("nano", "first:1")]
    assert settings.candidates("recurrent") == [(2, None, False), (4, None, False)]  # 4 sequences are all there are
    assert settings.candidates("first:1") == [(size, None, again) for again in (False, True) for size in (2, 4)]
    wide = ModelSettings(**SMALL, recurrent_micro_batch_sizes=(2, 64))
    assert wide.candidates("first:1") == [(1, None, False), (1, 2, False), (1, 4, False), (4, None, False)]
    assert wide.candidates("standard") == wide.candidates("recurrent") == [(1, None, False), (4, None, False)]
    assert wide.training("nano", "first:1", Candidate(1, 2, False)).recurrent_micro_batch_size == 2
    config = settings.training("nano", "first:1", Candidate(2, None, True))
    assert (config.batch_size, config.micro_batch_size, config.recompute) == (4, 2, True)
    assert config.model.layers == "first:1"


def test_tokens_are_new_in_every_step_and_targets_follow_them():
    settings = ModelSettings(**SMALL)
    batches = random_batches(settings.training("nano", "standard", Candidate(1, None, False)), settings)
    first, second = next(batches), next(batches)
    assert first.tokens.shape == first.targets.shape == (4, 8)
    assert torch.equal(first.tokens[:, 1:], first.targets[:, :-1])
    assert not torch.equal(first.tokens, second.tokens)


def test_a_step_trains(monkeypatch: pytest.MonkeyPatch):
    """Weights move, by micro-batches of the size that was asked for."""
    moved: dict[str, bool] = {}
    sizes: list[int] = []
    original = model.build_model

    def watched(*arguments: Any) -> Any:
        built = original(*arguments)
        before = {name: p.detach().clone() for name, p in built.named_parameters()}
        forward = built.forward

        def counting(tokens: torch.Tensor, **rest: Any) -> Any:
            sizes.append(len(tokens))
            moved.update({name: not torch.equal(p, before[name]) for name, p in built.named_parameters()})
            return forward(tokens, **rest)

        monkeypatch.setattr(built, "forward", counting)
        return built

    monkeypatch.setattr(model, "build_model", watched)
    bench_model(ModelSettings(**{**SMALL, "kinds": ("standard",), "micro_batch_sizes": (2,)}))
    assert sizes == [2, 2, 2, 2]  # two steps of two micro-batches
    assert all(moved.values())


def test_notes_name_the_scan_of_each_candidate():
    """Which depends on what is evaluated at a time; one note where all are alike."""

    def notes(**options: Any) -> list[str]:
        settings = ModelSettings(**{**SMALL, "tokens": 2048, "length": 256, **options})
        return model.scan_notes(settings, "nano", torch.device("cpu"), torch.float32)

    side_by_side = "wavefront: exact tiling, recurrent layers side by side"
    (only,) = notes(kinds=("recurrent", "standard"))
    assert only.startswith(f"recurrent layers of nano {side_by_side}")
    assert notes(kinds=("standard",)) == []
    again, alone = notes(kinds=("first:2", "first:1"), recurrent_micro_batch_sizes=(8,), recompute=(False, True))
    assert again.startswith(
        "recurrent layers of nano (first:2, 1 at a time; first:2, 8 at a time; first:2, 4 at a time) "
    )
    assert side_by_side in again
    assert "(first:2, recomputed, 1 at a time;" in alone
    assert "first:1, 4 at a time" in alone
    assert ") tiled: exact tiling" in alone
    (asked,) = notes(scan="reference")
    assert asked == "recurrent layers of nano reference: as requested"


def test_rows_ratios_and_the_fastest(monkeypatch: pytest.MonkeyPatch, text_of: Callable[..., str]):
    """Scripted times: each model's fastest candidate is marked and held against the Transformer's fastest."""
    seconds = iter([4.0, 2.0, 10.0, 5.0, 3.0])  # of standard 1 and 4, recurrent 1 and 4, first:1 of 1
    real = model._measure

    def measured(s: ModelSettings, config: Any, device: torch.device, report: Callable[[int], None]) -> dict[str, Any]:
        if config.model.layers == "first:1" and config.micro_batch_size == 4:
            raise torch.OutOfMemoryError("no")
        times = Times((next(seconds),))
        monkeypatch.setattr(model, "time_runs", lambda *_, **__: times)
        return real(s, config, device, report)

    monkeypatch.setattr(model, "_measure", measured)
    calls: list[tuple[int, int]] = []
    results = bench_model(ModelSettings(**SMALL), lambda _, done, total: calls.append((done, total)))
    found = [
        (row["layers"], row["micro_batch_size"], row.get("fastest", False), row.get("ratio")) for row in results["rows"]
    ]
    assert found == [
        ("standard", 1, False, 0.5), ("standard", 4, True, 1.0), ("recurrent", 1, False, 0.2),
        ("recurrent", 4, True, 0.4), ("first:1", 1, True, pytest.approx(2 / 3)), ("first:1", 4, False, None),
    ]  # fmt: skip
    assert results["rows"][1]["tokens_per_s"] == 16
    assert results["rows"][0]["peak_bytes"] > 16 * results["rows"][0]["parameters"]  # weights, gradients, two moments
    assert results["rows"][-1]["failed"] == "no memory"
    steps = SMALL["warmup"] + SMALL["repeats"]
    warmed = [n * steps + step for n in range(5) for step in range(SMALL["warmup"])]  # the last candidate has no memory
    assert calls == [(done, 6 * steps) for done in warmed]
    assert json.loads(json.dumps(results))["rows"] == results["rows"]
    shown = text_of(model.show_model, results)
    assert "first:1 *" in shown
    assert "no memory" in shown
    assert "Loss chunked: " in shown
    assert model.draw_model(results).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 100}, "tokens 100 is no multiple of length 512"),
        ({"micro_batch_sizes": ()}, "micro_batch_sizes is empty"),
        ({"micro_batch_sizes": (4, 0)}, "micro_batch_sizes holds 0"),
        ({"presets": ("150m",)}, "unknown preset '150m'.*did you mean"),
        ({"presets": ()}, "presets is empty"),
        ({"kinds": ("first:99",)}, "first:99"),
        ({"dtype": "fp8"}, "dtype is 'fp8'; choose one of 'fp32', 'bf16'"),
        ({"scan": "tile"}, "scan is 'tile'; choose one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_settings_that_make_no_measurement_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ModelSettings(**options)


def test_the_command(bench: Callable[..., tuple[int, str, str]], tmp_path: Path):
    code, out, _ = bench(
        "model", "--presets", "nano", "--kinds", "standard", "--tokens", 16, "--length", 8, "--dtype", "fp32",
        "--micro-batch-sizes", "1,2", "--recompute", "both", "--repeats", 1, "--warmup", 1, "--device", "cpu",
        "--out", tmp_path,
    )  # fmt: skip
    assert code == 0
    rows = json.loads((tmp_path / "model.json").read_text())["rows"]
    assert [(row["micro_batch_size"], row["recompute"]) for row in rows] == [
        (1, False), (2, False), (1, True), (2, True),
    ]  # fmt: skip
    assert "tokens/s" in out
    for arguments, message in (
        (("--micro-batch-sizes", "1,two"), "no list of whole numbers"),
        (("--tokens", 100), "no multiple of length"),
    ):
        code, _, err = bench("model", "--device", "cpu", *arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
