"""Every method under the same budgets: searches, criteria, allocations and zeros, with equal recovery, in one table.

A method is an entry of ``METHODS``: which search chooses the plan, or which criterion says what neurons and heads go,
or which one sets weights to zero. All start from the same capture and analysis; those that score units have a fit
stage of their own in ``RUN/fits``. All are trained with the same steps, batches and seeds.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppcl.common.artifacts import load_artifact, save_artifact
from ppcl.common.files import digest
from ppcl.config import PlanConfig
from ppcl.config.extensions import CRITERIA, SEARCHES
from ppcl.config.memory import changed
from ppcl.config.sparsity import SparsityConfig
from ppcl.errors import BudgetError, ConfigError, UserError, nearest
from ppcl.experiments.baselines import plan_from_runs, with_starts
from ppcl.experiments.methods_text import Entry, draw, paragraphs
from ppcl.experiments.runner import Row, RowRunner
from ppcl.experiments.tables import finish
from ppcl.pruning.searches import choose
from ppcl.pruning.sparsity import sparse_layers, sparsity_cost
from ppcl.run import Session
from ppcl.run.fork import fork
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
BUDGETS = "keep=0.84,keep=0.7,keep=0.5,speedup=1.5"  # at 0.84, four blocks of the embedded teacher, searches differ
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
    methods: dict[str, Method] = {}
    for name in (part.strip() for part in text.split(",")):
        kind, _, place = name.partition("=")
        if name == "all":
            methods |= METHODS
        elif place and kind in ("search", "units"):
            method = _outside(kind, place)
            short = f"{kind}-" + re.sub(r"[^A-Za-z0-9]+", "-", Path(place.replace(":", "-")).name)  # a folder's name
            other = methods.get(short, method) != method
            methods[f"{short}-{digest(place)[:6]}" if other else short] = method
        elif name in METHODS:
            methods[name] = METHODS[name]
        else:
            valid = ", ".join(("all", *METHODS, "search=FILE.py:Class", "units=FILE.py:Class"))
            raise ConfigError(f"--methods: unknown method{nearest(name, METHODS)}; valid: {valid}")
    return methods


def _outside(kind: str, place: str) -> Method:
    """The method of ``search=`` or ``units=``, which is loaded once now: the work before its turn takes hours."""
    table = SEARCHES if kind == "search" else CRITERIA
    try:
        table.named(table.valid(place))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--methods: {kind}={place}: {error}") from None
    if kind == "search":
        return _depth(place, place)
    return Method(f"{place}, uniform", "neurons, heads", {"mode": "allocation"}, place)


def budgets_named(text: str) -> list[dict[str, float]]:
    """Turn ``keep=0.7,speedup=1.5`` into budgets.

    Raises:
        ConfigError: It is not a list of budgets.
    """
    budgets = []
    for part in text.split(","):
        kind, _, value = part.strip().partition("=")
        try:
            budget = {kind: float(value)}
            if kind not in ("keep", "speedup"):
                raise ValueError(kind)
            PlanConfig.model_validate(budget)
        except ValueError:
            raise ConfigError(f"--budgets: got {part.strip()!r}; write them like {BUDGETS}") from None
        budgets.append(budget)
    return budgets


def plan_for(session: Session, settings: PlanConfig, seed: int) -> CompressionPlan:
    """The plan of a search; one that was chosen before from the same is read.

    Args:
        session: Whose candidates it is chosen from.
        settings: Search and budget.
        seed: Of what the search draws at random.

    Raises:
        BudgetError: No plan of this search meets the budget.
    """
    drawn = 0 if getattr(SEARCHES.named(settings.mode), "deterministic", False) else seed
    costs = (session.out / "candidates.json").read_text(encoding="utf-8")  # whose times may be shared after the stage
    path = (
        session.out / "compare" / "plans" / f"{digest(session.depends('fit'), costs, settings.identity(), drawn)}.json"
    )
    if path.is_file():
        return load_artifact(CompressionPlan, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plan = with_starts(session, choose(settings.mode, session.search_context(settings, seed)))
    save_artifact(plan, path)
    return plan


def zeros_row(session: Session, name: str, method: Method, budget: Mapping[str, float]) -> tuple[Row, float]:
    """The row of a method that sets weights to zero, and its cost in teacher forwards.

    Raises:
        BudgetError: The budget is a speed-up, or asks for more zeros than there are weights.
        ConfigError: Zeros do not go with how the run trains.
    """
    if "keep" not in budget:
        raise BudgetError("zeros make nothing faster by themselves")
    transformer, adapter = session.transformer, session.adapter
    candidates = session.candidates
    model = session.search_context().model
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
    distill = changed(session.config.distill, from_fit=False, sparsity=settings)
    cost = sparsity_cost(settings, settings.states, len(blocks))
    return Row(f"{slug(budget)}/{name}", method.label, plan, distill), cost


def row_of(
    session: Session, name: str, method: Method, budget: Mapping[str, float], seed: int
) -> tuple[Row, float | None]:
    """The row of a method under a budget, and its cost in teacher forwards (None: it does not say).

    Raises:
        BudgetError: It has no plan that meets the budget.
    """
    if method.zeros is not None:
        return zeros_row(session, name, method, budget)
    base = fork(session, method.criterion, UNITS) if method.criterion else session
    limits = {"keep": None, "speedup": None, "fit_gb": None, **budget}
    settings = PlanConfig.model_validate({**session.config.plan.model_dump(), **limits, **method.plan})
    plan = plan_for(base, settings, seed)
    cost: float | None = plan.teacher_forwards
    if method.criterion:
        cost = base.candidates.criterion_forwards
    distill = session.config.distill.model_copy(update={"from_fit": False})
    return Row(f"{slug(budget)}/{name}", method.label, plan, distill, fitted_by=base), cost


def slug(budget: Mapping[str, float]) -> str:
    """A budget as a folder's name, e.g. ``keep-0.7``."""
    return "-".join(f"{kind}-{value:g}" for kind, value in budget.items())


def compare_methods(
    session: Session,
    methods: Mapping[str, Method],
    budgets: Sequence[Mapping[str, float]],
    seeds: Sequence[int],
    place: Path | None = None,
) -> str:
    """Compare methods under equal budgets and equal recovery; resumable.

    Writes ``RUN/compare/<budget>/<method>/seed-<s>`` and ``RUN/compare/methods.md|json|png``.

    Args:
        session: Of a run whose fit stage is done.
        methods: By name.
        budgets: One kind and value each.
        seeds: Of training, and of searches that draw at random.
        place: A further place for the Markdown table; the plot goes beside it.

    Returns:
        The Markdown text.
    """
    runner = RowRunner(session)
    entries: list[Entry] = []
    for budget in budgets:
        for name, method in methods.items():
            try:
                rows = [row_of(runner.session, name, method, budget, seed) for seed in seeds]
            except UserError as error:  # the other methods are worth their hours
                entries.append(Entry(slug(budget), name, method.label, method.units, why_not=str(error)))
                continue
            metrics = [runner.run(row, seed) for (row, _), seed in zip(rows, seeds, strict=True)]
            plans = [row.plan for row, _ in rows]
            entries.append(Entry(slug(budget), name, method.label, method.units, plans, metrics, rows[0][1]))
    data = {"seeds": seeds, "rows": [entry.as_json() for entry in entries]}
    for path in filter(None, (session.out / "compare" / "methods.md", place)):
        draw(entries, path.with_suffix(".png"))
    return finish(session, "methods", paragraphs(runner, entries, seeds), data, place)
