"""No memory left, on a CPU or a GPU: one line that names what to lower, and exit code 2, in every verb."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import click
import pytest
import torch

from recurformer import cli
from recurformer.hardware import is_out_of_memory

ALLOCATOR = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


def of_the_cpu() -> None:
    torch.empty(2**60, dtype=torch.uint8)


def of_numpy() -> None:
    import numpy as np

    np.ones(2**60, dtype=np.uint8)


def of_a_chain() -> None:
    try:
        of_numpy()
    except MemoryError as error:
        raise RuntimeError("a worker has failed") from error


@pytest.mark.parametrize("ask", [of_the_cpu, of_numpy, of_a_chain])
def test_what_libraries_raise_is_known(ask: Any) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as error:
        ask()
    assert is_out_of_memory(error.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(f"{ALLOCATOR} allocate 400000000000000 bytes. Error code 12 (Cannot allocate memory)"),
        OSError(12, "Cannot allocate memory"),
        MemoryError(),
    ],
)
def test_every_kind_is_one_line(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {
        "train": "micro_batch_size", "eval": "--window", "generate": "--samples", "convert": "more memory",
        "prepare": "--workers", "bench": "batch size",
    }  # fmt: skip
    for verb, remedy in words.items():

        @click.command(verb)
        def fail() -> None:
            raise error

        group = click.Group("recurformer", commands={verb: fail})
        with pytest.raises(SystemExit) as stop:
            cli.main([verb], group)
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert said.startswith("recurformer: error: out of memory (")
        assert remedy in said
        assert len(said) < 500


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), RuntimeError("memory format is not supported")])
def test_other_errors_keep_their_traceback(error: RuntimeError) -> None:
    @click.command("train")
    def fail() -> None:
        raise error

    assert not is_out_of_memory(error)
    with pytest.raises(RuntimeError, match=str(error)):
        cli.main([], fail)


@pytest.mark.parametrize("closed", ["2>&-", "1>&-", "0<&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_are_no_files(closed: str, tmp_path: Any) -> None:
    """Without them, the first files that are opened would get what is meant for people."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, click\nfrom recurformer import cli\n"
        "@click.command()\n"
        "def write():\n"
        f"    file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "    assert file.fileno() > 2\n"
        "    for number in (1, 2):\n        os.write(number, b'for people')\n"
        "    print('one'), print('two', file=sys.stderr)\n"
        "    raise ValueError('no')\n"
        "cli.main([], write)\n"
    )
    found = subprocess.run(
        ["/bin/sh", "-c", f"exec {sys.executable} {script} {closed}"], capture_output=True, check=False
    )
    assert found.returncode == 2, found
    assert (tmp_path / "file").read_text() == ""
    assert (b"error: no" in found.stderr) == ("2>" not in closed)
