"""SIGTERM: what a scheduler sends before it takes the machine away. Save, and leave with exit code 0. SIGINT: leave.

Both raise an exception wherever the program is, which may be where some library lets none through (a destructor, a
callback, a bare except). So whoever sent a signal is not forgotten: the exception is raised again until it is obeyed.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

AGAIN = 1.0  # seconds until an exception that somebody swallowed is raised again


class Stopped(BaseException):
    """The process was asked to stop; like ``KeyboardInterrupt`` it is no error, and nothing may swallow it."""


@dataclass
class _State:
    """What the signal handlers and the running code tell each other; a signal belongs to the whole process."""

    requested: bool = False
    interrupted: bool = False
    listening: bool = False
    deferrals: int = 0


_state = _State()


def requested() -> bool:
    """Whether SIGTERM has come, in the present or the last block of :func:`on_signals`."""
    return _state.requested


def pending() -> bool:
    """Whether SIGTERM has come and is still to be obeyed; a signal of the past stops nothing."""
    return _state.requested and _state.listening


def _terminate(number: int, frame: FrameType | None) -> None:
    _state.requested = True
    _remind_later()
    if not _state.deferrals:
        raise Stopped


def _interrupt(number: int, frame: FrameType | None) -> None:
    _state.interrupted = True
    _remind_later()
    raise KeyboardInterrupt


def _remind(number: int, frame: FrameType | None) -> None:
    """Raise once more what is not on its way out."""
    _remind_later()
    error = sys.exception()
    while error is not None:
        if isinstance(error, Stopped | KeyboardInterrupt):
            return
        error = error.__context__
    if _state.interrupted:
        raise KeyboardInterrupt
    if not _state.deferrals:
        raise Stopped


def _remind_later() -> None:
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_REAL, AGAIN)


@contextlib.contextmanager
def on_signals() -> Iterator[None]:
    """Let SIGTERM raise :class:`Stopped` inside the block, and SIGINT ``KeyboardInterrupt``, until they are obeyed.

    In the main thread alone; elsewhere it changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {signal.SIGTERM: _terminate}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = _interrupt
    if hasattr(signal, "setitimer"):
        handlers[signal.SIGALRM] = _remind
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    _state.requested, _state.interrupted, _state.listening = False, False, True
    try:
        yield
    finally:
        _state.listening = False
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


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
