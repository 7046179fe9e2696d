"""What the stages hand to each other: typed, frozen, versioned, stored as JSON (no torch here).

Blocks are numbered from 0 in execution order inside their stack (a block list of the
transformer). A run ``first..last`` is inclusive. The paper numbers blocks from 1 and
writes [u, v]; here u = first + 1 and v = last + 1.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ppcl.errors import ArtifactError
from ppcl.files import read_json, write_json

SCHEMA_VERSION = 1
T = TypeVar("T")


@dataclass(frozen=True)
class Stack:
    """One block list of a transformer.

    Attributes:
        name: Attribute path of the ModuleList, e.g. ``transformer_blocks``.
        count_field: Config field that holds its length, e.g. ``num_layers``.
        num_blocks: Its length in the teacher.
        block_params: Parameters of each block.
        block_flops: Forward FLOPs of each block for one sample of the calibration's shape.
    """

    name: str
    count_field: str
    num_blocks: int
    block_params: tuple[int, ...]
    block_flops: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelInfo:
    """The teacher as the planner sees it.

    Attributes:
        transformer_class: Class name of the transformer.
        config_digest: Digest of its config; artifacts of another model are refused by it.
        params: Parameters of the whole transformer.
        flops: Forward FLOPs of the whole transformer for one sample (0: not counted).
        bytes_per_param: Bytes of one stored weight.
        other_bytes: Bytes of the pipeline's other components (text encoder, VAE).
        stacks: The block lists in execution order.
    """

    transformer_class: str
    config_digest: str
    params: int
    flops: int
    bytes_per_param: int
    other_bytes: int
    stacks: tuple[Stack, ...]


@dataclass(frozen=True)
class Stability:
    """How often an interval is found again with other tokens: shares of the draws.

    Attributes:
        same: Draws with exactly this interval.
        first: Draws in which some interval starts where this one does.
        last: Draws in which some interval ends where this one does.
    """

    same: float
    first: float
    last: float


@dataclass(frozen=True)
class StackAnalysis:
    """What the analysis found in one stack of M blocks.

    Attributes:
        cka: ``cka[u][k]`` for u <= k: CKA between the true output of block k and the chained
            probes u..k applied to block u's input, streams combined by token share; None for k < u (eq. 3).
        cka_by_stream: The same per stream.
        intervals: The paper's intervals [first, last] by eqs. 4-5 (runs of two or more blocks), found among the blocks
            that are not protected.
        probe_error: Held-out relative error of each block's probe, per stream.
        ridge: The ridge chosen per stream and block.
        influence: Block influence, 1 - mean cosine of a block's input and output (ShortGPT).
        ffn_linearity: Held-out relative error of the best linear map for each FFN, per stream (eq. 9).
        modulation_residual: Per stream and block, the share of a modulation layer's varying output that each rank
            0, 1, 2, ... misses on held-out prompts and timesteps that it was not fitted on.
        text_linearity: Held-out relative errors of a linear map from the preceding block's text signals
            (eq. 8): ``input`` for the text input of QKV, ``output`` for the block's text output.
        interval_draws: Draws of half of the held-out prompts that intervals were found with again; 0: none were made.
        interval_stability: For each interval, how often it was found.
    """

    name: str
    cka: tuple[tuple[float | None, ...], ...]
    cka_by_stream: dict[str, tuple[tuple[float | None, ...], ...]]
    intervals: tuple[tuple[int, int], ...]
    probe_error: dict[str, tuple[float, ...]]
    ridge: dict[str, tuple[float, ...]]
    influence: tuple[float, ...]
    ffn_linearity: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    text_linearity: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    modulation_residual: dict[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    interval_draws: int = 0
    interval_stability: tuple[Stability, ...] = ()


@dataclass(frozen=True)
class Analysis:
    """The result of the analyze stage (the probe matrices lie beside it as safetensors)."""

    model: ModelInfo
    stacks: tuple[StackAnalysis, ...]
    num_states: int
    num_tokens: dict[str, int]
    seconds: float
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Candidate:
    """A run that one block might replace, and what that costs.

    Attributes:
        probe_error: Relative error of the final velocity when the run alone is replaced by its chained
            probes (the "output sensitivity" of the run).
        start: The start of the substitute block that was best on held-out states.
        fitted_error: The same error with the briefly fitted substitute block; None if it was not fitted.
    """

    stack: str
    first: int
    last: int
    probe_error: float
    start: str | None = None
    fitted_error: float | None = None

    @property
    def removed(self) -> int:
        """Blocks that replacing this run saves."""
        return self.last - self.first


@dataclass(frozen=True)
class WidthOption:
    """Smaller modules inside one block, and what they cost.

    Attributes:
        group: What is made smaller (``modulation``, ``ffn.image``, ``ffn.text``); a block takes one option a group.
        parts: Path inside the block -> ``kind`` and ``size`` of the replacement (:mod:`ppcl.width`).
        saved_params: Parameters fewer, exactly.
        saved_flops: Forward FLOPs fewer for one sample of the calibration's shape.
        error: Relative error of the final velocity when this alone is put in, untrained.
        saved_time: What was measured: the share of the block's time that is saved, times the block's FLOPs; None if it
            was not measured.
    """

    stack: str
    block: int
    group: str
    parts: dict[str, dict[str, Any]]
    saved_params: int
    saved_flops: int
    error: float
    saved_time: int | None = None

    @property
    def saved_speed(self) -> int:
        """What counts for a speed-up, in FLOPs: measured time where there is any."""
        return self.saved_flops if self.saved_time is None else self.saved_time


@dataclass(frozen=True)
class Candidates:
    """The result of the fit stage.

    Attributes:
        candidates: Runs that one block might replace.
        steps: Of the short joint fit.
        seconds: Of the whole stage.
        width: Smaller modules.
        criterion: What scored neurons and heads; empty where none were.
        criterion_forwards: What it said it would cost: runs of the transformer on one state; None if it did not say.
    """

    candidates: tuple[Candidate, ...]
    steps: int
    seconds: float
    width: tuple[WidthOption, ...] = ()
    criterion: str = ""
    criterion_forwards: float | None = None
    schema_version: int = SCHEMA_VERSION


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
            (:mod:`ppcl.width`); empty in plans of depth alone.
        saved_params: Parameters that ``width`` saves.
        saved_flops: Forward FLOPs that ``width`` saves for one sample.
        error: Relative error of the final velocity when this alone is put in, as the planner saw it; None if
            it was not measured.
        saved_time: See :class:`WidthOption`.
        sparsity: Share of the weights in the block's masked linear layers that are zero (:mod:`ppcl.sparsity`).
    """

    first: int
    last: int
    start: str | None = None
    width: dict[str, dict[str, Any]] = field(default_factory=dict)
    saved_params: int = 0
    saved_flops: int = 0
    error: float | None = None
    saved_time: int | None = None
    sparsity: float = 0.0

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
        error: Square root of the summed squared velocity errors of the single substitutes (an estimate).
    """

    params: int
    param_ratio: float
    speedup: float
    bytes: int
    error: float | None


@dataclass(frozen=True)
class CompressionPlan:
    """Which blocks stay and which runs become one block, for every stack of the teacher.

    Attributes:
        mode: The search that chose it (:mod:`ppcl.searches`).
        budget: Kind and value.
        stacks: Segments of each stack.
        predicted: What it should give.
        teacher_forwards: What the search said it would cost: runs of the transformer on one state.
    """

    model: ModelInfo
    mode: str
    budget: dict[str, float]
    stacks: dict[str, tuple[Segment, ...]]
    predicted: Prediction
    teacher_forwards: float = 0.0
    schema_version: int = SCHEMA_VERSION
    # pattern, criterion, allocation; zeros among all parameters and in the masked layers; empty without sparsity
    sparsity: dict[str, Any] = field(default_factory=dict)

    @property
    def runs(self) -> list[tuple[str, Segment]]:
        """All (stack name, run) pairs that a substitute block replaces, in execution order."""
        order = [stack.name for stack in self.model.stacks]  # JSON sorts the keys of ``stacks``
        names = sorted(self.stacks, key=lambda name: order.index(name) if name in order else len(order))
        return [(name, s) for name in names for s in self.stacks[name] if s.is_run]

    @property
    def has_width(self) -> bool:
        """Whether any block has smaller modules; then the model is not of a stock class."""
        return any(segment.width for segments in self.stacks.values() for segment in segments)


def identity_segments(num_blocks: int) -> tuple[Segment, ...]:
    """The segments that keep every block."""
    return tuple(Segment(i, i) for i in range(num_blocks))


def to_jsonable(value: Any) -> Any:
    """Turn dataclasses and tuples into plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(v) for v in value]
    return value


def _build(kind: Any, value: Any) -> Any:
    """Build an annotated type from JSON values; ValueError on a mismatch."""
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = set(value) - set(hints)
        if unknown:
            raise ValueError(f"unknown entry '{min(unknown)}'")
        return kind(**{k: _build(hints[k], v) for k, v in value.items()})  # type: ignore[operator]
    if typing.get_origin(kind) is not None:
        return _build_generic(typing.get_origin(kind), typing.get_args(kind), value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind):
        raise ValueError(f"{value!r} is not {kind.__name__}")
    return value


def _build_generic(origin: Any, arguments: tuple[Any, ...], value: Any) -> Any:
    """Build ``X | None``, tuples and dicts."""
    if origin is types.UnionType or origin is typing.Union:
        if value is None and type(None) in arguments:
            return None
        return _build(next(a for a in arguments if a is not type(None)), value)
    if origin is dict:
        return {k: _build(arguments[1], v) for k, v in value.items()}
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a list")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_build(arguments[0], v) for v in value)
    return tuple(_build(a, v) for a, v in zip(arguments, value, strict=True))


def plan_digest(plan: CompressionPlan) -> str:
    """SHA-256 of a plan's canonical JSON (sorted keys, no spaces, UTF-8), as 64 hexadecimal digits."""
    text = json.dumps(to_jsonable(plan), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def save_artifact(artifact: Any, path: str | Path) -> None:
    """Write a dataclass artifact as JSON, atomically."""
    write_json(path, to_jsonable(artifact))


def load_artifact(kind: type[T], path: str | Path) -> T:
    """Read a dataclass artifact.

    Raises:
        ArtifactError: The file is missing, damaged, or of another schema version.
    """
    data = read_json(path)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(f"{path} has schema_version {version}, expected {SCHEMA_VERSION}; delete it and run again")
    try:
        return typing.cast(T, _build(kind, data))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{path} is not a valid {kind.__name__} ({error}); delete it and run again") from None
