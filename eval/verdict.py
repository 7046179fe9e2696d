"""One line that says what a model keeps of another, and whether the sample can tell."""

from __future__ import annotations

import math

from ppcl.common.tables import number
from ppcl.eval.intervals import LEVEL, Interval

TELLING = 2.0  # percent: an interval that is wider than this to both sides says little
MIN_PROMPTS = 30  # a bootstrap of fewer items understates how little they say


def verdict(
    name: str,
    against: str,
    drop: Interval | None,
    param_ratio: float | None,
    speedup: float | None,
    steps: int | None = None,
) -> str:
    """Write ``B keeps X% of the caption scores of A at Y% of the parameters, Zx as fast``, with the interval.

    Args:
        name: The model that is judged.
        against: The model that it is compared with.
        drop: Average drop in percent with its interval over prompts; None where there are no scores.
        param_ratio: Parameters relative to the other's.
        speedup: Above 1 where this model is faster.
        steps: That it draws in, where they are its own: the speed-up is that of whole pictures then.
    """
    costs = [f"at {param_ratio:.1%} of the parameters"] if param_ratio is not None else []
    own = f" in {steps} steps" if steps else ""
    costs += [f"{speedup:.2f}x as fast{own}"] if speedup is not None else []
    cost = ", ".join(costs)
    if drop is None:
        return f"{name} against {against}: no caption scores to compare{f'; {cost}' if cost else ''}"
    kept, low, high = 100 - drop.value, 100 - drop.high, 100 - drop.low
    line = f"{name} keeps {kept:.1f}% of the caption scores of {against}{f' {cost}' if cost else ''}"
    limits = f"{LEVEL:.0%} interval {low:.1f}% to {high:.1f}%, {drop.count} prompts"
    return f"{line} ({limits}){doubt(drop)}"


def doubt(drop: Interval) -> str:
    """What a reader must know about the sample: nothing, that it cannot tell, or that it is too small to."""
    if drop.count < MIN_PROMPTS:
        return f"; the sample is too small to tell: fewer than {MIN_PROMPTS} prompts"
    if drop.half_width > TELLING:
        # the width of an interval shrinks with the root of the sample
        needed = math.ceil(drop.count * (drop.half_width / TELLING) ** 2 / 10) * 10
        return f"; the sample is too small to tell: about {number(needed, 2)} prompts would narrow it to ±{TELLING:g}%"
    if drop.low <= 0 <= drop.high and drop.half_width > 0:
        return "; the two cannot be told apart by these prompts"
    return ""
