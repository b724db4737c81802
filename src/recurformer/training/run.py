"""A run's folder: its lock, its config.json, and the settings that may change when the run is resumed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from recurformer.files import write_json
from recurformer.settings import suggest
from recurformer.training.config import TrainConfig, flatten, names
from recurformer.training.config_file import read_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG, LOCK = "config.json", ".lock"

# Settings that no step depends on. They may change whenever a run is resumed. The data may have moved: the fingerprint
# of the tokens is checked instead of their path.
FREE = (
    "data.train", "data.validation", "data.workers", "evaluation.*", "sample.*", "checkpoint.*", "log.*", "parallel",
    "timeout",
)  # fmt: skip

# Settings that the saved weights or the saved place in the data depend on. They never change within a run.
FIXED = (
    "model.*",
    "data.window",
    "data.packing",
    "data.seed",
    "data.vocab_size",
    "data.dtype",
    "data.eos_id",
    "seed",
    "init_from",
    "trained",
)


class TrainingError(RuntimeError):
    """A run cannot go on. Checkpoints written before are whole; the message says how to continue."""


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(name == p or (p.endswith(".*") and name.startswith(p[:-1])) for p in patterns)


def check_resumable(config: TrainConfig, out: Path, resume: bool, allow_change: Sequence[str]) -> list[str]:
    """Check whether `config` may be trained into `out`, and return the settings that change.

    A new run needs a folder that is missing or empty. A resumed run needs its own configuration, with two exceptions:
    settings that no step depends on (`FREE`), and settings named in `allow_change`. Their new values hold from the next
    step on. A new schedule applies as if it had always been the schedule. `FIXED` settings never change.

    Returns:
        The differences, "name: old -> new" each.

    Raises:
        ValueError: naming each refused difference and the remedy, or the run that is in the way.
    """
    known = list(names())
    for name in allow_change:
        if name not in known:
            raise ValueError(f"--allow-change {name!r} is no setting{suggest(name, known)}")
        if _matches(name, FIXED):
            raise ValueError(f"--allow-change {name!r}: it cannot change within a run; start a new one, with init_from")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out needs a folder")
    if not resume:
        if out.exists() and any(path.name != LOCK for path in out.iterdir()):
            raise ValueError(f"{out} is not empty; --resume continues a run, another --out starts a new one")
        return []
    if not (out / CONFIG).is_file():  # killed before it wrote anything, or never started
        return []
    before, now = flatten(read_run_config(out).to_dict()), flatten(config.to_dict())
    changed = {n: f"{n}: {before.get(n)!r} -> {now.get(n)!r}" for n in now if before.get(n) != now.get(n)}
    fixed = [text for name, text in changed.items() if _matches(name, FIXED)]
    if fixed:
        raise ValueError(
            f"{out} cannot be resumed with {'; '.join(fixed)}: the saved weights and place in the data depend on it. "
            "Start a new run, with init_from for its weights"
        )
    named = {name: text for name, text in changed.items() if not _matches(name, FREE) and name not in allow_change}
    if named:
        options = " ".join(f"--allow-change {name}" for name in named)
        raise ValueError(
            f"{out} was started with other settings: {'; '.join(named.values())}. To change them: {options}"
        )
    return list(changed.values())


def read_run_config(out: str | Path) -> TrainConfig:
    """Return the configuration of a run.

    Raises:
        ValueError: when the folder is no run.
    """
    file = Path(out) / CONFIG
    if not file.is_file():
        raise ValueError(f"{out} is no training run: it has no {CONFIG}; give --config to start one")
    try:
        return TrainConfig.from_dict(read_file(file))
    except ValueError as error:
        raise ValueError(f"{error} (in {file})") from None


def write_run_config(config: TrainConfig, out: Path) -> None:
    """Write a run's config.json, with every default filled in."""
    write_json(out / CONFIG, config.to_dict())


class FolderLock:
    """This process's hold on a run's folder. The system releases it however the process ends."""

    def __init__(self, out: Path, file: TextIO, key: int) -> None:
        self.out, self._file = out, file
        self.key = key  # a number, new each time, by which `check_shared` knows the folder

    def check(self) -> None:
        """Raise TrainingError when the folder was removed, moved or replaced since it was locked."""
        locked = os.fstat(self._file.fileno())
        try:
            found = os.stat(self.out / LOCK)
        except OSError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != (locked.st_dev, locked.st_ino):
            raise TrainingError(
                f"the run's folder {self.out} was removed, moved or replaced while the run trained into it, so the run "
                "stops and writes nothing more; restore the folder and --resume, or start a new run"
            )


@contextmanager
def lock(out: Path) -> Iterator[FolderLock]:
    """Hold a run's folder (made if missing) for this process.

    Raises:
        ValueError: when another process trains into it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"another process is training into {out}; wait for it or stop it") from None
        key = secrets.randbits(52)  # exact as a float, too
        file.truncate(0)
        file.write(str(key))
        file.flush()
        os.fsync(file.fileno())  # or another machine would not see it
        yield FolderLock(out, file, key)


def check_shared(out: Path, key: int) -> None:
    """Raise ValueError when a run's folder is not the one that the first process holds."""
    file = out / LOCK
    if not file.is_file() or file.read_text() != str(key):
        raise ValueError(
            f"the run's folder {out.absolute()} is not that of the first process; put it on a file system that all "
            "machines see"
        )
