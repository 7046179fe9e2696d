"""Using compressed models with diffusers.

A depth-compressed pipeline is stock diffusers: ``DiffusionPipeline.from_pretrained(folder)``
is all it takes, and nothing of this package. What is here helps with what diffusers cannot
know: which of the teacher's blocks are still there.
"""

from __future__ import annotations

from typing import Any

from ppcl.errors import ModelError


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
    record = pipeline.transformer.config.get("_ppcl")
    if not record:
        raise ModelError(
            f"this {type(pipeline).__name__} was not compressed by ppcl: its transformer has no '_ppcl' entry"
        )
    blocks: dict[str, list[int | list[int]]] = record["kept_blocks"]
    return blocks
