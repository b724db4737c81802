"""Files and folders appear whole or not at all, and what killed writers leave behind goes at the next start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recurformer import files
from recurformer.files import WORK, appearing, remove_folder, remove_leftovers, replacing, unfinished


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed_while_writing(code: str, place: Path, until: str) -> subprocess.Popen[bytes]:
    """Return a process that writes until it is killed, once `until` has appeared in `place`."""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=place)
    deadline = time.monotonic() + 30
    while not list(place.glob(until)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


FILE = """
import pathlib, time
from recurformer.files import replacing
with replacing(pathlib.Path("file")) as new:
    new.write_text("half"); time.sleep(60)
"""
FOLDER = """
import pathlib, time
from recurformer.files import appearing
with appearing(pathlib.Path("folder"), replace=True) as new:
    (new / "part").write_text("half"); time.sleep(60)
"""


def test_a_folder_appears_whole(tmp_path: Path):
    with appearing(tmp_path / "a" / "b") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "inner" / "file").read_text() == "x"
    assert names(tmp_path / "a") == ["b"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path):
    with appearing(tmp_path / "a") as folder:
        (folder / "old").touch()

    def fail() -> None:
        with appearing(tmp_path / "a", replace=True) as folder:
            (folder / "new").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["old"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced(tmp_path: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch):
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    for name in ("old", "new"):
        with appearing(tmp_path / "a", replace=True) as folder:
            (folder / name).touch()
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["new"]


def test_a_replaced_folder_is_not_lost_between_two_renames(tmp_path: Path):
    work = tmp_path / f".a{WORK}"
    (work / files.REPLACED).mkdir(parents=True)
    (work / files.REPLACED / "old").touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["old"]


def test_a_link_is_replaced_and_its_target_stays(tmp_path: Path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").touch()
    (tmp_path / "a").symlink_to("target")
    with appearing(tmp_path / "a", replace=True) as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["a", "target"]
    assert names(tmp_path / "target") == ["mine"]
    assert names(tmp_path / "a") == ["new"]


def test_without_replace_nothing_is_replaced(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with appearing(tmp_path / "link") as folder:
        (folder / "file").touch()
    assert names(tmp_path / "empty") == ["file"]
    with (
        pytest.raises(ValueError, match=r"empty has appeared while .* choose another name"),
        appearing(tmp_path / "empty"),
    ):
        pass
    assert names(tmp_path / "empty") == ["file"]


def test_two_writers_of_one_folder_and_of_one_file(tmp_path: Path):
    with (
        appearing(tmp_path / "a"),
        pytest.raises(ValueError, match=r"another process is writing .*a; wait until it has ended"),
        appearing(tmp_path / "a"),
    ):
        pass
    with replacing(tmp_path / "file") as first, replacing(tmp_path / "file") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "file").read_text() == "first"  # its block ends last
    assert names(tmp_path) == ["a", "file"]


@pytest.mark.parametrize(("code", "name"), [(FILE, "file"), (FOLDER, "folder")])
def test_leftovers_of_the_killed_go_and_those_of_the_living_stay(tmp_path: Path, code: str, name: str):
    process = killed_while_writing(code, tmp_path, f".{name}*{WORK}/*")
    time.sleep(0.2)
    left = names(tmp_path)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == left
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert names(tmp_path) == left
    if name == "file":
        with replacing(tmp_path / name) as new:
            new.write_text("whole")
    else:
        with appearing(tmp_path / name) as new:
            (new / "part").write_text("whole")
    assert names(tmp_path) == [name]


def test_only_what_is_ours_goes(tmp_path: Path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    others = [".config.json", ".config.json.tmp", ".config.json.partial-123z", ".config.json.partial-1234abcd"]
    for kept in (*others, f".other.{gone.pid}.tmp", f".config.json.{os.getppid()}.tmp", f"config.json{WORK}"):
        (tmp_path / kept).touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / f".link{WORK}").symlink_to("mine")
    before = names(tmp_path)
    (tmp_path / f".config.json.{gone.pid}.tmp").touch()  # of an earlier version
    (tmp_path / f".config.json.{os.getpid()}.tmp").mkdir()
    (old := tmp_path / ".config.json.partial-abcdef01").mkdir()
    os.utime(old, (0, 0))
    with replacing(tmp_path / "config.json") as new:
        new.touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*before, "config.json"])


def test_a_worker_does_not_hold_the_folder_of_a_killed_parent(tmp_path: Path):
    code = """
import multiprocessing, pathlib, time
from recurformer.files import appearing
with appearing(pathlib.Path("folder")) as new:
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    pathlib.Path("worker").write_text(str(worker.pid)); time.sleep(60)
"""
    process = killed_while_writing(code, tmp_path, "worker")
    time.sleep(0.1)
    process.kill()
    process.wait()
    remove_leftovers(tmp_path)
    os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)
    assert names(tmp_path) == ["worker"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "file") as new:
            new.touch(0o600)  # as the safetensors library does
        with appearing(tmp_path / "folder") as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / "file").touch(0o600)
    finally:
        os.umask(before)
    for file in (tmp_path / "file", tmp_path / "folder" / "inner" / "file"):
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_folder_is_removed_whole(tmp_path: Path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    remove_folder(tmp_path / "a")
    remove_folder(tmp_path / "a")
    assert names(tmp_path) == []
    assert unfinished(tmp_path / "a").parent.parent == tmp_path
