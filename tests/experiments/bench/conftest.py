"""What tests of benchmarks share: a table as text, and the command."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from recurformer import cli


@pytest.fixture
def text_of() -> Callable[[Any, dict[str, Any]], str]:
    """Return a function that prints a table on 100 columns and checks that nothing is cut."""

    def shown(show: Any, results: dict[str, Any]) -> str:
        out = io.StringIO()
        show(results, Console(file=out, width=100))
        assert max(map(len, out.getvalue().splitlines())) <= 100
        assert "…" not in out.getvalue()
        return out.getvalue()

    return shown


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `recurformer bench ...`: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", *map(str, arguments)])
        assert isinstance(stop.value.code, int)
        said = capsys.readouterr()
        return stop.value.code, said.out, said.err

    return run
