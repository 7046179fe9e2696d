"""The paper's intervals: first-order trend of CKA (eqs. 4-5). No torch here."""

from __future__ import annotations

from collections.abc import Sequence

from ppcl.analysis.artifacts import Stability

CkaTable = Sequence[Sequence[float | None]]


def difference(cka: CkaTable, u: int, k: int) -> float:
    """D(u, k) = -(cka(u, k) - cka(u, k-1)), eq. 4; blocks from 0, k > u."""
    now, before = cka[u][k], cka[u][k - 1]
    if now is None or before is None:
        raise ValueError(f"D({u}, {k}) needs k > u")
    return -(now - before)


def interval_end(cka: CkaTable, u: int, last: int) -> int:
    """V = min{k - 1 : D(u, k) > D(u, k-1), k >= u + 2}, eq. 5; ``last`` if D never rises."""
    for k in range(u + 2, last + 1):
        if difference(cka, u, k) > difference(cka, u, k - 1):
            return k - 1
    return last


def detect_intervals(cka: CkaTable, first: int, last: int) -> list[tuple[int, int]]:
    """Tile blocks first..last with intervals, each starting after the one before it.

    Returns:
        Runs (u, v) of at least two blocks, in order.
    """
    intervals, u = [], first
    while u <= last:
        v = interval_end(cka, u, last)
        if v > u:
            intervals.append((u, v))
        u = v + 1
    return intervals


def stability(
    intervals: Sequence[tuple[int, int]], draws: Sequence[Sequence[tuple[int, int]]]
) -> tuple[Stability, ...]:
    """How often each interval, and each of its ends, is found in other draws of the tokens.

    Args:
        intervals: Of all tokens.
        draws: The intervals of each draw, at least one.
    """
    firsts = [{first for first, _ in found} for found in draws]
    lasts = [{last for _, last in found} for found in draws]
    return tuple(
        Stability(
            sum((first, last) in found for found in draws) / len(draws),
            sum(first in found for found in firsts) / len(draws),
            sum(last in found for found in lasts) / len(draws),
        )
        for first, last in intervals
    )


def threshold_intervals(cka: CkaTable, first: int, last: int, threshold: float) -> list[tuple[int, int]]:
    """The ablation of the paper: extend a run while cka(u, k) stays at or above a threshold."""
    intervals, u = [], first
    while u <= last:
        v = u
        while v + 1 <= last and (cka[u][v + 1] or 0.0) >= threshold:
            v += 1
        if v > u:
            intervals.append((u, v))
        u = v + 1
    return intervals
