"""Shared set-up of all tests: one thread a process, interpreted Triton without a GPU, fresh memory full of NaN."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal

import pytest
import torch

torch.set_num_threads(1)
os.environ["RECURFORMER_TRACEBACK"] = "1"  # an error that no code expects must fail a test, not pass as one line

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell script that starts tests with & ignores it
    signal.signal(signal.SIGINT, signal.default_int_handler)  # some tests send it to themselves or to children

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    # Triton decides at the import of kernels whether it compiles or interprets them, so import them all here.
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("recurformer.scan.fused.kernels")
    importlib.import_module("recurformer.generation.fused.kernels")
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill the tensors of `torch.empty*` with NaN, integers with their largest value, so that reading them shows."""

    def poison(make):
        def wrapped(*args, **kwargs):
            fresh = make(*args, **kwargs)
            if fresh.device.type != "meta":
                with torch.no_grad():
                    if fresh.is_floating_point():
                        fresh.fill_(float("nan"))
                    elif fresh.dtype != torch.bool:
                        fresh.fill_(torch.iinfo(fresh.dtype).max)
            return fresh

        return wrapped

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
