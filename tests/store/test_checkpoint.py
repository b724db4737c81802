"""Checkpoints: whole or not at all, checked before use, the right ones kept."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import recurformer
from recurformer import LanguageModel, ModelConfig, files
from recurformer.store import checkpoints
from recurformer.store.checkpoints import (
    Checkpoint,
    Manifest,
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


# --- only what is ours ------------------------------------------------------------------------------------------------


def test_rotation_deletes_only_folders_of_its_own_name(tmp_path):
    run = tmp_path / "checkpoints"
    first = write(run, 1)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    copies = ["step-00000001-before-lr-change", "step-0000001", "step-00000001.bak", "xstep-00000001"]
    for name in copies:
        shutil.copytree(first.path, run / name)
    shutil.copytree(first.path, elsewhere / "step-00000002")
    (run / "step-latest").symlink_to("step-00000001")
    (run / "step-00000002").symlink_to(elsewhere / "step-00000002")
    (run / ".tmp-notes").mkdir()
    (run / "step-00000000").write_text("a file")
    write(run, 3)
    write(run, 4)
    remove_outdated(run, 1)
    expected = {*copies, "step-latest", "step-00000002", ".tmp-notes", "step-00000000", "step-00000004"}
    assert {p.name for p in run.iterdir()} == expected
    assert (elsewhere / "step-00000002" / "manifest.json").is_file()
    assert steps(run) == [4]


def test_a_link_of_a_checkpoints_name_is_replaced_and_its_target_stays(tmp_path):
    run = tmp_path / "checkpoints"
    kept = write(tmp_path / "elsewhere", 2)
    run.mkdir()
    (run / "step-00000002").symlink_to(kept.path)
    written = write(run, 2)
    assert not written.path.is_symlink()
    assert newest_checkpoint(tmp_path / "elsewhere") == kept


def test_leftovers_of_earlier_versions_go_and_other_folders_stay(tmp_path):
    for name in (".tmp-step-00000009", ".tmp-old-step-00000001", ".tmp-step-9", ".tmp-mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / ".tmp-step-00000008").symlink_to("target")
    remove_outdated(tmp_path, 1)
    assert {p.name for p in tmp_path.iterdir()} == {".tmp-step-9", ".tmp-mine", "target", ".tmp-step-00000008"}


# --- files whose contents make no sense -------------------------------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    """Change values in a JSON file; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    removed = [name for name, value in changes.items() if value is None]
    path.write_text(json.dumps({name: value for name, value in values.items() if name not in removed}))


def tamper(checkpoint: Checkpoint, file: str, change: Callable[[Path], None]) -> None:
    """Change a file of a checkpoint, and its size and hash in the manifest."""
    change(checkpoint.path / file)
    files = json.loads((checkpoint.path / "manifest.json").read_text())["files"]
    size = (checkpoint.path / file).stat().st_size
    record = {"bytes": size, "sha256": checkpoints.digest(checkpoint.path / file)}
    edit(checkpoint.path / "manifest.json", files={**files, file: record})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 1.5}, "step is 1.5; it must be a whole number"),
        ({"step": "2"}, "step is '2'; it must be a whole number"),
        ({"step": 1e30}, "step is 1e.30; it must be a whole number"),
        ({"step": 10**30}, "step is 1000.*; it must be a whole number of at least 0 and at most"),
        ({"step": -1}, "step is -1; it must be"),
        ({"step": True}, "step is True; it must be"),
        ({"step": 3}, "is of step 3, its checkpoint of step 2"),
        ({"position": [2]}, "position is .2.*; it must be"),
        ({"seconds": float("nan")}, "seconds is nan; it must be"),
        ({"tokens": None}, "lacks tokens"),
        ({"dataset": {"a": 1}}, "dataset is .*; it must be text"),
        ({"dataset": ["x" * 10_000]}, "dataset is .*x... "),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_state_that_makes_no_sense(tmp_path, changes, message):
    write(tmp_path, 1)
    tamper(write(tmp_path, 2), "training/state.json", lambda path: edit(path, **changes))
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 2
    with pytest.raises(ValueError, match=f"state.json.*{message}.*; remove .*step-00000002 to continue from") as error:
        checkpoint.read()
    assert len(str(error.value)) < 700


def tensors(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        values = {**load_file(path), **changes}
        save_file({name: tensor for name, tensor in values.items() if tensor is not None}, path)

    return change


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("rng", tensors(python=torch.zeros(3, dtype=torch.int64)), "no usable random state 'python'"),
        ("rng", tensors(numpy=None), "no usable random state 'numpy'"),
        ("rng", tensors(torch=torch.zeros(5056)), "no usable random state 'torch'"),
        ("optimizer", tensors(x=torch.zeros(3, dtype=torch.int32)), "has type 'I32'"),
        ("optimizer", shorten, "is truncated or no safetensors file"),
    ],
)
def test_tensors_that_make_no_sense(tmp_path, file, change, message):
    tamper(checkpoint := write(tmp_path, 2), f"training/{file}.safetensors", change)
    with pytest.raises(ValueError, match=f"{message}.*; remove .*step-00000002 to continue from the checkpoint before"):
        checkpoint.read()


@pytest.mark.parametrize(
    "changes",
    [
        {"python": torch.full((626,), -1)}, {"numpy": torch.full((626,), 2**40)},
        {"numpy": torch.tensor([*range(624), 9999, 0])}, {"torch": torch.zeros(5056, dtype=torch.uint8)},
    ],
)  # fmt: skip
def test_random_states_that_are_none(changes):
    state = {name: tensor.clone() for name, tensor in read_rng().items()}
    with pytest.raises(ValueError, match=r"random states of the checkpoint are damaged .*; remove it to continue"):
        restore_rng({**state, **changes})
    restore_rng(state)


@pytest.mark.parametrize("version", [99, 2, "2", 1.5, True])
def test_a_checkpoint_of_a_newer_version_is_named_and_kept(tmp_path, version):
    write(tmp_path, 1)
    edit((newer := write(tmp_path, 2)).path / "manifest.json", format_version=version)
    for read in (newest_checkpoint, list_checkpoints, lambda folder: remove_outdated(folder, 1)):
        with pytest.raises(ValueError, match=r"step-00000002.manifest.json has format_version .*: upgrade recurformer"):
            read(tmp_path)
    assert newer.path.is_dir()


FAR = ["/etc/hostname", "../step-00000001/manifest.json", "/dev/zero", "model/../../x", "", "model//config.json"]


@pytest.mark.parametrize("name", FAR)
def test_a_manifest_names_only_files_of_its_own_folder(tmp_path, name):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    files = json.loads((bad.path / "manifest.json").read_text())["files"]
    edit(bad.path / "manifest.json", files={**files, name: {"bytes": 0, "sha256": "0"}})
    with pytest.raises(ValueError, match="which is outside of its folder; it is damaged"):
        Manifest.read(bad.path)
    assert newest_checkpoint(tmp_path) == good


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [link, pipe])
@pytest.mark.parametrize("file", ["model/model.safetensors", "training/state.json", "manifest.json"])
def test_devices_and_pipes_are_no_files_of_a_checkpoint(tmp_path, damage, file):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    damage(bad.path / file)
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) == good
    assert len(said) == 1


@pytest.mark.parametrize(
    "changes",
    [{"step": 3}, {"step": 1.5}, {"step": "x"}, {"files": [1]}, {"files": {"a": 1}}, {"files": None},
     {"validation_loss": "low"}, {"files": {"a": {"bytes": 10**40, "sha256": ""}}}],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_makes_no_sense_is_a_damaged_checkpoint(tmp_path, changes):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    edit(bad.path / "manifest.json", **changes)
    assert list_checkpoints(tmp_path) == ([good], [bad.path])
