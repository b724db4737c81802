"""Libraries that only some inputs need. They are imported when such an input appears."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, purpose: str) -> Any:
    """Return an optional library.

    Args:
        module: name of the module to import.
        purpose: what needs it, the subject of the error message.

    Raises:
        ValueError: the library is not installed. The message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{purpose} needs the {module} library; pip install 'recurformer[data]'") from error
