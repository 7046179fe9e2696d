"""Learned depth masks (TinyFusion, arXiv 2412.01199): which blocks of each group stay is trained with LoRA.

Blocks lie in groups of four neighbours, and of each group a given number goes. A group has one logit for each way to
do that. A step draws a way by Gumbel-softmax, straight through: the mask is hard in the forward pass, its gradient that
of the soft one. Logits and LoRA are trained jointly, so what counts is not the loss after pruning but the loss after
recovery, as far as LoRA can foretell it. At the end each group's likeliest way is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import torch
from torch import Tensor

from ppcl.common.progress import Progress
from ppcl.common.streams import step_generator
from ppcl.pruning.planner import Runs, removal_ladder, shares
from ppcl.pruning.searches.base import Context
from ppcl.pruning.searches.gates import PASSES, GatedStudent, apply_gradients, draw
from ppcl.student.plan import CompressionPlan

GROUP = 4
TEMPERATURES = (4.0, 0.1)  # of the first and the last step
LOGIT_RATE, LORA_RATE = 0.1, 1e-3

Block = tuple[str, int]


class Learned:
    """Train depth masks for ``plan.search_steps`` steps of ``plan.search_batch`` states."""

    def cost(self, context: Context) -> float:
        """One student, forward and backward; the teacher's answers were recorded."""
        return PASSES * context.settings.search_steps * context.settings.search_batch

    def choose(self, context: Context) -> CompressionPlan:
        """Train, and take each group's likeliest way.

        Raises:
            BudgetError: Even all blocks that can go are not enough.
            ModelError: Blocks of this family cannot stand behind a gate.
        """
        groups = groups_of(context.removable())
        quotas = quotas_of(context, groups)
        if not any(quotas):  # the teacher itself meets the budget
            return context.first_that_fits([()])
        masks = [ways(len(group), quota) for group, quota in zip(groups, quotas, strict=True)]
        logits = [torch.zeros(len(mask), requires_grad=True) for mask in masks]
        student = GatedStudent(context.teacher, [block for group in groups for block in group], context.seed)
        optimizer = torch.optim.AdamW(
            [{"params": logits, "lr": LOGIT_RATE}, {"params": student.parameters, "lr": LORA_RATE}],
            weight_decay=0.0,
            fused=True,
        )
        steps = context.settings.search_steps
        with Progress("plan: depth masks", total=steps) as progress:
            for step in range(steps):
                generator = step_generator(context.seed, step, 73)
                share = step / max(1, steps - 1)
                temperature = TEMPERATURES[0] ** (1 - share) * TEMPERATURES[1] ** share
                drawn = [
                    gumbel(logit, temperature, generator) @ mask for logit, mask in zip(logits, masks, strict=True)
                ]
                loss = student.loss(draw(context.teacher.train, context, step, 72), torch.cat(drawn))
                apply_gradients(optimizer, loss, [*logits, *student.parameters])
                progress.advance(loss=float(loss.detach()))
        kept = [mask[int(logit.argmax())] for logit, mask in zip(logits, masks, strict=True)]
        gone = [b for group, mask in zip(groups, kept, strict=True) for b, k in zip(group, mask, strict=True) if not k]
        return context.first_that_fits(removal_ladder(gone)[-1:], "first")


def groups_of(blocks: Sequence[Block]) -> list[list[Block]]:
    """Up to four neighbours of one stack a group, as even as can be."""
    found: list[list[Block]] = []
    for stack in dict.fromkeys(name for name, _ in blocks):
        own = [block for block in blocks if block[0] == stack]
        count = -(-len(own) // GROUP)
        edges = [i * len(own) // count for i in range(count + 1)]
        found += [own[a:b] for a, b in pairwise(edges)]
    return found


def quotas_of(context: Context, groups: Sequence[Sequence[Block]]) -> list[int]:
    """How many blocks of each group go: as few as the budget asks, in proportion to the groups.

    Where blocks differ in size, the smallest of each group must do, so that every way meets the budget.

    Raises:
        BudgetError: Even all of them are not enough.
    """
    sizes = {
        (stack.name, i): ((by_flops and stack.block_flops) or stack.block_params)[i]
        for by_flops in [context.settings.budget[0] == "speedup"]
        for stack in context.model.stacks
        for i in range(stack.num_blocks)
    }
    limits = [len(group) for group in groups]
    found: dict[Runs, list[int]] = {}
    for total in range(sum(limits) + 1):
        quotas = shares(total, limits)
        least = [
            block
            for group, quota in zip(groups, quotas, strict=True)
            for block in sorted(group, key=lambda b: sizes[b])[:quota]
        ]
        found[removal_ladder(least)[-1]] = quotas
    plan = context.first_that_fits(list(found), "first")
    return found[tuple(sorted((name, s.first, s.last) for name, s in plan.runs))]


def ways(size: int, quota: int) -> Tensor:
    """All masks of a group: (ways, size), 0 for the ``quota`` blocks that go."""
    rows = [[float(i not in gone) for i in range(size)] for gone in combinations(range(size), quota)]
    return torch.tensor(rows)


def gumbel(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Draw one of n ways, one-hot (n,); the gradient is that of the soft choice (straight through)."""
    uniform = torch.rand(logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    soft = torch.softmax((logits - torch.log(-torch.log(uniform))) / temperature, 0)
    hard = torch.nn.functional.one_hot(soft.argmax(), len(logits)).float()
    return hard + soft - soft.detach()
