"""Which widths of all networks together the stock class of a family has a config for."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from ppcl.config.names import PREFIX
from ppcl.errors import ModelError
from ppcl.modules.parts import join
from ppcl.modules.replacements import apply_width
from ppcl.pruning.artifacts import Candidates
from ppcl.pruning.planner import widths
from ppcl.student.stock_width import stock_fields
from ppcl.teacher.families import Adapter
from ppcl.teacher.model_info import ModelInfo

_DEPTH = "leave it out and set plan.width=[] for depth alone"


def check_uniform(adapter: Adapter, name: str) -> None:
    """Refuse one width of all networks for a class that has no such number in its config.

    Args:
        adapter: The teacher's family.
        name: Of its transformer's class.

    Raises:
        ModelError: It is such a class.
    """
    if name.startswith(PREFIX):
        raise ModelError(f"plan.uniform_width: {name} has modules of many sizes already; {_DEPTH}")
    if not adapter.ffn_field:
        raise ModelError(
            f"plan.uniform_width: the config of {name} has no number for the width of all its blocks' networks and of "
            f"nothing else; {_DEPTH}"
        )


def with_stock_widths(candidates: Candidates, info: ModelInfo, model: Any, adapter: Adapter) -> Candidates:
    """Leave of all smaller modules the networks at shares that the teacher's class can be built with.

    Args:
        candidates: What was measured.
        info: The teacher's sizes.
        model: A transformer of the teacher's class and config, on the meta device.
        adapter: Its family.

    Raises:
        ModelError: Its class has no such config, or nothing that was measured fits it.
    """
    check_uniform(adapter, type(model).__name__)
    fitting = []
    for options in widths(info, candidates.width):
        places = [(o, path, part) for o in options for path, part in o.parts.items()]
        parts = {join(option.stack, str(option.block), path): part for option, path, part in places}
        narrow = copy.deepcopy(model)
        apply_width(narrow, parts)
        if stock_fields(narrow, adapter, parts):
            fitting += options
    if not fitting:
        raise ModelError(
            f"plan.uniform_width: {type(model).__name__} can be built with no width that was measured (by its "
            f"{adapter.ffn_field}); fit with ffn in fit.width and other fit.width_shares, or {_DEPTH}"
        )
    return replace(candidates, width=tuple(fitting))
