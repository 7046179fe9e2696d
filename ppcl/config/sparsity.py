"""The config section on sparsity; no torch here."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ppcl.common.plugins import source_of
from ppcl.config.extensions import WEIGHT_CRITERIA
from ppcl.config.sections import Section


class SparsityConfig(Section):
    """Zeros in the linear layers of the student's blocks, made before distillation and kept by it."""

    share: float = Field(0.0, ge=0, lt=1, description="of the weights that become zero; 0: none, or as n:m says")
    pattern: str = Field(
        "unstructured",
        description="unstructured: the least of every row; n:m, e.g. 2:4: of every m neighbours of a row n stay",
    )
    criterion: str = Field(
        "wanda",
        description=f"what a weight is worth: {', '.join(WEIGHT_CRITERIA)}, or your file.py:ClassName",
    )
    allocation: Literal["uniform", "ecoflap"] = Field(
        "uniform", description="the same share of every block, or by blocks' zeroth-order importance (no n:m)"
    )
    modulation: bool = Field(False, description="modulation layers, too, which act on all tokens at once")
    states: int = Field(128, ge=1, description="training states behind the criterion and the allocation")
    batch_size: int = Field(16, ge=1)
    blocks_at_once: int = Field(
        1, ge=1, description="of first-order criteria: blocks whose gradients are in memory; more is faster"
    )
    epsilon: float = Field(1e-3, gt=0, description="of allocation=ecoflap: how far weights are moved")
    slack: float = Field(0.1, ge=0, le=1, description="of allocation=ecoflap: a block may lose so much more than share")

    @field_validator("pattern", mode="before")
    @classmethod
    def _no_clock(cls, value: Any) -> Any:
        """YAML 1.1 reads 2:4 as minutes and seconds, 124; undo that."""
        return f"{value // 60}:{value % 60}" if isinstance(value, int) and value >= 60 else value

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, value: str) -> str:
        pattern = re.fullmatch(r"(\d+):(\d+)", value)
        if value != "unstructured" and not (pattern and 0 < int(pattern[1]) < int(pattern[2])):
            raise ValueError("expected unstructured, or n:m with 0 < n < m, e.g. 2:4")
        return value

    @field_validator("criterion")
    @classmethod
    def _known_criterion(cls, name: str) -> str:
        return WEIGHT_CRITERIA.valid(name)

    @model_validator(mode="after")
    def _fitting(self) -> SparsityConfig:
        if self.n_of_m is None:
            return self
        n, m = self.n_of_m
        if self.share and abs(self.share - (1 - n / m)) > 1e-9:
            raise ValueError(
                f"sparsity.share={self.share:g} does not fit sparsity.pattern={self.pattern}, which makes "
                f"{1 - n / m:g} of the weights zero; leave the share out"
            )
        if self.allocation != "uniform":
            raise ValueError(
                f"sparsity.allocation={self.allocation} does not fit sparsity.pattern={self.pattern}, which makes the "
                "same share of every row zero; use allocation=uniform or pattern=unstructured"
            )
        return self

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """N and m of an n:m pattern; None for an unstructured one."""
        if self.pattern == "unstructured":
            return None
        n, m = self.pattern.split(":")
        return int(n), int(m)

    @property
    def zeros(self) -> float:
        """The share of the weights that become zero; 0 where sparsity is off."""
        return self.share if self.n_of_m is None else 1 - self.n_of_m[0] / self.n_of_m[1]

    def identity(self) -> dict[str, Any]:
        """Nothing while it is off; with the content of a criterion's file, without what costs memory alone."""
        settings = self.model_dump(exclude={"blocks_at_once"})
        return {**settings, "criterion_source": source_of(self.criterion)} if self.zeros else {}
