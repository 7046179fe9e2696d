"""Building blocks of the report: escaped text, numbers, tables, figures, the page."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence

from ppcl.eval.report_script import SCRIPT, VIEWER
from ppcl.eval.report_style import CSS

NONE = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"


def text(value: object) -> str:
    """Escape anything for use between tags or inside a quoted attribute."""
    return html.escape(str(value), quote=True)


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
    return f"{shown} <small>{show(limits[0])} to {show(limits[1])}</small>" if limits else shown


def paragraph(content: str, css: str = "") -> str:
    """A paragraph of ready HTML."""
    return f'<p class="{css}">{content}</p>' if css else f"<p>{content}</p>"


def note(content: str) -> str:
    """A caution that stands out; ``content`` is plain text."""
    return f'<div class="note">{text(content)}</div>'


def missing(sentence: str) -> str:
    """What stands where a part has nothing to show; plain text."""
    return paragraph(text(sentence), "soft")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], explanations: Sequence[str] = ()) -> str:
    """A table of ready HTML cells; ``explanations[i]`` is a full-width line under row i.

    On a narrow screen it scrolls sideways inside its own box.
    """
    parts = ["<div class=scroll><table><thead><tr>", *(f"<th scope=col>{cell}</th>" for cell in header)]
    parts.append("</tr></thead><tbody>")
    for index, (first, *rest) in enumerate(rows):
        parts.append(f"<tr><th scope=row>{first}</th>" + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>")
        if index < len(explanations) and explanations[index]:
            parts.append(f'<tr class=explain><td colspan="{len(header)}"><div>{explanations[index]}</div></td></tr>')
    parts.append("</tbody></table></div>")
    return "".join(parts)


def figure(title: str, svg: str, guide: str) -> str:
    """A chart with its title and the sentence that says how to read it (both plain text)."""
    return f"<figure><h3>{text(title)}</h3>{svg}<figcaption>{text(guide)}</figcaption></figure>"


def section(anchor: str, title: str, *content: str) -> str:
    """A section with a heading that the table of contents can point at."""
    return f'<section id="{anchor}"><h2>{text(title)}</h2>' + "\n".join(content) + "</section>"


def page(title: str, body: str) -> str:
    """The whole self-contained document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{CSS}</style></head>\n<body><main>\n{body}\n</main>"
        f"{VIEWER}<script>{SCRIPT}</script></body></html>\n"
    )
