"""Before a run: whether any plan can meet its budget, and what its stages will take."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ppcl.config.extensions import SEARCHES
from ppcl.errors import ModelError
from ppcl.run.session import Session


def check_budget(session: Session) -> None:
    """Refuse a budget that no plan can meet, by the model's config alone.

    Once costs are measured the plan stage knows better.

    Raises:
        BudgetError: It is out of reach.
    """
    if session.config.plan.mode not in SEARCHES:
        return  # a search from outside may know other ways
    from ppcl.inspection.blueprint import build_on_meta, example_call, flops_on_meta, read_config, token_grid
    from ppcl.inspection.limits import check_limits, limits_of
    from ppcl.teacher.blocks import loaded_bytes
    from ppcl.teacher.description import describe

    capture, kind = session.config.capture, session.config.plan.budget[0]
    try:
        config, scale = read_config(session.model, session.component)
        transformer = build_on_meta(config)
        flops: dict[str, Any] | None = None
        if kind == "speedup":
            call = example_call(transformer, token_grid(capture.height or 1024, capture.width or 1024, scale))
            flops = flops_on_meta(transformer, call) if call else None
    except ModelError:
        return  # loading it says what is wrong, or is able to
    import torch

    dtype = torch.float32 if session.config.precision == "fp32" else torch.bfloat16  # a CPU may have it in either
    sizes = loaded_bytes(session.model, dtype)
    others = sum(sizes.values()) - sizes.get(session.component, 0)
    info = describe(SimpleNamespace(**{session.component: transformer}, components={}), flops, session.component)
    check_limits(limits_of(transformer, info, session.config, dtype.itemsize, others), session.config)


def outlook(session: Session) -> tuple[list[str], dict[str, float]]:
    """What the stages will take on this machine.

    Returns:
        A line each, and the seconds of each; of what cannot be estimated why, and nothing.
    """
    from ppcl.inspection.estimate import estimate_lines, estimate_run
    from ppcl.inspection.hardware import hardware_here

    try:
        found = estimate_run(session.model, session.config, hardware_here(str(session.device)))
    except (ModelError, RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        return [f"no estimate of time and memory: {error}"], {}
    return estimate_lines(found), {stage.stage: stage.seconds for stage in found.stages}


def time_left(expected: Mapping[str, float], taken: Mapping[str, float]) -> float | None:
    """Seconds that the stages ahead will take: their estimates, by the pace of the stages that have been run.

    Args:
        expected: Seconds of the stages by :func:`outlook`; empty if not known.
        taken: Seconds of those that were run or skipped.
    """
    if not expected:
        return None
    known = sum(expected.get(stage, 0.0) for stage, seconds in taken.items() if seconds)
    pace = sum(taken.values()) / known if known else 1.0
    return pace * sum(seconds for stage, seconds in expected.items() if stage not in taken)
