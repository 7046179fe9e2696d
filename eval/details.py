"""What stands beside the plain numbers of a run's ``metrics.json``: more measures, and intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ppcl.eval.intervals import LEVEL, RESAMPLES, Interval, interval
from ppcl.eval.scoring import SCORES, SET_MEASURES, Measured, drop, limits, measure, paired, reference_of
from ppcl.eval.velocity import StateErrors, by_timestep


def pair(found: Interval | None) -> list[float] | None:
    """An interval as ``metrics.json`` holds it."""
    return [found.low, found.high] if found else None


def details(
    teacher: Tensor,
    student: Tensor,
    against: Tensor | None,
    text: Tensor | None,
    pairs: Mapping[str, tuple[float, ...]],
    errors: StateErrors | None,
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """Complete the metrics of a run.

    Args:
        teacher: (N, D) features of the teacher's pictures of the first seed.
        student: (N, D) features of the student's.
        against: (M, D) features behind FID and KID, if any.
        text: (N, D) features of the captions, if any.
        pairs: Paired measures by name, one value a picture.
        errors: Velocity errors of held-out states, if they were measured state by state.
        metrics: What is known already: ``teacher``, ``student``, ``fidelity``.

    Returns:
        ``teacher`` and ``student`` with ``kid_std``, ``cmmd``, ``precision``, ``recall``, ``density`` and
        ``coverage`` added, ``fidelity`` with ``velocity_error_by_timestep``, and new: ``intervals`` and ``verdict``.
    """
    reference = reference_of(against) if against is not None and len(against) > 1 else None
    sides = [measure(features, reference, text) for features in (teacher, student)]
    added = [{name: _value(side.get(name)) for name in SET_MEASURES if name not in ("fid", "kid")} for side in sides]
    fidelity = paired(pairs)
    lost = drop(*sides)
    intervals: dict[str, Any] = {
        "level": LEVEL,
        "resamples": RESAMPLES,
        "teacher": limits(sides[0]),
        "student": limits(sides[1]),
        "fidelity": limits(fidelity),
        "average_drop": pair(lost),
        "average_drop_per_metric": {name: pair(_one_drop(sides[0], sides[1], name)) for name in SCORES},
        "fid_ratio": pair(_ratio(sides[0], sides[1], "fid")),
    }
    if errors is not None:
        intervals["fidelity"]["velocity_error"] = pair(errors.error)
    return {
        "teacher": {**metrics["teacher"], **added[0]},
        "student": {**metrics["student"], **added[1]},
        "fidelity": {**metrics["fidelity"], "velocity_error_by_timestep": by_timestep(errors) if errors else []},
        "intervals": intervals,
    }


def _value(measured: Measured | None) -> float | None:
    return measured.value if measured is not None else None


def _one_drop(teacher: Mapping[str, Measured], student: Mapping[str, Measured], name: str) -> Interval | None:
    if name not in teacher or name not in student:
        return None
    return drop({name: teacher[name]}, {name: student[name]})


def _ratio(teacher: Mapping[str, Measured], student: Mapping[str, Measured], name: str) -> Interval | None:
    above, below = (side[name].items if name in side else None for side in (student, teacher))
    if above is None or below is None or below.mean() == 0:
        return None
    return interval([above, below], lambda a, b, axis: a.mean(axis) / b.mean(axis))
