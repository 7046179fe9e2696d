"""``RUN/eval/metrics.json`` as typed data, its JSON schema, and ``RUN/report.md``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ppcl.common.artifacts import load_artifact
from ppcl.common.files import read_json, write_json, write_text
from ppcl.common.tables import markdown_table, number
from ppcl.errors import ArtifactError
from ppcl.eval.results import DIALECT, NAMES, Number, Speed, Step, speed_table
from ppcl.student.plan import CompressionPlan

Limits = tuple[float | None, float | None] | None
HEADER = ("", "teacher", "student", "teacher's spread over seeds")
COSTS = (
    ("params", "parameters (M)", 1e-6),
    ("latency_ms", "one transformer call (ms)", 1.0),
    ("latency_end_to_end_ms", "one picture (ms)", 1.0),
    ("peak_memory_bytes", "peak memory (MB)", 1e-6),
    ("flops", "transformer call for one prompt (GFLOPs)", 1e-9),
)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Samples(_Frozen):
    """How many pictures are behind the numbers."""

    prompts: int
    references: int
    teacher_seeds: int


class Side(_Frozen):
    """The teacher or the student; null: not measured."""

    params: int
    fid: float | None
    kid: float | None
    kid_std: float | None = None
    cmmd: float | None = None
    precision: float | None = None
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None
    clip_score: float | None
    retrieval_at_1: float | None
    retrieval_at_5: float | None
    latency_ms: float = Field(description="one transformer call on evaluate.batch_size recorded states, median")
    latency_p10_ms: float
    latency_p90_ms: float
    latency_end_to_end_ms: float = Field(description="one picture from prompt to pixels, median")
    peak_memory_bytes: int | None
    flops: int | None = Field(description="of a transformer call for one prompt, counted by torch")


class Spread(_Frozen):
    """A score of the teacher over its seeds."""

    mean: float | None
    std: float | None
    values: list[float]


class SpeedOfBoth(_Frozen):
    """Several step counts and batch sizes; row by row the same work, timed in turn."""

    teacher: list[Speed]
    student: list[Speed]


class Fidelity(_Frozen):
    """The student's pictures against the teacher's, pair by pair; null: not measured."""

    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    feature_cosine: float | None
    teacher_psnr_other_seed: float | None
    velocity_error: float | None
    velocity_error_undistilled: float | None
    velocity_error_by_timestep: list[Step]


class Intervals(_Frozen):
    """Bootstrap limits [low, high] of the numbers of the same names; null where there are none."""

    level: float
    resamples: int
    teacher: dict[str, Limits]
    student: dict[str, Limits]
    fidelity: dict[str, Limits]
    average_drop: Limits
    average_drop_per_metric: dict[str, Limits]
    fid_ratio: Limits


class RunMetrics(_Frozen):
    """All of it."""

    schema_version: int
    features: str
    num_inference_steps: int
    seed: int
    samples: Samples
    notes: list[str] = Field(description="what is missing, and what was used instead")
    fid_reference: Literal["real", "teacher"] | None
    memory_measure: str
    speed: SpeedOfBoth
    teacher: Side
    student: Side
    teacher_spread: dict[str, Spread]
    fidelity: Fidelity
    average_drop: float | None = Field(description="percent; negative: a gain")
    average_drop_per_metric: dict[str, float | None]
    fid_ratio: float | None
    param_ratio: float | None
    speedup: float | None
    speedup_end_to_end: float | None
    intervals: Intervals


def write_run_schema(path: str | Path) -> None:
    """Write the JSON schema of :class:`RunMetrics`."""
    write_json(path, {"$schema": DIALECT, **RunMetrics.model_json_schema()})


def _with_limits(value: float | None, limits: Sequence[float | None] | None) -> str:
    if value is None:
        return "-"
    low, high = limits or (None, None)
    return str(Number(value=value, low=low, high=high))


def _score_lines(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Scores with their intervals and the teacher's own spread, then the paired measures."""
    lines, found = [], metrics["intervals"]
    for key, name in NAMES.items():
        values = [metrics[side].get(key) for side in ("teacher", "student")]
        if any(value is not None for value in values):
            limits = [found[side].get(key) for side in ("teacher", "student")]
            std = (metrics["teacher_spread"].get(key) or {}).get("std")
            noise = f"± {number(std, 2)}" if std is not None else ""
            lines.append([name, *(_with_limits(v, own) for v, own in zip(values, limits, strict=True)), noise])
    for key, name in NAMES.items():
        value, limits_of_pair = metrics["fidelity"].get(key), found["fidelity"].get(key)
        if value is not None:
            lines.append([name, "", _with_limits(value, limits_of_pair), ""])
    drop = _with_limits(metrics["average_drop"], found["average_drop"])
    return [*lines, [NAMES["average_drop"], "", drop, ""]]


def table_rows(metrics: Mapping[str, Any]) -> list[list[str]]:
    """All numbers: name, teacher, student, the teacher's spread over seeds."""
    rows = []
    for key, name, unit in COSTS:
        values = [metrics[side].get(key) for side in ("teacher", "student")]
        rows.append([name, *(number(value * unit if value is not None else None, 4) for value in values), ""])
    return [*_score_lines(metrics), *rows]


def run_report(metrics: Mapping[str, Any], plan: CompressionPlan | None = None) -> str:
    """Lay the numbers of a run out as Markdown.

    Args:
        metrics: Content of ``RUN/eval/metrics.json``.
        plan: What was replaced.
    """
    from ppcl.export.card import draw_plan

    samples, found = metrics["samples"], metrics["intervals"]
    references = {"real": f"{samples['references']} real pictures", "teacher": "the teacher's second seed"}
    against = references.get(str(metrics["fid_reference"]), "nothing")
    speed = [[Speed(**row) for row in metrics["speed"][side]] for side in ("teacher", "student")]
    table = speed_table(["teacher", "student"], speed)
    parts = [
        "# Student against teacher",
        _headline(metrics),
        f"{samples['prompts']} prompts, {metrics['num_inference_steps']} steps, seed {metrics['seed']}, "
        f"{samples['teacher_seeds']} teacher seed(s). Features: {metrics['features']}. FID and the like compare with: "
        f"{against}. In brackets: {found['level']:.0%} bootstrap intervals ({found['resamples']:,} resamples).",
        *(f"> {note}" for note in metrics["notes"]),
        markdown_table(HEADER, table_rows(metrics)),
        *(["## Speed and memory", table] if table else []),
        *(["## Plan", draw_plan(plan)] if plan else []),
    ]
    return "\n\n".join(parts) + "\n"


def _headline(metrics: Mapping[str, Any]) -> str:
    """Size, speed and drop in one sentence, as far as they are known."""
    ratio, faster, whole = (metrics[key] for key in ("param_ratio", "speedup", "speedup_end_to_end"))
    parts = [f"{ratio:.1%} of the parameters"] if ratio is not None else []
    if faster is not None:
        parts.append(f"{number(faster)} times as fast ({number(whole)} end to end)")
    if metrics["average_drop"] is not None:
        parts.append(f"average drop {_with_limits(metrics['average_drop'], metrics['intervals']['average_drop'])} %")
    return f"**{', '.join(parts)}.**" if parts else "Nothing was measured."


def write_run_report(run: Path) -> Path | None:
    """Write ``RUN/report.md``; None, and no file, where the metrics are missing, damaged or of another version.

    Raises:
        UserError: The report cannot be written.
    """
    path = run / "report.md"
    try:
        metrics = read_json(run / "eval" / "metrics.json")
        RunMetrics.model_validate(metrics)
    except (ArtifactError, ValidationError):
        path.unlink(missing_ok=True)  # of an evaluation that is gone
        return None
    try:
        plan = load_artifact(CompressionPlan, run / "plan.json")
    except ArtifactError:
        plan = None
    write_text(path, run_report(metrics, plan))
    return path
