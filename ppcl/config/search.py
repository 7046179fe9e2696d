"""The part of the plan's section that says who chooses the plan. No torch here."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from ppcl.common.plugins import source_of
from ppcl.config.extensions import ALLOCATIONS, SEARCHES
from ppcl.config.sections import Section

_OF_GATES = {"search_steps", "search_batch"}
_READS = {
    "allocation": {"allocation", "gamma"},
    "path": {"search_states"},
    "learned": _OF_GATES,
    "rarts": _OF_GATES,
}


class SearchConfig(Section):
    """Who chooses the plan, and what single searches read."""

    mode: str = Field("optimal", description=f"the search: {', '.join(SEARCHES)}, or your file.py:ClassName")
    allocation: str = Field(
        "uniform",
        description="of mode=allocation: how the cut is shared out among neurons and heads: "
        f"{', '.join(ALLOCATIONS)}, or your file.py:function",
    )
    gamma: float = Field(3.0, gt=0, description="of allocation=nirvana: how much harder neurons are cut than heads")
    search_states: int = Field(32, ge=1, description="of mode=path: held-out states behind each error")
    search_steps: int = Field(100, ge=1, description="of mode=learned, rarts: steps of training gates")
    search_batch: int = Field(8, ge=1, description="of the same: states a step")

    @field_validator("mode")
    @classmethod
    def _known_search(cls, name: str) -> str:
        """Name the nearest search; of one from outside the class is looked for when it is loaded."""
        return SEARCHES.valid(name)

    @field_validator("allocation")
    @classmethod
    def _known_allocation(cls, name: str) -> str:
        """Name the nearest allocation."""
        return ALLOCATIONS.valid(name)

    def identity(self) -> dict[str, Any]:
        """Without what another mode does not read; with the content of files from outside."""
        optional = set().union(*_READS.values())
        read = _READS.get(self.mode, set()) if self.mode in SEARCHES else optional
        settings = self.model_dump(exclude=optional - read)
        outside = {name: source_of(str(settings.get(name, ""))) for name in ("mode", "allocation")}
        return {**settings, **{f"{name}_source": text for name, text in outside.items() if text is not None}}
