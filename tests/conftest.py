"""What every test shares: two workers on two cores, so one thread each; and NaN-poisoned fresh memory on request."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal

import pytest
import torch

torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell script leaves it to what it starts with &
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests stop themselves, and what they start, with it

if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    # Whether kernels are compiled or interpreted is settled when Triton is imported, by whichever test comes first.
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("recurformer.scan.fused.kernels")
    importlib.import_module("recurformer.generation.kernels")
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty*` returns with NaN (integers: their largest value), so that a read of it shows."""

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
