"""RARTS (Xue, Qi, Xin 2020, arXiv 2008.03901): gates trained on a relaxed split of data and weights.

Differentiable architecture search is a problem in two levels: architecture a on validation data, weights w on training
data. RARTS makes one level of it with a second set of weights y, tied to the first by a penalty:

    L(y, w, a) = L_val(y, a) + lambda L_train(w, a) + beta/2 ||y - w||^2,

and goes down it one set after the other (Gauss-Seidel), each with what the others have become. No second derivatives
are needed. Here a are gates of blocks, w and y two sets of LoRA on one frozen teacher, and the two losses are of
disjoint prompts. A hinge on the cost of sigmoid(a) asks for the budget; at the end blocks go by the order of their
gates, so that the budget is met exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ppcl.common.progress import Progress
from ppcl.pruning.planner import removal_ladder
from ppcl.pruning.searches.base import Context
from ppcl.pruning.searches.gates import PASSES, GatedStudent, apply_gradients, draw
from ppcl.student.plan import CompressionPlan

LAMBDA, BETA = 10.0, 10.0
OPEN = 0.9  # of the gates at first, slightly below 1, so that each has a gradient
GATE_RATE, LORA_RATE = 0.2, 1e-3
HINGE = 1.0  # beside the loss of the velocity, for a share of the model that is too much

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Player:
    """One of the sets of variables, and what moves it."""

    variables: Sequence[Tensor]
    optimizer: torch.optim.Optimizer


def gauss_seidel(
    w: Player, y: Player, a: Player, train: Loss, validate: Loss, penalty: Loss, factor: float, beta: float
) -> None:
    """One round of RARTS: w, then y, then a, each by the gradient of L where the others are now.

    Args:
        w: Weights of the training loss.
        y: Weights of the validation loss, like w one by one.
        a: The architecture.
        train: L_train(w, a).
        validate: L_val(y, a).
        penalty: Of a alone, e.g. on its cost.
        factor: lambda.
        beta: Of the tie between y and w.
    """

    def tie() -> Tensor:
        pairs = zip(y.variables, w.variables, strict=True)
        return beta / 2 * torch.stack([(one - other).pow(2).sum() for one, other in pairs]).sum()

    apply_gradients(w.optimizer, factor * train() + tie(), w.variables)
    apply_gradients(y.optimizer, validate() + tie(), y.variables)
    apply_gradients(a.optimizer, validate() + factor * train() + penalty(), a.variables)


class Rarts:
    """Train gates for ``plan.search_steps`` rounds of ``plan.search_batch`` states of each half."""

    def cost(self, context: Context) -> float:
        """Four passes forward and backward a round: w, y, and both for the gates."""
        return 4 * PASSES * context.settings.search_steps * context.settings.search_batch

    def choose(self, context: Context) -> CompressionPlan:
        """Train, and remove blocks from the most closed gate on.

        Raises:
            BudgetError: Even all blocks that can go are not enough.
            ModelError: Blocks of this family cannot stand behind a gate.
            ArtifactError: There are states of one prompt alone.
        """
        blocks = context.removable()
        context.remove_in_order(blocks, "first")  # a budget that cannot be met is found before training
        train_half, validation_half = context.teacher.train.halves()
        first, second = (GatedStudent(context.teacher, blocks, context.seed) for _ in range(2))
        logits = torch.full((len(blocks),), math.log(OPEN / (1 - OPEN)), requires_grad=True)
        w, y = (Player(s.parameters, torch.optim.AdamW(s.parameters, LORA_RATE, fused=True)) for s in (first, second))
        a = Player([logits], torch.optim.AdamW([logits], GATE_RATE, weight_decay=0.0))
        with Progress("plan: gates", total=context.settings.search_steps) as progress:
            for step in range(context.settings.search_steps):
                one, other = draw(train_half, context, step, 74), draw(validation_half, context, step, 75)
                gauss_seidel(
                    *(w, y, a),
                    lambda call=one: first.loss(call, logits.sigmoid()),  # type: ignore[misc]
                    lambda call=other: second.loss(call, logits.sigmoid()),  # type: ignore[misc]
                    lambda: (1 + LAMBDA) * HINGE * excess(context, blocks, logits.sigmoid()),
                    LAMBDA,
                    BETA,
                )
                progress.advance()
        order = logits.detach().argsort(stable=True).tolist()
        return context.first_that_fits(removal_ladder([blocks[i] for i in order]), "first")


def excess(context: Context, blocks: Sequence[tuple[str, int]], gates: Tensor) -> Tensor:
    """The hinge: by what share of the model its blocks, weighed by their gates, are more than the budget.

    Args:
        context: Sizes and budget.
        blocks: (stack, block) of each gate.
        gates: 0 to 1, (blocks,).

    Returns:
        A scalar, 0 within the budget.
    """
    by_flops = context.settings.budget[0] == "speedup"
    sizes = {s.name: s.block_flops if by_flops else s.block_params for s in context.model.stacks}
    whole = context.model.flops if by_flops else context.model.params
    share = torch.tensor([sizes[stack][index] / whole for stack, index in blocks])
    return torch.relu(context.needed_savings / whole - ((1 - gates) * share).sum())
