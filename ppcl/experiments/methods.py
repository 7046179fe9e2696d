"""Every method under the same budgets: searches, criteria, allocations and zeros, with equal recovery, in one table.

A method is an entry of ``METHODS``: which search chooses the plan, or which criterion says what neurons and heads go,
or which one sets weights to zero. All start from the same capture and analysis; those that score units have a fit
stage of their own in ``RUN/fits``. All are trained with the same steps, batches and seeds.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ppcl.common.artifacts import load_artifact, save_artifact
from ppcl.common.files import digest, read_json, remove, write_json, write_text
from ppcl.common.plugins import valid_name
from ppcl.config import CRITERION_NAMES, FitConfig, PlanConfig
from ppcl.config.memory import changed, for_tables
from ppcl.config.search import SEARCH_NAMES
from ppcl.config.sparsity import SparsityConfig
from ppcl.errors import BudgetError, ConfigError, UserError, nearest
from ppcl.experiments.baselines import plan_from_runs, with_starts
from ppcl.experiments.compare import Judge, run_row
from ppcl.experiments.compare_text import Row
from ppcl.experiments.methods_text import Entry, draw, write_up
from ppcl.export.pipeline import link_file
from ppcl.pruning.artifacts import Candidates, WidthOption
from ppcl.pruning.criteria import CRITERIA, criterion_named
from ppcl.pruning.searches import choose, search_named
from ppcl.pruning.sparsity import sparse_layers, sparsity_cost
from ppcl.run import STAGES, Run
from ppcl.student.plan import CompressionPlan

logger = logging.getLogger(__name__)
# Of a criterion's own fit stage: sizes down to a tenth, so that half of the parameters can go, and no runs of blocks.
UNITS = {
    "width": ("ffn", "attention"),
    "width_shares": (0.1, 0.25, 0.5, 0.75),
    "steps": 0,
    "max_candidates": 1,
    "max_run": 2,
    "eval_states": 8,
}
BUDGETS = "keep=0.7,keep=0.5,speedup=1.5"
MOST_ZEROS = 0.95  # of the weights that may become zero


@dataclass(frozen=True)
class Method:
    """One way to choose what goes.

    Attributes:
        label: What the table calls it.
        units: What it takes away.
        plan: Settings of the plan stage, beside the budget.
        criterion: What scores neurons and heads, in a fit stage of its own; None needs none.
        zeros: Settings of sparsity, beside the share; None for none.
    """

    label: str
    units: str
    plan: Mapping[str, Any] = field(default_factory=dict)
    criterion: str | None = None
    zeros: Mapping[str, Any] | None = None


def _depth(label: str, mode: str) -> Method:
    return Method(label, "blocks", {"mode": mode, "width": ()})


METHODS: dict[str, Method] = {
    "ours": Method("ours (optimal)", "blocks, neurons, ranks", {"mode": "optimal"}),
    "ours-depth": _depth("ours, depth alone", "optimal"),
    "paper": _depth("the paper's intervals", "paper"),
    "path": _depth("path search", "path"),
    "learned": _depth("learned masks (TinyFusion)", "learned"),
    "rarts": _depth("gates by RARTS", "rarts"),
    "influence": _depth("block influence", "influence"),
    "position": _depth("position (later first)", "position"),
    "uniform": _depth("uniform", "uniform"),
    "random": _depth("random blocks", "random"),
    **{
        f"units-{name}": Method(f"{name}, uniform", "neurons, heads", {"mode": "allocation"}, name) for name in CRITERIA
    },
    "units-nirvana-balanced": Method(
        "nirvana, its allocation", "neurons, heads", {"mode": "allocation", "allocation": "nirvana"}, "nirvana"
    ),
    "zeros-magnitude": Method("magnitude, zeros", "weights", zeros={"criterion": "magnitude"}),
    "zeros-wanda": Method("wanda, zeros", "weights", zeros={"criterion": "wanda"}),
    "zeros-gblm": Method("gblm, zeros", "weights", zeros={"criterion": "gblm"}),
    "zeros-gblm-ecoflap": Method(
        "gblm, zeros by ECoFLaP", "weights", zeros={"criterion": "gblm", "allocation": "ecoflap"}
    ),
}


def methods_named(text: str) -> dict[str, Method]:
    """Turn ``all``, ``ours,path`` or ``all,search=mine.py:Mine,units=mine.py:Mine`` into methods.

    Raises:
        ConfigError: One is unknown, or cannot be loaded.
    """
    found: dict[str, Method] = {}
    for name in (part.strip() for part in text.split(",")):
        kind, _, place = name.partition("=")
        if name == "all":
            found |= METHODS
        elif place and kind in ("search", "units"):
            method = _outside(kind, place)
            short = f"{kind}-" + re.sub(r"[^A-Za-z0-9]+", "-", Path(place.replace(":", "-")).name)  # a folder's name
            other = found.get(short, method) != method
            found[f"{short}-{digest(place)[:6]}" if other else short] = method
        elif name in METHODS:
            found[name] = METHODS[name]
        else:
            valid = ", ".join(("all", *METHODS, "search=FILE.py:Class", "units=FILE.py:Class"))
            raise ConfigError(f"--methods: unknown method{nearest(name, METHODS)}; valid: {valid}")
    return found


def _outside(kind: str, place: str) -> Method:
    """The method of ``search=`` or ``units=``, which is loaded once now: the work before its turn takes hours."""
    try:
        valid_name(place, SEARCH_NAMES if kind == "search" else CRITERION_NAMES, kind)
    except ValueError as error:
        raise ConfigError(f"--methods: {kind}={place}: {error}") from None
    if kind == "search":
        search_named(place)
        return _depth(place, place)
    criterion_named(place)
    return Method(f"{place}, uniform", "neurons, heads", {"mode": "allocation"}, place)


def budgets_named(text: str) -> list[dict[str, float]]:
    """Turn ``keep=0.7,speedup=1.5`` into budgets.

    Raises:
        ConfigError: It is not a list of budgets.
    """
    found = []
    for part in text.split(","):
        kind, _, value = part.strip().partition("=")
        try:
            budget = {kind: float(value)}
            if kind not in ("keep", "speedup"):
                raise ValueError(kind)
            PlanConfig.model_validate(budget)
        except ValueError:
            raise ConfigError(
                f"--budgets: got {part.strip()!r}; write them like keep=0.7,keep=0.5,speedup=1.5"
            ) from None
        found.append(budget)
    return found


def forked(run: Run, criterion: str) -> Run:
    """A run beside this one with the same capture and analysis and a fit stage of its own; it is done then.

    Args:
        run: Its capture and analyze stages are done.
        criterion: What scores neurons and heads.

    Raises:
        UserError: The criterion does not fit the family.
    """
    folder = run.out / "fits" / re.sub(r"[^A-Za-z0-9]+", "-", criterion)
    shared = {stage: run.stages[stage] for stage in ("capture", "analyze")}
    record = folder / "stages.json"
    if record.is_file() and {name: read_json(record).get(name) for name in shared} != shared:
        remove(folder)
    if not record.is_file():
        remove(folder)
        for stage, known in shared.items():
            for source in (run.out / name for name in (*STAGES[stage].products, *known["files"])):
                place = folder / source.relative_to(run.out)
                place.parent.mkdir(parents=True, exist_ok=True)
                if source.is_file() and not link_file(source, place):
                    shutil.copyfile(source, place)
        rest = {name: value for name, value in run.stages.items() if not isinstance(value, dict) and "." not in name}
        write_json(record, {**rest, **shared})
    fit = FitConfig.model_validate({**run.config.fit.model_dump(), **UNITS, "criterion": criterion})
    twin = Run(run.model, folder, run.config.model_copy(update={"fit": fit}), run.prompts, run.command)
    twin.teacher = run.teacher  # one teacher in memory is enough
    twin.run("fit")
    _share_times(run, twin)
    return twin


def _share_times(run: Run, twin: Run) -> None:
    """Let all criteria plan with the times that were measured first: units of one number take one time."""
    path, found = run.out / "fits" / "times.json", twin.read(Candidates, "candidates.json")
    fitted = run.depends("fit")

    def key(option: WidthOption) -> str:
        parts = sorted((name, part["kind"], part["size"]) for name, part in option.parts.items())
        return digest(fitted, option.stack, option.block, parts)

    own = {key(option): option.saved_time for option in run.read(Candidates, "candidates.json").width}
    times = own | (read_json(path) if path.is_file() else {})
    options = [replace(option, saved_time=times.setdefault(key(option), option.saved_time)) for option in found.width]
    if tuple(options) != found.width:
        save_artifact(replace(found, width=tuple(options)), twin.out / "candidates.json")
    write_json(path, times)


def plan_for(run: Run, settings: PlanConfig, seed: int) -> CompressionPlan:
    """The plan of a search; one that was chosen before from the same is read.

    Args:
        run: Whose candidates it is chosen from.
        settings: Search and budget.
        seed: Of what the search draws at random.

    Raises:
        BudgetError: No plan of this search meets the budget.
    """
    drawn = 0 if getattr(search_named(settings.mode), "deterministic", False) else seed
    costs = (run.out / "candidates.json").read_text(encoding="utf-8")  # whose times may be shared after the stage
    path = run.out / "compare" / "plans" / f"{digest(run.depends('fit'), costs, settings.identity(), drawn)}.json"
    if path.is_file():
        return load_artifact(CompressionPlan, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = with_starts(run, choose(settings.mode, run.search_context(settings, seed)))
    save_artifact(found, path)
    return found


def zeros_row(run: Run, name: str, method: Method, budget: Mapping[str, float]) -> tuple[Row, float]:
    """The row of a method that sets weights to zero, and its cost in teacher forwards.

    Raises:
        BudgetError: The budget is a speed-up, or asks for more zeros than there are weights.
        ConfigError: Zeros do not go with how the run trains.
    """
    if "keep" not in budget:
        raise BudgetError("zeros make nothing faster by themselves")
    transformer, adapter = run.teacher.transformer, run.adapter
    candidates = run.read(Candidates, "candidates.json")
    model = run.search_context().model
    plan = plan_from_runs(model, (), "optimal", candidates)
    blocks = {
        (spec.name, index, index): block
        for spec in adapter.stacks
        for index, block in enumerate(adapter.blocks(transformer, spec))
    }
    settings = SparsityConfig.model_validate({"share": 0.5, "modulation": True, **(method.zeros or {})})
    layers = sparse_layers(plan, adapter, blocks, settings)
    share = (1 - budget["keep"]) * model.params / sum(layer.module.weight.numel() for layer in layers)
    if share > MOST_ZEROS:
        raise BudgetError(f"{share:.0%} of the blocks' weights would have to be zero")
    settings = settings.model_copy(update={"share": share})
    distill = changed(run.config.distill, from_fit=False, sparsity=settings)
    cost = sparsity_cost(settings, settings.states, len(blocks))
    return Row(f"{slug(budget)}/{name}", method.label, plan, distill), cost


def row_of(run: Run, name: str, method: Method, budget: Mapping[str, float], seed: int) -> tuple[Row, float | None]:
    """The row of a method under a budget, and its cost in teacher forwards (None: it does not say).

    Raises:
        BudgetError: It has no plan that meets the budget.
    """
    if method.zeros is not None:
        return zeros_row(run, name, method, budget)
    base = forked(run, method.criterion) if method.criterion else run
    limits = {"keep": None, "speedup": None, "fit_gb": None, **budget}
    settings = PlanConfig.model_validate({**run.config.plan.model_dump(), **limits, **method.plan})
    plan = plan_for(base, settings, seed)
    cost: float | None = plan.teacher_forwards
    if method.criterion:
        cost = base.read(Candidates, "candidates.json").criterion_forwards
    distill = run.config.distill.model_copy(update={"from_fit": False})
    return Row(f"{slug(budget)}/{name}", method.label, plan, distill, fitted_by=base), cost


def slug(budget: Mapping[str, float]) -> str:
    """A budget as a folder's name, e.g. ``keep-0.7``."""
    return "-".join(f"{kind}-{value:g}" for kind, value in budget.items())


def compare_methods(
    run: Run,
    methods: Mapping[str, Method],
    budgets: Sequence[Mapping[str, float]],
    seeds: Sequence[int],
    table: Path | None = None,
) -> str:
    """Compare methods under equal budgets and equal recovery; resumable.

    Writes ``RUN/compare/<budget>/<method>/seed-<s>`` and ``RUN/compare/methods.md|json|png``.

    Args:
        run: The run; capture, analyze and fit are done first if they are not.
        methods: By name.
        budgets: One kind and value each.
        seeds: Of training, and of searches that draw at random.
        table: A further place for the Markdown table; the plot goes beside it.

    Returns:
        The Markdown text.
    """
    for stage in ("capture", "analyze", "fit"):
        run.run(stage)
    run.config = for_tables(run.config)
    judge = Judge(run)
    teacher = judge.teacher()
    entries: list[Entry] = []
    for budget in budgets:
        for name, method in methods.items():
            try:
                rows = [row_of(run, name, method, budget, seed) for seed in seeds]
            except UserError as error:  # the other methods are worth their hours
                entries.append(Entry(slug(budget), name, method.label, method.units, why_not=str(error)))
                continue
            metrics = [run_row(run, judge, row, seed, teacher) for (row, _), seed in zip(rows, seeds, strict=True)]
            plans = [row.plan for row, _ in rows]
            entries.append(Entry(slug(budget), name, method.label, method.units, plans, metrics, rows[0][1]))
    text = write_up(run, teacher, entries, seeds)
    write_json(run.out / "compare" / "methods.json", {"seeds": seeds, "rows": [entry.as_json() for entry in entries]})
    for path in filter(None, (run.out / "compare" / "methods.md", table)):
        draw(entries, path.with_suffix(".png"))
        write_text(path, text.replace("methods.png", path.with_suffix(".png").name))
    return text
