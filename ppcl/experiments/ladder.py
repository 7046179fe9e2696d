"""One bundle, many sizes: substitutes are taken out again and the teacher's blocks put back, without training."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppcl.capture.states import States
from ppcl.common.artifacts import to_jsonable
from ppcl.common.devices import resolve_device
from ppcl.common.files import digest, file_digest, read_json, write_json, write_text
from ppcl.common.tables import INTERVALS, markdown_table, measured, number, provenance, spread
from ppcl.config import ExportConfig
from ppcl.errors import ArtifactError
from ppcl.eval.report import write_report
from ppcl.eval.velocity import state_errors
from ppcl.experiments.compare import Judge, claim
from ppcl.experiments.compare_text import MEASURES
from ppcl.export.pipeline import export
from ppcl.pruning.selection import select_bundle
from ppcl.run import STAGES, Run
from ppcl.run.summary import describe_plan
from ppcl.student.bundle import Bundle, build_student, load_bundle
from ppcl.teacher.families import adapter_for
from ppcl.teacher.flops import count_params
from ppcl.teacher.loading import load_pipeline


def export_size(
    folder: Path, out: Path, kind: str, value: float, device: str = "cpu", settings: ExportConfig | None = None
) -> Bundle:
    """Write a pipeline of another size from a finished run's bundle.

    Args:
        folder: The run directory.
        out: Where the pipeline goes; must not exist.
        kind: ``keep``, ``speedup`` or ``fit_gb``.
        value: The budget.
        device: Where the models are put together.
        settings: How it is written; the defaults if None.

    Returns:
        The plan and the substitutes that were put in.

    Raises:
        ArtifactError: The folder is no run with a bundle, or ``out`` is there already.
        BudgetError: The bundle does not reach the budget.
    """
    if not (folder / "bundle" / "bundle.json").is_file():
        raise ArtifactError(f"{folder} has no bundle; run ppcl distill (or compress) first")
    if out.exists():
        raise ArtifactError(f"{out} is already there; choose another --out or delete it")
    model = str(read_json(folder / "stages.json")["model"])
    pipeline = load_pipeline(model, resolve_device(device))
    adapter = adapter_for(pipeline.transformer)
    chosen = select_bundle(load_bundle(folder / "bundle", pipeline.transformer, adapter), kind, value)
    student = build_student(pipeline.transformer, adapter, chosen)
    export(pipeline, student, chosen.plan, model, out, settings or ExportConfig())  # type: ignore[call-arg]
    return chosen


def measure_ladder(run: Run, keeps: Sequence[float], table: Path | None = None) -> str:
    """Score the bundle of a run at several sizes; resumable.

    Writes ``RUN/ladder/keep-<share>`` (pictures, metrics.json), ``RUN/ladder/table.md|json``, and the report again,
    which then shows the sizes.

    Args:
        run: The run; what comes before its bundle is done first if it is not.
        keeps: Shares of the transformer's parameters, largest first.
        table: A further place for the Markdown table.

    Returns:
        The Markdown text.

    Raises:
        BudgetError: The bundle does not reach a share.
        ArtifactError: The bundle's kept blocks were tuned together with all its substitutes.
    """
    for stage in STAGES[: STAGES.index("distill") + 1]:
        run.run(stage)
    whole = load_bundle(run.out / "bundle", run.teacher.transformer, run.adapter)
    rungs = [(keep, select_bundle(whole, "keep", keep)) for keep in keeps]
    judge = Judge(run)
    teacher = judge.teacher()
    rows = [(keep, rung, _rung(run, judge, rung, keep, teacher)) for keep, rung in rungs]
    text = _write_up(run, teacher, rows)
    data = {
        "teacher": teacher,
        "rungs": [
            {
                "keep": keep,
                "plan": to_jsonable(rung.plan.stacks),
                "predicted": to_jsonable(rung.plan.predicted),
                "metrics": metrics,
            }
            for keep, rung, metrics in rows
        ],
    }
    write_json(run.out / "ladder" / "table.json", data)
    for path in filter(None, (run.out / "ladder" / "table.md", table)):
        write_text(path, text)
    write_report(run.out)
    return text


def _rung(run: Run, judge: Judge, rung: Bundle, keep: float, teacher: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of one size; what is done is kept."""
    folder = run.out / "ladder" / f"keep-{keep:g}"
    weights = digest(file_digest(run.out / "bundle" / "bundle.json"), to_jsonable(rung.plan.stacks))
    evaluated = digest(weights, judge.depends)
    path = folder / "metrics.json"
    if path.is_file() and (known := read_json(path)).get("digest") == evaluated:
        return dict(known)
    claim(folder, {"evaluated": evaluated}, {"evaluated": ("pictures", "metrics.json")})
    student = build_student(run.teacher.transformer, run.adapter, rung)  # as it is exported
    held_out, count = States(run.out / "calibration", "held-out"), judge.settings.velocity_states
    error = state_errors(run.teacher.transformer, student, held_out.batches(count, count)).error
    metrics = {
        "digest": evaluated,
        "params": count_params(student),
        "velocity_error": error.value,
        **judge.student(student, folder, weights, teacher),
    }
    metrics["intervals"]["velocity_error"] = [error.low, error.high]
    write_json(path, metrics)
    return metrics


def _write_up(run: Run, teacher: Mapping[str, Any], rows: Sequence[tuple[float, Bundle, Mapping[str, Any]]]) -> str:
    """The ladder as Markdown."""
    header = ["", "parameters", "share", "speed-up (predicted)", "velocity error, predicted", "measured"]
    header += ["FID", "CLIP score", "retrieval@1", "retrieval@5", "average drop, %"]
    model = rows[0][1].plan.model
    own = [spread([seed[name] for seed in teacher["seeds"]]) for name in MEASURES]
    lines = [["teacher", f"{model.params:,}", "100%", "1.00", "0", "0", *own]]
    for keep, rung, metrics in rows:
        p = rung.plan.predicted
        scores = [measured([metrics], name) for name in ("velocity_error", *MEASURES)]
        size = [f"{metrics['params']:,}", f"{metrics['params'] / model.params:.1%}", f"{p.speedup:.2f}"]
        lines.append([f"keep {keep:g}", *size, number(p.error), *scores])
    drops = [s["average_drop"] for s in teacher["seeds"]]
    noise = statistics.stdev(drops) if len(drops) > 1 and None not in drops else None
    inside = f" The drop of one teacher seed against their mean varies by {number(noise)}." if noise else ""
    plans = "\n".join(f"* keep {keep:g}: {describe_plan(rung.plan)}" for keep, rung, _ in rows)
    reading = (
        f"All sizes are one bundle, trained once: substitutes are put in or left out, nothing is trained again. "
        f"{len(run.evaluation_prompts)} prompts, features: {teacher['features']}, FID against "
        f"{teacher['fid_reference']}; the teacher's row is the mean ± standard deviation over {len(teacher['seeds'])} "
        f"seeds of pictures.{inside} Velocity errors are relative, on held-out states; the predicted one is the root "
        f"of the summed squares of the single substitutes' errors before distillation. {INTERVALS}"
    )
    parts = ["# One bundle, many sizes", markdown_table(header, lines), reading, plans]
    return "\n\n".join([*parts, provenance(run.command, str(run.device))]) + "\n"
