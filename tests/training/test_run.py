"""A run's folder: one process holds it, and a run whose folder is gone or replaced writes nothing more."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from recurformer.store.checkpoints import Checkpoint
from recurformer.training import NonFiniteError, TrainingError, loop, train
from recurformer.training.run import LOCK, lock


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function: do something in the middle of a step, counted from 1, between its gradient and its update."""

    def plan(number: int, act: Any) -> None:
        original, count = loop.gradient_step, iter(range(1, 10**9))

        def watched(model: Any, optimizer: Any, *rest: Any) -> Any:
            result = original(model, optimizer, *rest)
            if next(count) == number:
                act(model, optimizer)
            return result

        monkeypatch.setattr(loop, "gradient_step", watched)

    return plan


# --- the folder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 1000], ids=["noticed by a record", "noticed by a checkpoint"])
def test_a_run_whose_folder_was_removed_stops(every: int, tiny: Any, tmp_path: Path, at_step: Any) -> None:
    run = tmp_path / "run"
    at_step(7, lambda *_: shutil.rmtree(run))
    with pytest.raises(TrainingError, match=r"run was removed, moved or replaced while the run trained into it"):
        train(tiny(log__every=every), run, quiet=True)
    assert not run.exists()


def test_a_run_whose_folder_was_moved_stops(tiny: Any, tmp_path: Path, at_step: Any) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    at_step(7, lambda *_: run.rename(other))
    with pytest.raises(TrainingError, match="was removed, moved or replaced"):
        train(tiny(), run, quiet=True)
    assert not run.exists()
    assert [path.name for path in (other / "checkpoints").iterdir()] == ["step-00000005"]
    assert train(tiny(), other, resume=True, quiet=True).finished


def test_a_second_run_under_the_name_is_left_alone(tiny: Any, tmp_path: Path, at_step: Any) -> None:
    run, inner = tmp_path / "run", tiny(seed=1, schedule__steps=5)

    def replace(*_: Any) -> None:
        shutil.rmtree(run)
        loop.gradient_step = original  # pyright: ignore[reportPrivateImportUsage]
        assert train(inner, run, quiet=True).finished

    original = loop.gradient_step
    at_step(7, replace)
    with pytest.raises(TrainingError, match="was removed, moved or replaced"):
        train(tiny(), run, quiet=True)
    train(inner, tmp_path / "alone", quiet=True)
    files = [sorted(str(p.relative_to(r)) for p in r.rglob("*")) for r in (run, tmp_path / "alone")]
    assert files[0] == files[1]
    weights = [r / "checkpoints/step-00000005/model/model.safetensors" for r in (run, tmp_path / "alone")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_lock_that_was_removed_and_made_anew_is_another(tmp_path: Path) -> None:
    with lock(tmp_path) as held:
        held.check()
        (tmp_path / LOCK).unlink()
        with pytest.raises(TrainingError, match="replaced"):
            held.check()
        (tmp_path / LOCK).write_text(str(held.key))
        with pytest.raises(TrainingError, match="replaced"):
            held.check()


# --- what is saved, and when a run ends -----------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["weight", "optimizer"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_is_never_saved(what: str, value: float, tiny: Any, tmp_path: Path, at_step: Any) -> None:
    """Without held-out data nothing else would notice before the next step."""

    def poison(model: Any, optimizer: Any) -> None:
        weight = model.layers[0].o_proj.weight
        tensor = weight.data if what == "weight" else optimizer.state[weight]["exp_avg_sq"]
        tensor.view(-1)[3] = value

    at_step(7, poison)
    with pytest.raises(NonFiniteError, match=r"not finite at step 7; the last good checkpoint is .*step-00000006"):
        train(tiny(data__validation=None, checkpoint__every=1), tmp_path / "run", quiet=True)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000005", "step-00000006"]


@pytest.mark.parametrize("keep", [1, 2])
def test_the_checkpoint_that_a_run_resumed_from_is_kept_like_any_other(keep: int, tiny: Any, tmp_path: Path) -> None:
    config = tiny(data__validation=None, checkpoint={"every": 5, "keep_last": keep})
    train(config, tmp_path / "run", stop_at=5, quiet=True)
    train(config, tmp_path / "run", resume=True, quiet=True)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000015", "step-00000020"][-keep:]


@pytest.mark.parametrize("step", [19.5, 25, 20.0])
def test_a_run_ends_at_or_beyond_its_last_step(
    step: float, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(data__validation=None)
    train(config, tmp_path / "run", stop_at=5, quiet=True)
    read = Checkpoint.read

    def changed(self: Checkpoint) -> Any:
        state, *rest = read(self)
        state.step = step  # pyright: ignore[reportAttributeAccessIssue]
        return state, *rest

    made: list[int] = []
    original = loop.gradient_step
    monkeypatch.setattr(Checkpoint, "read", changed)
    monkeypatch.setattr(loop, "gradient_step", lambda *a: made.append(1) or original(*a))
    monkeypatch.setattr(loop, "save", lambda folder, state, *_: Checkpoint(folder / "none", state.step, None))
    result = train(config, tmp_path / "run", resume=True, quiet=True)
    assert result.finished
    assert len(made) == (step == 19.5)


# --- refused before anything is written -----------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scan": "fused"}, "fused"),
        ({"scan": "tileds"}, "tileds"),
        ({"scan": "fused", "model__layers": "recurrent", "precision": "bf16"}, "fused"),
        ({"device": "meta"}, "meta"),
    ],
    ids=str,
)
def test_what_this_device_cannot_do(changes: dict[str, Any], said: str, tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        train(tiny(**changes), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    train(tiny(schedule__steps=1), tmp_path / "run", quiet=True)  # nothing is in the way
