"""The page's other sections: headline, pictures, training, cost, how it was measured and run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from ppcl.common.outside import inside
from ppcl.common.tables import zeros_meaning
from ppcl.common.tensor_files import weights_variant
from ppcl.config.names import STAGES
from ppcl.eval import figures
from ppcl.eval.report_blocks import strip_of
from ppcl.eval.report_data import RunData, pick
from ppcl.eval.report_gallery import MAX_MEASURED, NUM_TRIPLES, Card, extremes, gallery, lay_out
from ppcl.eval.report_html import (
    TIMES,
    Chart,
    count,
    duration,
    number,
    percent,
    render,
    size_bytes,
)
from ppcl.eval.report_numbers import speed_table
from ppcl.eval.report_pictures import MAX_PAIRS, Pair, prompts_of, seed_folders, spread
from ppcl.eval.results import Evaluation
from ppcl.student.plan import Segment
from ppcl.teacher.stored import has_own_class, is_quantised

MAX_PICTURES = 256  # in the gallery: many models show fewer prompts


def headline_sentence(run: RunData) -> str:
    """The result in one plain sentence, with what is known so far."""
    row, predicted, parts = run.comparison, run.plan.predicted if run.plan else None, []
    ratio = row.param_ratio if row else predicted.param_ratio if predicted else None
    if ratio is not None:
        parts.append(f"{percent(ratio, 0)} of the parameters")
    if row and row.num_inference_steps:
        steps = f"{row.num_inference_steps} steps without guidance"
        parts.append(f"whole pictures {number(row.speedup_end_to_end)} times as fast in {steps}")
    elif row and row.speedup is not None:
        parts.append(f"{number(row.speedup)} times as fast")
    elif predicted:
        parts.append(f"about {number(predicted.speedup)} times as fast (predicted)")
    if row and row.average_drop is not None:
        parts.append(f"average drop {number(row.average_drop.value, 2)}%")
    sentence = ", ".join(parts)
    if not sentence:
        return "Nothing has been measured in this run yet"
    return sentence if row else f"Planned, not measured yet: {sentence}"


def _tiles(run: RunData) -> list[tuple[str, ...]]:
    """The main numbers, measured and predicted: name, value, lines below."""
    row, predicted = run.comparison, run.plan.predicted if run.plan else None
    of_given = predicted if not run.is_against_first else None  # what is predicted of speed and error
    tiles: list[tuple[str, ...]] = []
    before, after = (model.params for model in run.evaluation.models[:2]) if run.evaluation and row else (None, None)
    before = before or (run.plan.model.params if run.plan else None)
    after = after or (predicted.params if predicted else None)
    if before and after:
        planned = f"predicted {percent(predicted.params / before)}" if predicted else ""
        change = f"{count(before)} \N{RIGHTWARDS ARROW} {count(after)}"
        tiles.append(("Parameters", percent(after / before), change, planned))
    if predicted or (row and row.speedup is not None):
        planned = f"predicted {number(of_given.speedup)}{TIMES}" if of_given else ""
        whole = row.speedup_end_to_end if row else None
        end = f"{number(whole)}{TIMES} end to end" if whole is not None else ""
        shown = f"{number(row.speedup)}{TIMES}" if row and row.speedup is not None else "not measured"
        tiles.append(("Transformer speed", shown, end, planned))
    error = row.fidelity.get("velocity_error") if row else None
    if error is not None or (predicted and predicted.error is not None):
        planned = f"predicted {number(of_given.error)} before distillation" if of_given and of_given.error else ""
        undistilled = row.scale.get("velocity_error") if row else None
        start = f"{number(undistilled)} before distillation" if undistilled is not None else ""
        tiles.append(("Velocity error", number(error.value) if error else "not measured", start, planned))
    if row and row.average_drop is not None:
        ratios = (("FID", row.fid_ratio), ("diversity", row.diversity_ratio))
        against = [f"{name} {number(ratio.value)}{TIMES}" for name, ratio in ratios if ratio]
        beside = f"{', '.join(against)} the teacher's" if against else ""
        shown = f"{number(row.average_drop.value, 2)}%"
        tiles.append(("Average drop", shown, "mean of CLIP score, retrieval at 1 and 5", beside))
    return tiles


def load_lines(run: RunData) -> str:
    """The Python that loads the result; importing ppcl.pipelines is needed only where widths changed."""
    lines, folder = ["from diffusers import DiffusionPipeline"], run.folder / "pipeline"
    remote = any(folder.glob("*/transformer_ppcl.py"))
    if has_own_class(folder) and not remote:
        lines.append("import ppcl.pipelines  # registers the classes with narrower blocks")
    path = json.dumps(folder.as_posix(), ensure_ascii=False)
    variant = weights_variant(folder)
    named = f', variant="{variant}"' if variant else ""
    if is_quantised(folder):
        lines.insert(0, "import torch")
        named += ", dtype=torch.bfloat16"
    named += ", trust_remote_code=True" if remote else ""
    lines += [f"pipe = DiffusionPipeline.from_pretrained({path}{named})"]
    return "\n".join(lines)


def headline(run: RunData) -> Markup:
    """Title and main numbers; of a run with the line that loads the result, of an evaluation with its verdicts."""
    if not run.is_run and run.evaluation:
        verdicts = [row.verdict for row in run.evaluation.comparisons if row.verdict]
        return render(
            "headline.html",
            kicker="ppcl evaluation",
            title=title_of(run.evaluation),
            verdicts=verdicts,
            tiles=(),
            load="",
        )
    model = run.config.get("model") or (run.plan.model.transformer_class if run.plan else "")
    exported = (run.folder / "pipeline" / "model_index.json").is_file()
    return render(
        "headline.html",
        kicker=f"ppcl compression report{' of ' + str(model) if model else ''}",
        title=headline_sentence(run),
        verdicts=(),
        tiles=_tiles(run),
        load=load_lines(run),
        missing="" if exported else run.missing("pipeline"),
    )


def title_of(result: Evaluation) -> str:
    """Which models are compared with which."""
    first, *others = [model.label for model in result.models]
    return f"{', '.join(others)} against {first}" if others else first


def _labels(run: RunData) -> list[str]:
    """The models whose pictures are shown; of a run that is not evaluated yet those that have drawn."""
    if run.evaluation:
        return [model.label for model in run.evaluation.models]
    return [label for label in ("teacher", "student") if (run.pictures / label).is_dir()]


def _drawn(run: RunData, labels: list[str]) -> tuple[dict[str, dict[str, Path]], dict[str, Path]]:
    """Pictures of each model by file name, all of one seed; and the first model's of its next seed."""
    places = {label: inside(run.pictures, label, "metrics.json") for label in labels}
    folders = {label: {path.name: path for path in seed_folders(place)} for label, place in places.items()}
    shared = [seed for seed in folders[labels[0]] if all(seed in seeds for seeds in folders.values())]
    if not shared:
        return {label: {} for label in labels}, {}

    def of(folder: Path) -> dict[str, Path]:
        return {path.name: path for path in sorted(folder.glob("[0-9]*.png"))}

    other = next((path for seed, path in folders[labels[0]].items() if seed != shared[0]), None)
    return {label: of(folders[label][shared[0]]) for label in labels}, of(other) if other else {}


def pictures_section(run: RunData) -> Markup:
    """All models side by side, the least and most alike pairs of each with the first, and another seed for scale."""
    labels = _labels(run)
    files, other = _drawn(run, labels) if labels else ({}, {})
    names = [name for name in files[labels[0]] if all(name in drawn for drawn in files.values())] if labels else []
    if not names:
        why = run.missing("eval") if run.is_run else f"There are no pictures of all models in {run.pictures}."
        return render("pictures.html", missing=why)
    prompts = prompts_of(files[labels[0]][names[0]].parent)

    def prompt(name: str) -> str:
        index = int(Path(name).stem)
        return prompts[index] if index < len(prompts) else f"picture {index}"

    shown = spread(names, max(1, min(MAX_PAIRS, MAX_PICTURES // len(labels))))
    cards = [Card(prompt(name), tuple((label, files[label][name]) for label in labels)) for name in shown]
    triples = [
        Card(card.prompt, (*card.shots, (f"{labels[0]}, other seed", other[name])))
        for card, name in zip(cards, shown, strict=True)
        if name in other
    ][:NUM_TRIPLES]
    tried = spread(names, MAX_MEASURED)
    extremes_of = [
        extremes([Pair(prompt(n), files[labels[0]][n], files[label][n]) for n in tried], (labels[0], label))
        for label in labels[1:]
    ]
    whole, scale, *rest = lay_out([cards, triples, *(cards for both in extremes_of for cards in both)])
    return render(
        "pictures.html",
        labels=labels,
        gallery=gallery(whole, "triples" if len(labels) > 2 else ""),
        unreadable=len(cards) - len(whole),
        extremes=list(zip(labels[1:], rest[::2], rest[1::2], strict=True)),
        tried=len(tried),
        scale=scale,
    )


STAGE_NAMES = {
    "fit": "Fitting candidate runs",
    "distill.local": "Distillation 1: substitutes one by one",
    "distill.carried": "Distillation: substitutes on the student's own states",
    "distill.alternating": "Distillation 2: hybrids of teacher and substitutes",
    "distill.output": "Distillation 3: the whole student",
    "distill.recovery": "Recovery of what is not quantised",
}


def training_section(run: RunData) -> Markup:
    """Loss curves by stage."""
    order = [*STAGE_NAMES, *(stage for stage in run.log if stage not in STAGE_NAMES)]
    charts = []
    for stage in order:
        points = figures.loss_points(run.log.get(stage, []))
        if len(points) < 2:
            continue
        steps = len(run.log[stage])
        guide = (
            f"How to read: pale the loss of each of {steps} steps, dark its running median, on a logarithmic "
            "scale; lower is closer to the teacher."
        )
        charts.append(Chart(STAGE_NAMES.get(stage, stage), figures.loss_curve(stage, points), guide))
    return render("training.html", charts=charts, missing=run.missing("log.jsonl"))


MEMORY = {
    "cuda": "what torch allocated on the GPU while drawing",
    "resident": "the growth of the process while drawing (no GPU was used), a rough figure",
}


def _ratio(before: float | None, after: float | None) -> str:
    return percent(after / before) if before and after is not None else number(None)


def _cost_rows(run: RunData) -> list[list[str]]:
    """What two models cost, and what was predicted."""
    plan, rows = run.plan, []
    models = run.evaluation.models[:2] if run.evaluation and len(run.evaluation.models) > 1 else []

    def row(name: str, key: str, show: Callable[[float | None], str], predicted: str = number(None)) -> None:
        values = [float(model.params) if key == "params" else model.costs.get(key) for model in models]
        if any(value is not None for value in values):
            rows.append([name, *map(show, values), _ratio(*values), predicted])

    of_given = plan is not None and not run.is_against_first
    faster = percent(1 / plan.predicted.speedup) if plan and of_given else number(None)
    share = (plan.predicted.param_ratio if of_given else plan.share_of_first) if plan else None
    row("Parameters of the transformer", "params", count, percent(share))
    row("FLOPs of a call for one prompt", "flops", count)
    if plan and plan.model.flops and not (models and models[1].costs.get("flops") is not None):
        student = f"{count(plan.model.flops / plan.predicted.speedup)} (predicted)"
        rows.append(["FLOPs a transformer call", count(plan.model.flops), student, number(None), faster])
    if plan and of_given:
        whole = plan.model.params * plan.model.bytes_per_param + plan.model.other_bytes
        shown = f"{size_bytes(plan.predicted.bytes)} (predicted)"
        kept = _ratio(whole, plan.predicted.bytes)
        rows.append(["Weights of the whole pipeline", size_bytes(whole), shown, number(None), kept])
    rows += _quantised_rows(run)
    row("Transformer call, ms", "latency_ms", number, faster)
    row("End to end, ms", "latency_end_to_end_ms", number)
    row("Peak memory", "peak_memory_bytes", size_bytes)
    if models and models[1].zeros:
        shown = f"{percent(pick(models[1].zeros, 'zeros'))} ({models[1].zeros.get('pattern')})"
        rows.append(["Weights that are zero", number(None), shown, number(None), number(None)])
    return rows


def _quantised_rows(run: RunData) -> list[list[str]]:
    """What a format takes and costs: bytes, and the error before and after quantising and recovery."""
    made = (run.log.get("quantize") or [{}])[-1]
    settings = run.config.get("config")
    export = settings.get("export") if isinstance(settings, dict) else None
    kind = export.get("quantize", "none") if isinstance(export, dict) else "none"
    if kind == "none" or made.get("format") != kind:
        return []
    none = number(None)
    whole, left = pick(made, "bytes_bf16"), pick(made, "bytes")
    rows = [["Weights of the transformer, in bfloat16 and as stored", size_bytes(whole), size_bytes(left)]]
    rows += [
        [f"Velocity error on held-out states, {words}", none, number(error)]
        for key, words in (
            ("distilled", "in bfloat16"),
            ("quantised", f"in {kind} before recovery"),
            ("recovered", f"in {kind} after recovery"),
        )
        if (error := pick(made, key)) is not None
    ]
    return [[*cells, _ratio(whole, left) if number_of == 0 else none, none] for number_of, cells in enumerate(rows)]


def cost_section(run: RunData) -> Markup:
    """Size, speed and memory of the models, and the time every stage of a run took."""
    result, longest = run.evaluation, max(max(run.seconds.values(), default=0), 1e-9)
    zeros = result.models[1].zeros if result and len(result.models) > 1 else None
    stages = sorted(run.seconds.items(), key=lambda item: _place(item[0]))
    return render(
        "cost.html",
        rows=_cost_rows(run),
        memory=MEMORY.get(result.memory_measure if result else "", "as evaluate measured it"),
        zeros=zeros_meaning(str(zeros.get("pattern"))) if zeros else "",
        missing="" if result else run.missing("eval/metrics.json"),
        speed=speed_table([m.label for m in result.models], [m.speed for m in result.models]) if result else "",
        stages=[(name, f"{100 * s / longest:.1f}", duration(s)) for name, s in stages] if run.is_run else None,
        in_all=duration(sum(run.seconds.values())),
        no_stages=run.missing("stages.json"),
    )


def strips_section(result: Evaluation) -> Markup:
    """What became of the teacher's blocks in each model that ppcl made; empty if there is none."""
    strips = []
    for model in result.models:
        for name, blocks in model.blocks.items():
            segments = [Segment(b.first, b.last, width={module: {} for module in b.width}) for b in blocks]
            strips.append((model.label, strip_of(name, segments)))
    return render("strips.html", strips=strips) if strips else Markup()


def _place(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def _evaluate_command(result: Evaluation) -> str:
    settings = [f"seed={result.seed}", f"evaluate.num_inference_steps={result.num_inference_steps}"]
    command = ["ppcl", "evaluate", *(model.model for model in result.models), "--out", "DIR"]
    return shlex.join([*command, *(part for setting in settings for part in ("--set", setting))])


def reproduce_section(run: RunData) -> Markup:
    """Command, versions, seed, device, commit and the whole config; of an evaluation its command."""
    if not run.is_run and run.evaluation:
        return render("reproduce.html", missing="", facts={}, command=_evaluate_command(run.evaluation))
    if not run.config:
        return render("reproduce.html", missing=run.missing("config.yaml"))
    command, versions = run.config.get("command"), run.config.get("versions")
    facts: dict[str, Any] = {
        "Model": run.config.get("model"),
        "Seed": run.config.get("seed"),
        "Device": run.config.get("device"),
        "Commit": run.config.get("git_commit"),
        "Versions": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else versions,
    }
    return render(
        "reproduce.html",
        missing="",
        facts=facts,
        command=" ".join(map(str, command)) if isinstance(command, list) else str(command or ""),
        settings=yaml.safe_dump(run.config.get("config") or {}, sort_keys=False, allow_unicode=True),
    )
