"""Which runs of blocks one block might replace, and which of them are worth a short fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ppcl.analysis.artifacts import Analysis
from ppcl.config import PlanConfig
from ppcl.student.assembly import RunKey
from ppcl.student.plan import free_blocks


def all_runs(analysis: Analysis, max_run: int, settings: PlanConfig) -> list[RunKey]:
    """Every run of 2..max_run unprotected blocks of every stack, and the paper's intervals whatever their length."""
    runs: set[RunKey] = set()
    for stack in analysis.model.stacks:
        low, high = free_blocks(analysis.model, stack, settings)
        for first in range(low, high):
            runs |= {(stack.name, first, last) for last in range(first + 1, min(first + max_run, high))}
    for found in analysis.stacks:
        runs |= {(found.name, *interval) for interval in found.intervals}
    order = [stack.name for stack in analysis.model.stacks]
    return sorted(runs, key=lambda run: (order.index(run[0]), run[1], run[2]))


def shortlist(errors: Mapping[RunKey, float], always: Sequence[RunKey], count: int) -> list[RunKey]:
    """Choose the runs to fit: those in ``always``, pairs for up to half of the places, then all lengths in turn.

    The planner can only lay out what was fitted, so of each length the cheapest runs that do not overlap come first,
    then the cheapest of the rest, and so on: every place of a stack is covered before any is covered twice. Pairs
    come first because they are cheapest for each block that they save.
    """
    by_length: dict[int, list[RunKey]] = {}
    for run in errors:
        by_length.setdefault(run[2] - run[1], []).append(run)
    orders = {length: spread_out(runs, errors) for length, runs in sorted(by_length.items())}
    chosen = list(dict.fromkeys(always))
    pairs = orders.get(1, [])
    for run in pairs[: max(0, count // 2)]:
        if run not in chosen and len(chosen) < count:
            chosen.append(run)
    position = 0
    while len(chosen) < count and any(position < len(order) for order in orders.values()):
        for order in orders.values():
            if position < len(order) and order[position] not in chosen and len(chosen) < count:
                chosen.append(order[position])
        position += 1
    return sorted(chosen)


def spread_out(runs: Sequence[RunKey], errors: Mapping[RunKey, float]) -> list[RunKey]:
    """Order runs of one length: the cheapest that do not overlap, then the cheapest of the rest, and so on."""
    left, order = sorted(runs, key=lambda run: (errors[run], run)), []
    while left:
        layer: list[RunKey] = []
        for run in left:
            if all(run[0] != other[0] or run[2] < other[1] or other[2] < run[1] for other in layer):
                layer.append(run)
        order += layer
        left = [run for run in left if run not in layer]
    return order
