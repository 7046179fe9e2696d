"""Progress bars with the time left (rich), silent where there is no terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType


def announce(text: str) -> None:
    """Say something to the person who waits, where progress is shown."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """A progress bar that becomes an occasional line of text outside a terminal.

    Args:
        label: What is being done.
        total: Number of units.
        start: Units done before (a resumed stage).
    """

    def __init__(self, label: str, total: int, start: int = 0) -> None:
        self.label, self.total, self.done, self.start = label, total, start, start
        self._bar = None
        self._began = self._said = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description:<22}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(label, total=total, completed=start, note="")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def advance(self, count: int = 1, loss: float | None = None) -> None:
        """Count units done; ``loss`` is shown beside the bar."""
        self.done += count
        note = f"loss {loss:.4f}" if loss is not None else ""
        if self._bar:
            self._bar.update(self._task, advance=count, note=note)
            return
        now = time.monotonic()
        if now - self._said > 15 or (self.done >= self.total and now - self._began > 2):
            self._said = now
            rate = (self.done - self.start) / max(1e-9, now - self._began)
            left = (self.total - self.done) / max(rate, 1e-9)
            text = f"  {self.label}: {self.done}/{self.total}, {left:.0f} s left{note and f', {note}'}"
            print(text, file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
