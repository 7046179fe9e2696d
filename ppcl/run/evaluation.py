"""The evaluate stage of a run: the exported pipeline against the teacher, by the one evaluation that there is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ppcl.capture.states import States
from ppcl.common.files import file_digest
from ppcl.common.tensor_files import weights_variant
from ppcl.eval.command import track
from ppcl.eval.feature_choice import real_reference
from ppcl.eval.judge import TIMES_OF_STREAMED, Entrant, Judge, Side, described
from ppcl.eval.models import with_transformer
from ppcl.eval.results import Comparison, Evaluation, ModelResult, save_evaluation
from ppcl.eval.velocity import in_dtype_of, state_errors
from ppcl.run.session import Session
from ppcl.student.assembly import assemble_student
from ppcl.student.bundle import build_student, load_bundle
from ppcl.student.plan import CompressionPlan
from ppcl.student.substitutes import new_substitutes
from ppcl.teacher.call_arguments import to_device
from ppcl.teacher.calls import velocity
from ppcl.teacher.loading import load_pipeline, on_device, open_pipeline, source_name
from ppcl.teacher.origin import weights_digest
from ppcl.teacher.pipeline_call import own_call
from ppcl.teacher.stored import is_quantised
from ppcl.teacher.streaming import STREAMED, load_streamed

NOT_UNDISTILLED = (
    "the velocity error before distillation is left out: it needs all substitutes in memory (blocks=resident has them)"
)
ROUND_UNDISTILLED = (
    "the velocity error before distillation is left out: of a later round it needs the model of the round before in "
    "memory, too"
)


def evaluate_session(session: Session, student: Any) -> Evaluation:
    """Evaluate ``RUN/pipeline`` against the teacher, of several rounds the first; write ``RUN/eval/metrics.json``.

    Args:
        session: Of a run whose export stage is done.
        student: That pipeline, see :func:`load_student`.
    """
    origin = session.origin
    teacher, folder, settings = origin.teacher, session.out / "pipeline", session.config.evaluate
    is_streamed = origin.blocks == STREAMED
    held_out = States(session.calibration, "held-out")
    count = settings.velocity_states
    extractor = session.extractor
    reference = real_reference(origin.model, extractor)
    judge = Judge(session.out / "eval", session.evaluation_prompts, session.config, extractor, reference)
    judge.note(session.feature_note)
    if is_streamed:
        judge.note(TIMES_OF_STREAMED)
    if is_streamed or session.first:
        judge.note(NOT_UNDISTILLED if is_streamed else ROUND_UNDISTILLED)
    first = judge.side(
        Entrant("teacher", source_name(origin.model), weights_digest(origin.model), lambda: teacher),
        settings.teacher_seeds,
    )
    second = judge.side(Entrant("student", "pipeline", file_digest(folder / "transformer"), lambda: student))
    state = to_device(held_out.alike(settings.batch_size), session.device)  # whose speed is measured
    undistilled = None if is_streamed or session.first else undistilled_error(session, held_out)
    models, comparisons, measure = list[ModelResult](), list[Comparison](), ""
    for side in chain([second], _before_few_steps(session, judge, second)):
        same = in_dtype_of(state, teacher.transformer, side.pipeline.transformer)
        calls = (partial(velocity, teacher.transformer, state), partial(velocity, side.pipeline.transformer, same))
        errors = None
        if not side.own_steps:
            batches = held_out.batches(count, count)
            errors = state_errors(teacher.transformer, side.pipeline.transformer, batches)
        comparison, cost = judge.compare(first, side, errors, calls, undistilled if errors else None)
        comparisons.append(comparison)
        models += [] if models else [described(first, cost.teacher, cost.speed[0])]
        models.append(described(side, cost.student, cost.speed[1]))
        measure = cost.memory_measure
    result = judge.result(models, comparisons, measure)
    save_evaluation(result, session.out / "eval")
    track(session.tracker, result, session.out / "eval", session.evaluation_prompts)
    return result


def _before_few_steps(session: Session, judge: Judge, student: Side) -> Iterator[Side]:
    """The student as it was before few steps were trained: at all steps with guidance, and called as the student is."""
    folder, teacher = session.out / "recovered", session.teacher
    if not student.own_steps:
        return
    if session.blocks == STREAMED:
        judge.note("the student before few steps is left out: it needs the whole teacher (blocks=resident has it)")
        return

    def load(call: dict[str, int | float]) -> Any:
        bundle = load_bundle(folder, teacher.transformer, session.adapter)
        bundle = replace(bundle, plan=replace(bundle.plan, call=call))
        built = build_student(teacher.transformer, session.adapter, bundle)
        return with_transformer(student.pipeline if call else teacher, built)

    for label, call in (("recovered", {}), ("recovered-few", own_call(student.pipeline))):
        yield judge.side(Entrant(label, label, file_digest(folder / "bundle.json"), partial(load, call)))


def load_student(session: Session, folder: Path) -> Any:
    """The exported pipeline; a streamed one has the teacher's text encoders and VAE, whose files are its own."""
    teacher, variant = session.origin.teacher, weights_variant(folder)
    dtype = teacher.transformer.dtype
    if is_quantised(folder):  # no teacher's weights: load_pipeline refuses them
        return on_device(str(folder), open_pipeline(str(folder), session.device, None, variant), session.device)
    if session.origin.blocks == STREAMED:
        return load_streamed(str(folder), session.device, dtype, variant, teacher)
    return load_pipeline(str(folder), session.device, dtype, variant)


def undistilled_error(session: Session, held_out: States) -> float:
    """Velocity error of the same plan with substitutes that were never trained; all of them are in memory at once."""
    plan = session.read(CompressionPlan, "plan.json")
    transformer, count = session.teacher.transformer, session.config.evaluate.velocity_states
    substitutes = new_substitutes(transformer, session.adapter, plan, None, session.out / "analysis.safetensors")
    with torch.no_grad():
        student = assemble_student(transformer, session.adapter, plan, substitutes)
        errors = state_errors(transformer, student, held_out.batches(count, count), session.precision)
    return errors.error.value
