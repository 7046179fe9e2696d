"""How sure a number is: bootstrap intervals over pictures, prompts or states.

Every number here is a mean over items, or a function of several means over the same items
(a ratio, the average drop). Items are drawn again with replacement, the same ones for all
columns, so that what two models share (the prompt, the noise) cancels: a paired bootstrap.
Training and picture seeds are few, and no resampling of three says much: their interval is Student's.
A set distance such as FID is no mean; its first-order expansion is one (an item's influence,
see :mod:`ppcl.eval.set_distances`), and that is what is drawn again.

The limits are bias-corrected and accelerated (BCa; Efron 1987) up to 2,000 items; beyond
that the correction is too small to see and its jackknife too long to wait for, and they are
plain percentiles. A share that is 0 or 1 in the whole sample has Wilson's limits, since no
resampling of equal values says anything.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Statistic = Callable[..., Any]  # called with the columns and axis=, as scipy's vectorised statistics

LEVEL = 0.95
RESAMPLES = 2000
BCA_LIMIT = 2000
BATCH_ELEMENTS = 2**22  # resampled numbers in memory at a time


@dataclass(frozen=True)
class Interval:
    """A number and its bootstrap interval.

    Attributes:
        value: The number itself, from all items once.
        low: Lower limit.
        high: Upper limit.
        count: Items behind it.
    """

    value: float
    low: float
    high: float
    count: int

    @property
    def half_width(self) -> float:
        """Half the distance between the limits."""
        return (self.high - self.low) / 2


def _mean(values: Array, axis: int = -1) -> Any:
    return values.mean(axis=axis)


def interval(
    columns: Sequence[Sequence[float] | Array],
    statistic: Statistic = _mean,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Bootstrap a function of the columns' means, drawing the same items of all columns.

    Args:
        columns: Arrays (N,), row i of each about the same item.
        statistic: Takes the columns and ``axis``, as ``scipy.stats.bootstrap`` calls it; by default the mean of
            the one column.
        level: Share of repetitions of the whole experiment whose interval holds the truth.
        resamples: How often N items are drawn.
        seed: Of the resampling; the same one gives the same interval.

    Returns:
        The interval; both limits are the value where one item alone, or items that are all the same, leave
        nothing to draw.

    Raises:
        ValueError: There is no item, or the columns differ in length.
    """
    data = [np.asarray(column, dtype=np.float64) for column in columns]
    count = len(data[0]) if data else 0
    if not count or any(column.shape != (count,) for column in data):
        raise ValueError(f"columns must be equally long (N,) with N > 0, got {[column.shape for column in data]}")
    value = float(statistic(*data, axis=-1))
    if count == 1 or all(np.ptp(column) == 0 for column in data):
        return Interval(value, value, value, count)
    low, high = _limits(data, statistic, level, resamples, seed)
    return Interval(value, low, high, count)


def _limits(data: list[Array], statistic: Statistic, level: float, resamples: int, seed: int) -> tuple[float, float]:
    from scipy import stats

    count = len(data[0])
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # scipy warns where BCa has no meaning; the percentiles below answer then
        bootstrap = stats.bootstrap(
            data,
            statistic,
            n_resamples=resamples,
            batch=max(1, BATCH_ELEMENTS // count),
            vectorized=True,
            paired=True,
            axis=-1,
            confidence_level=level,
            method="BCa" if count <= BCA_LIMIT else "percentile",
            random_state=np.random.default_rng(seed),
        )
    low, high = float(bootstrap.confidence_interval.low), float(bootstrap.confidence_interval.high)
    if np.isfinite([low, high]).all():
        return low, high
    finite = bootstrap.bootstrap_distribution[np.isfinite(bootstrap.bootstrap_distribution)]
    if not len(finite):
        return float("nan"), float("nan")
    tail = (1 - level) / 2
    return float(np.quantile(finite, tail)), float(np.quantile(finite, 1 - tail))


def share_interval(hits: Sequence[float] | Array, *, level: float = LEVEL, seed: int = 0) -> Interval:
    """The interval of a share of items (each 0 or 1); Wilson's where all are the same."""
    values = np.asarray(hits, dtype=np.float64)
    if len(values) and np.ptp(values) == 0 and values[0] in (0.0, 1.0):
        from scipy import stats

        limits = stats.binomtest(int(values.sum()), len(values)).proportion_ci(level, method="wilson")
        return Interval(float(values[0]), float(limits.low), float(limits.high), len(values))
    return interval([values], level=level, seed=seed)


def drop_interval(teacher: Sequence[Array], student: Sequence[Array]) -> Interval | None:
    """The interval of the average drop: 100 times the mean over scores of 1 - student / teacher.

    Args:
        teacher: One array (N,) for each score; the score is its mean.
        student: The same scores of the student, on the same prompts.

    Returns:
        Percent; None where the teacher has no score above zero. A score that is zero for the teacher is left out.
    """
    kept = [(a, b) for a, b in zip(teacher, student, strict=True) if float(np.mean(a)) != 0]
    if not kept:
        return None
    half = len(kept)

    def drop(*columns: Array, axis: int = -1) -> Any:
        drops = [1 - b.mean(axis) / a.mean(axis) for a, b in zip(columns[:half], columns[half:], strict=True)]
        return 100 * np.mean(drops, axis=0)

    return interval([*(a for a, _ in kept), *(b for _, b in kept)], drop)


def seeds_interval(first: Array, second: Array, *, level: float = LEVEL) -> Interval | None:
    """The t interval of mean(second) - mean(first) over other seeds of training and of pictures.

    Three variances add up: of each side over its own training seeds, and of the difference over the picture seeds,
    which both sides share. Degrees of freedom by Welch and Satterthwaite.

    Args:
        first: (training seeds, picture seeds).
        second: The same of the other side; training seeds may be fewer or more, picture seeds may not.
        level: Share of repetitions whose interval holds the truth.

    Returns:
        The interval; None where there is one seed of everything.

    Raises:
        ValueError: The two have other numbers of picture seeds.
    """
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"expected as many picture seeds on both sides, got {first.shape[1]} and {second.shape[1]}")
    samples = [first.mean(1), second.mean(1), second.mean(0) - first.mean(0)]
    parts = [(float(values.var(ddof=1)) / len(values), len(values) - 1) for values in samples if len(values) > 1]
    if not parts:
        return None
    value, variance = float(second.mean() - first.mean()), sum(part for part, _ in parts)
    if variance == 0:
        return Interval(value, value, value, first.shape[1])
    from scipy import stats

    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * variance**0.5
    return Interval(value, value - half, value + half, first.shape[1])
