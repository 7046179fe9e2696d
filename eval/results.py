"""What ``ppcl evaluate A B ...`` finds out, as typed data; ``metrics.json`` holds it.

The JSON schema of the file follows from these classes: :func:`write_schema`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ppcl.eval.intervals import LEVEL, RESAMPLES, Interval
from ppcl.eval.scoring import Measured
from ppcl.files import write_json
from ppcl.tables import markdown_table, number

SCHEMA_VERSION = 1
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


class ModelResult(_Frozen):
    """One model."""

    label: str
    model: str = Field(description="as it was given, folders by their last name")
    params: int = Field(description="of the transformer or U-Net")
    numbers: dict[str, Number]
    costs: dict[str, float | None] = Field(description="times in milliseconds and bytes; these alone vary between runs")


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
    write_json(path, Evaluation.model_json_schema())


def cost_rows(result: Evaluation) -> list[list[str]]:
    """Parameters, times and memory, one row each."""
    rows = [["parameters (M)", *(number(one.params / 1e6, 4) for one in result.models)]]
    for key, name, unit in (
        ("latency_ms", "one transformer call (ms)", 1.0),
        ("latency_end_to_end_ms", "one picture (ms)", 1.0),
        ("peak_memory_bytes", "peak memory (MB)", 1e-6),
    ):
        values = [one.costs.get(key) for one in result.models]
        if any(value is not None for value in values):
            rows.append([name, *(number(value * unit if value is not None else None) for value in values)])
    return rows


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
