"""The report's section on which blocks were redundant and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ppcl.analysis.artifacts import StackAnalysis
from ppcl.eval import figures
from ppcl.eval.report_data import RunData
from ppcl.eval.report_html import Chart, number, percent, render
from ppcl.pruning.artifacts import Candidate, WidthOption
from ppcl.student.plan import CompressionPlan, Recovered, Segment, start_index
from ppcl.student.words import size_words

DASH = "\N{EN DASH}"
BECAME = "\N{RIGHTWARDS ARROW}"
NUM_HUES = 4


def span(first: int, last: int) -> str:
    """``3-5`` with an en dash, or ``3`` for a single block."""
    return str(first) if first == last else f"{first}{DASH}{last}"


@dataclass(frozen=True)
class Cell:
    """A part of a row: its text, and the teacher's blocks that it lies under."""

    label: str
    css: str
    first: int
    last: int
    hint: str
    share: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a strip."""

    caption: str
    cells: Sequence[Cell] = ()


@dataclass(frozen=True)
class Strip:
    """One stack: rows of cells, on a grid of the teacher's blocks."""

    num_blocks: int
    rows: Sequence[Row]


def redundancy(run: RunData) -> Markup:
    """The plan as a strip of blocks, and the measurements behind it."""
    plan, missing = run.plan, []
    of_plan: dict[str, Any] = {"summary": ""}
    if plan:
        of_plan = {
            "summary": _summary(run, plan),
            "strips": [strip_of(name, plan.stacks[name], _interval_rows(run, name)) for name in plan.stacks],
            "first_teacher": _first_teacher(plan),
            "share_of_first": percent(plan.share_of_first) if plan.share_of_first else "",
            "runs": _run_rows(run, plan),
            "keeps_all": not plan.has_width,
            "smaller": _width_rows(run, plan),
            "recovered": [_recovered_row(seen, plan.recovered[0]) for seen in plan.recovered],
        }
    else:
        missing.append(run.missing("plan.json"))
    stacks = [stack for stack in (run.analysis.stacks if run.analysis else ()) if stack.cka]
    charts = [chart for stack in stacks for chart in _stack_charts(run, stack)]
    if not run.analysis:
        missing.append(run.missing("analysis.json"))
    if run.candidates and run.candidates.candidates:
        charts.append(_candidate_chart(run))
    else:
        missing.append(run.missing("candidates.json"))
    return render("blocks.html", missing=missing, charts=charts, basis=_basis(run), **of_plan)


def _summary(run: RunData, plan: CompressionPlan) -> str:
    total = sum(stack.num_blocks for stack in plan.model.stacks)
    kept = sum(len(segments) for segments in plan.stacks.values())
    budget = ", ".join(f"{name} {value:g}" for name, value in plan.budget.items())
    how = f" (mode {plan.mode}, budget {budget})." if budget else f" (mode {plan.mode})."
    if plan.runs:
        words = [f"Of {total} blocks {kept} are left: {len(plan.runs)} runs of neighbours became one block each{how}"]
    else:
        words = [f"All {total} blocks stay{how}"]
    inside, outside = _probe_errors(run, plan)
    if inside and outside:
        words.append(
            f"A linear map misses a block's effect by {number(_mean(inside), 2)} on average inside these runs and by "
            f"{number(_mean(outside), 2)} in the blocks that stay (relative error on held-out tokens)."
        )
    narrow = Counter(kind for segments in plan.stacks.values() for s in segments for kind in s.width)
    if narrow:
        names = ", ".join(f"{kind} in {number} blocks" for kind, number in sorted(narrow.items()))
        words.append(f"Narrower inside: {names}.")
    return " ".join(words)


def _first_teacher(plan: CompressionPlan) -> str:
    """Where the teacher was compressed before: the student by the blocks of the first teacher."""
    if not any(stack.spans for stack in plan.model.stacks):
        return ""
    from ppcl.export.card import draw_plan  # torch comes with it

    return draw_plan(plan)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _probe_errors(run: RunData, plan: CompressionPlan) -> tuple[list[float], list[float]]:
    """Probe errors, averaged over streams, of the blocks inside the plan's runs and of the others."""
    inside: list[float] = []
    outside: list[float] = []
    for stack in run.analysis.stacks if run.analysis else ():
        merged = {block for first, last in run.runs_of(stack.name) for block in range(first, last + 1)}
        for block in range(len(stack.influence)):
            errors = [values[block] for values in stack.probe_error.values() if block < len(values)]
            if errors and stack.name in plan.stacks:
                (inside if block in merged else outside).append(_mean(errors))
    return inside, outside


def strip_of(name: str, segments: Sequence[Segment], between: Sequence[Row] = ()) -> Strip:
    """One stack as a strip: the teacher's blocks above, the student's below, both with what became of them.

    Args:
        name: Of the stack.
        segments: The student's blocks, in order.
        between: Rows between the two.
    """
    num_blocks = max((s.last for s in segments), default=-1) + 1
    hues = {s.first: f"r{i % NUM_HUES + 1}" for i, s in enumerate([s for s in segments if s.is_run])}  # by first block
    above = []
    for segment in segments:
        for block in range(segment.first, segment.last + 1):
            hint = f"block {block}: {'part of run ' + span(segment.first, segment.last) if segment.is_run else 'kept'}"
            above.append(Cell(str(block), hues.get(segment.first, ""), block, block, hint))
    below = f"the student's {len(segments)} blocks; a wide one stands for the whole run above it"
    rows = [
        Row(f"{name}: the teacher's {num_blocks} blocks; those that became one share a colour", above),
        *between,
        Row(below, [_student_cell(segment, hues) for segment in segments]),
    ]
    if any(s.width for s in segments):
        rows.append(Row("a bar along the bottom: narrower inside (text stream, FFN or modulation)"))
    return Strip(num_blocks, rows)


def _interval_rows(run: RunData, name: str) -> list[Row]:
    stack = next((s for s in (run.analysis.stacks if run.analysis else ()) if s.name == name), None)
    if not stack or not stack.intervals:
        return []
    stability = stack.interval_stability or (None,) * len(stack.intervals)
    cells = []
    for (a, b), stable in zip(stack.intervals, stability, strict=False):
        hint = f"eqs. 4-5: blocks {a} to {b}"
        if stable:
            hint += f"; in {percent(stable.same, 0)} of {stack.interval_draws} draws of half of the held-out prompts"
            hint += f"; starts here in {percent(stable.first, 0)}, ends here in {percent(stable.last, 0)}"
        cells.append(Cell(span(a, b), "open", a, b, hint, percent(stable.same, 0) if stable else ""))
    caption = "intervals that the paper's rule finds (eqs. 4\N{EN DASH}5), before any budget"
    if stack.interval_stability:
        caption += f"; %: how many of {stack.interval_draws} draws of half of the held-out prompts find the same one"
    return [Row(caption, cells)]


def _student_cell(segment: Segment, hues: dict[int, str]) -> Cell:
    narrow = " narrow" if segment.width else ""
    inside = f"; narrower: {', '.join(segment.width)}" if segment.width else ""
    if segment.is_run:
        label, css = span(segment.first, segment.last), hues[segment.first] + narrow
        hint = f"one block instead of {label}; start: {segment.start or 'not recorded'}{inside}"
        return Cell(label, css, segment.first, segment.last, hint)
    hint = f"block {segment.first}, kept{inside}"
    return Cell(str(segment.first), narrow.strip(), segment.first, segment.last, hint)


def _candidate(run: RunData, stack: str, segment: Segment) -> Candidate | None:
    candidates = run.candidates.candidates if run.candidates else ()
    return next((c for c in candidates if (c.stack, c.first, c.last) == (stack, segment.first, segment.last)), None)


def _cka(run: RunData, name: str, segment: Segment) -> float | None:
    stack = next((s for s in (run.analysis.stacks if run.analysis else ()) if s.name == name), None)
    in_range = stack and segment.last < len(stack.cka)
    return stack.cka[segment.first][segment.last] if stack and in_range else None


def _run_rows(run: RunData, plan: CompressionPlan) -> list[list[str]]:
    """One row for each run: what made it cheap and what it saves."""
    params = {stack.name: stack.block_params for stack in plan.model.stacks}
    several = len(plan.stacks) > 1
    rows = []
    for name, segment in plan.runs:
        candidate = _candidate(run, name, segment)
        saved = sum(params.get(name, ())[segment.first + 1 : segment.last + 1])
        label = (
            f"{name} " * several + f"{span(segment.first, segment.last)}\N{NO-BREAK SPACE}{BECAME}\N{NO-BREAK SPACE}1"
        )
        rows.append(
            [
                label,
                number(_cka(run, name, segment), 4),
                number(candidate.probe_error if candidate else None),
                number(candidate.fitted_error if candidate else None),
                segment.start or DASH,
                percent(saved / plan.model.params if plan.model.params else None),
            ]
        )
    return rows


def _width_rows(run: RunData, plan: CompressionPlan) -> list[list[str]]:
    """One row for each kind of smaller module: where, how small, what it saves and what it costs alone."""
    by_group: dict[str, list[WidthOption]] = {}
    for option in run.candidates.width if run.candidates else ():
        pieces = plan.stacks.get(option.stack, ())
        piece = next((s for s in pieces if option.block == start_index(s.first, s.last, s.start)), None)
        if piece and all(piece.width.get(path) == part for path, part in option.parts.items()):
            by_group.setdefault(option.group, []).append(option)
    rows = []
    for group, options in by_group.items():
        size = ", or ".join(size_words([part for option in options for part in option.parts.values()]))
        params = sum(option.saved_params for option in options)
        error = sum(option.error**2 for option in options) ** 0.5
        rows.append([group, str(len(options)), size, percent(params / plan.model.params), number(error)])
    return rows


def _recovered_row(seen: Recovered, first: Recovered) -> list[str]:
    """What one of the plans was like before and after its recoveries."""
    what = [", ".join(seen.runs).replace("-", DASH), f"narrower inside {seen.narrower} blocks" if seen.narrower else ""]
    words = "; ".join(filter(None, what)) or "nothing replaced"
    after = [f"{number(errors.score)} ({steps})" for steps, errors in zip(seen.steps, seen.after, strict=True)]
    last, noises = seen.after[-1], list(zip(seen.after[0].noises, first.after[0].noises, strict=True))
    nearer = DASH if seen is first else f"{sum(a < b for a, b in noises)} of {len(noises)}"
    errors = [number(seen.predicted), number(seen.before.score), f" {BECAME} ".join(after)]
    return [
        f"{words}{' (the plan)' if seen.chosen else ''}",
        *errors,
        *map(number, (last.guided, last.caption)),
        nearer,
    ]


def _basis(run: RunData) -> str:
    if not run.analysis:
        return ""
    tokens = ", ".join(f"{count:,} {stream} tokens" for stream, count in run.analysis.num_tokens.items())
    shaded = "Shaded spans are the plan's runs; blocks are numbered from 0."
    return f"Measured on {run.analysis.num_states:,} denoising states of the teacher ({tokens}). {shaded}"


def _stack_charts(run: RunData, stack: StackAnalysis) -> list[Chart]:
    runs = run.runs_of(stack.name)
    several = f"{stack.name}: " if run.analysis and len(run.analysis.stacks) > 1 else ""
    charts = [
        Chart(
            f"{several}How well linear maps imitate blocks u to k",
            figures.cka_map(stack, runs),
            "How to read: each cell says how alike the true output of block k and a chain of linear maps for blocks "
            "u to k are; bright means alike, so bright cells far from the diagonal are long redundant runs. "
            "Solid squares: the plan's runs; dashed: the paper's intervals.",
        ),
        Chart(
            f"{several}Where a run should end",
            figures.difference_curves(stack, runs),
            "How to read: D(u, k) is the likeness lost by adding block k to a run that starts at u; while it falls "
            "the run goes on, and at its first rise the interval ends one block before (eqs. 4\N{EN DASH}5); "
            "grey: all other starts.",
        ),
        Chart(
            f"{several}How much each block does",
            figures.block_scores(stack, runs),
            "How to read: low probe error means that a linear map nearly replaces the block; low influence means "
            "that the block hardly turns its input (1 minus their cosine).",
        ),
    ]
    if stack.ffn_linearity or stack.text_linearity:
        charts.append(
            Chart(
                f"{several}How linear the FFNs and the text stream are",
                figures.linearity(stack, runs),
                "How to read: error of the best linear map in place of each FFN (eq. 9) and of each block's text "
                "signals (eq. 8); the lowest blocks lose least when made narrow.",
            )
        )
    return charts


def _candidate_chart(run: RunData) -> Chart:
    runs = run.candidates.candidates if run.candidates else ()
    in_plan = {(name, s.first, s.last) for name, s in run.plan.runs} if run.plan else set()
    shown = len(figures.select_candidates(runs, in_plan))
    rest = f" Shown: {shown} of {len(runs)}, the chosen and the cheapest others." if shown < len(runs) else ""
    return Chart(
        "What replacing each run costs",
        figures.candidate_bars(runs, in_plan),
        "How to read: how far the model's final output moves when this run alone is replaced; short bars are cheap, "
        "and the planner picks runs that do not overlap, meet the budget and together move it least." + rest,
    )
