"""One bundle, many sizes: substitutes are taken out again and the teacher's blocks put back, without training."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppcl.common.artifacts import to_jsonable
from ppcl.common.devices import resolve_device
from ppcl.common.files import digest, file_digest
from ppcl.common.folders import check_apart
from ppcl.config import ExportConfig
from ppcl.config.names import TRANSFORMER
from ppcl.errors import ArtifactError, ConfigError
from ppcl.eval.report import write_report
from ppcl.experiments.noise import READING, is_alike, without_items
from ppcl.experiments.runner import MEASURES, RowRunner
from ppcl.experiments.tables import finish, measured_with, row_cells, table, teacher_cells
from ppcl.export.pipeline import check_source, export
from ppcl.export.quantised import check_quantize, quantised
from ppcl.pruning.selection import select_bundle
from ppcl.run import Session
from ppcl.run.summary import describe_plan
from ppcl.student.bundle import Bundle, build_student, check_teacher, load_bundle, read_plan
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.families import adapter_for
from ppcl.teacher.loading import load_pipeline, model_path
from ppcl.teacher.origin import teacher_of

logger = logging.getLogger(__name__)

COLUMNS = ("params", "share", "speedup", "predicted", "velocity_error", *MEASURES)


def export_size(
    folder: Path,
    out: Path,
    kind: str,
    value: float,
    device: str = "cpu",
    settings: ExportConfig | None = None,
    teacher: str | None = None,
) -> Bundle:
    """Write a pipeline of another size from a finished run's bundle.

    Args:
        folder: The run directory.
        out: Where the pipeline goes; must not exist.
        kind: ``keep``, ``speedup`` or ``fit_gb``.
        value: The budget.
        device: Where the models are put together.
        settings: How it is written; the defaults if None.
        teacher: Where the teacher is, if it or the run was moved.

    Returns:
        The plan and the substitutes that were put in.

    Raises:
        ArtifactError: The folder is no run with a bundle, or ``out`` is there already, or lies in what is read.
        BudgetError: The bundle does not reach the budget.
        ConfigError: The settings are not for the transformer of that run.
    """
    if not (folder / "bundle" / "bundle.json").is_file():
        raise ArtifactError(f"{folder} has no bundle; run ppcl distill (or compress) first")
    settings = settings or ExportConfig()  # type: ignore[call-arg]
    check_quantize(settings.quantize, resolve_device(device))
    if out.exists():
        raise ArtifactError(f"{out} is already there; choose another --out or delete it")
    model = teacher_of(folder, teacher)
    check_apart(out, filter(Path.is_dir, [Path(model_path(model))]))
    plan = read_plan(folder / "bundle")
    component = plan.model.component
    if component != TRANSFORMER and settings.quantize != "none":
        raise ConfigError(
            f"export.quantize={settings.quantize}: known of {TRANSFORMER!r} alone, not of {component} of {folder}; "
            "leave it out"
        )
    check_source(model, component)
    check_teacher(plan, model, folder / "bundle")
    pipeline = load_pipeline(model, resolve_device(device), component=component)
    transformer = getattr(pipeline, component)
    adapter = adapter_for(transformer)
    sized = select_bundle(load_bundle(folder / "bundle", transformer, adapter), kind, value)
    student = build_student(transformer, adapter, sized)
    if settings.quantize != "none":
        logger.warning(
            "export.quantize=%s: a size of a bundle is not recovered; ppcl export of a run is", settings.quantize
        )
        student = quantised(student, settings.quantize, out.parent, resolve_device(device))
    other = folder / TRANSFORMER / "pipeline"  # of a run of both transformers
    beside = other if component != TRANSFORMER and other.is_dir() else None
    export(pipeline, student, sized.plan, model, out, settings, beside=beside)
    return sized


def measure_ladder(session: Session, keeps: Sequence[float], place: Path | None = None) -> str:
    """Score the bundle of a run at several sizes; resumable.

    Writes ``RUN/compare/ladder/keep-<share>`` (pictures, metrics.json), ``RUN/compare/ladder.md|json``, and the report
    again, which then shows the sizes.

    Args:
        session: Of a run whose distill stage is done.
        keeps: Shares of the transformer's parameters, largest first.
        place: A further place for the Markdown table.

    Returns:
        The Markdown text.

    Raises:
        BudgetError: The bundle does not reach a share.
        ArtifactError: The bundle's kept blocks were tuned together with all its substitutes.
    """
    session.keep_whole()
    whole = load_bundle(session.out / "bundle", session.transformer, session.adapter)
    rungs = [(keep, select_bundle(whole, "keep", keep)) for keep in keeps]
    runner = RowRunner(session)
    of_whole = file_digest(session.out / "bundle" / "bundle.json")
    rows = []
    for keep, rung in rungs:
        weights = digest(of_whole, to_jsonable(rung.plan.stacks))

        def make(rung: Bundle = rung) -> tuple[Any, dict[str, Any]]:
            return build_student(session.transformer, session.adapter, rung), {}  # as it is exported

        rows.append(
            (keep, rung.plan, runner.measured(f"ladder/keep-{keep:g}", {"bundle": weights}, {"bundle": ()}, make))
        )
    data = {"teacher": runner.summary(), "rungs": [_rung_as_json(*row) for row in rows]}
    text = finish(session, "ladder", _paragraphs(runner, rows), data, place)
    write_report(session.out)
    return text


def _rung_as_json(keep: float, plan: CompressionPlan, metrics: Mapping[str, Any]) -> dict[str, Any]:
    stacks, predicted = to_jsonable(plan.stacks), to_jsonable(plan.predicted)
    return {"keep": keep, "plan": stacks, "predicted": predicted, "metrics": without_items([metrics])[0]}


def _paragraphs(runner: RowRunner, rows: Sequence[tuple[float, CompressionPlan, Mapping[str, Any]]]) -> list[str]:
    """The ladder in words."""
    lines = {"teacher": teacher_cells(rows[0][1].model.params, runner.teacher_scores)}
    larger: Mapping[str, Any] | None = None
    for keep, plan, metrics in rows:
        cells = row_cells(plan, [metrics])
        cells["average_drop"] += " ~" if larger and is_alike([larger], [metrics], "average_drop") else ""
        lines[f"keep {keep:g}"], larger = cells, metrics
    plans = "\n".join(f"* keep {keep:g}: {describe_plan(plan)}" for keep, plan, _ in rows)
    reading = (
        f"All sizes are one bundle, trained once: substitutes are put in or left out, nothing is trained again. "
        f"{measured_with(runner)} The predicted error is that of the substitutes in it together, by how each moves the "
        f"velocity, before distillation. {READING} `~`: the drop cannot be told apart from that of the size above."
    )
    return ["# One bundle, many sizes", table(COLUMNS, lines), reading, plans]
