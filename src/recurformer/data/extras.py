"""Libraries that only some inputs need: imported when one of those inputs appears, never before."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, purpose: str) -> Any:
    """Import an optional library.

    Raises:
        ValueError: when it is not installed; the message says what needs it and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{purpose} needs the {module} library; pip install 'recurformer[data]'") from error
