"""Training and scoring on tasks, sweeps, hybrids and their commands."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from recurformer import LanguageModel, ModelConfig, cli
from recurformer.experiments.tasks import (
    HybridSettings,
    TaskSettings,
    accuracy,
    fit,
    hybrids,
    make_task,
    placements,
    run_hybrids,
    run_tasks,
    sweep,
    text,
    training,
)
from recurformer.experiments.tasks.generators import TASKS
from recurformer.training.config import OptimizerConfig, ScheduleConfig
from recurformer.training.optimizer import learning_rate, set_rates

PNG = b"\x89PNG\r\n\x1a\n"
SMALL: dict[str, Any] = {"d_model": 16, "n_heads": 2, "length": 12, "steps": 2, "batch_size": 4}


def text_of(show: Any, results: dict[str, Any]) -> str:
    out = io.StringIO()
    show(results, Console(file=out, width=80))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "…" not in out.getvalue()
    return out.getvalue()


def test_one_recurrent_layer_learns_parity_and_holds_beyond_the_training_length():
    task = make_task("parity")
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=2, d_model=64, n_layers=1, n_heads=16))
    generator = torch.Generator().manual_seed(0)
    result = fit(
        model,
        lambda step: task.sample(32, 8, generator),
        ScheduleConfig(steps=120),
        OptimizerConfig(lr=4e-3, weight_decay=0.0),
    )
    assert len(result.losses) == len(result.gradient_norms) == 120
    assert result.losses[-1] < 0.05
    assert accuracy(model, task, 8, seed=1) > 0.98
    assert accuracy(model, task, 16, seed=1) > 0.9  # positions 9 ... 16, never trained


class Constant(LanguageModel):
    """Always answers 1."""

    def hidden(self, tokens: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.ones(*tokens.shape, self.config.d_model)


def test_accuracy_counts_the_answers_of_the_second_half():
    model = Constant(ModelConfig(vocab_size=2, d_model=4, n_layers=1, n_heads=1))
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[0.0], [1.0]]).expand(2, 4))
    _, targets = make_task("parity").sample(100, 15, seed=7)
    expected = targets[:, 7:].float().mean().item()
    assert accuracy(model, make_task("parity"), 15, count=100, seed=7) == pytest.approx(expected)


def test_training_stops_at_a_loss_that_is_not_finite():
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=2, d_model=16, n_layers=1, n_heads=2))
    task, before = make_task("parity"), model.head.weight.detach().clone()

    def batch(step: int):
        if step == 0:
            with torch.no_grad():
                model.norm.weight.fill_(float("nan"))
        return task.sample(2, 8, seed=step)

    result = fit(model, batch, ScheduleConfig(steps=5))
    assert result.diverged_at == 0
    assert result.losses == []
    assert torch.equal(model.head.weight, before)


def test_a_sweep_has_one_row_for_each_model_task_and_seed():
    settings = TaskSettings(
        tasks=("parity", "khop:1"), n_layers=(1, 2), layers=("recurrent", "first:2", "standard"), seeds=(0, 5),
        factors=(1, 3), test_count=20, **{**SMALL, "length": 5},
    )  # fmt: skip
    seen: list[tuple[str, int, int]] = []
    results = run_tasks(settings, lambda what, done, total: seen.append((what, done, total)))
    keys = [(r["task"], r["seed"], r["layers"], r["n_layers"]) for r in results["rows"]]
    models = [("recurrent", 1), ("standard", 1), ("recurrent", 2), ("first:2", 2), ("standard", 2)]
    assert keys == [(t, s, *m) for t in ("parity", "khop:1") for s in (0, 5) for m in models]
    assert len({r["parameters"] for r in results["rows"] if r["n_layers"] == 2}) == 1  # equal parameters
    assert all(list(r["accuracy"]) == ["5", "15"] for r in results["rows"])
    assert seen[-1][1:] == (40, 40)
    same = {r["layers"]: r["accuracy"] for r in results["rows"] if r["seed"] == 0 and r["task"] == "parity"}
    assert same["recurrent"] == same["first:2"]  # of two layers: the same model
    assert json.loads(json.dumps(results)) == {**results, "settings": json.loads(json.dumps(results["settings"]))}
    shown = text_of(sweep.show_tasks, results)
    assert "first:2 x2" in shown
    assert "mean of 2 seed(s)" in shown
    assert sweep.draw_tasks(results).startswith(PNG)


def test_a_curriculum_moves_on_when_a_length_is_learned_or_its_share_is_over():
    lesson = sweep.Lesson((2, 4, 8), 300)
    lengths = []
    for step in range(300):
        lengths.append(lesson.length(step))
        lesson.saw(0.0 if step < 30 else 1.0)
    learned = sweep.RECENT  # losses that must be seen
    assert lengths == [2] * learned + [4] * 100 + [8] * (200 - learned)  # 4 gets a third of the steps, 8 what is left
    assert lesson.began == {"2": 0, "4": learned, "8": learned + 100}
    # Steps passed over for want of time count for the share, but were not made.
    lesson = sweep.Lesson((2, 4), 300)
    lengths = []
    for step in range(0, 300, 50):
        lengths.append(lesson.length(step))
        lesson.saw(1.0)
    assert lengths == [2, 2, 2, 4, 4, 4]
    assert lesson.began == {"2": 0, "4": 3}


def test_a_sweep_with_a_curriculum_trains_at_its_lengths(monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    forward = LanguageModel.forward

    def watched(self: LanguageModel, tokens: torch.Tensor, *rest: Any, **options: Any):
        if self.training:
            seen.append(tokens.shape[1])
        return forward(self, tokens, *rest, **options)

    monkeypatch.setattr(LanguageModel, "forward", watched)
    small = {**SMALL, "length": 8, "steps": 6}
    settings = TaskSettings(
        tasks=("s3",), n_layers=(1,), layers=("standard",), curriculum=(2, 4), factors=(2,), test_count=4, **small
    )
    results = run_tasks(settings)
    assert seen == [2, 2, 4, 4, 8, 8]
    (row,) = results["rows"]
    assert row["began"] == {"2": 0, "4": 2, "8": 4}
    assert [step for step, _ in row["curve"]] == [1, 2, 3, 4, 5, 6]
    assert row["loss"] == row["curve"][-1][1]
    assert "2, 4 before" in text_of(sweep.show_tasks, results)


def test_training_ends_with_its_time_and_the_schedule_with_it(monkeypatch: pytest.MonkeyPatch):
    clock = itertools.count()  # each look at the clock takes a second

    monkeypatch.setattr(training.time, "perf_counter", lambda: next(clock))
    rates: list[float] = []
    monkeypatch.setattr(training, "set_rates", lambda *given: rates.append(set_rates(*given)))
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=2, d_model=16, n_layers=1, n_heads=2))
    task, asked = make_task("parity"), []

    def batch(step: int):
        asked.append(step)
        return task.sample(2, 8, seed=step)

    schedule = ScheduleConfig(steps=1000)
    result = fit(model, batch, schedule, OptimizerConfig(lr=1e-3), limit_s=10)
    assert asked == list(range(0, 1000, 100))
    assert len(result.losses) == 10
    assert rates == [learning_rate(step, 1e-3, schedule) for step in asked]
    assert rates[-1] < 2e-4  # of the end, not of the tenth step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curriculum": (4, 4)}, "must rise and stay below length 16"),
        ({"curriculum": (16,)}, "must rise and stay below length 16"),
        ({"curriculum": (4,), "length": 20, "tasks": ("recall",)}, r"curriculum is \(4,\); recall:4 needs at least 12"),
        ({"minutes": 0.0}, "minutes is 0.0"),
        ({"minutes": float("nan")}, "minutes is nan"),
        ({"tasks": ("party",)}, "did you mean 'parity'"),
        ({"tasks": ()}, "tasks is empty"),
        ({"steps": 0}, "steps is 0"),
        ({"length": 5, "tasks": ("recall",)}, "recall:4 needs at least 12"),
        ({"factors": (0,)}, "factors holds 0; each must be a whole number of at least 1"),
        ({"layers": ("recursive",)}, "recursive"),
        ({"layers": ("first:3",)}, "fit no depth"),
        ({"d_model": 30}, "d_model 30 is not divisible"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"seeds": ()}, "seeds is empty"),
    ],
    ids=str,
)
def test_settings_that_make_no_sweep_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TaskSettings(**{"tasks": ("parity",), **options})


# --- hybrids ---------------------------------------------------------------------------------------------------------


def test_placements():
    assert list(placements(4)) == [
        "SSSS", "RSSS", "SRSS", "SSRS", "SSSR", "RRSS", "RRRS", "SSRR", "SRRR", "RSRS", "SRSR", "RRRR",
    ]  # fmt: skip
    assert list(placements(1)) == ["S", "R"]
    assert placements(2)["RS"] == ("recurrent", "standard")


@pytest.mark.parametrize("on", ["text", "modular"])
def test_hybrids_are_trained_and_compared(on: str):
    settings = HybridSettings(on=on, n_layers=2, extra_steps=(2,), **SMALL)
    results = run_hybrids(settings)
    assert [(r["layers"], r["times"]) for r in results["rows"]] == [
        ("SS", 1), ("RS", 1), ("SR", 1), ("RR", 1), ("SS", 2),
    ]  # fmt: skip
    assert all(r["loss"] > 0 and r["cost_s"] > 0 for r in results["rows"])
    shown = text_of(hybrids.show_hybrids, results)
    assert "2 times the steps" in shown
    assert ("at 4x" in shown) == (on == "modular")
    assert hybrids.draw_hybrids(results).startswith(PNG)


def test_some_placements_alone():
    results = run_hybrids(HybridSettings(on="parity", n_layers=2, only=("RS",), extra_steps=(), **SMALL))
    assert [r["layers"] for r in results["rows"]] == ["SS", "RS"]  # the Transformer is the one to compare with
    results = run_hybrids(HybridSettings(on="text", n_layers=2, only=("SR", "RS"), extra_steps=(2,), **SMALL))
    assert [(r["layers"], r["times"]) for r in results["rows"]] == [("SS", 1), ("RS", 1), ("SR", 1), ("SS", 2)]
    base, *others = hybrids.summary(results)
    assert (base["layers"], base["times"]) == ("SS", 1)
    text = text_of(hybrids.show_hybrids, results)
    for entry in others:
        assert f"{entry['loss'] - base['loss']:+.4f}" in text
        assert f"{entry['cost_s'] / base['cost_s']:.2f}" in text
    everything = HybridSettings(on="parity", n_layers=2, only=("SS",), extra_steps=(), **SMALL)
    assert [r["layers"] for r in run_hybrids(everything)["rows"]] == ["SS"]
    with pytest.raises(ValueError, match="SS, RS, SR, RR"):
        HybridSettings(n_layers=2, only=("RSS",))


def test_the_held_out_loss_of_a_uniform_guess():
    model = LanguageModel(ModelConfig(vocab_size=256, d_model=8, n_layers=1, n_heads=1))
    torch.nn.init.zeros_(model.head.weight)
    assert text.held_out_loss(model, 16, count=70) == pytest.approx(torch.tensor(256.0).log().item(), rel=1e-6)
    tokens, targets = text.random_windows(text.quickstart_bytes("train"), 5, 9, torch.Generator().manual_seed(0))
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(["tasks", *arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("list") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in TASKS)
    common = ["--d-model", "16", "--n-heads", "2", "--length", "12", "--steps", "1", "--batch-size", "2"]
    out = tmp_path / "new"
    assert run("run", "parity", "--layers", "standard", "--test-count", "4", *common, "--out", str(out)) == 0
    assert run("hybrids", "text", "--n-layers", "2", *common, "--out", str(out)) == 0
    assert sorted(path.name for path in out.iterdir()) == ["hybrids.json", "hybrids.png", "tasks.json", "tasks.png"]
    assert json.loads((out / "tasks.json").read_text())["settings"]["tasks"] == ["parity"]
    assert str(out / "hybrids.png") in capsys.readouterr().out


def test_bad_values_end_in_one_line(capsys: pytest.CaptureFixture[str]):
    for arguments, message in (
        (["run", "party"], "did you mean 'parity'"),
        (["run", "parity", "--steps", "0"], "steps is 0"),
        (["hybrids", "texts"], "no task 'texts'"),
    ):
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
