"""Teacher against student: pictures, scores, fidelity and speed in one ``metrics.json``.

"Average drop" is the mean over the score metrics of the relative loss against the teacher,
as in the PPCL paper; here the scores are CLIP score and caption retrieval at 1 and 5 among
the prompts. FID stands beside it as a ratio, with the teacher's own spread between seeds.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppcl.common.files import write_json
from ppcl.config import EvaluateConfig
from ppcl.errors import UserError
from ppcl.eval.clip import clip_score, retrieval_at
from ppcl.eval.costs import Costs, Timing, costs
from ppcl.eval.details import details
from ppcl.eval.features import FeatureExtractor
from ppcl.eval.fid import fid, kid
from ppcl.eval.fidelity import feature_cosine, pair_measures
from ppcl.eval.generate import accepted_kwargs, generate, read_picture
from ppcl.eval.pictures import compare_pairs, describe
from ppcl.eval.run_metrics import write_run_schema
from ppcl.eval.scoring import SCORES
from ppcl.eval.velocity import StateErrors

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
DISTANCES = ("fid", "kid")
Scores = dict[str, float | None]


@dataclass(frozen=True)
class Drawn:
    """One model's pictures for one seed; they stay on disk.

    Attributes:
        paths: N picture files.
        features: (N, D) float32.
    """

    paths: list[Path]
    features: Tensor


@dataclass(frozen=True)
class Quality:
    """What the pictures say.

    Attributes:
        fid_reference: What FID and KID compare with: ``real`` pictures, the ``teacher``'s second seed, or None.
        teacher: Scores of each of the teacher's seeds.
        student: Scores of the student.
        fidelity: Paired measures of the first seed.
        against: (M, D) features that FID and KID compare with, if any.
        pairs: The paired measures picture by picture.
        notes: What could not be measured, and why.
    """

    fid_reference: str | None
    teacher: list[Scores]
    student: Scores
    fidelity: Scores
    against: Tensor | None
    pairs: dict[str, tuple[float, ...]]
    notes: tuple[str, ...] = ()


def score(features: Tensor, reference: Tensor | None, text: Tensor | None) -> Scores:
    """Score one set of pictures.

    Args:
        features: (N, D) of the pictures.
        reference: (M, D) of the pictures that FID and KID compare with; None leaves both empty.
        text: (N, D) of the captions; None leaves the caption scores empty.

    Returns:
        ``fid``, ``kid``, ``clip_score``, ``retrieval_at_1``, ``retrieval_at_5``.
    """
    return {
        "fid": fid(features, reference) if reference is not None else None,
        "kid": kid(features, reference) if reference is not None else None,
        "clip_score": clip_score(features, text) if text is not None else None,
        "retrieval_at_1": retrieval_at(features, text, 1) if text is not None else None,
        "retrieval_at_5": retrieval_at(features, text, 5) if text is not None else None,
    }


def spread(per_seed: Sequence[Scores]) -> dict[str, dict[str, Any]]:
    """Mean, standard deviation (None for one value) and values of each metric over the seeds."""
    result: dict[str, dict[str, Any]] = {}
    for name in (*DISTANCES, *SCORES):
        values = [value for scores in per_seed if (value := scores[name]) is not None]
        result[name] = {
            "mean": statistics.fmean(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "values": values,
        }
    return result


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """The quotient, or None where it has no meaning."""
    if numerator is None or denominator is None or denominator == 0:
        return None
    return numerator / denominator


def average_drop(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> tuple[float | None, Scores]:
    """Relative loss in percent, as the mean over the scores and for each of them.

    A score that the teacher has none of (or zero) has no relative loss and is left out of the mean;
    a negative loss is a gain.
    """
    drops: Scores = {}
    for name in SCORES:
        kept = ratio(student[name], teacher[name])
        drops[name] = 100 * (1 - kept) if kept is not None else None
    known = [drop for drop in drops.values() if drop is not None]
    return (statistics.fmean(known) if known else None), drops


def paired_values(teacher: Drawn, student: Drawn) -> tuple[dict[str, tuple[float, ...]], list[str]]:
    """Paired measures, one value a picture, a pair in memory at a time; and notes on what is left out."""
    side = min(read_picture(teacher.paths[0]).shape[:2])
    measures, notes = pair_measures(side)
    found = compare_pairs(teacher.paths, student.paths, measures)
    if not found:
        notes = ["teacher and student draw pictures of different sizes: PSNR, SSIM and LPIPS are left out"]
    pairs = {name: tuple(values) for name, values in found.items()}
    return {**pairs, "feature_cosine": feature_cosine(teacher.features, student.features).values}, notes


def _psnr_of(first: Drawn, second: Drawn | None) -> float | None:
    """Mean PSNR of two sets of pictures, if there is a second one of the same size."""
    psnr_alone = {"psnr": pair_measures(0)[0]["psnr"]}
    values = compare_pairs(first.paths, second.paths, psnr_alone).get("psnr") if second else None
    return statistics.fmean(values) if values else None


def judge(teachers: Sequence[Drawn], student: Drawn, reference: Tensor | None, text: Tensor | None) -> Quality:
    """Score the pictures of all the teacher's seeds and of the student.

    Args:
        teachers: One for each seed, the first drawn from the student's noise.
        student: The student's pictures.
        reference: (M, D) features of real pictures; None compares with the teacher's second seed instead
            (which is not compared with itself), or with nothing where the teacher has but one.
        text: (N, D) features of the captions; None where there is no text tower.
    """
    other = teachers[1] if len(teachers) > 1 else None
    kind = "real" if reference is not None else "teacher" if other else None
    left_out = "no real pictures and one teacher seed: FID is left out; set evaluate.teacher_seeds=2"
    if kind is None:
        logger.warning(left_out)
    against = other.features if kind == "teacher" and other else reference
    scores = [
        score(drawn.features, None if kind == "teacher" and drawn is other else against, text) for drawn in teachers
    ]
    pairs, notes = paired_values(teachers[0], student)
    fidelity: Scores = {name: statistics.fmean(values) for name, values in pairs.items()}
    # what unrelated noise gives, to judge PSNR by
    fidelity["teacher_psnr_other_seed"] = _psnr_of(teachers[0], other)
    notes = [*notes, *([left_out] if kind is None else [])]
    return Quality(kind, scores, score(student.features, against, text), fidelity, against, pairs, tuple(notes))


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON cannot hold, by None, all the way down."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _draw_all(
    pipeline: Any,
    prompts: list[str],
    settings: EvaluateConfig,
    extractor: FeatureExtractor,
    folder: Path,
    seeds: Sequence[int],
    call_kwargs: dict[str, Any],
    model: str,
) -> list[Drawn]:
    """Draw the prompts with every seed under ``folder/seed-<s>`` and describe the pictures."""
    drawn = []
    for seed in seeds:
        paths = generate(
            pipeline,
            prompts,
            folder / f"seed-{seed}",
            seed=seed,
            num_inference_steps=settings.num_inference_steps,
            batch_size=settings.batch_size,
            call_kwargs=call_kwargs,
            label=f"{folder.name}, seed {seed}",
            model=model,
        )
        drawn.append(Drawn(paths, describe(paths, extractor, label=f"{folder.name}, seed {seed}: features")))
    return drawn


def _check_references(references: Tensor | None) -> None:
    if references is not None and (references.dtype != torch.uint8 or references.ndim != 4 or len(references) < 2):
        raise UserError(
            f"references must be at least 2 pictures (N, 3, H, W) uint8, got {tuple(references.shape)} "
            f"{references.dtype}; give more pictures, or none to compare with the teacher"
        )


def evaluate(
    teacher_pipe: Any,
    student_pipe: Any,
    *,
    prompts: list[str],
    folder: Path,
    settings: EvaluateConfig,
    call_kwargs: dict[str, Any],
    references: Tensor | None,
    extractor: FeatureExtractor,
    velocity_error: float | None,
    transformer_calls: tuple[Callable[[], object], Callable[[], object]],
    seed: int,
    params: tuple[int, int],
    models: tuple[str, str] = ("", ""),
    velocity_error_undistilled: float | None = None,
    state_errors: StateErrors | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Draw, score, time; write ``folder/metrics.json`` and its schema. Running it again keeps the pictures.

    Everything but times and memory is the same, bit for bit, when repeated.

    Args:
        teacher_pipe: The teacher's pipeline; it draws with every seed.
        student_pipe: The student's; it draws with the first seed, from the teacher's noise.
        prompts: What both draw (all of them; distinct texts).
        folder: Gets ``teacher/seed-<s>``, ``student/seed-<s>`` and ``metrics.json``.
        settings: Steps, batch size, teacher seeds, latency runs.
        call_kwargs: Arguments of the pipelines' calls, see :func:`ppcl.eval.generate.generate`.
        references: (M, 3, H, W) uint8 real pictures behind FID, or None, see :func:`judge`.
        extractor: Features behind all scores.
        velocity_error: Relative error of the student's velocity on held-out states, passed through.
        transformer_calls: Run the teacher's / the student's transformer once on one batch of states.
        seed: First seed; the teacher also draws seed + 1, seed + 2 ...
        params: Parameters of the teacher's and of the student's transformer.
        models: Identify the weights; pictures of other weights in ``folder`` are refused.
        velocity_error_undistilled: The same error before any training, passed through.
        state_errors: The error state by state, for its interval and its course over the timesteps.
        notes: What a reader must know beside what is found out here.

    Raises:
        UserError: The folder holds pictures of other settings, or the inputs cannot be scored.
    """
    _check_references(references)
    seeds = [seed + offset for offset in range(settings.teacher_seeds)]
    # filtered here once, so that an argument without effect is warned about once
    kwargs = (accepted_kwargs(teacher_pipe, call_kwargs), accepted_kwargs(student_pipe, call_kwargs))
    common, folder = (prompts, settings, extractor), Path(folder)
    teachers = _draw_all(teacher_pipe, *common, folder / "teacher", seeds, kwargs[0], models[0])
    students = _draw_all(student_pipe, *common, folder / "student", [seed], kwargs[1], models[1])
    reference = extractor.image_features(references) if references is not None else None
    text = extractor.text_features(prompts)
    quality = judge(teachers, students[0], reference, text)
    cost = costs((teacher_pipe, student_pipe), prompts, settings, kwargs, transformer_calls, seed)
    metrics = {
        "schema_version": SCHEMA_VERSION,
        "features": extractor.name,
        "num_inference_steps": settings.num_inference_steps,
        "seed": seed,
        "samples": _samples(prompts, references, seeds),
        "notes": [*notes, *quality.notes],
        **summary(quality, cost, params, velocity_error, velocity_error_undistilled),
    }
    drawn = (teachers[0].features, students[0].features)
    metrics |= finite(details(*drawn, quality.against, text, quality.pairs, state_errors, metrics))
    write_run_schema(folder / "metrics.schema.json")
    write_json(folder / "metrics.json", metrics)
    return metrics


def _samples(prompts: Sequence[str], references: Tensor | None, seeds: Sequence[int]) -> dict[str, int]:
    count = len(references) if references is not None else 0
    return {"prompts": len(prompts), "references": count, "teacher_seeds": len(seeds)}


def summary(
    quality: Quality,
    cost: Costs,
    params: tuple[int, int],
    velocity_error: float | None,
    velocity_error_undistilled: float | None = None,
) -> dict[str, Any]:
    """Put scores and costs side by side, as ``metrics.json`` holds them; NaN and infinity become None."""
    teacher = {"params": params[0], **quality.teacher[0], **cost.teacher}
    student = {"params": params[1], **quality.student, **cost.student}
    result: dict[str, Any] = finite(
        {
            "fid_reference": quality.fid_reference,
            "memory_measure": cost.memory_measure,
            "speed": {"teacher": _rows(cost.speed[0]), "student": _rows(cost.speed[1])},
            "teacher": teacher,
            "student": student,
            "teacher_spread": spread(quality.teacher),
            "fidelity": {
                **quality.fidelity,
                "velocity_error": velocity_error,
                "velocity_error_undistilled": velocity_error_undistilled,
            },
            **comparison(teacher, student),
        }
    )
    return result


def _rows(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    return [asdict(timing) for timing in timings]


def comparison(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> dict[str, Any]:
    """The student's numbers relative to the teacher's; speed-ups are above 1 where the student is faster."""
    drop, drops = average_drop(teacher, student)
    return {
        "average_drop": drop,
        "average_drop_per_metric": drops,
        "fid_ratio": ratio(student["fid"], teacher["fid"]),
        "param_ratio": ratio(student["params"], teacher["params"]),
        "speedup": ratio(teacher["latency_ms"], student["latency_ms"]),
        "speedup_end_to_end": ratio(teacher["latency_end_to_end_ms"], student["latency_end_to_end_ms"]),
    }
