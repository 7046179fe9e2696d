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
from ppcl.common.files import digest, file_digest
from ppcl.common.tensor_files import weights_variant
from ppcl.eval.command import track
from ppcl.eval.feature_choice import drawn_before, real_reference
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
from ppcl.teacher.flops import count_params
from ppcl.teacher.loading import load_pipeline, on_device, open_pipeline, source_name
from ppcl.teacher.origin import weights_digest
from ppcl.teacher.pipeline_call import other_transformers, own_call
from ppcl.teacher.stored import is_quantised, transformers_in
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
    drawn, prompts = drawn_before(origin.model), session.evaluation_prompts
    judge = Judge(session.out / "eval", prompts, session.config, extractor, reference, drawn=drawn)
    judge.note(session.feature_note)
    if is_streamed:
        judge.note(TIMES_OF_STREAMED)
    if is_streamed or session.first:
        judge.note(NOT_UNDISTILLED if is_streamed else ROUND_UNDISTILLED)
    first = judge.side(
        Entrant("teacher", source_name(origin.model), weights_digest(origin.model), lambda: teacher),
        settings.teacher_seeds,
    )
    weights = [file_digest(folder / name) for name in transformers_in(folder)]
    identity = weights[0] if len(weights) == 1 else digest(weights)
    second = judge.side(Entrant("student", "pipeline", identity, lambda: student))
    one = getattr(teacher, session.component)
    _note_others(session, judge, teacher, student)
    state = to_device(held_out.alike(settings.batch_size), session.device)  # whose speed is measured
    undistilled = None if is_streamed or session.first else undistilled_error(session, held_out)
    models, comparisons, measure = list[ModelResult](), list[Comparison](), ""
    for side in chain([second], _before_few_steps(session, judge, second)):
        two = getattr(side.pipeline, session.component)
        calls = (partial(velocity, one, state), partial(velocity, two, in_dtype_of(state, one, two)))
        errors = None
        if not side.own_steps:
            errors = state_errors(one, two, held_out.batches(count, count))
        comparison, cost = judge.compare(first, side, errors, calls, undistilled if errors else None)
        comparisons.append(comparison)
        models += [] if models else [described(first, cost.teacher, cost.speed[0])]
        models.append(described(side, cost.student, cost.speed[1]))
        measure = cost.memory_measure
    result = judge.result(models, comparisons, measure)
    save_evaluation(result, session.out / "eval")
    track(session.tracker, result, session.out / "eval", prompts)
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
        bundle = load_bundle(folder, session.transformer, session.adapter)
        bundle = replace(bundle, plan=replace(bundle.plan, call=call))
        built = build_student(session.transformer, session.adapter, bundle)
        return with_transformer(student.pipeline if call else teacher, built, session.component)

    for label, call in (("recovered", {}), ("recovered-few", own_call(student.pipeline))):
        yield judge.side(Entrant(label, label, file_digest(folder / "bundle.json"), partial(load, call)))


def load_student(session: Session, folder: Path) -> Any:
    """The exported pipeline; a streamed one has the teacher's text encoders and VAE, whose files are its own."""
    teacher, variant = session.origin.teacher, weights_variant(folder)
    dtype = getattr(teacher, session.component).dtype
    if is_quantised(folder):  # no teacher's weights: load_pipeline refuses them
        return on_device(str(folder), open_pipeline(str(folder), session.device, None, variant), session.device)
    if session.origin.blocks == STREAMED:
        beside = None if session.beside else teacher  # whose other transformer is compressed, too
        return load_streamed(str(folder), session.device, dtype, variant, beside, session.component)
    return load_pipeline(str(folder), session.device, dtype, variant, session.component)


def _note_others(session: Session, judge: Judge, teacher: Any, student: Any) -> None:
    """Say of a pipeline with two transformers whose numbers these are, and what both come to."""
    names = [session.component, *other_transformers(teacher, session.component)]
    if len(names) == 1:
        return
    before, after = (sum(count_params(getattr(p, name)) for name in names) for p in (teacher, student))
    judge.note(
        f"numbers of a transformer are those of {names[0]}; with {' and '.join(names[1:])} it keeps "
        f"{after / before:.1%} of the parameters, {after:,} of {before:,}"
    )
    if session.beside:
        count, other = session.config.evaluate.velocity_states, session.beside.component
        states = States(session.beside.calibration, "held-out").batches(count, count)
        error = state_errors(getattr(teacher, other), getattr(student, other), states).error
        judge.note(f"velocity error of {other}: {error.value:.4g} ({error.low:.4g} to {error.high:.4g})")


def undistilled_error(session: Session, held_out: States) -> float:
    """Velocity error of the same plan with substitutes that were never trained; all of them are in memory at once."""
    plan = session.read(CompressionPlan, "plan.json")
    transformer, count = session.transformer, session.config.evaluate.velocity_states
    substitutes = new_substitutes(transformer, session.adapter, plan, None, session.out / "analysis.safetensors")
    with torch.no_grad():
        student = assemble_student(transformer, session.adapter, plan, substitutes)
        errors = state_errors(transformer, student, held_out.batches(count, count), session.precision)
    return errors.error.value
