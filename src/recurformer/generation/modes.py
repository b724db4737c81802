"""Evaluation mode for the length of a call, also when several threads call at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

_lock = threading.Lock()
_evaluated: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()  # calls inside, mode before the first


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep a model and its parts in evaluation mode inside; each part's own mode returns when the last call ends.

    Calls may nest, and may overlap in several threads. Restoring what each call found would leave the model in
    evaluation mode: a call that began second finds the mode that the first one set.
    """
    parts = list(model.modules())
    with _lock:
        for part in parts:
            calls, training = _evaluated.get(part, (0, part.training))
            _evaluated[part] = (calls + 1, training)
        model.eval()
    try:
        yield
    finally:
        with _lock:
            for part in parts:
                calls, training = _evaluated.pop(part)
                if calls > 1:
                    _evaluated[part] = (calls - 1, training)
                else:
                    part.training = training
