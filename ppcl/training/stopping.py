"""SIGTERM: what a scheduler sends before it takes the machine away. Save, and leave with exit code 0."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


class Stopped(BaseException):
    """The process was asked to stop; like ``KeyboardInterrupt`` it is no error, and nothing may swallow it."""


@dataclass
class _State:
    """What the signal handler and the running code tell each other; a signal belongs to the whole process."""

    requested: bool = False
    listening: bool = False
    deferrals: int = 0


_state = _State()


def requested() -> bool:
    """Whether SIGTERM has come, in the present or the last block of :func:`on_sigterm`."""
    return _state.requested


def pending() -> bool:
    """Whether SIGTERM has come and is still to be obeyed; a signal of the past stops nothing."""
    return _state.requested and _state.listening


@contextlib.contextmanager
def on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise :class:`Stopped` inside the block (in the main thread alone; elsewhere it changes nothing)."""

    def handle(number: int, frame: FrameType | None) -> None:
        _state.requested = True
        if not _state.deferrals:
            raise Stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    _state.requested, _state.listening = False, True
    try:
        yield
    finally:
        _state.listening = False
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside the block SIGTERM is only noted; the block looks at :func:`pending` where it can stop."""
    _state.deferrals += 1
    try:
        yield
    finally:
        _state.deferrals -= 1
    if pending() and not _state.deferrals:
        raise Stopped
