"""Checkpoints: whole or not at all, checked before use, the right ones kept."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

import recurformer
from recurformer import LanguageModel, ModelConfig, files
from recurformer.store import checkpoints
from recurformer.store.checkpoints import (
    Checkpoint,
    TrainingState,
    list_checkpoints,
    newest_checkpoint,
    remove_outdated,
    resolve,
    write_checkpoint,
)
from recurformer.training.checkpoint import read_rng, restore_rng


def save_model(folder: Path) -> None:
    with torch.random.fork_rng():
        recurformer.save(LanguageModel(ModelConfig(vocab_size=7, d_model=8, n_heads=2, n_layers=1)), folder)


def write(folder: Path, step: int, loss: float | None = None) -> Checkpoint:
    folder.mkdir(exist_ok=True, parents=True)
    state = TrainingState(step=step, position=3 * step, evaluated=-1 if loss is None else step, validation_loss=loss)
    return write_checkpoint(folder, state, save_model, {"exp_avg/x": torch.arange(3.0)}, read_rng())


def steps(folder: Path) -> list[int]:
    return [c.step for c in list_checkpoints(folder)[0]]


def test_what_is_written_is_read_and_nothing_is_pickled(tmp_path):
    written = write(tmp_path, 7, 1.25)
    assert newest_checkpoint(tmp_path) == written
    state, optimizer, rng = written.read()
    assert state == TrainingState(step=7, position=21, evaluated=7, validation_loss=1.25)
    assert torch.equal(optimizer["exp_avg/x"], torch.arange(3.0))
    assert torch.equal(rng["torch"], read_rng()["torch"])
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".json", ".safetensors"}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [shorten, flip, Path.unlink])
@pytest.mark.parametrize(
    "file", ["model/model.safetensors", "training/optimizer.safetensors", "training/state.json", "manifest.json"]
)
def test_a_damaged_newest_checkpoint_is_passed_over_and_said(tmp_path, damage, file):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    damage(bad.path / file)
    if damage is not Path.unlink and file == "manifest.json":
        (bad.path / file).write_text((bad.path / file).read_text()[:-20])
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) == good
    assert len(said) == 1
    assert bad.path.name in said[0]
    assert write(tmp_path, 2).step == 2  # the next one of that step takes its place
    assert newest_checkpoint(tmp_path, said.append) == bad


def test_the_last_ones_the_best_and_the_named_are_kept(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: float("nan"), 6: 1.5, 7: None}
    written = {step: write(tmp_path, step, loss) for step, loss in losses.items()}
    (tmp_path / ".tmp-step-00000009").mkdir()  # a writer was killed
    shorten(written[3].path / "model/model.safetensors")
    remove_outdated(tmp_path, 2, [written[4].path])
    assert steps(tmp_path) == [2, 4, 6, 7]
    assert {p.name for p in tmp_path.iterdir()} == {f"step-{n:08d}" for n in (2, 4, 6, 7)}
    remove_outdated(tmp_path, 1)
    assert steps(tmp_path) == [2, 7]


def test_a_damaged_newer_one_does_not_cost_the_good_one(tmp_path):
    write(tmp_path, 1)
    shorten(write(tmp_path, 2).path / "training/state.json")
    remove_outdated(tmp_path, 1)
    assert steps(tmp_path) == [1]


@pytest.mark.parametrize("failing", ["optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json", "sync"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch, failing):
    good = write(tmp_path, 1)

    def full(wrapped):
        def write_or_fail(first, second=None):
            path = next(p for p in (first, second) if isinstance(p, Path))
            if path.name == failing or (failing == "sync" and path.name == "config.json"):
                path.write_bytes(b"half")
                raise OSError(28, "No space left on device")
            return wrapped(first) if second is None else wrapped(first, second)

        return write_or_fail

    for module, name in ((checkpoints, "write_tensors"), (checkpoints, "_write_json"), (files, "sync_file")):
        monkeypatch.setattr(module, name, full(getattr(module, name)))
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == [good.path.name]
    assert newest_checkpoint(tmp_path) == good


def test_what_a_path_means(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="is no folder"):
        resolve(run)
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"has no checkpoint yet.*--resume"):
        resolve(run)
    first, best, last = (write(run / "checkpoints", step, loss) for step, loss in ((1, None), (2, 1.0), (3, 2.0)))
    assert resolve(run) == best.model
    assert resolve(run, "newest") == last.model
    assert resolve(first.path) == first.model
    assert resolve(first.model) == first.model
    assert recurformer.load(run).config.vocab_size == 7
    for checkpoint in (first, best, last):
        (checkpoint.path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="only 3 damaged"):
        resolve(run)


@pytest.mark.parametrize("gauss", [False, True])
def test_random_states_come_back(gauss):
    def draw() -> list[float]:
        return [
            random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(),  # noqa: NPY002
            torch.rand(1).item(), torch.randn(1, dtype=torch.float64).item(),
        ]  # fmt: skip

    if gauss:  # both keep the second of a pair of normal numbers for later
        random.gauss(0, 1)
        np.random.randn()  # noqa: NPY002
    state = {name: tensor.clone() for name, tensor in read_rng().items()}
    first = draw()
    restore_rng(state)
    assert draw() == first
