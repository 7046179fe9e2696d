"""The evaluate stage of a run: the exported pipeline against the teacher."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppcl.capture.states import States
from ppcl.capture.trajectories import guidance_arguments, velocity_error
from ppcl.common.files import file_digest, weights_variant, write_json, write_text
from ppcl.errors import UserError
from ppcl.eval.evaluate import evaluate
from ppcl.eval.features import FeatureExtractor, load_extractor
from ppcl.eval.run_metrics import HEADER, table_rows
from ppcl.eval.velocity import state_errors
from ppcl.export.card import run_card
from ppcl.pruning.sparsity import zeros_of
from ppcl.student.assembly import assemble_student
from ppcl.student.plan import CompressionPlan
from ppcl.student.substitutes import new_substitutes
from ppcl.teacher.call_arguments import to_device
from ppcl.teacher.calls import velocity
from ppcl.teacher.flops import count_params
from ppcl.teacher.loading import load_pipeline, weights_digest

if TYPE_CHECKING:
    from ppcl.run.stages import Run

logger = logging.getLogger(__name__)

DEFAULT_FEATURES = "ViT-B-32/openai"


def choose_extractor(model: str, features: str, device: str) -> FeatureExtractor:
    """Load the feature extractor: the embedded one for the embedded model, ViT-B-32 otherwise."""
    extractor, note = extractor_with_note(model, features, device)
    if note:
        logger.warning("%s", note)
    return extractor


def extractor_with_note(model: str, features: str, device: str) -> tuple[FeatureExtractor, str | None]:
    """Load the feature extractor, and say what was used instead of what, if its weights are out of reach."""
    if features != "auto":
        return load_extractor(features, device), None
    if model == "emoji":
        return load_extractor("emoji", device), None
    try:
        return load_extractor(DEFAULT_FEATURES, device), None
    except UserError as error:
        note = f"{error}; the embedded emoji evaluator is used instead, which knows emoji alone"
        return load_extractor("emoji", device), note


def references_for(model: str) -> Tensor | None:
    """Real pictures behind FID: all of the embedded data set for the embedded model, (N, 3, H, W) uint8."""
    if model != "emoji":
        return None
    from ppcl.emoji.data import load_pairs, load_pictures

    return torch.from_numpy(load_pictures(load_pairs())).permute(0, 3, 1, 2).contiguous()


def evaluate_run(run: Run) -> dict[str, Any]:
    """Evaluate ``RUN/pipeline`` against the teacher; write ``RUN/eval/metrics.json`` and the model card's numbers."""
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
    write_text(run.out / "pipeline" / "README.md", run_card(run, run.out / "pipeline"))
    _mirror(run, metrics)
    return metrics


def _mirror(run: Run, metrics: dict[str, Any]) -> None:
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


def _feature_notes(run: Run) -> list[str]:
    """Say so in the numbers, too, if another network than the usual one had to do."""
    if run.config.evaluate.features == "auto" and run.model != "emoji" and run.extractor.name == "emoji":
        return [
            f"the weights of {DEFAULT_FEATURES} can be neither found nor downloaded: the embedded emoji evaluator is "
            "used instead, which knows emoji alone"
        ]
    return []


def undistilled_error(run: Run, held_out: States) -> float:
    """Velocity error of the same plan with substitutes that were never trained."""
    plan = run.read(CompressionPlan, "plan.json")
    transformer, count = run.teacher.transformer, run.config.evaluate.velocity_states
    substitutes = new_substitutes(transformer, run.adapter, plan, None, run.out / "analysis.safetensors")
    with torch.no_grad():
        student = assemble_student(transformer, run.adapter, plan, substitutes)
        return velocity_error(transformer, student, held_out.batches(count, count), run.config.precision)
