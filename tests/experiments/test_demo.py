"""The demo: equal models on the package's own text, resumed rather than repeated, and honest output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recurformer import cli
from recurformer.data import TokenDataset
from recurformer.experiments import demo
from recurformer.store.runs import read_metrics
from recurformer.training import read_train_config

# The package's text, but models, windows and evaluations that take a second.
SHORT = ["data.window=16", "batch_size=2", "evaluation.batches=1", "evaluation.batch_size=2"]
RUNS = tuple(demo.MODELS)


def run_demo(out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    arguments = ["--out", str(out), "--steps", "2", *(part for setting in SHORT for part in ("--set", setting)), *more]
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", *arguments])
    assert isinstance(stop.value.code, int)
    shown = capsys.readouterr()
    return stop.value.code, shown.out, shown.err


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder with its text prepared."""
    out = tmp_path_factory.mktemp("demo")
    demo.prepare_text(out / "data")
    return out


def test_the_text_is_in_the_package(data: Path) -> None:
    train, validation = TokenDataset(data / "data" / "train"), TokenDataset(data / "data" / "validation")
    assert train.n_documents == 69
    assert train.n_bytes == 1_039_352
    assert validation.n_documents == 6
    assert validation.n_bytes == 102_890
    assert "public domain" in Path(demo.quickstart("LICENCE.md")).read_text(encoding="utf-8")
    texts = {
        name: {json.loads(line)["text"] for line in Path(demo.quickstart(f"{name}.jsonl")).read_text().splitlines()}
        for name in ("train", "validation")
    }
    assert not texts["train"] & texts["validation"]


def test_the_models_are_of_one_size_and_learn_from_the_same(data: Path) -> None:
    configs = {
        name: read_train_config(None, demo.settings_of(model, data / "data", demo.STEPS))
        for name, model in demo.MODELS.items()
    }
    matrices, depths = set(), {}
    for name, config in configs.items():
        m = config.model
        matrices.add(m.n_layers * (4 * m.d_model**2 + 2 * m.d_model * m.mlp_width))
        depths[name] = m.n_layers
    assert matrices == {786_432}
    assert depths == {"recurrent": 4, "first-1": 4, "transformer": 8}
    assert [c.model.layer_kinds.count("recurrent") for c in configs.values()] == [4, 1, 0]
    besides_the_model = [{k: v for k, v in c.to_dict().items() if k != "model"} for c in configs.values()]
    assert besides_the_model[0] == besides_the_model[1] == besides_the_model[2]


def test_runs_compares_samples_and_continues(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_demo(data, capsys)
    assert code == 0, err
    for part in ("786,432 parameters", *RUNS, "val", "One seed", str(data / "curves.png"), str(data / "report.html")):
        assert part in out
    assert out.count(demo.PROMPTS[0]) == 3
    assert max(len(line) for line in out.splitlines() if "786,432" in line or "787,840" in line) <= 80
    page = (data / "report.html").read_text(encoding="utf-8")
    assert demo.PROMPTS[1] in page
    records = {name: read_metrics(data / name) for name in RUNS}
    for name in RUNS:
        assert [r["step"] for r in records[name] if r["event"] == "train"] == [1, 2]
        lowest = min(r["validation_loss"] for r in records[name] if r["event"] == "evaluation")
        assert f"{lowest:.4f}" in out

    # A second time: the finished runs are kept, a missing one is made again and turns out the same.
    lost = data / RUNS[1]
    for path in sorted(lost.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    assert run_demo(data, capsys)[0] == 0
    for name in (RUNS[0], RUNS[2]):
        assert read_metrics(data / name) == records[name]
    again = [r["loss"] for r in read_metrics(lost) if r["event"] == "train"]
    assert again == [r["loss"] for r in records[RUNS[1]] if r["event"] == "train"]

    # With other settings the old runs are in the way.
    code, _, err = run_demo(data, capsys, "--set", "optimizer.lr=1e-4")
    assert code == 2
    assert "optimizer.lr" in err
    assert "another --out" in err


def test_bad_settings_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_demo(tmp_path, capsys, "--set", "optimizer.rl=1")
    assert code == 2
    assert err.count("\n") == 1
    assert "optimizer.lr" in err


def test_help_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--help"])
    assert stop.value.code == 0
    assert f"default: {demo.STEPS}" in " ".join(capsys.readouterr().out.split())
