"""Two transformers under one budget: a run of each, side by side in one folder.

``RUN/transformer`` is a run of the first, ``RUN`` itself one of the second, whose exported pipeline has both. Each
records the calls that the teacher's own pipeline makes of its transformer, and learns from these. When it is known of
both what replacing costs, the budget is shared so that their predicted errors, squared and weighted by how often a
picture calls each, come to the least; then each gets its plan.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from ppcl.common.progress import announce
from ppcl.common.tensor_files import read_metadata
from ppcl.config import RunConfig
from ppcl.config.memory import changed
from ppcl.config.names import BUDGETS
from ppcl.errors import BudgetError
from ppcl.run.run import Round, Run
from ppcl.run.stage import ORDER
from ppcl.student.plan import CompressionPlan

MEASURING, LEARNING = ORDER[: ORDER.index("plan")], ORDER[ORDER.index("plan") : ORDER.index("export") + 1]
STEPS, REACH = 4, 0.5  # shares that are tried on each side of the equal one, up to that part of what is left or goes


def open_experts(model: str, out: Path, config: RunConfig, prompts: Path | None, command: str) -> Iterator[Round]:
    """Open the runs of a pipeline's two transformers; see :func:`ppcl.run.rounds.open_rounds`.

    Raises:
        ModelError: There are not two.
        BudgetError: The two cannot meet the budget together.
    """
    names = _two_of(model)
    settings = [config.model_copy(update={"capture": changed(config.capture, component=name)}) for name in names]
    first = Run(model, out / names[0], settings[0], prompts, command)
    first.is_half = True
    second = Run(model, out, settings[1], prompts, command, beside=first)
    runs = (first, second)
    kind, due = _due(first, names)
    _give(runs, kind, [due, due])
    for run in runs:
        yield Round(run, MEASURING, f"{run.component}: what replacing costs")
        if run is first and (pipeline := first.release_teacher()) is not None:
            second.blocks, second.teacher = first.blocks, pipeline  # one in memory is enough
    _give(runs, kind, share(runs, kind, due))
    second.release_teacher()
    yield Round(first, LEARNING, f"{first.component}: {kind} {first.config.plan.budget[1]:.4g}")
    first.release_teacher()
    yield Round(second, ORDER, f"{second.component}: {kind} {second.config.plan.budget[1]:.4g}")


def _two_of(model: str) -> list[str]:
    from ppcl.teacher.loading import check_model, fetch_files, two_transformers

    check_model(model)
    fetch_files(model)
    return two_transformers(model)


def _due(run: Run, names: Sequence[str]) -> tuple[str, float]:
    """The budget of both together: a share of their parameters, or how much faster a picture's calls are."""
    from ppcl.teacher.blocks import loaded_bytes

    kind, value = run.config.plan.budget
    if kind != "fit_gb":
        return kind, value
    sizes = loaded_bytes(run.model, run.dtype)
    weights = sum(sizes[name] for name in names)
    others = sum(sizes.values()) - weights
    if value * 1e9 <= others:
        raise BudgetError(
            f"all but the two transformers takes {others / 1e9:.3g} GB, and plan.fit_gb is {value:g}; give more"
        )
    return "keep", min(1.0, (value * 1e9 - others) / weights)


def _give(runs: Sequence[Run], kind: str, values: Sequence[float]) -> None:
    """Give each run its budget."""
    for run, value in zip(runs, values, strict=True):
        plan = changed(run.config.plan, **{**dict.fromkeys(BUDGETS), kind: value})
        run.config = run.config.model_copy(update={"plan": plan})


def share(runs: Sequence[Run], kind: str, due: float) -> list[float]:
    """What each of two runs is to keep, or to be faster, that together they meet a budget.

    Args:
        runs: Their fit stages are done.
        kind: ``keep`` or ``speedup``.
        due: Of both together.

    Raises:
        BudgetError: No split does.
    """
    whole = _sizes(runs, kind)
    if whole is None:
        return [due, due]
    left = due if kind == "keep" else 1 / due  # of the parameters, or of the time
    step = REACH * min(left, 1 - left) / STEPS
    steps = [number * step for number in sorted(range(-STEPS, STEPS + 1), key=abs)]
    splits = dict.fromkeys((left + more, left - more * whole[0] / whole[1]) for more in steps)
    scored: list[tuple[float, list[float], list[float]]] = []
    calls = [_calls_of(run) for run in runs]
    for split in (split for split in splits if 0 < split[1] <= 1):
        values = [part if kind == "keep" else 1 / part for part in split]
        with contextlib.suppress(BudgetError):
            errors = [_predicted(run, kind, value) for run, value in zip(runs, values, strict=True)]
            score = sum(count * error * error for count, error in zip(calls, errors, strict=True))
            scored.append((score, values, errors))
    if not scored:  # the equal share says what is near
        _predicted(runs[0], kind, due)
        _predicted(runs[1], kind, due)
    _, values, errors = min(scored, key=lambda entry: entry[0])
    parts = (f"{run.component} {v:.4g} (error {e:.3f})" for run, v, e in zip(runs, values, errors, strict=True))
    announce(f"{kind} {due:.4g} of both, shared by their predicted errors: {', '.join(parts)}")
    return values


def _sizes(runs: Sequence[Run], kind: str) -> list[float] | None:
    """What a share of each run is of: parameters, or calls a picture; None where nothing predicts errors for less."""
    from ppcl.analysis.artifacts import Analysis
    from ppcl.config.extensions import SEARCHES
    from ppcl.pruning.planner import Planned

    mode = runs[0].config.plan.mode
    if mode not in SEARCHES or not isinstance(SEARCHES.named(mode), Planned):
        announce(f"plan.mode={mode} looks at the teacher itself: both transformers get the same share of the budget")
        return None
    if kind == "keep":
        return [float(run.read(Analysis, "analysis.json").model.params) for run in runs]
    return [float(_calls_of(run)) for run in runs]


def _calls_of(run: Run) -> int:
    """How often a picture calls a run's transformer."""
    return int(read_metadata(run.calibration / "train-0000.safetensors")["of"])


def _predicted(run: Run, kind: str, value: float) -> float:
    """The error of the plan that a run would choose.

    Raises:
        BudgetError: There is none.
    """
    from ppcl.pruning.searches import choose

    settings = changed(run.config.plan, **{**dict.fromkeys(BUDGETS), kind: value})
    plan: CompressionPlan = choose(settings.mode, run.search_context(settings))
    return math.inf if plan.predicted.error is None else plan.predicted.error
