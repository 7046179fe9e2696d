"""Which runs of blocks one block might replace, and which of them are worth a short fit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product

from ppcl.analysis.artifacts import Analysis
from ppcl.config import PlanConfig
from ppcl.pruning.artifacts import Candidate, WidthOption
from ppcl.pruning.knapsack import CLASSES, DEPTH_CLASSES, best_layouts, edges_of
from ppcl.student.assembly import RunKey
from ppcl.student.plan import free_blocks
from ppcl.teacher.model_info import ModelInfo

# What a short fit leaves of a linear error, by blocks saved: 48 runs of the embedded teacher (benchmarks/shortlist.py)
FITTED_SHARE = {1: 0.63, 2: 0.79, 3: 0.91}


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


def shortlist(
    model: ModelInfo,
    errors: Mapping[RunKey, float],
    options: Sequence[WidthOption],
    always: Sequence[RunKey],
    count: int,
) -> list[RunKey]:
    """Choose the runs to fit: those in ``always``, then those that plans of any size are likely to use.

    What a fit will leave of a run's error is guessed by its length. The planner then lays out every size, in parameters
    and in time, with the smaller modules and without them; the runs that most of these plans use come first, then the
    cheapest for each block that they save.

    Args:
        model: The teacher.
        errors: Velocity error of each run by its chained probes.
        options: Smaller modules.
        always: Runs that are chosen in any case.
        count: How many to choose.
    """
    guesses = {run: error * FITTED_SHARE.get(run[2] - run[1], 1.0) for run, error in errors.items()}
    candidates = [Candidate(*run, guess) for run, guess in guesses.items()]
    used: defaultdict[RunKey, float] = defaultdict(float)
    for smaller, by_flops in product((options, ()), (False, True) if model.flops else (False,)):
        edges = edges_of(model, candidates, smaller, by_flops)
        layouts = best_layouts(model, edges, by_flops, CLASSES if smaller else DEPTH_CLASSES)
        for layout in layouts:
            for stack, segments in layout.items():
                for segment in segments:
                    if segment.is_run:
                        used[stack, segment.first, segment.last] += 1 / len(layouts)

    def rank(run: RunKey) -> tuple[float, float, RunKey]:
        return -used[run], guesses[run] ** 2 / (run[2] - run[1]), run

    return sorted(list(dict.fromkeys([*always, *sorted(errors, key=rank)]))[: max(count, len(always))])
