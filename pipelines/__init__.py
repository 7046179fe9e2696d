"""Using compressed models with diffusers.

A depth-compressed pipeline is stock diffusers: ``DiffusionPipeline.from_pretrained(folder)``
is all it takes, and nothing of this package. Where modules inside the blocks were made
smaller, too, write ``import ppcl.pipelines`` before that line: it makes the compressed classes
known to diffusers. What else is here helps with what diffusers cannot know: which of the
teacher's blocks are still there, and so where a LoRA or a ControlNet made for the teacher
belongs.
"""

from __future__ import annotations

from typing import Any

from ppcl.modules.compressed import register
from ppcl.pipelines.bundle import load_bundle
from ppcl.pipelines.controlnet import attach_controlnet, detach_controlnet
from ppcl.pipelines.lora import convert_lora, load_lora, remap_lora
from ppcl.pipelines.lora_report import MappingReport
from ppcl.pipelines.semi_structured import to_semi_structured
from ppcl.teacher.block_map import pipeline_record
from ppcl.teacher.families import ADAPTERS

__all__ = [
    "MappingReport",
    "attach_controlnet",
    "convert_lora",
    "detach_controlnet",
    "kept_blocks",
    "load_bundle",
    "load_lora",
    "remap_lora",
    "to_semi_structured",
]

register(ADAPTERS)


def kept_blocks(pipeline: Any) -> dict[str, list[int | list[int]]]:
    """Return, for each block list, where every block of a compressed pipeline comes from.

    Args:
        pipeline: A pipeline that ppcl exported, loaded by diffusers.

    Returns:
        For each block list one entry a block: the teacher's block number, or ``[first, last]`` of
        the run that it replaces.

    Raises:
        ModelError: The pipeline was not compressed by ppcl.
    """
    blocks: dict[str, list[int | list[int]]] = pipeline_record(pipeline)["kept_blocks"]
    return blocks
