"""What a stage is: one function, one command, one place in the run directory. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ppcl.config.names import STAGES

ORDER = STAGES


def _nothing(_: Any) -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Stage:
    """One stage; :data:`ppcl.run.stages.STAGES` has them all.

    Attributes:
        name: Of the command, and of the config section whose settings count (the report has none).
        summary: One line for ``--help``.
        products: Files and folders in the run directory that the stage writes; they go when it changes.
        work: Does it: takes the :class:`ppcl.run.session.Session` and what ``prepare`` returned.
        prepare: Finds what a user can have got wrong, before anything older is removed; its result goes to ``work``.
        inputs: Files and folders that the stage reads, with the type of a JSON artifact (None: not one). They are
            checked before anything older is removed, too.
        on_the_way: What it writes beside its products while it works: useless once what it depends on has changed.
        is_shared: Whether all processes work on it; of other stages the first one does them while the rest wait.
    """

    name: str
    summary: str
    products: tuple[str, ...]
    work: Callable[[Any, Any], None]
    prepare: Callable[[Any], Any] = _nothing
    inputs: Mapping[str, Any] = field(default_factory=dict)
    on_the_way: tuple[str, ...] = ()
    is_shared: bool = False
