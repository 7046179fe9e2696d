"""What the report's sections share: numbers as text, charts, and templates with HTML around them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from ppcl.common.templates import Templates

NONE = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
TEMPLATES = Templates(Path(__file__).resolve().parent / "templates")
render = TEMPLATES.html


@dataclass(frozen=True)
class Chart:
    """A chart with its title and the sentence that says how to read it."""

    title: str
    svg: Markup
    guide: str


def number(value: float | None, digits: int = 3) -> str:
    """A number with ``digits`` significant digits, an en dash for None."""
    if value is None:
        return NONE
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    decimals = max(0, digits - len(str(int(abs(value)))) + (abs(value) < 1))
    if 0 < abs(value) < 0.01:  # no significant digit would be left of a small difference
        decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:.{decimals}f}".replace("-", MINUS)


def percent(value: float | None, decimals: int = 1) -> str:
    """A share (0..1) as a percentage."""
    return NONE if value is None else f"{100 * value:.{decimals}f}%".replace("-", MINUS)


def count(value: float | None) -> str:
    """A large count with a unit: 14.4 M, 20.3 B."""
    if value is None:
        return NONE
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return number(value / size) + unit
    return number(value, 4) if value % 1 else str(int(value))


def size_bytes(value: float | None) -> str:
    """Bytes in MB or GB (powers of ten)."""
    if value is None:
        return NONE
    return f"{number(value / 1e9)} GB" if abs(value) >= 1e9 else f"{number(value / 1e6)} MB"


def duration(seconds: float) -> str:
    """Seconds as ``12.3 s``, ``4 min 5 s`` or ``2 h 3 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def signed(value: float | None, shown: str) -> str:
    """``shown`` with a plus sign in front when ``value`` is positive."""
    return f"+{shown}" if value is not None and value > 0 else shown


def ranged(shown: str, limits: tuple[float, float] | None, show: Callable[[float], str] = number) -> str:
    """A number as shown with its interval (low, high) underneath, where there is one."""
    return Markup("{} <small>{} to {}</small>").format(shown, show(limits[0]), show(limits[1])) if limits else shown
