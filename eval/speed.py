"""Latency, memory and size.

The teacher and the student are timed alternately in one run, so that whatever else the
machine does hits both; medians keep single hiccups out.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class LatencyResult:
    """Wall-clock time of a call in milliseconds: median, and the 10th and 90th percentile."""

    median_ms: float
    p10_ms: float
    p90_ms: float


@dataclass(frozen=True)
class MemoryGrowth:
    """How far a call's peak lay above the level before it.

    Attributes:
        growth_bytes: Peak minus level before; None where the system offers no way to tell.
        measure: ``cuda`` (allocated tensors) or ``resident`` (resident set of the process).
    """

    growth_bytes: int | None
    measure: Literal["cuda", "resident"]


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def _time_ms(call: Callable[[], object]) -> float:
    _synchronize()
    began = time.perf_counter()
    call()
    _synchronize()
    return 1000 * (time.perf_counter() - began)


def summarize(times_ms: list[float]) -> LatencyResult:
    """Median and percentiles (interpolated) of at least one time."""
    if len(times_ms) == 1:
        return LatencyResult(times_ms[0], times_ms[0], times_ms[0])
    deciles = statistics.quantiles(times_ms, n=10, method="inclusive")
    return LatencyResult(statistics.median(times_ms), deciles[0], deciles[-1])


def measure_pair(
    first: Callable[[], object], second: Callable[[], object], runs: int, warmup: int = 1
) -> tuple[LatencyResult, LatencyResult]:
    """Time two calls alternately, ``runs`` times each.

    The order turns round every time (a b, b a, a b ...), so a machine that slows down steadily
    favours neither.

    Returns:
        The latency of the first and of the second call.

    Raises:
        ValueError: There is nothing to measure (``runs`` below 1).
    """
    if runs < 1:
        raise ValueError(f"runs must be at least 1, got {runs}")
    for _ in range(warmup):
        first()
        second()
    times: tuple[list[float], list[float]] = ([], [])
    calls = (first, second)
    for run in range(runs):
        for index in (0, 1) if run % 2 == 0 else (1, 0):
            times[index].append(_time_ms(calls[index]))
    return summarize(times[0]), summarize(times[1])


def _resident_bytes(field: Literal["VmRSS", "VmHWM"]) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if not match:
        raise OSError(f"no {field} in /proc/self/status")
    return int(match.group(1)) * 1024


def _return_freed_memory() -> None:
    """Give the heap's free pages back, or a call could reuse them and seem to need no memory."""
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _resident_growth(call: Callable[[], object]) -> int | None:
    """Growth of the resident set by the kernel's high-water mark, which Linux lets a process reset."""
    _return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident_bytes("VmRSS")
    except OSError:
        call()
        return None
    call()
    return max(0, _resident_bytes("VmHWM") - before)


def measure_memory(call: Callable[[], object], device: str | torch.device = "cpu") -> MemoryGrowth:
    """Run a call once and measure how far its peak lies above the memory in use before.

    On CUDA this is ``torch.cuda.max_memory_allocated`` over what was allocated; elsewhere the
    growth of the process' resident set (Linux), which also holds what libraries allocate.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return MemoryGrowth(_resident_growth(call), "resident")
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return MemoryGrowth(torch.cuda.max_memory_allocated(device) - before, "cuda")


def weight_bytes(module: nn.Module, device: str | torch.device | None = None) -> int:
    """Bytes of parameters and buffers; with ``device``, only of those that live on that kind of device."""
    kind = torch.device(device).type if device is not None else None
    tensors = [*module.parameters(), *module.buffers()]
    return sum(_bytes(t) for t in tensors if kind is None or t.device.type == kind)


def _bytes(tensor: Any) -> int:
    """Bytes of a tensor; a quantised one of torchao is made of several."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    size: int = tensor.numel() * tensor.element_size()
    return size
