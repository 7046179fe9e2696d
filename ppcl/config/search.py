"""The part of the plan's section that says who chooses the plan. No torch here."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ppcl.common.plugins import source_of, valid_name

# keys of ppcl.pruning.searches.SEARCHES; the first five are the planner's own
SEARCH_NAMES = (
    *("optimal", "paper", "uniform", "influence", "allocation"),
    *("random", "position", "path", "learned", "rarts"),
)
ALLOCATION_NAMES = ("uniform", "nirvana")  # keys of ppcl.pruning.allocations.ALLOCATIONS
_OF_GATES = {"search_steps", "search_batch"}
_READS = {
    "allocation": {"allocation", "gamma"},
    "path": {"search_states"},
    "learned": _OF_GATES,
    "rarts": _OF_GATES,
}


class SearchConfig(BaseModel):
    """Who chooses the plan, and what single searches read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: str = Field("optimal", description=f"the search: {', '.join(SEARCH_NAMES)}, or your file.py:ClassName")
    allocation: str = Field(
        "uniform",
        description="of mode=allocation: how the cut is shared out among neurons and heads: "
        f"{', '.join(ALLOCATION_NAMES)}, or your file.py:function",
    )
    gamma: float = Field(3.0, gt=0, description="of allocation=nirvana: how much harder neurons are cut than heads")
    search_states: int = Field(32, ge=1, description="of mode=path: held-out states behind each error")
    search_steps: int = Field(100, ge=1, description="of mode=learned, rarts: steps of training gates")
    search_batch: int = Field(8, ge=1, description="of the same: states a step")

    @field_validator("mode")
    @classmethod
    def _known_search(cls, name: str) -> str:
        """Name the nearest search; of one from outside the class is looked for when it is loaded."""
        return valid_name(name, SEARCH_NAMES, "search")

    @field_validator("allocation")
    @classmethod
    def _known_allocation(cls, name: str) -> str:
        """Name the nearest allocation."""
        return valid_name(name, ALLOCATION_NAMES, "allocation")

    def identity(self) -> dict[str, Any]:
        """Without what another mode does not read; with the content of files from outside."""
        own = _READS.get(self.mode, set()) if self.mode in SEARCH_NAMES else set().union(*_READS.values())
        found = self.model_dump(exclude=set().union(*_READS.values()) - own)
        outside = {name: source_of(str(found.get(name, ""))) for name in ("mode", "allocation")}
        return {**found, **{f"{name}_source": text for name, text in outside.items() if text is not None}}
