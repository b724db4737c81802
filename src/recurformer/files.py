"""Write files and folders whole: nothing half-written ever has its final name.

    with replacing(path) as temporary:      # a file
        temporary.write_text("...")
    with appearing(path) as temporary:      # a folder
        (temporary / "part").write_text("...")

Both write into a hidden work folder beside `path`, `.NAME.recurformer-tmp`, which the process holds by a lock of the
system. The lock goes when the process ends, however it ends. A work folder without a lock is therefore a leftover of a
killed process, and the next writer of the same name removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

WORK = ".recurformer-tmp"
REPLACED = ".replaced"  # the older folder, inside the work folder
OLDER_THAN = 3600  # seconds after which a leftover that names no process counts as one

_held: set[int] = set()  # descriptors of the locks of this process


# --- a file, a folder -------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the place of a new file, which takes the name `path` when the block ends well and vanishes otherwise."""
    path = Path(path)
    with _work_folder(path, f".{secrets.token_hex(4)}") as work:
        yield work / path.name
        _settle(work / path.name, _usual_mode(work))
        os.replace(work / path.name, path)
    sync_folder(path.parent)


@contextmanager
def appearing(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yield a new folder, which takes the name `path` when the block ends well and vanishes otherwise.

    Args:
        path: missing, or an empty folder. A link to a folder stands for that folder. Its parents are made.
        replace: a folder of that name, or a link to one, may be there. It is replaced at one instant.

    Raises:
        ValueError: another process writes a folder of that name, or has done so meanwhile.
    """
    path = Path(path) if replace else Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _work_folder(path) as work:
        folder = unfinished(path)
        folder.mkdir()
        yield folder
        mode = _usual_mode(work)
        for entry in folder.rglob("*"):
            if not entry.is_symlink():
                _settle(entry, mode)
        sync_folder(folder)
        _give_name(folder, path, replace)
    sync_folder(path.parent)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def unfinished(path: str | os.PathLike[str]) -> Path:
    """Return the folder that `appearing(path, replace=True)` yields, for other processes that write into it too."""
    path = Path(path)
    return path.with_name(f".{path.name}{WORK}") / path.name


def remove_folder(path: Path) -> None:
    """Delete a folder so that a kill in between leaves no part of it under its name. Do nothing when it is missing."""
    if not path.exists():
        return
    with _work_folder(path) as work:
        os.rename(path, work / path.name)


# --- what killed processes left behind --------------------------------------------------------------------------------


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers left in a folder. Work that a living process holds, and links, are left alone.

    Args:
        name: only what was to become `name`; None: every work folder.
    """
    ours = re.compile(rf"\.({'.+' if name is None else re.escape(name)})(\.[0-9a-f]{{8}})?{re.escape(WORK)}")
    for entry in _entries(folder):
        if (match := ours.fullmatch(entry.name)) and entry.is_dir():
            _discard_if_free(entry, entry.with_name(match[1]))
        elif name is not None and _is_old_leftover(entry, name):
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def _entries(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.name.startswith(".") and not entry.is_symlink()]
    except OSError:
        return []


def _is_old_leftover(path: Path, name: str) -> bool:
    """Whether a killed process of an earlier version, which took no locks, left this on the way to `name`."""
    if by_process := re.fullmatch(rf"\.{re.escape(name)}\.(\d+)\.tmp", path.name):
        return int(by_process[1]) == os.getpid() or not _is_alive(int(by_process[1]))
    if re.fullmatch(rf"\.{re.escape(name)}\.partial-[0-9a-f]{{8}}", path.name):
        return time.time() - path.stat().st_mtime > OLDER_THAN
    return False


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        pass
    return True


def _discard_if_free(work: Path, path: Path) -> None:
    """Remove a work folder that no process holds. An unknown holder, on a file system without locks, counts as one."""
    if fcntl is None:
        return
    try:
        descriptor = os.open(work, os.O_RDONLY)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _discard(work, path)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _discard(work: Path, path: Path) -> None:
    """Remove a work folder. The folder that it was about to replace gets its name back when nothing else has it."""
    if (work / REPLACED).is_dir() and not path.exists():
        os.rename(work / REPLACED, path)
    shutil.rmtree(work, ignore_errors=True)


# --- work folders and their locks -------------------------------------------------------------------------------------


@contextmanager
def _work_folder(path: Path, token: str = "") -> Iterator[Path]:
    """Yield a new locked folder beside `path`, and remove it with all that is left in it at the end.

    Args:
        token: makes its name unique; without one, a second writer of the same name is refused.
    """
    remove_leftovers(path.parent, path.name)
    work = path.with_name(f".{path.name}{token}{WORK}")
    lock = None
    while lock is None:
        try:
            work.mkdir()
        except FileExistsError:
            raise ValueError(
                f"another process is writing {path}; wait until it has ended. If there is none, remove {work}"
            ) from None
        lock = _lock(work)
    try:
        yield work
    finally:
        _discard(work, path)
        _unlock(lock)


def _lock(folder: Path) -> int | None:
    """Return the descriptor that holds a folder; None when a process that cleans up has removed it.

    On a file system without locks the folder is held by its name alone, and nobody removes it as a leftover.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    _held.add(descriptor)
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    with contextlib.suppress(FileNotFoundError):
        if os.stat(folder).st_ino == os.fstat(descriptor).st_ino:
            return descriptor
    _unlock(descriptor)
    return None


def _unlock(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _forget_locks() -> None:
    """Let go of the parent's locks in a forked child: a worker that outlives the parent must not hold its folders."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


# --- names ------------------------------------------------------------------------------------------------------------


def _give_name(folder: Path, path: Path, replace: bool) -> None:
    """Rename a finished folder to `path`. A folder of that name lies in the work folder afterwards."""
    if replace and path.is_dir():
        if not _exchange(folder, path):
            os.rename(path, folder.with_name(REPLACED))  # until the next line, `_discard` would bring it back
            os.rename(folder, path)
        return
    try:
        os.rename(folder, path)  # takes the place of an empty folder, too
    except OSError as error:
        if not path.exists():
            raise
        raise ValueError(
            f"{path} has appeared while it was being written, and is not empty; remove it or choose another name"
        ) from error


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names at one instant; False where the system or the file system cannot.

    Two renames would leave nothing under the name when the process is killed between them.
    """
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


# --- on the disk ------------------------------------------------------------------------------------------------------


def sync_file(path: Path) -> None:
    """Make the contents of a file durable."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _usual_mode(work: Path) -> int:
    """Return the permissions of a new file here: by umask, or as the folder's access list says."""
    example = work / ".mode"
    example.touch()
    mode = example.stat().st_mode & 0o777
    example.unlink()
    return mode


def _settle(path: Path, mode: int) -> None:
    """Give a written file the usual permissions, and make it durable. The safetensors library writes mode 600."""
    if path.is_dir():
        sync_folder(path)
        return
    sync_file(path)
    if path.stat().st_mode & 0o777 != mode:
        path.chmod(mode)
