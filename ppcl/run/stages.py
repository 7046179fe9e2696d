"""The stages, and all the glue between them: what each is given of a session, and where its artifacts go.

A stage is a function of artifacts and settings in the room where it belongs; here stands nothing but who gets what.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ppcl.analysis.artifacts import Analysis
from ppcl.common.artifacts import load_artifact, save_artifact
from ppcl.common.files import read_json, share_folder, write_text
from ppcl.common.folders import LEDGER, check_apart
from ppcl.common.tensor_files import StoredTensors
from ppcl.config.sections import PROMPTS
from ppcl.pruning.artifacts import Candidates
from ppcl.run.folder import CHECKPOINTS
from ppcl.run.session import Session
from ppcl.run.stage import ORDER, Stage
from ppcl.student.plan import CompressionPlan

STATES, SWEEP, BUNDLE, PIPELINE, PICTURES = "calibration", "sweep", "bundle", "pipeline", "eval"
RECOVERED = "recovered"  # the bundle before few steps


def _check_quantize(session: Session) -> None:
    from ppcl.errors import UserError
    from ppcl.export.quantised import check_quantize
    from ppcl.teacher.streaming import STREAMED

    kind = session.config.export.quantize
    if kind != "none":
        check_quantize(kind, session.device)
        if session.blocks == STREAMED:
            raise UserError(
                f"export.quantize={kind} has the student in memory whole, and blocks are streamed here; leave it out, "
                "or set blocks=resident"
            )


def _check_capture(session: Session) -> None:
    from ppcl.capture.pictures import check_data
    from ppcl.capture.trajectories import check_teacher
    from ppcl.config.names import BUDGETS
    from ppcl.export.pipeline import check_source
    from ppcl.inspection.blueprint import read_config
    from ppcl.pruning.stock_widths import check_uniform
    from ppcl.run.outlook import check_budget
    from ppcl.run.sources import check_sources

    _check_quantize(session)
    if any(getattr(session.config.plan, name) is not None for name in BUDGETS):
        check_budget(session)
    check_source(session.model, session.component)
    if session.config.plan.uniform_width:
        check_uniform(session.adapter, read_config(session.model, session.component)[0]["_class_name"])
    if session.first:
        return
    settings = session.config.capture
    data = Path(settings.data)
    if settings.data != PROMPTS and data.is_dir() and not (data / "metadata.jsonl").is_file():
        check_apart(session.out, [data])  # or the run's own pictures would be samples
    if settings.sources:
        check_sources(session)
    noised = not session.is_pictured and settings.data != PROMPTS
    check_data(session.teacher, settings, noised or bool(session.config.distill.fresh))
    check_teacher(session.teacher, settings, session.is_pictured, session.is_half)
    _check_few_steps(session)


def _check_few_steps(session: Session) -> None:
    from ppcl.capture.jumps import check_few_steps
    from ppcl.distill.streamed import check_streamed
    from ppcl.teacher.streaming import STREAMED

    few = session.config.distill.few_steps
    if not few.num_inference_steps:
        return
    if session.blocks == STREAMED:
        check_streamed(session.config.distill)
    check_few_steps(session.teacher, session.calibration_prompts, session.config.capture, few)


def _capture(session: Session, _: None) -> None:
    from ppcl.capture.padding import check_padding
    from ppcl.capture.pictures import capture_pictures
    from ppcl.capture.trajectories import capture
    from ppcl.run.sources import draw_sources

    if session.first:
        share_folder(session.first.calibration, session.calibration)
        return
    settings, seed = session.config.capture, session.config.seed
    if settings.sources:
        draw_sources(session)
    if settings.data == PROMPTS or session.is_pictured:
        capture(session.teacher, session.calibration_prompts, session.calibration, settings, seed)
    else:
        capture_pictures(session.teacher, session.calibration, settings, seed, session.evaluation_prompts)
    check_padding(session.transformer, session.adapter, session.calibration)


def _analyze(session: Session, _: None) -> None:
    from dataclasses import replace
    from types import SimpleNamespace

    import torch

    from ppcl.analysis.analyze import analyze
    from ppcl.capture.states import States
    from ppcl.teacher.blocks import StreamedBlocks, loaded_bytes
    from ppcl.teacher.call_arguments import batch_size, to_device
    from ppcl.teacher.calls import velocity
    from ppcl.teacher.description import describe
    from ppcl.teacher.families import check_inferred
    from ppcl.teacher.flops import count_flops
    from ppcl.teacher.origin import weights_digest

    session.agree_on_blocks()
    source = session.open_blocks()
    state = to_device(next(States(session.calibration, "held-out").batches(1)), session.device)
    stacks = {name: list(source.adapter.blocks(source.transformer, spec)) for name, spec in source.stacks.items()}
    with torch.no_grad(), source.whole() as transformer:
        check_inferred(transformer, state, batch_size(state))
        flops = count_flops(transformer, stacks, lambda: velocity(transformer, state), batch_size(state))
    if isinstance(source, StreamedBlocks):  # the other components are not loaded for the sake of their size
        sizes = loaded_bytes(session.model, source.dtype)
        alone = SimpleNamespace(**{session.component: source.transformer}, components={})
        others = sum(sizes.values()) - sizes[session.component]
        model = replace(describe(alone, flops, session.component), other_bytes=others)
    else:
        model = describe(session.teacher, flops, session.component)
    model = replace(model, weights_digest=weights_digest(session.model))
    analyze(
        source,
        model,
        session.calibration,
        session.out,
        session.config.analyze,
        session.config.seed,
        session.config.plan,
        session.depends("analyze"),
        session.group,
    )


def _check_units(session: Session) -> None:
    from ppcl.config.extensions import CRITERIA

    CRITERIA.named(session.config.fit.criterion)


def _fit(session: Session, _: None) -> None:
    from ppcl.distill.fit import fit

    session.agree_on_blocks()
    fit(
        session.open_blocks(),
        session.read(Analysis, "analysis.json"),
        StoredTensors(session.out / "analysis.safetensors"),
        session.calibration,
        session.out,
        session.config.fit,
        session.config.seed,
        lambda row: session.log({"stage": "fit", **row}),
        session.group,
        session.precision,
        session.config.plan,
        session.depends("fit"),
    )


def _choose_plans(session: Session) -> list[CompressionPlan]:
    """The plan, and what else may recover better: a search is the check of its budget, and may take long."""
    from ppcl.common.progress import announce
    from ppcl.pruning.planner import best_plans
    from ppcl.pruning.searches import checked, choose

    settings, context = session.config.plan, session.search_context()
    plans = [choose(settings.mode, context, announce)]
    if settings.recover:
        session.config.recovery(settings.recover_steps)  # settings that do not fit together are refused here
        others = best_plans(context.analysis, context.candidates, settings, settings.recover)
        plans += [p for p in (checked(other, context) for other in others) if p.stacks != plans[0].stacks]
        if len(plans) == 1:
            announce("plan.recover: there is one plan alone under this budget, so none is recovered")
    return plans[: max(1, settings.recover)]


def _plan(session: Session, plans: list[CompressionPlan]) -> None:
    plan = plans[0] if len(plans) == 1 else _recovers_best(session, plans)
    save_artifact(plan, session.out / "plan.json")


def _recovers_best(session: Session, plans: list[CompressionPlan]) -> CompressionPlan:
    """The one of some plans that recovers best, with the teacher's transformer in memory whole."""
    from dataclasses import replace

    from ppcl.capture.states import States
    from ppcl.distill.choice import Choice, Judge
    from ppcl.teacher.pipeline_call import guidance_weight

    settings, adapter = session.config.plan, session.adapter
    scale = guidance_weight(session.teacher, session.config.capture)
    transformer = session.whole_transformer()
    held_out, train = (States(session.calibration, split) for split in ("held-out", "train"))
    choice = Choice(
        transformer,
        adapter,
        session.out,
        session.out / CHECKPOINTS / "plan",
        session.config.recovery,
        settings.recover_steps,
        session.config.seed,
        Judge(transformer, held_out, train, settings.recover_states, scale, session.precision),
        session.precision,
        session.log,
    )
    return replace(choice.of(plans), teacher_forwards=plans[0].teacher_forwards)


def _check_distill(session: Session) -> None:
    from ppcl.distill.trainer import check_plan
    from ppcl.pruning.criteria.weights import weight_criterion_named
    from ppcl.student.bundle import check_fits

    analysis, path = session.read(Analysis, "analysis.json"), session.out / "plan.json"
    plan = session.read(CompressionPlan, "plan.json")
    check_plan(plan, analysis.model, path)
    check_fits(plan, session.model, path)
    _check_few_steps(session)
    if session.config.distill.sparsity.zeros:
        weight_criterion_named(session.config.distill.sparsity.criterion)


def _distill(session: Session, _: None) -> None:
    """With nothing of the pipeline in memory but its transformer, or two blocks of it."""
    from ppcl.teacher.streaming import STREAMED

    session.agree_on_blocks()
    if session.blocks == STREAMED:
        _distill_streamed(session)
    else:
        _distill_resident(session)


def _distill_streamed(session: Session) -> None:
    from ppcl.capture.states import States
    from ppcl.distill.preparation import say_streamed_memory
    from ppcl.distill.streamed import check_streamed, distill_streamed

    settings, precision, group = session.config.distill, session.config.precision, session.group
    check_streamed(settings)
    plan, source = session.read(CompressionPlan, "plan.json"), session.open_blocks()
    say_streamed_memory(source, plan, States(session.calibration, "train"), settings, precision, group)
    common = (session.calibration, session.out, settings, session.config.seed, precision, session.log, group)
    distill_streamed(source, plan, *common)


def _distill_resident(session: Session) -> None:
    """The rest of the pipeline is in memory where pictures are drawn or noised on the way."""
    from ppcl.capture.jumps import capture_jumps
    from ppcl.capture.states import States
    from ppcl.distill.fresh_states import fresh_states
    from ppcl.distill.preparation import say_memory, training_transformer
    from ppcl.distill.trainer import Distiller
    from ppcl.eval.samples import sample_sheet
    from ppcl.teacher.streaming import STREAMED

    settings, group = session.config.distill, session.group
    pipeline = session.teacher if settings.sample_every or settings.fresh else None
    adapter, trajectories = session.adapter, session.out / CHECKPOINTS / "trajectories"
    if settings.few_steps.num_inference_steps:
        given = (session.config.capture, settings.few_steps, session.config.seed)
        group.on_main(lambda: capture_jumps(session.teacher, session.calibration_prompts, trajectories, *given))
    transformer = training_transformer(
        session.release_teacher(),
        session.model,
        session.device,
        settings,
        session.precision,
        group.size,
        session.component,
    )
    if pipeline is not None and session.blocks == STREAMED:
        pipeline.streamed_blocks.attach()  # pictures are still drawn with it
    plan = session.read(CompressionPlan, "plan.json")
    states = States(session.calibration, "train")
    if pipeline is not None and settings.fresh:
        exclude, seed = session.evaluation_prompts, session.config.seed
        states = fresh_states(
            pipeline, session.calibration, session.config.capture, settings.fresh, exclude, seed, group.is_main
        )
    say_memory(transformer, plan, states, settings, session.precision, session.device, group)
    Distiller(
        transformer,
        adapter,
        plan,
        session.calibration,
        session.out,
        settings,
        session.config.seed,
        session.precision,
        session.log,
        group=group,
        device=session.device,
        sample=sample_sheet(pipeline, session.config, session.evaluation_prompts, session.out, session.log, group),
        states=states,
        keep_teacher=False,
        trajectories=trajectories if settings.few_steps.num_inference_steps else None,
    ).run()


def _card(session: Session, folder: Path) -> str:
    """The model card of the run's pipeline as it stands: with its numbers once they are measured."""
    from ppcl.eval.markdown import measured_table
    from ppcl.eval.results import load_evaluation
    from ppcl.export.card import facts_of, model_card

    ledger = read_json(session.out / LEDGER)
    done = [record["command"] for record in ledger.values() if isinstance(record, dict) and "command" in record]
    metrics = session.out / PICTURES / "metrics.json"
    measured = measured_table(load_evaluation(metrics)) if metrics.is_file() else ""
    commands, seed, device = [*done, session.command], session.config.seed, str(session.device)
    facts = facts_of(session.model, folder, commands, seed, device, measured, session.component)
    return model_card(load_artifact(CompressionPlan, session.out / BUNDLE / "plan.json"), facts)


def _build(session: Session) -> Any:
    """What is exported: plan and student; None where the student is never in memory."""
    from ppcl.export.pipeline import check_source
    from ppcl.student.bundle import build_student, check_bundle, check_fits, load_bundle
    from ppcl.teacher.streaming import STREAMED

    bundle = session.out / BUNDLE
    _check_quantize(session)
    check_source(session.model, session.component)
    check_bundle(bundle)
    check_fits(load_artifact(CompressionPlan, bundle / "plan.json"), session.model, bundle / "plan.json")
    if session.blocks == STREAMED:
        return None
    loaded = load_bundle(bundle, session.transformer, session.adapter)
    return loaded.plan, build_student(session.transformer, session.adapter, loaded)


def _quantise(session: Session, plan: CompressionPlan, student: Any) -> Any:
    """The student in the format of ``export.quantize``, what stays in bfloat16 recovered; its record says how exact."""
    from ppcl.common.progress import announce
    from ppcl.distill.recovery import recover
    from ppcl.export.quantised import multiplied_out, put_back, quantised
    from ppcl.student.stored_size import StoredSize
    from ppcl.teacher.block_map import RECORD

    kind, checkpoints, device = session.config.export.quantize, session.out / CHECKPOINTS, session.device
    made = quantised(student, kind, checkpoints, device)
    weights = multiplied_out(made, kind)
    student.to(device=device, dtype=session.dtype)
    places = (session.calibration, checkpoints, session.config, device, session.precision, session.log)
    recovered = recover(student, session.adapter, plan, weights, *places)
    put_back(made, recovered.tensors)
    shown = ", ".join(f"{name} {error:.4g}" for name, error in recovered.errors.items())
    announce(f"{kind}: velocity error on held-out states: {shown}")
    sizes = {"bytes_bf16": 2 * plan.model.params, "bytes": StoredSize(student, session.adapter, kind).of_teacher()}
    session.log({"stage": "quantize", "step": 0, "format": kind, **recovered.errors, **sizes})
    made.register_to_config(**{RECORD: {**made.config[RECORD], "quantised": {"format": kind, **recovered.errors}}})
    return made


def _export(session: Session, built: Any) -> None:
    from ppcl.export.pipeline import export
    from ppcl.export.streamed import export_streamed

    out, settings = session.out / PIPELINE, session.config.export
    beside = session.beside.out / PIPELINE if session.beside else None

    def card(folder: Path) -> str:
        return _card(session, folder)

    if built is None:
        export_streamed(session.open_blocks(), session.out / BUNDLE, session.model, out, settings, card, beside)
        return
    plan, student = built
    if settings.quantize != "none":
        student = _quantise(session, plan, student)
    export(session.teacher, student, plan, session.model, out, settings, card, beside)


def _load_student(session: Session) -> Any:
    from ppcl.run.evaluation import load_student

    _ = session.extractor
    if session.first:
        session.release_teacher()  # the first teacher is compared with
    return load_student(session, session.out / PIPELINE)


def _evaluate(session: Session, student: Any) -> None:
    from ppcl.run.evaluation import evaluate_session

    evaluate_session(session, student)
    write_text(session.out / PIPELINE / "README.md", _card(session, session.out / PIPELINE))


def _report(session: Session, _: None) -> None:
    from ppcl.eval.report import write_report

    write_report(session.out)


_ALL = (
    Stage("capture", "Record the teacher's denoising states.", (STATES,), _capture, _check_capture),
    Stage(
        "analyze",
        "Probes, CKA, intervals, linearity.",
        ("analysis.json", "analysis.safetensors"),
        _analyze,
        inputs={STATES: None},
        on_the_way=(SWEEP,),
        is_shared=True,
    ),
    Stage(
        "fit",
        "Costs of candidate runs.",
        ("candidates.json", "candidates.safetensors", "width.safetensors", "prices.safetensors"),
        _fit,
        _check_units,
        inputs={STATES: None, "analysis.json": Analysis, "analysis.safetensors": None},
        on_the_way=(CHECKPOINTS,),
        is_shared=True,
    ),
    Stage(
        "plan",
        "Choose the runs under the budget.",
        ("plan.json",),
        _plan,
        _choose_plans,
        inputs={"analysis.json": Analysis, "candidates.json": Candidates},
        on_the_way=(CHECKPOINTS,),
    ),
    Stage(
        "distill",
        "Train the substitutes.",
        (BUNDLE,),
        _distill,
        _check_distill,
        inputs={
            STATES: None,
            "plan.json": CompressionPlan,
            "candidates.safetensors": None,
            "width.safetensors": None,
        },
        on_the_way=(CHECKPOINTS, "samples", RECOVERED),
        is_shared=True,
    ),
    Stage(
        "export",
        "Write the pipeline.",
        (PIPELINE,),
        _export,
        _build,
        inputs={BUNDLE: None},
        on_the_way=(CHECKPOINTS,),
    ),
    Stage(
        "evaluate",
        "Pictures and numbers.",
        (PICTURES,),
        _evaluate,
        _load_student,
        inputs={STATES: None, "plan.json": CompressionPlan, PIPELINE: None},
    ),
    Stage("report", "The report, as a page and as Markdown.", ("report.html", "report.md"), _report),
)
STAGES: dict[str, Stage] = {stage.name: stage for stage in _ALL}
assert tuple(STAGES) == ORDER
