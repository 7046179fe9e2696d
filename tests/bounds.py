"""Bounds of one call: a test fails while it hangs, and when it took more work or memory than it may."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path


def _resident(field: str) -> int:
    """Bytes of resident memory of this process: now (VmRSS), or the most since the mark was reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


@contextlib.contextmanager
def bounded(seconds: float = 10, memory: float = 2e9) -> Iterator[None]:
    """Interrupt a block that works for over ``seconds``, or waits for over ten times that; bound its memory.

    Work is processor time, which other processes on a busy machine do not add to. Memory is how far the peak of
    resident memory lies above what there was, in bytes: what earlier tests needed does not count.
    """

    def late(number: int, _: object) -> None:
        raise AssertionError(f"{signal.Signals(number).name}: it hangs")

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, 10 * seconds)}
    before = {number: signal.signal(number, late) for number in timers}
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    start = _resident("VmRSS")
    try:
        for timer, limit in timers.values():
            signal.setitimer(timer, limit)
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
    assert _resident("VmHWM") - start < memory, f"{(_resident('VmHWM') - start) / 1e9:.2f} GB more"
