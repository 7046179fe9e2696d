"""The evaluate stage of a run: the exported pipeline against the teacher."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ppcl.capture.states import States
from ppcl.capture.trajectories import guidance_arguments, velocity_error
from ppcl.common.files import file_digest, weights_variant, write_json
from ppcl.eval.evaluate import evaluate
from ppcl.eval.feature_choice import DEFAULT_FEATURES, references_for
from ppcl.eval.run_metrics import HEADER, table_rows
from ppcl.eval.velocity import state_errors
from ppcl.pruning.sparsity import zeros_of
from ppcl.run.session import Session
from ppcl.student.assembly import assemble_student
from ppcl.student.plan import CompressionPlan
from ppcl.student.substitutes import new_substitutes
from ppcl.teacher.call_arguments import to_device
from ppcl.teacher.calls import velocity
from ppcl.teacher.flops import count_params
from ppcl.teacher.loading import load_pipeline, weights_digest

logger = logging.getLogger(__name__)


def evaluate_session(run: Session) -> dict[str, Any]:
    """Evaluate ``RUN/pipeline`` against the teacher; write ``RUN/eval/metrics.json``."""
    teacher = run.teacher
    variant = weights_variant(run.out / "pipeline")
    student = load_pipeline(str(run.out / "pipeline"), run.device, teacher.transformer.dtype, variant)
    held_out = States(run.out / "calibration", "held-out")
    settings = run.config.evaluate
    count = settings.velocity_states
    errors = state_errors(teacher.transformer, student.transformer, held_out.batches(count, count))
    one = to_device(next(held_out.batches(settings.batch_size, settings.batch_size)), run.device)
    metrics = evaluate(
        teacher,
        student,
        prompts=run.evaluation_prompts,
        folder=run.out / "eval",
        settings=settings,
        call_kwargs=guidance_arguments(teacher, run.config.capture),
        references=references_for(run.model),
        extractor=run.extractor,
        velocity_error=errors.error.value,
        state_errors=errors,
        velocity_error_undistilled=undistilled_error(run, held_out),
        transformer_calls=(lambda: velocity(teacher.transformer, one), lambda: velocity(student.transformer, one)),
        seed=run.config.seed,
        params=(count_params(teacher.transformer), count_params(student.transformer)),
        models=(weights_digest(run.model), file_digest(Path(run.out / "pipeline" / "transformer"))),
        notes=_feature_notes(run),
    )
    if sparsity := zeros_of(student.transformer):
        metrics["sparsity"] = sparsity
        write_json(run.out / "eval" / "metrics.json", metrics)
    _mirror(run, metrics)
    return metrics


def _mirror(run: Session, metrics: dict[str, Any]) -> None:
    """Send table, pictures and the main numbers to wandb, if asked."""
    folder = f"seed-{run.config.seed}"
    pictures = {
        side: list(
            zip(run.evaluation_prompts, sorted((run.out / "eval" / side / folder).glob("[0-9]*.png")), strict=False)
        )
        for side in ("teacher", "student")
    }
    names = ("average_drop", "fid_ratio", "param_ratio", "speedup", "speedup_end_to_end")
    numbers = {name: metrics[name] for name in names} | {f"student/{k}": v for k, v in metrics["student"].items()}
    numbers["velocity_error"] = metrics["fidelity"]["velocity_error"]
    run.tracker.evaluation(HEADER, table_rows(metrics), numbers, pictures)


def _feature_notes(run: Session) -> list[str]:
    """Say so in the numbers, too, if another network than the usual one had to do."""
    if run.config.evaluate.features == "auto" and run.model != "emoji" and run.extractor.name == "emoji":
        return [
            f"the weights of {DEFAULT_FEATURES} can be neither found nor downloaded: the embedded emoji evaluator is "
            "used instead, which knows emoji alone"
        ]
    return []


def undistilled_error(run: Session, held_out: States) -> float:
    """Velocity error of the same plan with substitutes that were never trained."""
    plan = run.read(CompressionPlan, "plan.json")
    transformer, count = run.teacher.transformer, run.config.evaluate.velocity_states
    substitutes = new_substitutes(transformer, run.adapter, plan, None, run.out / "analysis.safetensors")
    with torch.no_grad():
        student = assemble_student(transformer, run.adapter, plan, substitutes)
        return velocity_error(transformer, student, held_out.batches(count, count), run.config.precision)
