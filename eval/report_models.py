"""The page of ``ppcl evaluate A B ...``: verdicts, a sortable table, plots against size and time, pictures.

Built from the output folder's ``metrics.json`` and ``pictures`` alone, without torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ppcl.common.files import read_json, write_text
from ppcl.errors import ArtifactError
from ppcl.eval import figures
from ppcl.eval.report_blocks import strip
from ppcl.eval.report_data import pick
from ppcl.eval.report_gallery import (
    MAX_MEASURED,
    Card,
    extremes,
    extremes_html,
    gallery,
    lay_out,
)
from ppcl.eval.report_html import (
    NONE,
    TIMES,
    count,
    figure,
    missing,
    note,
    number,
    page,
    paragraph,
    percent,
    ranged,
    section,
    size_bytes,
    text,
)
from ppcl.eval.report_pictures import MAX_PAIRS, Pair, prompts_of, spread
from ppcl.eval.report_scores import FIDELITY, SCORES, VELOCITY_GUIDE, velocity_steps
from ppcl.eval.report_speed import speed_table
from ppcl.student.plan import Segment

MAX_PICTURES = 256  # in the gallery: many models show fewer prompts
NUM_PLOTTED = 3  # measures in a plot
UP, DOWN = "\N{UPWARDS ARROW}", "\N{DOWNWARDS ARROW}"  # higher is better, lower is better
PLOTTED = ("average_drop", "velocity_error", "fid", "kid", "clip_score")  # the first that are there
NAMES = {
    "average_drop": f"Average drop, % {DOWN}",
    "velocity_error": f"Velocity error {DOWN}",
    "psnr": f"PSNR, dB {UP}",
    "ssim": f"SSIM {UP}",
    "lpips": f"LPIPS {DOWN}",
    "feature_cosine": f"Feature cosine {UP}",
    **{key: f"{name} {DOWN if lower else UP}" for key, (name, lower, *_) in SCORES.items()},
}
COSTS = {
    "params": "Parameters",
    "speedup": "Times as fast",
    "latency_ms": "Transformer call, ms",
    "latency_end_to_end_ms": "One picture, ms",
    "peak_memory_bytes": "Peak memory",
    "flops": "FLOPs of a call",
}
SHOW: dict[str, Callable[[float | None], str]] = {"params": count, "peak_memory_bytes": size_bytes, "flops": count}


def write_models_report(folder: Path) -> Path:
    """Write ``report.html`` beside the ``metrics.json`` of an evaluation of one or many models.

    Args:
        folder: What ``ppcl evaluate`` got as ``--out``.

    Returns:
        The path of the page.

    Raises:
        ArtifactError: There is no readable ``metrics.json`` of such an evaluation.
        UserError: The page cannot be written.
    """
    result = read_json(folder / "metrics.json")
    if not isinstance(result, dict) or not result.get("models"):
        raise ArtifactError(f"{folder / 'metrics.json'} holds no models; write it with ppcl evaluate A B --out DIR")
    labels = [str(one["label"]) for one in result["models"]]
    others = result.get("comparisons") or []
    title = f"{', '.join(labels[1:])} against {labels[0]}" if others else labels[0]
    contents = {"numbers": "Numbers", "plots": "Against size and time"}
    contents |= {"speed": "Speed and memory"} if _speed(result) else {}
    contents |= {"blocks": "Blocks"} if _blocks(result) else {}
    contents |= {"pictures": "Pictures", "method": "Method"}
    body = [
        f"<header><p class=kicker>ppcl evaluation</p><h1>{text(title)}</h1></header>",
        *(paragraph(f"<b>{text(one['verdict'])}.</b>") for one in others),
        "<nav>" + "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name in contents.items()) + "</nav>",
        _numbers(result),
        _plots(result),
        _speed(result),
        _blocks(result),
        _pictures(folder, result),
        _method(result),
    ]
    path = folder / "report.html"
    write_text(path, page(f"ppcl evaluation: {title}", "\n".join(body)))
    return path


def measured(result: Mapping[str, Any]) -> list[dict[str, dict[str, Any]]]:
    """Numbers by name for each model: its own, and those of its comparison with the first."""
    against = {one["label"]: one for one in result.get("comparisons") or []}
    rows = []
    for one in result["models"]:
        made = against.get(one["label"]) or {}
        found = {**one["numbers"], **(made.get("fidelity") or {}), "average_drop": made.get("average_drop")}
        rows.append({key: value for key, value in found.items() if pick(value, "value") is not None})
    return rows


def _costs(one: Mapping[str, Any]) -> dict[str, float | None]:
    return {key: pick(one, key) if key == "params" else pick(one, "costs", key) for key in COSTS}


def _cell(value: float | None, shown: str) -> str:
    raw = f' data-value="{value:.10g}"' if value is not None else ""
    return f"<td{raw}>{shown}</td>"


def _numbers(result: Mapping[str, Any]) -> str:
    """One row a model; a click on a column's name sorts by it."""
    rows = measured(result)
    faster = {one["label"]: pick(one, "speedup") for one in result.get("comparisons") or []}
    costs = [_costs(one) | {"speedup": faster.get(one["label"], 1.0 if faster else None)} for one in result["models"]]
    cost_keys = [key for key in COSTS if any(one[key] is not None for one in costs)]
    keys = [key for key in NAMES if any(key in row for row in rows)]
    heads = ["Model", *(COSTS[key] for key in cost_keys), *(NAMES[key] for key in keys)]
    parts = ['<div class=scroll tabindex=0 role=region aria-label="all numbers"><table class="sortable"><thead><tr>']
    parts += [f"<th scope=col><button type=button>{text(head)}</button></th>" for head in heads]
    parts.append("</tr></thead><tbody>")
    for one, row, cost in zip(result["models"], rows, costs, strict=True):
        parts.append(f"<tr><th scope=row>{text(one['label'])}</th>")
        parts += [_cell(cost[key], SHOW.get(key, number)(cost[key])) for key in cost_keys]
        for key in keys:
            found = row.get(key)
            value, low, high = (pick(found, name) for name in ("value", "low", "high"))
            around = (low, high) if low is not None and high is not None else None
            parts.append(_cell(value, ranged(number(value), around)))
        parts.append("</tr>")
    parts.append("</tbody></table></div>")
    meanings = {
        key: SCORES[key][3] if key in SCORES else FIDELITY[key][1] for key in keys if key in {**SCORES, **FIDELITY}
    }
    explained = "".join(f"<p><b>{text(NAMES[key])}</b> {text(words)}</p>" for key, words in meanings.items())
    guide = (
        f"Click a name to sort. Small: {percent(pick(result, 'level'), 0)} bootstrap intervals. {NONE}: not measured. "
        "Times as fast: timed in turn with the first model; the milliseconds also hold what else the machine did."
    )
    more = f"<details><summary>What the numbers mean</summary>{explained}</details>" if explained else ""
    notes = [note(str(line)) for line in result.get("notes") or []]
    return section(
        "numbers", "Numbers", *notes, *parts[:1], "".join(parts[1:]), paragraph(text(guide), "soft small"), more
    )


def _point(found: Mapping[str, Any] | None, is_first: bool, key: str) -> figures.Point | None:
    value, low, high = (pick(found, name) for name in ("value", "low", "high"))
    if value is None:  # what the others are compared with loses nothing against itself
        return (0.0, 0.0, 0.0) if is_first and key in ("average_drop", "velocity_error") else None
    return value, value if low is None else low, value if high is None else high


def _relative_times(result: Mapping[str, Any]) -> list[float | None]:
    """Time of a transformer call in percent of the first model's: each was timed in turn with it, so load cancels."""
    against = {one["label"]: pick(one, "speedup") for one in result.get("comparisons") or []}
    faster = [against.get(one["label"]) for one in result["models"][1:]]
    return [100.0, *(100 / ratio if ratio else None for ratio in faster)] if faster else [None]


def _plots(result: Mapping[str, Any]) -> str:
    """Quality against parameters and against time, and the velocity error by timestep."""
    rows, labels = measured(result), [str(one["label"]) for one in result["models"]]
    keys = [key for key in PLOTTED if any(key in row for row in rows)][:NUM_PLOTTED]
    measures = {NAMES[key]: [_point(row.get(key), i == 0, key) for i, row in enumerate(rows)] for key in keys}
    cards = []
    for key, title, axis, unit in (
        ("params", "Quality against size", "parameters, millions", 1e-6),
        ("time", "Quality against time", f"time of a transformer call, % of {labels[0]}", 1.0),
    ):
        costs = _relative_times(result) if key == "time" else [_costs(one)[key] for one in result["models"]]
        known = [cost * unit for cost in costs if cost is not None]
        if measures and len(known) == len(labels):
            guide = (
                f"How to read: one mark a model, bars its intervals; further left is cheaper. {UP} higher is better, "
                f"{DOWN} lower is better."
            )
            cards.append(figure(title, figures.quality_against(axis, labels, known, measures), guide))
    curves = {
        str(one["label"]): steps
        for one in result.get("comparisons") or []
        if (steps := velocity_steps(one.get("velocity_error_by_timestep")))
    }
    if curves:
        cards.append(
            figure("Velocity error by timestep", figures.velocity_curves(curves, first_colour=1), VELOCITY_GUIDE)
        )
    content = f'<div class="even">{"".join(cards)}</div>' if cards else missing("Nothing was measured to plot.")
    return section("plots", "Quality against size and time", content)


def _speed(result: Mapping[str, Any]) -> str:
    """Times at several step counts and batch sizes; empty if there are none."""
    shown = speed_table([str(one["label"]) for one in result["models"]], [one.get("speed") for one in result["models"]])
    return section("speed", "Speed and memory", shown) if shown else ""


def _blocks(result: Mapping[str, Any]) -> str:
    """What became of the teacher's blocks in each model that ppcl made; empty if there is none."""
    parts = []
    for one in result["models"]:
        for name, blocks in (one.get("blocks") or {}).items():
            segments = [
                Segment(int(b["first"]), int(b["last"]), width={str(m): {} for m in b.get("width") or ()})
                for b in blocks
            ]
            parts += [f"<h3>{text(one['label'])}</h3>", strip(str(name), segments)]
    return section("blocks", "What became of the blocks", *parts) if parts else ""


def drawn(folder: Path, label: str, seed: int) -> dict[str, Path]:
    """Pictures of a model by file name; empty if there are none."""
    return {path.name: path for path in sorted((folder / "pictures" / label / f"seed-{seed}").glob("[0-9]*.png"))}


def _pictures(folder: Path, result: Mapping[str, Any]) -> str:
    """All models side by side, and the least and most alike pairs of each with the first."""
    labels, seed = [str(one["label"]) for one in result["models"]], int(pick(result, "seed") or 0)
    files = {label: drawn(folder, label, seed) for label in labels}
    shared = [name for name in files[labels[0]] if all(name in files[label] for label in labels)]
    if not shared:
        return section(
            "pictures", "Pictures", missing(f"There are no pictures of all models in {folder.name}/pictures.")
        )
    prompts = prompts_of(files[labels[0]][shared[0]].parent)

    def prompt(name: str) -> str:
        index = int(Path(name).stem)
        return prompts[index] if index < len(prompts) else f"picture {index}"

    shown = spread(shared, max(1, min(MAX_PAIRS, MAX_PICTURES // len(labels))))
    cards = [Card(prompt(name), tuple((label, files[label][name]) for label in labels)) for name in shown]
    tried = spread(shared, MAX_MEASURED)
    found = [
        extremes([Pair(prompt(n), files[labels[0]][n], files[label][n]) for n in tried], (labels[0], label))
        for label in labels[1:]
    ]
    whole, *rest = lay_out([cards, *(cards for both in found for cards in both)])
    many = len(labels) > 2
    parts = [
        paragraph(text(f"In each: {', '.join(labels)}; same prompt, same initial noise. Open one to compare two.")),
        gallery(whole, "triples" if many else ""),
    ]
    for index, label in enumerate(labels[1:]):
        parts.append(extremes_html(rest[2 * index], rest[2 * index + 1], (labels[0], label), len(tried)))
    return section("pictures", "Pictures", *parts)


def _method(result: Mapping[str, Any]) -> str:
    """How it was measured, and the command."""
    reference = f"{result.get('reference')} ({result.get('reference_count') or 'unknown number of'} pictures)"
    rows: dict[str, object] = {
        "Prompts": result.get("prompts"),
        "Sampling steps": result.get("num_inference_steps"),
        "Seed": result.get("seed"),
        "Features": result.get("features"),
        "FID and the like compare with": reference if result.get("reference") else "nothing",
        "Intervals": f"{percent(pick(result, 'level'), 0)}, {pick(result, 'resamples') or 0:,.0f} bootstrap resamples, "
        "paired by prompt where models are compared",
    }
    for one in result.get("comparisons") or []:
        faster = pick(one, "speedup")
        size = f"{percent(pick(one, 'param_ratio'))} of the parameters of {one['against']}"
        rows[str(one["label"])] = size + (f", {number(faster)}{TIMES} as fast" if faster is not None else "")
    facts = "".join(f"<tr><th scope=row>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in rows.items())
    settings = [f"seed={result.get('seed')}", f"evaluate.num_inference_steps={result.get('num_inference_steps')}"]
    command = ["ppcl", "evaluate", *(str(one["model"]) for one in result["models"]), "--out", "DIR"]
    command += [part for setting in settings for part in ("--set", setting)]
    return section(
        "method",
        "Method and command",
        f'<table class="facts"><tbody>{facts}</tbody></table>',
        paragraph("Folders by their last name; prompts and reference pictures as they were given:"),
        f"<pre><code>{text(shlex.join(command))}</code></pre>",
    )
