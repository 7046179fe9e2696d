"""What the output stage trains beside the substitutes: the kept blocks, their weights or LoRA on them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.common.parts import is_part
from ppcl.student.assembly import RunKey, own_names, with_blocks
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.families import Adapter
from ppcl.training.distributed import Group
from ppcl.training.lora import with_lora
from ppcl.training.sharding import shard_block, whole_copy


def thawed(
    student: nn.Module,
    adapter: Adapter,
    substitutes: Mapping[RunKey, nn.Module],
    group: Group,
    split: bool = False,
    again: bool = True,
) -> Any:
    """A student with its own copies of the kept blocks and of all else that it shared; everything is trained.

    Args:
        student: Made of the teacher's blocks and the substitutes.
        adapter: Its family.
        substitutes: Its own already.
        group: The processes that train.
        split: Split each block over them before the next one is copied, so that the whole student is never there.
        again: See :func:`ppcl.training.sharding.shard`.
    """
    lists: dict[str, list[nn.Module]] = {}
    own = set(map(id, substitutes.values()))
    for spec in adapter.stacks:
        lists[spec.name] = []
        for block in adapter.blocks(student, spec):
            trained = block if id(block) in own else whole_copy(block).float()
            if split:
                group.copy_from_main(trained.requires_grad_(True).parameters())
                shard_block(trained, again)
            lists[spec.name].append(trained)
    student = with_blocks(student, lists, own=True)
    for name, module in list(student._modules.items()):
        if name not in lists:
            student._modules[name] = copy.deepcopy(module)
    student.requires_grad_(True)
    student.train(False)
    if split:
        group.copy_from_main(p for p in student.parameters() if not is_part(p))
    return student


def kept_blocks(student: nn.Module, adapter: Adapter, plan: CompressionPlan) -> dict[str, nn.Module]:
    """A student's blocks that stand for one of the teacher's, by their path in the student."""
    return {
        f"{spec.name}.{position}": block
        for spec in adapter.stacks
        for position, (block, segment) in enumerate(
            zip(adapter.blocks(student, spec), plan.stacks[spec.name], strict=True)
        )
        if not segment.is_run
    }


def with_factors(
    student: nn.Module, adapter: Adapter, plan: CompressionPlan, rank: int, generator: torch.Generator
) -> Any:
    """A student whose kept blocks have LoRA; their weights stay the teacher's own.

    Args:
        student: Made of the teacher's blocks and the substitutes.
        adapter: Its family.
        plan: What it was made by.
        rank: Of the factors.
        generator: Draws the first of them.
    """
    lists = {}
    for spec in adapter.stacks:
        pairs = zip(adapter.blocks(student, spec), plan.stacks[spec.name], strict=True)
        lists[spec.name] = [
            block if segment.is_run else with_lora(block, rank, segment.width, generator) for block, segment in pairs
        ]
    return with_blocks(student, lists)


def tuned(student: nn.Module, plan: CompressionPlan, substitutes: Mapping[RunKey, nn.Module]) -> dict[str, Tensor]:
    """The weights of a thawed student that are no substitute's, by name."""
    own = set()
    for stack, segments in plan.stacks.items():
        for segment in segments:
            if segment.is_substitute:
                parameters = dict(substitutes[stack, segment.first, segment.last].named_parameters())
                own |= {id(parameters[name]) for name in own_names(segment, list(parameters))}
    return {name: p.detach() for name, p in student.named_parameters() if id(p) not in own}
