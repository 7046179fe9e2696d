"""Using compressed models with diffusers.

A depth-compressed pipeline is stock diffusers: ``DiffusionPipeline.from_pretrained(folder)``
is all it takes, and nothing of this package. Where modules inside the blocks were made
smaller, too, write ``import ppcl.pipelines`` before that line: it makes the compressed classes
known to diffusers. What else is here helps with what diffusers cannot know: which of the
teacher's blocks are still there, and so where a LoRA, a ControlNet or an IP-Adapter made for
the teacher belongs, and which numbers its blocks have now.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ppcl.config.names import TRANSFORMER
from ppcl.errors import UserError
from ppcl.modules.compressed import register
from ppcl.pipelines.bundle import load_bundle
from ppcl.pipelines.controlnet import attach_controlnet, detach_controlnet
from ppcl.pipelines.ip_adapter import load_ip_adapter
from ppcl.pipelines.lora import convert_lora, load_lora, remap_lora
from ppcl.pipelines.lora_report import MappingReport
from ppcl.pipelines.semi_structured import to_semi_structured
from ppcl.teacher.block_map import block_maps, pipeline_record
from ppcl.teacher.families import ADAPTERS

__all__ = [
    "MappingReport",
    "attach_controlnet",
    "convert_lora",
    "detach_controlnet",
    "kept_blocks",
    "load_bundle",
    "load_ip_adapter",
    "load_lora",
    "locate_blocks",
    "remap_lora",
    "to_semi_structured",
]

register(ADAPTERS)


def kept_blocks(pipeline: Any, component: str = TRANSFORMER) -> dict[str, list[int | list[int]]]:
    """Return, for each block list, where every block of a compressed pipeline comes from.

    Args:
        pipeline: A pipeline that ppcl exported, loaded by diffusers.
        component: Which transformer of it.

    Returns:
        For each block list one entry a block: the teacher's block number, or ``[first, last]`` of
        the run that it replaces.

    Raises:
        ModelError: The pipeline was not compressed by ppcl.
    """
    blocks: dict[str, list[int | list[int]]] = pipeline_record(pipeline, component)["kept_blocks"]
    return blocks


def locate_blocks(pipeline: Any, numbers: Iterable[int], stack: str | None = None) -> list[int]:
    """Where some of the teacher's blocks are now, for settings that name blocks by number.

    Such are SD3.5's ``skip_guidance_layers``, the ``indices`` of ``LayerSkipConfig`` (skip-layer, perturbed-attention
    and smoothed-energy guidance), and per-block weights of a LoRA. A substitute is named where at least half of the
    blocks that it replaces are.

    Args:
        pipeline: A pipeline that ppcl exported, loaded by diffusers.
        numbers: The teacher's block numbers.
        stack: The block list; the first one if None.

    Raises:
        ModelError: The pipeline was not compressed by ppcl.
        UserError: It has no such list, or the teacher no such block.
    """
    maps = block_maps(pipeline_record(pipeline)["kept_blocks"])
    name, wanted = stack or next(iter(maps)), set(numbers)
    if name not in maps:
        raise UserError(f"stack is {name!r}; expected one of {', '.join(maps)}")
    count = maps[name].num_teacher_blocks
    if not wanted <= set(range(count)):
        raise UserError(f"block {max(wanted)} of '{name}' is not there; the teacher had {count} (0-{count - 1})")
    spans = enumerate(maps[name].spans)
    return [
        position
        for position, (first, last) in spans
        if 2 * len(wanted & set(range(first, last + 1))) >= last - first + 1
    ]
