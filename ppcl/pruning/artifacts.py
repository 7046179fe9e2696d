"""What the fit stage hands on: options and what each costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ppcl.common.artifacts import SCHEMA_VERSION, STRICT, Amount, Count, Error, Index, load_artifact
from ppcl.common.tensor_files import open_tensors
from ppcl.errors import ArtifactError
from ppcl.modules.parts import check_part, label
from ppcl.student.plan import StartName
from ppcl.teacher.model_info import ModelInfo

VECTORS = "prices.safetensors"


@dataclass(frozen=True)
class Candidate:
    """A run that one block might replace, and what that costs.

    Attributes:
        probe_error: Relative error of the final velocity when the run alone is replaced by its chained
            probes (the "output sensitivity" of the run).
        start: The start of the substitute block that was best on held-out states.
        fitted_error: The same error with the briefly fitted substitute block; None if it was not fitted.
    """

    __pydantic_config__ = STRICT

    stack: str
    first: Index
    last: Index
    probe_error: Error
    start: StartName | None = None
    fitted_error: Error | None = None

    @property
    def name(self) -> str:
        """Of its vector: ``stack/first-last``."""
        return f"{self.stack}/{self.first}-{self.last}"

    @property
    def removed(self) -> int:
        """Blocks that replacing this run saves."""
        return self.last - self.first

    @property
    def cost(self) -> float:
        """Squared velocity error: fitted where it was fitted, by probes otherwise."""
        return (self.probe_error if self.fitted_error is None else self.fitted_error) ** 2


def option_name(stack: str, block: int, group: str, parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Name smaller modules: ``stack/block/group/kind-size``, with a ``+`` between several kinds and sizes."""
    return f"{stack}/{block}/{group}/" + "+".join(label(part) for part in parts.values())


@dataclass(frozen=True)
class WidthOption:
    """Smaller modules inside one block, and what they cost.

    Attributes:
        group: What is made smaller (``modulation``, ``ffn.image``, ``ffn.text``, ``attention``; ``ffn+attention`` where
            one layer reads both); a block takes one option a group.
        parts: Path inside the block -> ``kind`` and ``size`` of the replacement (:mod:`ppcl.modules.replacements`).
        saved_params: Parameters fewer, exactly.
        saved_flops: Forward FLOPs fewer for one sample of the calibration's shape.
        error: Relative error of the final velocity when this alone is put in, untrained.
        saved_time: What was measured: the share of the block's time that is saved, times the block's FLOPs; None if it
            was not measured.
    """

    __pydantic_config__ = STRICT

    stack: str
    block: Index
    group: str
    parts: dict[str, dict[str, Any]]
    saved_params: Count
    saved_flops: Count
    error: Error
    saved_time: Amount | None = None

    @property
    def name(self) -> str:
        """Of its vector."""
        return option_name(self.stack, self.block, self.group, self.parts)

    @property
    def family(self) -> str:
        """What is made smaller, as ``fit.width`` and ``plan.width`` name it: the group without its stream."""
        return self.group.partition(".")[0]

    @property
    def slot(self) -> str:
        """Of options with one slot a block takes one: they are of one group, or cut one module."""
        return "parallel" if any(part["kind"] == "parallel" for part in self.parts.values()) else self.group

    @property
    def saved_speed(self) -> int:
        """What counts for a speed-up, in FLOPs: measured time where there is any."""
        return self.saved_flops if self.saved_time is None else self.saved_time


@dataclass(frozen=True)
class Candidates:
    """The result of the fit stage.

    Attributes:
        candidates: Runs that one block might replace.
        steps: Of the short fit.
        seconds: Of the whole stage.
        width: Smaller modules.
        criterion: What scored neurons and heads; empty where none were.
        criterion_forwards: What it said it would cost: runs of the transformer on one state; None if it did not say.
        vectors: How each option moves the velocity, (1, D) by its name (:mod:`ppcl.analysis.products`); in a
            file of its own.
    """

    __pydantic_config__ = STRICT

    candidates: tuple[Candidate, ...]
    steps: Count
    seconds: Error
    width: tuple[WidthOption, ...] = ()
    criterion: str = ""
    criterion_forwards: Error | None = None
    schema_version: int = SCHEMA_VERSION
    vectors: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False, metadata={"stored": False})

    def check(self) -> None:
        """Refuse runs and smaller modules that are none.

        Raises:
            ValueError: A run is of one block, modules are replaced by what is none, or something is there twice.
        """
        for run in self.candidates:
            if run.last <= run.first:
                raise ValueError(f"{run.name} is no run of several blocks")
        for part in (part for option in self.width for part in option.parts.values()):
            check_part(part)
        names = [run.name for run in self.candidates] + [option.name for option in self.width]
        name, times = Counter(["", *names]).most_common(1)[0]
        if times > 1:
            raise ValueError(f"{name} is there {times} times")

    def check_blocks(self, model: ModelInfo) -> None:
        """Refuse options that a model has not.

        Raises:
            ArtifactError: An option is of other blocks, or saves more than there is.
        """
        try:
            for run in self.candidates:
                if run.last >= model.stack(run.stack).num_blocks:
                    raise ValueError(f"there is no run {run.name}")
            for option in self.width:
                stack = model.stack(option.stack)
                if option.block >= stack.num_blocks or option.saved_params > stack.block_params[option.block]:
                    raise ValueError(f"there is no {option.name} that saves so much")
        except ValueError as reason:
            raise ArtifactError(f"candidates.json is of another model ({reason}); run the fit stage again") from None


def load_candidates(folder: Path) -> Candidates:
    """Read what the fit stage left in a run directory, with the vectors.

    Raises:
        ArtifactError: A file is missing or damaged.
    """
    candidates, path = load_artifact(Candidates, folder / "candidates.json"), folder / VECTORS
    with open_tensors(path, remedy="run the fit stage again", framework="numpy") as file:
        vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    wrong = [n for n, v in vectors.items() if v.ndim != 2 or not np.isfinite(v).all()]
    if wrong or len({vector.shape for vector in vectors.values()}) > 1:
        raise ArtifactError(f"{path} is damaged ({(wrong or ['shapes'])[0]}); run the fit stage again")
    return replace(candidates, vectors=vectors)
