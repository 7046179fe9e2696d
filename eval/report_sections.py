"""The report's sections on the run: headline, pictures, training, cost, how to reproduce."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import yaml

from ppcl.common.files import weights_variant
from ppcl.common.tables import zeros_meaning
from ppcl.eval import figures
from ppcl.eval.report_data import RunData, pick
from ppcl.eval.report_gallery import NUM_TRIPLES, extremes, extremes_html, gallery, grid, lay_out, pair_card
from ppcl.eval.report_html import (
    TIMES,
    count,
    duration,
    figure,
    missing,
    note,
    number,
    paragraph,
    percent,
    section,
    size_bytes,
    table,
    text,
)
from ppcl.eval.report_pictures import Pair
from ppcl.eval.report_speed import speed_table

STAGES = ("capture", "analyze", "fit", "plan", "distill", "export", "evaluate", "report")  # as they follow


def share_of_params(run: RunData) -> float | None:
    """Student parameters / teacher parameters: measured, or else the plan's (exact) prediction."""
    measured = pick(run.metrics, "param_ratio")
    student, teacher = pick(run.metrics, "student", "params"), pick(run.metrics, "teacher", "params")
    if measured is None and student is not None and teacher:
        measured = student / teacher
    return run.plan.predicted.param_ratio if measured is None and run.plan else measured


def headline_sentence(run: RunData) -> str:
    """The result in one plain sentence, with what is known so far."""
    speedup, drop, parts = pick(run.metrics, "speedup"), pick(run.metrics, "average_drop"), []
    if (ratio := share_of_params(run)) is not None:
        parts.append(f"{percent(ratio, 0)} of the parameters")
    if speedup is not None:
        parts.append(f"{number(speedup)} times as fast")
    elif run.plan:
        parts.append(f"about {number(run.plan.predicted.speedup)} times as fast (predicted)")
    if drop is not None:
        parts.append(f"average drop {number(drop, 2)}%")
    sentence = ", ".join(parts)
    if not sentence:
        return "Nothing has been measured in this run yet"
    return sentence if run.metrics else f"Planned, not measured yet: {sentence}"


def _tile(name: str, value: str, *lines: str) -> str:
    below = "".join(f"<span>{text(line)}</span>" for line in lines if line)
    return f"<div class=tile><span class=name>{text(name)}</span><b>{text(value)}</b>{below}</div>"


def _tiles(run: RunData) -> str:
    metrics, predicted = run.metrics, run.plan.predicted if run.plan else None
    teacher_params = pick(metrics, "teacher", "params") or (run.plan.model.params if run.plan else None)
    student_params = pick(metrics, "student", "params") or (predicted.params if predicted else None)
    tiles = []
    if teacher_params and student_params:
        planned = f"predicted {percent(predicted.param_ratio)}" if predicted else ""
        change = f"{count(teacher_params)} \N{RIGHTWARDS ARROW} {count(student_params)}"
        tiles.append(_tile("Parameters", percent(share_of_params(run)), change, planned))
    speedup, whole = pick(metrics, "speedup"), pick(metrics, "speedup_end_to_end")
    if speedup is not None or predicted:
        planned = f"predicted {number(predicted.speedup)}{TIMES} from FLOPs" if predicted else ""
        end = f"{number(whole)}{TIMES} end to end" if whole is not None else ""
        shown = f"{number(speedup)}{TIMES}" if speedup is not None else "not measured"
        tiles.append(_tile("Transformer speed", shown, end, planned))
    error = pick(metrics, "fidelity", "velocity_error")
    if error is not None or (predicted and predicted.error is not None):
        planned = f"predicted {number(predicted.error)} before distillation" if predicted and predicted.error else ""
        before = pick(metrics, "fidelity", "velocity_error_undistilled")
        start = f"{number(before)} before distillation" if before is not None else ""
        tiles.append(_tile("Velocity error", number(error) if error is not None else "not measured", start, planned))
    if (drop := pick(metrics, "average_drop")) is not None:
        ratio = pick(metrics, "fid_ratio")
        fid = f"FID {number(ratio)}{TIMES} the teacher's" if ratio is not None else ""
        tiles.append(_tile("Average drop", f"{number(drop, 2)}%", "mean of CLIP score, retrieval at 1 and 5", fid))
    return '<div class="tiles">' + "".join(tiles) + "</div>" if tiles else ""


def load_lines(run: RunData) -> str:
    """The Python that loads the result; importing ppcl.pipelines is needed only where widths changed."""
    stacks = run.plan.stacks if run.plan else {}
    narrow = any(s.width for segments in stacks.values() for s in segments)
    lines = ["from diffusers import DiffusionPipeline"]
    remote = (run.folder / "pipeline" / "transformer" / "transformer_ppcl.py").is_file()
    if narrow and not remote:
        lines.append("import ppcl.pipelines  # registers the classes with narrower blocks")
    path = json.dumps((run.folder / "pipeline").as_posix(), ensure_ascii=False)
    variant = weights_variant(run.folder / "pipeline")
    named = f', variant="{variant}"' if variant else ""
    named += ", trust_remote_code=True" if remote else ""
    lines += [f"pipe = DiffusionPipeline.from_pretrained({path}{named})"]
    return "\n".join(lines)


def headline(run: RunData) -> str:
    """Title, headline numbers measured and predicted, and the line that loads the result."""
    model = run.config.get("model") or (run.plan.model.transformer_class if run.plan else "")
    kicker = f"ppcl compression report{' of ' + str(model) if model else ''}"
    exported = (run.folder / "pipeline" / "model_index.json").is_file()
    use = paragraph("Use the compressed model:") if exported else missing(run.missing("pipeline"))
    return (
        f"<header><p class=kicker>{text(kicker)}</p><h1>{text(headline_sentence(run))}</h1></header>"
        + _tiles(run)
        + use
        + f"<pre><code>{text(load_lines(run))}</code></pre>"
    )


def pictures(run: RunData, pairs: Sequence[Pair], measured: Sequence[Pair]) -> str:
    """Teacher beside student, the least and most alike pairs, and the teacher's other seed for scale.

    Args:
        run: The run.
        pairs: What the gallery shows.
        measured: What the least and most alike pairs are looked for in.
    """
    extra = [pair_card(pair, with_other=True) for pair in pairs if pair.other][:NUM_TRIPLES]
    worst, best = extremes(measured)
    cards, triples, least, most = lay_out([[pair_card(pair) for pair in pairs], extra, worst, best])
    if not cards:
        return section("pictures", "Side by side", missing(run.missing("eval")))
    parts = [
        paragraph(
            "Left the teacher, right the compressed student: same prompt, same initial noise. "
            "The prompts are those of the evaluation in order, not chosen. Open a pair to compare it with a divider."
        ),
        gallery(cards),
    ]
    if unreadable := len(pairs) - len(cards):
        pairs_are = "1 pair is" if unreadable == 1 else f"{unreadable} pairs are"
        parts.append(note(f"{pairs_are} left out because a picture cannot be read; evaluate again."))
    parts.append(extremes_html(least, most, ("teacher", "student"), len(measured)))
    if triples:
        parts.append("<h3>For scale: the teacher with another seed</h3>")
        parts.append(
            paragraph("How much a picture changes when only the noise changes. A good student stays well inside that.")
        )
        parts.append(grid(triples, "triples"))
    return section("pictures", "Side by side", *parts)


STAGE_NAMES = {
    "fit": "Fitting candidate runs",
    "distill.local": "Distillation 1: substitutes one by one",
    "distill.output": "Distillation 2: the whole student",
}


def training(run: RunData) -> str:
    """Loss curves by stage."""
    order = [*STAGE_NAMES, *(stage for stage in run.log if stage not in STAGE_NAMES)]
    cards = []
    for stage in order:
        points = figures.loss_points(run.log.get(stage, []))
        if len(points) < 2:
            continue
        steps = len(run.log[stage])
        guide = (
            f"How to read: pale the loss of each of {steps} steps, dark its running median, on a logarithmic "
            "scale; lower is closer to the teacher."
        )
        cards.append(figure(STAGE_NAMES.get(stage, stage), figures.loss_curve(stage, points), guide))
    if not cards:
        return section("training", "How it was trained", missing(run.missing("log.jsonl")))
    return section("training", "How it was trained", '<div class="even">', *cards, "</div>")


MEMORY = {
    "cuda": "what torch allocated on the GPU while drawing",
    "resident": "the growth of the process while drawing (no GPU was used), a rough figure",
}


def _ratio(before: float | None, after: float | None) -> str:
    return percent(after / before) if before and after is not None else number(None)


def cost(run: RunData) -> str:
    """Size, speed and memory of both models, and the time every stage took."""
    metrics, plan = run.metrics, run.plan
    rows: list[list[str]] = []

    def row(name: str, key: str, show: Callable[[float | None], str], predicted: str = number(None)) -> None:
        before, after = pick(metrics, "teacher", key), pick(metrics, "student", key)
        if before is not None or after is not None:
            rows.append([name, show(before), show(after), _ratio(before, after), predicted])

    row("Parameters of the transformer", "params", count, percent(plan.predicted.param_ratio) if plan else number(None))
    row("FLOPs of a call for one prompt", "flops", count, percent(1 / plan.predicted.speedup) if plan else number(None))
    if plan and plan.model.flops and pick(metrics, "student", "flops") is None:
        student = plan.model.flops / plan.predicted.speedup
        share = percent(1 / plan.predicted.speedup)
        rows.append(["FLOPs a transformer call", count(plan.model.flops), number(None), number(None), share])
        rows[-1][2] = f"{count(student)} (predicted)"
    if plan:
        whole = plan.model.params * plan.model.bytes_per_param + plan.model.other_bytes
        kept = _ratio(whole, plan.predicted.bytes)
        shown = f"{size_bytes(plan.predicted.bytes)} (predicted)"
        rows.append(["Weights of the whole pipeline", size_bytes(whole), shown, number(None), kept])
    faster = percent(1 / plan.predicted.speedup) if plan else number(None)
    row("Transformer call, ms", "latency_ms", number, faster)
    row("End to end, ms", "latency_end_to_end_ms", number)
    row("Peak memory", "peak_memory_bytes", size_bytes)
    sparsity = metrics.get("sparsity") if metrics else None
    if isinstance(sparsity, Mapping) and pick(sparsity, "zeros") is not None:
        shown = f"{percent(pick(sparsity, 'zeros'))} ({sparsity.get('pattern')})"
        rows.append(["Weights that are zero", number(None), shown, number(None), number(None)])
    parts = []
    if rows:
        parts.append(table(["", "teacher", "student", "student / teacher", "predicted"], rows))
        if isinstance(sparsity, Mapping):
            parts.append(paragraph(text(zeros_meaning(str(sparsity.get("pattern")))), "soft small"))
        parts.append(
            paragraph(
                "Parameters are counted before anything is built. The predicted time counts FLOPs only; "
                "launch overhead, memory traffic and the text encoder and VAE come on top of it. "
                f"Peak memory is {MEMORY.get(str(metrics.get('memory_measure')), 'as evaluate measured it')}.",
                "soft small",
            )
        )
    if not metrics:
        parts.append(missing(run.missing("eval/metrics.json")))
    speed = metrics.get("speed")
    if isinstance(speed, Mapping):
        shown = speed_table(["teacher", "student"], [speed.get("teacher"), speed.get("student")])
        parts += ["<h3>At several step counts and batch sizes</h3>", shown] if shown else []
    return section("cost", "What it costs", *parts, "<h3>Time spent by stage</h3>", _stage_bars(run))


def _place(stage: str) -> int:
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def _stage_bars(run: RunData) -> str:
    if not run.seconds:
        return missing(run.missing("stages.json"))
    longest = max(max(run.seconds.values()), 1e-9)
    lines = [
        f"<span>{text(stage)}</span>"
        f'<i style="width:{100 * seconds / longest:.1f}%"></i>'
        f"<span>{duration(seconds)}</span>"
        for stage, seconds in sorted(run.seconds.items(), key=lambda item: _place(item[0]))
    ]
    total = f"<p class=soft>{duration(sum(run.seconds.values()))} in all.</p>"
    return '<div class="bars">' + "".join(lines) + "</div>" + total


def reproduce(run: RunData) -> str:
    """Command, versions, seed, device, commit and the whole config."""
    if not run.config:
        return section("reproduce", "What was run", missing(run.missing("config.yaml")))
    command = run.config.get("command", "")
    command = " ".join(map(str, command)) if isinstance(command, list) else str(command or "")
    versions = run.config.get("versions")
    named = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else versions
    facts = {
        "Model": run.config.get("model"),
        "Seed": run.config.get("seed"),
        "Device": run.config.get("device"),
        "Commit": run.config.get("git_commit"),
        "Versions": named,
    }
    rows = [[name, text(value)] for name, value in facts.items() if value is not None]
    settings = yaml.safe_dump(run.config.get("config") or {}, sort_keys=False, allow_unicode=True)
    parts = [
        paragraph(
            "Run this again into a fresh folder. With the same versions on the same kind of device the numbers repeat; "
            "times vary with the load of the machine."
        )
        if command
        else "",
        f"<pre><code>{text(command)}</code></pre>" if command else "",
        '<table class="facts"><tbody>' + "".join(f"<tr><th scope=row>{a}</th><td>{b}</td></tr>" for a, b in rows),
        "</tbody></table>",
        f"<details><summary>All settings</summary><pre><code>{text(settings)}</code></pre></details>",
    ]
    return section("reproduce", "What was run", *parts)
