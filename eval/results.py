"""What an evaluation finds out, as typed data; ``metrics.json`` of a run and of ``ppcl evaluate`` holds it.

The first model is what the others are compared with: in a run the teacher. The JSON schema of the file follows from
these classes; it lies beside every such file and, for who reads them without ppcl, in ``schemas``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ppcl.common.files import read_json, write_json
from ppcl.common.tables import number
from ppcl.errors import ArtifactError
from ppcl.eval.intervals import LEVEL, RESAMPLES, Interval
from ppcl.eval.metrics import Over

if TYPE_CHECKING:
    from ppcl.eval.scoring import Measured

SCHEMA_VERSION = 2
MARKER = "evaluation.json"  # in a folder of ``ppcl evaluate``, from the start
DIALECT = "https://json-schema.org/draft/2020-12/schema"  # what pydantic writes


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Number(_Frozen):
    """A number with its bootstrap interval; limits are null where there is none."""

    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = Field(default=None, description="items behind the interval")
    over: Over = Field(default="pictures", description="what the items are")

    @property
    def limits(self) -> tuple[float, float] | None:
        """Both limits, or None."""
        return (self.low, self.high) if self.low is not None and self.high is not None else None

    def __str__(self) -> str:
        """The number and its limits, as in ``31.4 (30.9 to 31.9)``."""
        if self.limits is None:
            return number(self.value)
        return f"{number(self.value)} ({number(self.low)} to {number(self.high)})"


class Spread(_Frozen):
    """A score of one model over several seeds of pictures."""

    mean: float
    std: float | None = Field(description="sample standard deviation; null for one seed")
    values: list[float]


class Step(_Frozen):
    """The velocity error in one range of timesteps."""

    timestep_low: float
    timestep_high: float
    states: int
    error: float
    low: float
    high: float


class Speed(_Frozen):
    """The time of one kind of work; median and percentiles of ``runs``, milliseconds."""

    part: Literal["transformer", "picture"] = Field(description="one call, or from prompts to pixels")
    batch_size: int
    num_inference_steps: int | None = Field(description="null for one call of the transformer")
    latency_ms: float
    latency_p10_ms: float
    latency_p90_ms: float
    runs: int
    warmup_runs: int
    peak_memory_bytes: int | None
    times_as_fast: float | None = Field(
        default=None, description="against the first model, timed in turn with it; medians alone vary with the load"
    )


class Block(_Frozen):
    """One block of a compressed model: the teacher's blocks ``first`` to ``last`` that it stands for."""

    first: int
    last: int
    width: list[str] = Field(default=[], description="modules inside that are smaller")


class ModelResult(_Frozen):
    """One model."""

    label: str
    model: str = Field(description="as it was given, folders by their last name")
    params: int = Field(description="of the transformer or U-Net")
    numbers: dict[str, Number] = Field(description="of the pictures of the first seed")
    spread: dict[str, Spread] = Field(default={}, description="the same numbers over all seeds that were drawn")
    costs: dict[str, float | None] = Field(
        description="times in milliseconds, bytes, FLOPs of a transformer call for one prompt; times and bytes vary"
    )
    speed: list[Speed] = Field(default=[], description="several step counts and batch sizes")
    blocks: dict[str, list[Block]] = Field(default={}, description="by stack; empty for models not made by ppcl")
    zeros: dict[str, Any] = Field(default={}, description="share and pattern of weights that are zero, if it is sparse")


class Comparison(_Frozen):
    """A model against the first one, prompt by prompt."""

    label: str
    against: str
    average_drop: Number | None = Field(description="percent; negative: a gain")
    average_drop_per_score: dict[str, Number]
    differences: dict[str, Number] = Field(description="this model's number minus the first one's, paired by prompt")
    fid_ratio: Number | None = Field(default=None, description="this model's FID over the first one's")
    diversity_ratio: Number | None = Field(default=None, description="this model's diversity over the first one's")
    fidelity: dict[str, Number]
    scale: dict[str, float] = Field(
        default={},
        description="for fidelity: the same numbers of the first model's two seeds, velocity error before distillation",
    )
    velocity_error_by_timestep: list[Step]
    param_ratio: float
    speedup: float | None = Field(description="of the transformer or U-Net; above 1: faster than the first")
    speedup_end_to_end: float | None
    num_inference_steps: int | None = Field(default=None, description="of this model, where it is made for so many")
    verdict: str


class Evaluation(_Frozen):
    """All of it."""

    schema_version: int = SCHEMA_VERSION
    features: str
    prompts: int
    seed: int
    num_inference_steps: int
    reference: str | None = Field(description="what FID and the like compare with")
    reference_count: int | None
    floor: dict[str, float] = Field(
        default={}, description="the same distances of as many pictures of the reference to its other ones"
    )
    memory_measure: str = Field(default="", description="cuda (allocated tensors) or resident (the process)")
    level: float = LEVEL
    resamples: int = RESAMPLES
    notes: list[str] = Field(description="what is missing, what was used instead, what to be careful about")
    models: list[ModelResult] = Field(min_length=1)
    comparisons: list[Comparison]

    def comparison_of(self, model: ModelResult) -> Comparison | None:
        """What compares a model with the first one; None for the first one itself."""
        return next((row for row in self.comparisons if row.label == model.label), None)

    def numbers_of(self, model: ModelResult) -> dict[str, Number]:
        """All numbers of a model: its own, and those of its comparison with the first."""
        comparison = self.comparison_of(model)
        if comparison is None:
            return dict(model.numbers)
        drop = {"average_drop": comparison.average_drop} if comparison.average_drop else {}
        return {**drop, **comparison.fidelity, **model.numbers}


def of_interval(interval: Interval, over: Over = "pictures") -> Number:
    """An interval as the file holds it."""
    return Number(value=interval.value, low=interval.low, high=interval.high, count=interval.count, over=over)


def of_measured(measured: Measured) -> Number:
    """A measure as the file holds it."""
    interval = measured.interval
    return of_interval(interval, measured.over) if interval else Number(value=measured.value, over=measured.over)


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON cannot hold, by None, all the way down."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_evaluation(result: Evaluation, folder: Path) -> None:
    """Write ``metrics.json`` and its schema into a folder."""
    write_json(folder / "metrics.json", finite(result.model_dump(mode="json")))
    write_schema(folder / "metrics.schema.json")


def write_schema(path: str | Path) -> None:
    """Write the JSON schema of :class:`Evaluation`."""
    write_json(path, {"$schema": DIALECT, **Evaluation.model_json_schema()})


def load_evaluation(path: Path) -> Evaluation:
    """Read a ``metrics.json``, of an older version too.

    Raises:
        ArtifactError: It is missing, damaged, or of no evaluation.
    """
    from ppcl.eval.older_results import upgraded

    data = read_json(path)
    try:
        return Evaluation.model_validate(upgraded(data))
    except (ValidationError, KeyError, TypeError, AttributeError, ValueError, IndexError, ArithmeticError) as error:
        count = error.error_count() if isinstance(error, ValidationError) else 1
        raise ArtifactError(
            f"{path} is of no evaluation of ppcl, or of another version ({count} entries do not fit); "
            "run ppcl evaluate again, it keeps the pictures"
        ) from None


def is_evaluation(folder: Path) -> bool:
    """Whether a folder is marked as one of ``ppcl evaluate``, or has the numbers of one that older versions wrote."""
    try:
        return (folder / MARKER).is_file() or bool(load_evaluation(folder / "metrics.json"))
    except ArtifactError:
        return False


def flat_numbers(result: Evaluation) -> dict[str, float | None]:
    """Every number of every model by ``label/name``, for who plots them over evaluations."""
    flat: dict[str, float | None] = {}
    for model in result.models:
        flat |= {f"{model.label}/{name}": entry.value for name, entry in result.numbers_of(model).items()}
        flat |= {f"{model.label}/{name}": value for name, value in model.costs.items()}
    for row in result.comparisons:
        flat |= {f"{row.label}/speedup": row.speedup, f"{row.label}/param_ratio": row.param_ratio}
    return flat


def spread_of(values: Sequence[float]) -> Spread:
    """A score over seeds.

    Args:
        values: At least one.
    """
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) if len(values) > 1 else None
    return Spread(mean=mean, std=std, values=list(values))
