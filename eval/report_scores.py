"""The report's section on quality: scores of both models, and how close they are pair by pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ppcl.eval import figures
from ppcl.eval.report_data import RunData, limits, pick
from ppcl.eval.report_html import (
    figure,
    missing,
    note,
    number,
    paragraph,
    percent,
    ranged,
    section,
    signed,
    table,
    text,
)

# Name, lower is better, shown as a percentage, what it means.
SCORES: dict[str, tuple[str, bool, bool, str]] = {
    "fid": (
        "FID",
        True,
        False,
        "Distance between the statistics of these pictures and of the reference pictures. It judges the whole set, "
        "not single pictures, and it is too high for small sets: compare the two columns with each other only.",
    ),
    "kid": (
        "KID",
        True,
        False,
        "The same question as FID by another statistic, which is not biased by the number of pictures.",
    ),
    "cmmd": (
        "CMMD",
        True,
        False,
        "The same question again, asked of the embedding that judges prompts: a distance between means, not biased.",
    ),
    "precision": ("Precision", False, True, "How many of these pictures lie near reference pictures: plausible ones."),
    "recall": ("Recall", False, True, "How many reference pictures lie near these pictures: the variety is kept."),
    "density": (
        "Density",
        False,
        False,
        "How many reference pictures lie near each of these, by what is usual among them; 1 or more is good.",
    ),
    "coverage": ("Coverage", False, True, "How many reference pictures have one of these as a near neighbour."),
    "clip_score": (
        "CLIP score",
        False,
        False,
        "How well each picture fits its own prompt: 100 times the cosine of their embeddings, averaged.",
    ),
    "retrieval_at_1": (
        "Retrieval at 1",
        False,
        True,
        "How often the picture's own prompt comes first among all prompts of the evaluation.",
    ),
    "retrieval_at_5": (
        "Retrieval at 5",
        False,
        True,
        "How often the picture's own prompt is among the first five.",
    ),
}

OPTIONAL = ("kid", "cmmd", "precision", "recall", "density", "coverage")  # no row where neither model has it

# Name, digits as percentage or not, what it means; the student's pictures against the teacher's, pair by pair.
FIDELITY: dict[str, tuple[str, str]] = {
    "psnr": (
        "PSNR, dB",
        "Pixel by pixel likeness of pairs; higher is closer. For scale: the teacher against its own picture of "
        "the same prompt with another seed.",
    ),
    "ssim": ("SSIM", "Likeness of local structure; 1 is identical."),
    "lpips": ("LPIPS", "Learned perceptual distance; 0 is identical."),
    "feature_cosine": ("Feature cosine", "Likeness in the evaluator's embedding; 1 is identical."),
    "velocity_error": (
        "Velocity error",
        "Relative difference of the transformer's output on held-out denoising states, without any sampler; 0 is "
        "identical. For scale: the same student before distillation.",
    ),
}
SCALE_OF = {"psnr": "teacher_psnr_other_seed", "velocity_error": "velocity_error_undistilled"}


def verdict(teacher: float | None, student: float | None, values: Sequence[float], lower_is_better: bool) -> str:
    """What a difference means beside the teacher's own spread over seeds.

    The spread is the larger of two standard deviations and the full range of ``values``.
    """
    if teacher is None or student is None:
        return "Not measured."
    if len(values) < 2:
        return "The teacher was drawn with one seed, so its own spread is unknown."
    mean = sum(values) / len(values)
    deviation = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
    if abs(student - teacher) <= max(2 * deviation, max(values) - min(values)):
        return "Inside the teacher's own spread over seeds: this sample shows no difference."
    better = (student < teacher) == lower_is_better
    return f"Outside the teacher's own spread: {'better' if better else 'worse'} on this sample."


def _score_rows(metrics: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    rows, explanations = [], []
    for key, (name, lower, as_share, meaning) in SCORES.items():
        teacher, student = pick(metrics, "teacher", key), pick(metrics, "student", key)
        if key in OPTIONAL and teacher is None and student is None:
            continue
        show = percent if as_share else number
        change = student - teacher if teacher is not None and student is not None else None
        points = f"{number(None if change is None else 100 * change, 2)} points" if as_share else number(change, 2)
        deviation = pick(metrics, "teacher_spread", key, "std")
        around = show(deviation) if as_share else number(deviation, 2)
        if deviation is not None:
            around = f"\N{PLUS-MINUS SIGN}{around}"
        cells = [
            ranged(show(value), limits(metrics, "intervals", side, key), show)
            for side, value in (("teacher", teacher), ("student", student))
        ]
        rows.append([name, *cells, signed(change, points), around])
        better = "Lower is better." if lower else "Higher is better."
        values = _spread_values(metrics, key)
        judged = "" if key in OPTIONAL and not values else verdict(teacher, student, values, lower)
        explanations.append(f"{text(meaning)} {better} <span class=verdict>{text(judged)}</span>")
    return rows, explanations


def _spread_values(metrics: Mapping[str, Any], key: str) -> list[float]:
    entry = (metrics.get("teacher_spread") or {}).get(key) or {}
    values = entry.get("values") if isinstance(entry, Mapping) else None
    return [v for v in values if isinstance(v, int | float)] if isinstance(values, list) else []


def _fidelity_table(metrics: Mapping[str, Any]) -> str:
    rows, explanations = [], []
    for key, (name, meaning) in FIDELITY.items():
        value = pick(metrics, "fidelity", key)
        if key == "lpips" and value is None:
            continue  # a note says why
        shown = ranged(number(value), limits(metrics, "intervals", "fidelity", key))
        rows.append([name, shown, number(pick(metrics, "fidelity", SCALE_OF.get(key, "-")))])
        explanations.append(text(meaning))
    return table(["", "student against teacher", "for scale"], rows, explanations)


def cautions(metrics: Mapping[str, Any]) -> list[str]:
    """What a reader should know before believing the scores."""
    prompts, seeds = pick(metrics, "samples", "prompts"), pick(metrics, "samples", "teacher_seeds")
    found = [str(line) for line in metrics.get("notes") or ()]
    if prompts is not None and prompts < 1000:
        found.append(
            f"Small sample: {prompts:.0f} prompts. One picture more or less moves retrieval by "
            f"{number(100 / max(prompts, 1), 2)} points, and FID needs thousands of pictures to settle."
        )
    if seeds is not None and seeds < 4:
        found.append(f"The spread comes from {seeds:.0f} seeds of the teacher, so it is itself only a rough guide.")
    if metrics.get("fid_reference") == "teacher":
        found.append("No real pictures were given: FID is measured against the teacher's own pictures of another seed.")
    if metrics.get("features") == "emoji":
        found.append(
            "Scores come from the embedded emoji evaluator. It knows this domain only: do not compare them with "
            "published numbers of other evaluators."
        )
    return found


def metrics_section(run: RunData) -> str:
    """Scores of teacher and student with their meaning, and paired fidelity."""
    metrics = run.metrics
    if not metrics:
        return section("numbers", "How good is it", missing(run.missing("eval/metrics.json")))
    named = {"prompts": "prompts", "references": "reference pictures", "teacher_seeds": "teacher seeds"}
    sizes = [
        f"{value:.0f} {name}" for key, name in named.items() if (value := pick(metrics, "samples", key)) is not None
    ]
    steps = pick(metrics, "num_inference_steps")
    sizes += [f"{steps:.0f} sampling steps"] if steps is not None else []
    sizes += [f"features: {metrics['features']}"] if metrics.get("features") else []
    how = ", ".join(sizes) or "settings that were not recorded"
    rows, explanations = _score_rows(metrics)
    parts = [paragraph(text(f"Measured with {how}."), "soft"), *(note(line) for line in cautions(metrics))]
    parts.append("<h3>Scores</h3>")
    parts.append(table(["", "teacher", "student", "change", "teacher's spread"], rows, explanations))
    if level := pick(metrics, "intervals", "level"):
        drawn = pick(metrics, "intervals", "resamples")
        times = f" ({drawn:,.0f} resamples)" if drawn else ""
        parts.append(paragraph(f"Under a number: its {percent(level, 0)} bootstrap interval{times}.", "soft small"))
    parts += [_drop(metrics), "<h3>Closeness to the teacher, pair by pair</h3>", _fidelity_table(metrics)]
    parts.append(_velocity_figure(metrics))
    return section("numbers", "How good is it", *parts)


def _drop(metrics: Mapping[str, Any]) -> str:
    """The average drop in words, with its interval and its parts."""
    drop = pick(metrics, "average_drop")
    if drop is None:
        return ""
    each = metrics.get("average_drop_per_metric") or {}
    drops = {name: pick(each, key) for key, (name, *_) in SCORES.items()}
    names = [f"{name} {number(value, 2)}%" for name, value in drops.items() if value is not None]
    detail = f" ({'; '.join(names)})" if names else ""
    around = limits(metrics, "intervals", "average_drop")
    interval = f", interval {number(around[0], 2)}% to {number(around[1], 2)}%" if around else ""
    return paragraph(
        f"<b>Average drop {text(number(drop, 2))}%</b>{text(interval)}, the mean relative loss of the scores where "
        f"higher is better{text(detail)}. A negative drop is a gain."
    )


VELOCITY_GUIDE = (
    "How to read: relative error of the transformer's output at the teacher's own denoising states, by range of "
    "timesteps, from pure noise on the left to the finished picture on the right; shaded: the interval. Lower is "
    "closer to the teacher."
)


def velocity_steps(rows: object) -> list[dict[str, float]]:
    """The rows of ``velocity_error_by_timestep`` that hold every number; empty where there are none."""
    keys = ("timestep_low", "timestep_high", "error", "low", "high")
    found = [{key: pick(row, key) for key in keys} for row in rows] if isinstance(rows, list) else []
    whole = [{key: value for key, value in row.items() if value is not None} for row in found]
    return [row for row in whole if len(row) == len(keys)]


def _velocity_figure(metrics: Mapping[str, Any]) -> str:
    fidelity = metrics.get("fidelity")
    steps = velocity_steps(fidelity.get("velocity_error_by_timestep") if isinstance(fidelity, Mapping) else None)
    if not steps:
        return ""
    return figure("Velocity error by timestep", figures.velocity_curves({"student": steps}), VELOCITY_GUIDE, "single")
