"""The plan: which blocks stay, which runs become one, what is smaller inside; frozen, stored as JSON (no torch here).

Blocks are numbered from 0 in execution order inside their stack (a block list of the
transformer). A run ``first..last`` is inclusive. The paper numbers blocks from 1 and
writes [u, v]; here u = first + 1 and v = last + 1.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args

from pydantic import Field

from ppcl.common.artifacts import SCHEMA_VERSION, STRICT, Amount, Count, Error, Index, Share, to_jsonable
from ppcl.config import PlanConfig
from ppcl.config.names import Start
from ppcl.modules.parts import check_part
from ppcl.teacher.block_map import is_call
from ppcl.teacher.model_info import ModelInfo, Stack

_SPARSITY = {"pattern": str, "criterion": str, "allocation": str, "zeros": float, "zeros_in_layers": float}
StartName = Annotated[str, Field(pattern=f"^({'|'.join(get_args(Start))})$")]


def start_index(first: int, last: int, start: str | None) -> int:
    """Number of the teacher's block whose shape the substitute of first..last has (``mean``: the first's)."""
    return {"first": first, "mean": first, "last": last}.get(start or "middle", (first + last) // 2)


@dataclass(frozen=True)
class Segment:
    """A piece of a stack in a plan: blocks first..last of the teacher become one block.

    ``first == last`` keeps the teacher's block.

    Attributes:
        start: What the substitute of a run starts from.
        width: Smaller modules inside the block that stays or the substitute: path -> ``kind`` and ``size``
            (:mod:`ppcl.modules.replacements`); empty in plans of depth alone.
        saved_params: Parameters that ``width`` saves.
        saved_flops: Forward FLOPs that ``width`` saves for one sample.
        error: Relative error of the final velocity when this alone is put in, as the planner saw it; None if
            it was not measured.
        vector: How it moves the velocity, by which errors of several are added up (:func:`ppcl.student.prediction
            .together`); what follows the last number is 0.
        saved_time: See :class:`ppcl.pruning.artifacts.WidthOption`.
        sparsity: Share of the weights in the block's masked linear layers that are zero (:mod:`ppcl.pruning.sparsity`).
    """

    __pydantic_config__ = STRICT

    first: Index
    last: Index
    start: StartName | None = None
    width: dict[str, dict[str, Any]] = field(default_factory=dict)
    saved_params: Count = 0
    saved_flops: Count = 0
    error: Error | None = None
    vector: tuple[float, ...] = ()
    saved_time: Amount | None = None
    sparsity: Share = 0.0

    @property
    def saved_speed(self) -> int:
        """What ``width`` saves that counts for a speed-up, in FLOPs: measured time where there is any."""
        return self.saved_flops if self.saved_time is None else self.saved_time

    @property
    def is_run(self) -> bool:
        """Whether several blocks become one."""
        return self.last > self.first

    @property
    def is_substitute(self) -> bool:
        """Whether anything is replaced: a run by one block, modules inside a block, or weights by zeros."""
        return self.is_run or bool(self.width) or bool(self.sparsity)

    @property
    def is_sparse_only(self) -> bool:
        """Whether it is a kept block with zeros and nothing else: as many parameters, and as fast."""
        return bool(self.sparsity) and not self.is_run and not self.width


@dataclass(frozen=True)
class Prediction:
    """What a plan should give, before it is built.

    Attributes:
        params: Parameters of the compressed transformer (exact).
        speedup: Estimate of the transformer's speed-up: teacher FLOPs / student FLOPs, smaller modules by their
            measured time.
        bytes: Bytes of the whole pipeline's weights.
        error: Velocity error of all substitutes together (an estimate).
    """

    __pydantic_config__ = STRICT

    params: Count
    param_ratio: Error
    speedup: Error
    bytes: Count
    error: Error | None


@dataclass(frozen=True)
class StudentErrors:
    """Relative errors of a student on held-out states.

    Attributes:
        velocity: Of the velocity with caption.
        guided: Of what guidance makes of both branches; None where the teacher knows none.
        caption: Of the difference that the caption makes, v_c - v_u.
        noises: For each held-out prompt, which has a noise of its own, its :attr:`score`.
    """

    __pydantic_config__ = STRICT

    velocity: Error
    guided: Error | None = None
    caption: Error | None = None
    noises: tuple[Error, ...] = ()

    @property
    def score(self) -> float:
        """What students are told apart by: the geometric mean of the guided error and the caption's, if there are."""
        return self.velocity if self.guided is None or self.caption is None else math.sqrt(self.guided * self.caption)


@dataclass(frozen=True)
class Recovered:
    """A plan that was trained for a few steps before one was chosen.

    Attributes:
        runs: Its runs, as ``stack first-last``.
        narrower: Blocks with smaller modules.
        predicted: Its predicted error.
        before: Its errors untrained.
        steps: Of each of its recoveries.
        after: The errors after each.
        chosen: Whether it is the plan.
    """

    __pydantic_config__ = STRICT

    runs: tuple[str, ...]
    narrower: Count
    predicted: Error | None
    before: StudentErrors
    steps: tuple[Count, ...]
    after: tuple[StudentErrors, ...]
    chosen: bool = False
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class CompressionPlan:
    """Which blocks stay and which runs become one block, for every stack of the teacher.

    Attributes:
        mode: The search that chose it (:mod:`ppcl.pruning.searches`).
        budget: Kind and value.
        stacks: Segments of each stack.
        predicted: What it should give.
        teacher_forwards: What the search said it would cost: runs of the transformer on one state.
        recovered: The plans that it was chosen from by a short recovery (``plan.recover``); empty without.
    """

    __pydantic_config__ = STRICT

    model: ModelInfo
    mode: str
    budget: dict[str, float]
    stacks: dict[str, tuple[Segment, ...]]
    predicted: Prediction
    teacher_forwards: Error = 0.0
    schema_version: int = SCHEMA_VERSION
    # pattern, criterion, allocation; zeros among all parameters and in the masked layers; empty without sparsity
    sparsity: dict[str, str | float] = field(default_factory=dict)
    call: dict[str, int | float] = field(default_factory=dict)  # steps and guidance of a student of few steps
    recovered: tuple[Recovered, ...] = ()

    def check(self) -> None:
        """Refuse a plan that is none.

        Raises:
            ValueError: It does not name each of the model's blocks once and in order, or replaces modules by what is
                none.
        """
        self.model.check()
        if self.stacks.keys() != {stack.name for stack in self.model.stacks}:
            raise ValueError(f"it plans {sorted(self.stacks)}, the model has {[s.name for s in self.model.stacks]}")
        for stack in self.model.stacks:
            due = 0
            for segment in self.stacks[stack.name]:
                if segment.first != due or segment.last < segment.first:
                    raise ValueError(f"{stack.name}: {segment.first}-{segment.last} stands where block {due} is due")
                due = segment.last + 1
            if due != stack.num_blocks:
                raise ValueError(f"{stack.name}: it ends with block {due - 1} of {stack.num_blocks}")
        for segment in (segment for segments in self.stacks.values() for segment in segments):
            for part in segment.width.values():
                check_part(part)
        said = {name: type(value) for name, value in self.sparsity.items()}
        if said and said != _SPARSITY:
            raise ValueError(f"sparsity says {sorted(said)}, expected {sorted(_SPARSITY)}")
        if self.call and not is_call(self.call):
            raise ValueError(f"call says {sorted(self.call)}, expected num_inference_steps and a guidance scale")

    @property
    def runs(self) -> list[tuple[str, Segment]]:
        """All (stack name, run) pairs that a substitute block replaces, in execution order."""
        order = [stack.name for stack in self.model.stacks]  # JSON sorts the keys of ``stacks``
        names = sorted(self.stacks, key=lambda name: order.index(name) if name in order else len(order))
        return [(name, s) for name in names for s in self.stacks[name] if s.is_run]

    @property
    def has_width(self) -> bool:
        """Whether any block has smaller modules than in the teacher."""
        return any(segment.width for segments in self.stacks.values() for segment in segments)

    @property
    def share_of_first(self) -> float | None:
        """Share of the first teacher's parameters, where the teacher was compressed before and says how many it had."""
        return self.predicted.params / self.model.first_params if self.model.first_params else None


def identity_segments(num_blocks: int) -> tuple[Segment, ...]:
    """The segments that keep every block."""
    return tuple(Segment(i, i) for i in range(num_blocks))


def plan_digest(plan: CompressionPlan) -> str:
    """SHA-256 of a plan's canonical JSON (sorted keys, no spaces, UTF-8), as 64 hexadecimal digits.

    How it was chosen is no part of what it is, nor is a call that nobody made its own.
    """
    left_out = {"recovered"} if plan.call else {"recovered", "call"}
    told = {name: value for name, value in to_jsonable(plan).items() if name not in left_out}
    text = json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def free_blocks(model: ModelInfo, stack: Stack, settings: PlanConfig) -> tuple[int, int]:
    """Unprotected blocks low <= i < high of a stack."""
    low = settings.protect_first if stack is model.stacks[0] else 0
    return low, stack.num_blocks - (settings.protect_last if stack is model.stacks[-1] else 0)
