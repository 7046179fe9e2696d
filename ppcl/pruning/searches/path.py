"""Path search (Paths-over-Graph, arXiv 2410.14211) on the layer graph of :mod:`ppcl.pruning.searches.graph`.

Edges are what the fit stage made: fitted substitutes of runs (chained probes for those it did not fit), and blocks
with smaller modules. Paths are measured by the velocity error on held-out states of all timesteps. These are states
of calibration prompts: evaluation prompts are never looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from ppcl.errors import BudgetError
from ppcl.pruning.knapsack import Route, edges_of, layout_of
from ppcl.pruning.planner import costs_of, infeasible, meets, nearest_budget, plan, usable
from ppcl.pruning.searches.base import Context
from ppcl.pruning.searches.graph import Graph, PathSearch, Widths
from ppcl.student.plan import CompressionPlan, Segment, start_index
from ppcl.student.prediction import predict

BATCH = 16
PRIORS = ("optimal", "paper", "uniform", "influence")


class Path:
    """Search for the model of least true error under the budget.

    The paper's widths 80 / 20 / 3. Must-keep blocks are the quarter of most influence; what is suggested beforehand
    are the plans of the planner's modes. Branches are measured on a quarter of the states.
    """

    widths, deterministic = Widths(), True

    def cost(self, context: Context) -> float:
        """At most: each phase measures two branches a path that the fuzzy step kept, and the paths of the last step."""
        widths, (few, many) = self.widths, _states(context)
        phases = 2 + widths.rounds
        return phases * (2 * widths.fuzzy * few + widths.reduced * many) + len(PRIORS) * many

    def choose(self, context: Context) -> CompressionPlan:
        """Search, and turn the best path into a plan."""
        teacher, (few, many) = context.teacher, _states(context)
        graph, linear = build_graph(context)
        modules: dict[int, nn.Module] = {}

        def measure(routes: Sequence[Route], states: int, label: str) -> list[float]:
            new = sorted({number for route in routes for number in route} - modules.keys())
            pieces = [(graph.edges[n].stack, graph.edges[n].segment) for n in new]
            modules.update(zip(new, teacher.substitutes(context.model, pieces, [linear[n] for n in new]), strict=True))
            models = [[((graph.edges[n].stack, graph.edges[n].segment), modules[n]) for n in route] for route in routes]
            return teacher.errors(models, states, min(BATCH, states), label)

        search = PathSearch(
            graph,
            lambda routes: measure(routes, few, "plan: branches"),
            lambda routes: measure(routes, many, "plan: paths"),
            self.widths,
        )
        best = search.run(must_keep(context), priors(context, graph))
        if best is None:
            raise AssertionError("the graph was built with a path that saves enough")
        layout = layout_of(context.model, [graph.edges[number] for number in best])
        kind, value = context.settings.budget
        prediction = predict(context.model, layout, math.sqrt(search.errors[best]))
        return CompressionPlan(context.model, context.settings.mode, {kind: value}, layout, prediction)


def _states(context: Context) -> tuple[int, int]:
    """States behind the error of a branch and of a path."""
    many = context.settings.search_states
    return max(1, many // 4), many


def build_graph(context: Context) -> tuple[Graph, list[bool]]:
    """The layer graph of what was measured, and for each edge whether only its chained probes were.

    Runs that were fitted and runs that were not have costs on different scales, so the others come in only where the
    fitted ones cannot meet the budget.

    Raises:
        BudgetError: No path meets the budget.
    """
    model, settings = context.model, context.settings
    kind, value = settings.budget
    runs, options = usable(model, context.candidates, settings)
    for costed in ([run for run in runs if run.fitted_error is not None], runs):
        edges = edges_of(model, costed, options, kind == "speedup", context.candidates.vectors)
        graph = Graph(sum(stack.num_blocks for stack in model.stacks), edges, context.needed_savings)
        most = predict(model, layout_of(model, [edges[number] for number in graph.most()]))
        if meets(most, kind, value):
            fitted = {run for run, cost in costs_of(context.candidates).items() if cost.fitted_error is not None}
            spans = [(edge.stack, edge.segment.first, edge.segment.last) for edge in edges]
            return graph, [e.segment.is_run and span not in fitted for e, span in zip(edges, spans, strict=True)]
    raise BudgetError(infeasible(settings, nearest_budget([most], kind)))


def must_keep(context: Context) -> set[int]:
    """The quarter of all blocks that has most influence, numbered through the stacks."""
    scored, offset = [], 0
    for stack in context.model.stacks:
        influence = next(s.influence for s in context.analysis.stacks if s.name == stack.name)
        scored += [(value, offset + index) for index, value in enumerate(influence)]
        offset += stack.num_blocks
    return {block for _, block in sorted(scored, reverse=True)[: len(scored) // 4]}


def priors(context: Context, graph: Graph) -> list[Route]:
    """The plans of the planner's modes as paths; of what is not in the graph, the rest."""
    numbers = {_key(edge.stack, edge.segment): number for number, edge in enumerate(graph.edges)}
    routes = []
    for mode in PRIORS:
        settings = context.settings.model_copy(update={"mode": mode})
        try:
            suggested = plan(context.analysis, context.candidates, settings)
        except BudgetError:
            continue
        keys = [_key(s.name, segment) for s in context.model.stacks for segment in suggested.stacks[s.name]]
        routes.append(tuple(numbers[key] for key in keys if key in numbers))
    return routes


def _key(stack: str, segment: Segment) -> tuple[object, ...]:
    start = start_index(segment.first, segment.last, segment.start) if segment.is_run else segment.first
    return stack, segment.first, segment.last, start, repr(sorted(segment.width.items()))
