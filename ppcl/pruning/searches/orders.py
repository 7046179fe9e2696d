"""Searches that put the blocks in an order without looking at the model: the floor, and position."""

from __future__ import annotations

import random

from ppcl.pruning.searches.base import Context
from ppcl.student.plan import CompressionPlan


class Random:
    """Remove blocks in a random order: the floor that every other search must beat."""

    def cost(self, context: Context) -> float:
        """Nothing: it does not look."""
        return 0

    def choose(self, context: Context) -> CompressionPlan:
        """The order depends on the seed alone."""
        order = context.removable()
        random.Random(context.seed).shuffle(order)
        return context.remove_in_order(order)


class Position:
    """Later blocks first (HierarchicalPrune's position rule): early blocks lay out the picture, later ones refine it.

    Blocks go in the reverse order of execution over all stacks, so the early ones stay as long as the budget can be
    met without them. Those that went are one run at the end, which one block stands for. The paper's other parts
    (weights that make distillation gentle on sensitive blocks) are not plans and are not here.
    """

    deterministic = True

    def cost(self, context: Context) -> float:
        """Nothing: it does not look."""
        return 0

    def choose(self, context: Context) -> CompressionPlan:
        """Remove from the end."""
        return context.remove_in_order(context.removable()[::-1])
