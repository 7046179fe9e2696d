"""What ``ppcl evaluate A B ...`` finds out, as typed data; ``metrics.json`` holds it.

The JSON schema of the file follows from these classes: :func:`write_schema`. It lies beside every such file
and, for who reads them without ppcl, in ``schemas``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from ppcl.common.files import write_json
from ppcl.common.tables import markdown_table, number
from ppcl.eval.intervals import LEVEL, RESAMPLES, Interval

if TYPE_CHECKING:
    from ppcl.eval.scoring import Measured

SCHEMA_VERSION = 1
DIALECT = "https://json-schema.org/draft/2020-12/schema"  # what pydantic writes
NAMES = {
    "fid": "FID ↓",
    "kid": "KID ↓",
    "kid_std": "KID, standard deviation of subsets",
    "cmmd": "CMMD ↓",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "density": "density ↑",
    "coverage": "coverage ↑",
    "clip_score": "CLIP score ↑",
    "retrieval_at_1": "retrieval at 1 ↑",
    "retrieval_at_5": "retrieval at 5 ↑",
    "velocity_error": "velocity error ↓",
    "psnr": "PSNR (dB) ↑",
    "ssim": "SSIM ↑",
    "lpips": "LPIPS ↓",
    "feature_cosine": "feature cosine ↑",
    "average_drop": "average drop (%) ↓",
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Number(_Frozen):
    """A number with its bootstrap interval; limits are null where there is none."""

    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = Field(default=None, description="items behind the interval")
    over: Literal["pictures", "references", "states"] = Field(default="pictures", description="what the items are")

    def __str__(self) -> str:
        """The number and its limits, as in ``31.4 (30.9 to 31.9)``."""
        if self.low is None or self.high is None:
            return number(self.value)
        return f"{number(self.value)} ({number(self.low)} to {number(self.high)})"


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
    numbers: dict[str, Number]
    costs: dict[str, float | None] = Field(
        description="times in milliseconds, bytes, FLOPs of a transformer call for one prompt; times and bytes vary"
    )
    speed: list[Speed] = Field(default=[], description="several step counts and batch sizes")
    blocks: dict[str, list[Block]] = Field(default={}, description="by stack; empty for models not made by ppcl")


class Comparison(_Frozen):
    """A model against the first one, prompt by prompt."""

    label: str
    against: str
    average_drop: Number | None = Field(description="percent; negative: a gain")
    average_drop_per_score: dict[str, Number]
    differences: dict[str, Number] = Field(description="this model's number minus the first one's, paired by prompt")
    fidelity: dict[str, Number]
    velocity_error_by_timestep: list[Step]
    param_ratio: float
    speedup: float | None = Field(description="of the transformer or U-Net; above 1: faster than the first")
    speedup_end_to_end: float | None
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
    level: float = LEVEL
    resamples: int = RESAMPLES
    notes: list[str] = Field(description="what is missing, what was used instead, what to be careful about")
    models: list[ModelResult]
    comparisons: list[Comparison]


def of_interval(found: Interval, over: Literal["pictures", "references", "states"] = "pictures") -> Number:
    """An interval as the file holds it."""
    return Number(value=found.value, low=found.low, high=found.high, count=found.count, over=over)


def of_measured(measured: Measured) -> Number:
    """A measure as the file holds it."""
    known = measured.interval
    return of_interval(known, measured.over) if known else Number(value=measured.value, over=measured.over)


def write_schema(path: str | Path) -> None:
    """Write the JSON schema of :class:`Evaluation`."""
    write_json(path, {"$schema": DIALECT, **Evaluation.model_json_schema()})


def cost_rows(result: Evaluation) -> list[list[str]]:
    """Parameters, times and memory, one row each."""
    rows = [["parameters (M)", *(number(one.params / 1e6, 4) for one in result.models)]]
    for key, name, unit in (
        ("latency_ms", "one transformer call (ms)", 1.0),
        ("latency_end_to_end_ms", "one picture (ms)", 1.0),
        ("peak_memory_bytes", "peak memory (MB)", 1e-6),
        ("flops", "transformer call for one prompt (GFLOPs)", 1e-9),
    ):
        values = [one.costs.get(key) for one in result.models]
        if any(value is not None for value in values):
            rows.append([name, *(number(value * unit if value is not None else None) for value in values)])
    for key, name in (("speedup", "times as fast, transformer"), ("speedup_end_to_end", "times as fast, one picture")):
        if result.comparisons:
            rows.append([name, "1", *(number(getattr(one, key)) for one in result.comparisons)])
    return rows


def speed_table(labels: Sequence[str], rows: Sequence[Sequence[Speed]]) -> str:
    """Times of several models at several step counts and batch sizes, as Markdown; empty if there are none.

    Args:
        labels: The models.
        rows: The times of each, in one order.
    """
    if not rows or not all(rows) or len({len(own) for own in rows}) > 1:
        return ""
    lines = []
    for same in zip(*rows, strict=True):
        first = same[0]
        what = "transformer call" if first.part == "transformer" else f"pictures, {first.num_inference_steps} steps"
        cells = [
            f"{number(one.latency_ms)} ({number(one.latency_p10_ms)} to {number(one.latency_p90_ms)})"
            + (f", {one.times_as_fast:.2f}x" if one.times_as_fast is not None else "")
            for one in same
        ]
        memory = [number(one.peak_memory_bytes / 1e6 if one.peak_memory_bytes is not None else None) for one in same]
        lines.append([what, str(first.batch_size), *cells, *memory])
    header = ["", "prompts at once", *(f"{label}, ms" for label in labels), *(f"{label}, peak MB" for label in labels)]
    counted = sorted({f"{one.runs} runs after {one.warmup_runs}" for own in rows for one in own})
    guide = (
        f"Median (10th to 90th percentile) of {' or '.join(counted)} of warm-up. x: times as fast as {labels[0]}, "
        "timed in turn with it, whatever else the machine did."
    )
    return f"{markdown_table(header, lines)}\n\n{guide}"


def score_rows(result: Evaluation) -> list[list[str]]:
    """All numbers, one row each: the models', then those that only a comparison has."""
    rows = []
    for key, name in NAMES.items():
        cells = [str(one.numbers[key]) if key in one.numbers else "-" for one in result.models]
        if set(cells) != {"-"}:
            rows.append([name, *cells])
    for key, name in NAMES.items():
        found = [one.fidelity.get(key) for one in result.comparisons]
        if key == "average_drop":
            found = [one.average_drop for one in result.comparisons]
        if any(value is not None for value in found):
            rows.append([name, "", *(str(value) if value is not None else "-" for value in found)])
    return rows


def flat_numbers(result: Evaluation) -> dict[str, float | None]:
    """Every number of every model by ``label/name``, for who plots them over evaluations."""
    found: dict[str, float | None] = {}
    for one in result.models:
        found |= {f"{one.label}/{name}": value.value for name, value in one.numbers.items()}
        found |= {f"{one.label}/{name}": value for name, value in one.costs.items()}
    for made in result.comparisons:
        found |= {f"{made.label}/{name}": value.value for name, value in made.fidelity.items()}
        found[f"{made.label}/average_drop"] = made.average_drop.value if made.average_drop else None
        found[f"{made.label}/speedup"] = made.speedup
    return found


def report(result: Evaluation) -> str:
    """Lay the result out as Markdown: verdicts, notes, tables."""
    labels = [one.label for one in result.models]
    against = f"{result.reference} ({result.reference_count or 'unknown number of'} pictures)"
    parts = [
        f"# {' against '.join([', '.join(labels[1:]), labels[0]]) if labels[1:] else labels[0]}",
        *(f"**{one.verdict}.**" for one in result.comparisons),
        f"{result.prompts} prompts, {result.num_inference_steps} steps, seed {result.seed}. "
        f"Features: {result.features}. "
        f"FID and the like compare with: {against if result.reference else 'nothing'}. In brackets: {result.level:.0%} "
        f"bootstrap intervals ({result.resamples:,} resamples, paired by prompt where models are compared).",
        *(f"> {note}" for note in result.notes),
        markdown_table(["", *labels], [*score_rows(result), *cost_rows(result)]),
    ]
    speed = speed_table(labels, [one.speed for one in result.models])
    parts += ["## Speed and memory", speed] if speed else []
    for one in result.comparisons:
        if one.velocity_error_by_timestep:
            rows = [
                [
                    f"{number(step.timestep_high)} to {number(step.timestep_low)}",
                    str(step.states),
                    f"{number(step.error)} ({number(step.low)} to {number(step.high)})",
                ]
                for step in one.velocity_error_by_timestep
            ]
            parts += [
                f"Velocity error of {one.label} by timestep, on states of {one.against}:",
                markdown_table(["timestep", "states", "error"], rows),
            ]
    return "\n\n".join(parts) + "\n"
