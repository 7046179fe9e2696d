"""Markdown tables, and the lines that say how their numbers came about."""

from __future__ import annotations

import math
import os
import platform
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ppcl import __version__

_TAG = re.compile(r"<(?=[A-Za-z/!?])")  # what would begin one in HTML
PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """Lay out a table; the first column is text.

    Args:
        header: Column names.
        rows: One text a column each.
        numbers: Whether the other columns are numbers.
    """
    lines = [header, ["---", *["---:" if numbers else "---"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(_cell, cells))} |" for cells in lines)


def _cell(text: str) -> str:
    """A text that ends neither its cell nor its row, and is no HTML."""
    return _TAG.sub("&lt;", " ".join(text.split())).replace("|", "\\|")


def plain(text: str) -> str:
    """A text of somebody else's as Markdown that shows it and does nothing else: no HTML, link, code, or new line."""
    return _TAG.sub("&lt;", re.sub(r"([\\`\[\]])", r"\\\1", " ".join(text.split())))


def fenced(text: str, language: str = "") -> str:
    """A block of code in Markdown, with a fence that the text does not hold."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with so many significant digits, never as 1e-3; a dash if it is not known."""
    if value is None or not math.isfinite(value):
        return "-"
    if abs(value) < 1e-9:  # nothing here is measured that finely: it is rounding
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """Write the mean of some numbers, with their standard deviation where there are several."""
    measured_values = [value for value in values if value is not None]
    if not measured_values:
        return "-"
    mean = number(statistics.fmean(measured_values), digits)
    return f"{mean} ± {number(statistics.stdev(measured_values), 2)}" if len(measured_values) > 1 else mean


def with_limits(value: float | None, limits: Sequence[float | None] | None, digits: int = 3) -> str:
    """Write a number with its interval, as in ``31.4 (30.9 to 31.9)``; without one where it is not known."""
    low, high = limits or (None, None)
    if value is None or low is None or high is None:
        return number(value, digits)
    return f"{number(value, digits)} ({number(low, digits)} to {number(high, digits)})"


def measured(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Write a number of a row of a comparison: over several seeds mean and spread, of one seed with its interval.

    Args:
        rows: For each seed the numbers, and under ``intervals`` their limits, where they are known.
        name: Of the number.
    """
    values = [row[name] for row in rows]
    if len(values) != 1:
        return spread(values)
    return with_limits(values[0], (rows[0].get("intervals") or {}).get(name))


def processor() -> str:
    """Name the processor and count its cores, e.g. ``Intel Xeon, 2 cores``."""
    name = platform.processor() or platform.machine()
    try:
        model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        model = None
    return f"{model.group(1).strip() if model else name}, {os.cpu_count()} cores"


def device_name(device: str) -> str:
    """Describe a torch device, e.g. ``cpu (Intel Xeon, 2 cores), 2 threads``."""
    import torch

    if device.startswith("cuda"):
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"{device} ({processor()}), {threads} thread{'s' if threads > 1 else ''}"


def versions() -> str:
    """The versions behind a number, on one line."""
    parts = [f"ppcl {__version__}", f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            parts.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(parts)


def provenance(command: str, device: str) -> str:
    """Command, device and versions as the end of a Markdown file."""
    return f"Command: `{command}`\n\nDevice: {device_name(device)}. Versions: {versions()}."


def zeros_meaning(pattern: str) -> str:
    """What zeros of a pattern save and what they do not, in words."""
    text = "Zeros are stored like any other number: files, memory and time are those of the dense weights. "
    if pattern == "2:4":
        return text + (
            "ppcl.pipelines.to_semi_structured(pipe.transformer) makes them count on NVIDIA GPUs of compute capability "
            "8.0 or newer, in half precision: 9/16 of the memory of these layers, and kernels that skip the zeros."
        )
    return text + "No common kernel runs this pattern faster; 2:4 is the one that GPUs know."


def counted(number: int, noun: str) -> str:
    """A number with its noun: ``1 step``, ``2 steps``, ``2 branches``."""
    ending = "" if number == 1 else "es" if noun.endswith(("ch", "s", "x")) else "s"
    return f"{number:,} {noun}{ending}"


def size_text(count: float) -> str:
    """Bytes as text, GB (1e9) or MB where that is too coarse."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
