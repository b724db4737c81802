"""The progress bar of `prepare`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from recurformer.data.sources import Source


class Bar:
    """Progress on stderr: bytes of input read, speed, tokens, time left. It is silent where there is no terminal.

    Args:
        sources: the inputs, whose sizes add up to the whole.
        visible: False: never show the bar.
    """

    def __init__(self, sources: Sequence[Source], visible: bool):
        console = Console(stderr=True)
        sizes = [source.size for source in sources]
        self._total = sum(sizes) if all(sizes) else None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TextColumn("{task.fields[tokens]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (visible and console.is_terminal),
        )
        self._task = None

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, what: str) -> None:
        """Start another pass over the inputs."""
        if self._task is not None:
            self._progress.update(self._task, visible=False)
        self._task = self._progress.add_task(what, total=self._total, tokens="")

    def tap(self, chunk: bytes) -> None:
        """Count bytes of input that were read."""
        if self._task is not None:
            self._progress.advance(self._task, len(chunk))

    def show_tokens(self, count: int) -> None:
        """Show the number of tokens written so far."""
        if self._task is not None:
            self._progress.update(self._task, tokens=f"{count:,} tokens")
