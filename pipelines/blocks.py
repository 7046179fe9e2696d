"""Where the blocks of a compressed transformer come from, as its config records it (no torch here).

A block list of n teacher blocks became a shorter one. Every entry of it is a *span*: one
teacher block that was kept, or the run ``first..last`` that a substitute replaces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppcl.errors import ModelError


@dataclass(frozen=True)
class BlockMap:
    """The blocks of one stack.

    Attributes:
        spans: For each block of the compressed stack the teacher blocks (first, last) it stands for, inclusive.
        starts: For each of them the start of the substitute (``first``, ``middle``, ``last``, ``mean``), or None.
    """

    spans: tuple[tuple[int, int], ...]
    starts: tuple[str | None, ...]

    @property
    def num_teacher_blocks(self) -> int:
        """Blocks of the teacher's stack."""
        return self.spans[-1][1] + 1

    def locate(self, index: int) -> int:
        """Return the position in the compressed stack of the block that stands for teacher block ``index``.

        Raises:
            ValueError: The teacher has no such block, or nothing stands for it.
        """
        for position, (first, last) in enumerate(self.spans):
            if first <= index <= last:
                return position
        raise ValueError(f"no block of the compressed stack stands for block {index}")

    def is_run(self, position: int) -> bool:
        """Whether the block at ``position`` of the compressed stack is a substitute."""
        first, last = self.spans[position]
        return last > first

    def start_index(self, position: int) -> int | None:
        """Return the teacher block that the substitute at ``position`` started from, None if that is not known."""
        first, last = self.spans[position]
        return {"first": first, "middle": (first + last) // 2, "last": last}.get(self.starts[position] or "")


def block_maps(
    kept_blocks: Mapping[str, Sequence[Any]], starts: Mapping[str, Sequence[str | None]] | None = None
) -> dict[str, BlockMap]:
    """Read the record of a compressed transformer.

    Args:
        kept_blocks: For each stack one entry a block: a teacher block's number or ``[first, last]``, as
            :func:`ppcl.pipelines.kept_blocks` returns it.
        starts: For each stack one entry a block: what its substitute started from; None where it is too short.

    Returns:
        One map a stack.

    Raises:
        ModelError: The record is empty or does not list each of the teacher's blocks once and in order.
    """
    maps = {}
    for stack, entries in kept_blocks.items():
        spans, expected = [], 0
        for entry in entries:
            span = tuple(entry) if isinstance(entry, (list, tuple)) else (entry, entry)
            whole = len(span) == 2 and all(isinstance(number, int) for number in span)
            if not whole or span[0] != expected or span[1] < span[0]:
                raise ModelError(
                    f"kept_blocks of '{stack}' has {entry!r} where block {expected} or a run [{expected}, last] "
                    "is expected; pass the record of the compressed transformer's config unchanged"
                )
            spans.append((span[0], span[1]))
            expected = span[1] + 1
        own = [*(starts or {}).get(stack, ()), *[None] * len(spans)][: len(spans)]
        if spans:
            maps[stack] = BlockMap(tuple(spans), tuple(own))
    if not maps:
        raise ModelError("kept_blocks is empty; expected a list of blocks for each block list of the transformer")
    return maps


def pipeline_record(pipeline: Any) -> Mapping[str, Any]:
    """Return what ppcl recorded in the config of a pipeline's transformer.

    Raises:
        ModelError: The pipeline was not compressed by ppcl.
    """
    config = getattr(getattr(pipeline, "transformer", None), "config", None) or {}
    record = config.get("_ppcl")
    if not record:
        raise ModelError(
            f"this {type(pipeline).__name__} was not compressed by ppcl: its transformer has no '_ppcl' entry"
        )
    found: Mapping[str, Any] = record
    return found
