"""Eqs. 4-5 on tables made by hand."""

from __future__ import annotations

import random

import pytest

from ppcl.analysis.artifacts import Stability
from ppcl.analysis.intervals import detect_intervals, difference, interval_end, stability, threshold_intervals


def table(rows: dict[int, list[float]], size: int) -> list[list[float | None]]:
    """Row u lists cka(u, u), cka(u, u+1), ...; missing ends repeat the last value."""
    result: list[list[float | None]] = [[None] * size for _ in range(size)]
    for u in range(size):
        values = rows.get(u, [1.0])
        for k in range(u, size):
            result[u][k] = values[min(k - u, len(values) - 1)]
    return result


# Falls by 0.10, 0.05, 0.03 and then 0.12: the trend breaks at block 4, so 0..3 is a run.
# From 4: falls by 0.05, then 0.15: 4..5. From 6: only 0.1 is left to fall: 6..7.
ROWS = {0: [1.0, 0.90, 0.85, 0.82, 0.70], 4: [1.0, 0.95, 0.80], 6: [1.0, 0.9]}


def test_difference_is_the_fall_of_cka() -> None:
    cka = table(ROWS, 8)
    assert difference(cka, 0, 1) == pytest.approx(0.10)
    assert difference(cka, 0, 4) == pytest.approx(0.12)
    with pytest.raises(ValueError, match=r"D\(3, 3\) needs k > u"):
        difference(cka, 3, 3)


def test_interval_ends_where_the_fall_grows() -> None:
    cka = table(ROWS, 8)
    assert interval_end(cka, 0, 7) == 3
    assert interval_end(cka, 4, 7) == 5
    assert interval_end(cka, 6, 7) == 7


def test_an_equal_fall_is_no_break() -> None:
    cka = table({0: [1.0, 0.75, 0.5, 0.25, -0.5]}, 5)
    assert interval_end(cka, 0, 4) == 3


def test_intervals_tile_in_order() -> None:
    assert detect_intervals(table(ROWS, 8), 0, 7) == [(0, 3), (4, 5), (6, 7)]
    assert detect_intervals(table(ROWS, 8), 4, 7) == [(4, 5), (6, 7)]


def test_a_single_block_left_over_is_no_run() -> None:
    assert detect_intervals(table({0: [1.0, 0.9, 0.5]}, 3), 0, 2) == [(0, 1)]


@pytest.mark.parametrize("seed", range(5))
def test_random_tables_are_tiled_completely(seed: int) -> None:
    generator = random.Random(seed)
    cka = table({u: [generator.random() for _ in range(12)] for u in range(12)}, 12)
    covered = [i for first, last in detect_intervals(cka, 0, 11) for i in range(first, last + 1)]
    assert covered in (list(range(12)), list(range(11)))


def test_threshold_variant() -> None:
    rows = {0: [1.0, 0.96, 0.91, 0.80], 1: [1.0, 0.5], 3: [1.0, 0.5], 4: [1.0, 0.95, 0.92]}
    cka = table(rows, 7)
    assert threshold_intervals(cka, 0, 6, 0.9) == [(0, 2), (4, 6)]
    assert threshold_intervals(cka, 0, 6, 0.95) == [(0, 1), (2, 6)]
    assert threshold_intervals(table({u: [1.0, 0.1] for u in range(7)}, 7), 0, 6, 0.5) == []


def test_stability_is_the_share_of_draws() -> None:
    draws = [[(1, 3), (4, 5)], [(1, 2), (3, 5)], [(1, 3), (4, 6)], [(1, 3), (4, 5)]]
    assert stability([(1, 3), (4, 5)], draws) == (Stability(0.75, 1.0, 0.75), Stability(0.5, 0.75, 0.75))
