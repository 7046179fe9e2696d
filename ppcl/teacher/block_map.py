"""Where the blocks of a compressed transformer come from, as its config records it (no torch here).

A block list of n teacher blocks became a shorter one. Every entry of it is a *span*: one
teacher block that was kept, or the run ``first..last`` that a substitute replaces. Where a compressed model was
compressed again, spans are those of the first teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppcl.common.reading import MOST_NUMBER
from ppcl.config.names import TRANSFORMER
from ppcl.errors import ModelError
from ppcl.modules.parts import check_part

RECORD = "_ppcl"  # entry of the config; diffusers does not warn of a key with a leading underscore
UNIFORM = "uniform"  # in it, of a model of a stock class with narrower networks: which units they keep
SCALES = ("true_cfg_scale", "distilled_guidance_scale", "guidance_scale")  # arguments that carry a guidance scale
Start = str | int | None


@dataclass(frozen=True)
class BlockMap:
    """The blocks of one stack.

    Attributes:
        spans: For each block of the compressed stack the teacher blocks (first, last) it stands for, inclusive.
        starts: For each of them the start of the substitute (``first``, ``middle``, ``last``, ``mean``), or the number
            of the teacher's block; None where it is not known, or no substitute.
    """

    spans: tuple[tuple[int, int], ...]
    starts: tuple[Start, ...]

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
        (first, last), start = self.spans[position], self.starts[position]
        named = {"first": first, "middle": (first + last) // 2, "last": last}
        return start if isinstance(start, int) else named.get(start or "")

    def joined(self, first: int, last: int, start: str | None) -> tuple[tuple[int, int], Start]:
        """Span and start of one block that another round of compression puts in the place of some of these.

        Args:
            first: Position of the first of them.
            last: Of the last one; the same where the block stays.
            start: What the substitute starts from, among these blocks.
        """
        span = (self.spans[first][0], self.spans[last][1])
        if first == last:
            return span, self.starts[first]
        if not any(self.is_run(position) for position in range(first, last + 1)):
            return span, start
        origin = {"first": first, "middle": (first + last) // 2, "last": last}.get(start or "")
        if origin is None:
            return span, None
        return span, self.start_index(origin) if self.is_run(origin) else self.spans[origin][0]


def block_maps(
    kept_blocks: Mapping[str, Sequence[Any]], starts: Mapping[str, Sequence[Start]] | None = None
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
    if not isinstance(kept_blocks, Mapping) or not isinstance(starts or {}, Mapping):
        raise ModelError("the record of kept blocks is no mapping; pass that of the transformer's config unchanged")
    for stack, entries in kept_blocks.items():
        if not isinstance(entries, list | tuple):
            raise ModelError(f"kept_blocks of '{stack}' is {str(entries)[:50]!r}, expected a list of blocks")
        spans, expected = [], 0
        for entry in entries if isinstance(entries, list | tuple) else [entries]:
            span = tuple(entry) if isinstance(entry, (list, tuple)) else (entry, entry)
            whole = len(span) == 2 and all(type(number) is int for number in span)
            if not whole or span[0] != expected or span[1] < span[0]:
                raise ModelError(
                    f"kept_blocks of '{stack}' has {entry!r} where block {expected} or a run [{expected}, last] "
                    "is expected; pass the record of the compressed transformer's config unchanged"
                )
            spans.append((span[0], span[1]))
            expected = span[1] + 1
        own = [start if isinstance(start, str) else None for start in (starts or {}).get(stack) or ()]
        own = [*own, *[None] * len(spans)][: len(spans)]
        if spans:
            maps[stack] = BlockMap(tuple(spans), tuple(own))
    if not maps:
        raise ModelError("kept_blocks is empty; expected a list of blocks for each block list of the transformer")
    return maps


def recorded_maps(config: Mapping[str, Any], counts: Mapping[str, int] | None = None) -> dict[str, BlockMap]:
    """The block maps in a transformer's config; none of one that ppcl did not compress.

    Args:
        config: The transformer's.
        counts: Blocks of each list, to compare with.

    Raises:
        ModelError: The record is damaged, or of other block lists.
    """
    record = config.get(RECORD)
    if not record:
        return {}
    if not isinstance(record, Mapping):
        raise ModelError(f"'{RECORD}' in the transformer's config is a {type(record).__name__}; export the model again")
    maps = block_maps(record.get("kept_blocks") or {}, record.get("starts"))
    for stack, count in (counts or {}).items():
        if stack in maps and len(maps[stack].spans) != count:
            raise ModelError(
                f"'{RECORD}' in the transformer's config lists {len(maps[stack].spans)} blocks of '{stack}', but there "
                f"are {count}; export the model again, or take '{RECORD}' out of the config to compress it as another"
            )
    return maps


def smaller_modules(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What is smaller than in the first teacher, by path: as a class of ours has it, or a stock one of narrow networks.

    Args:
        config: The transformer's.

    Raises:
        ModelError: The entries are damaged.
    """
    record = config.get(RECORD)
    uniform = record.get(UNIFORM) if isinstance(record, Mapping) else None
    parts = config.get("pruning") or (uniform.get("pruning") if isinstance(uniform, Mapping) else uniform) or {}
    if not isinstance(parts, Mapping):
        raise ModelError(f"smaller modules in the transformer's config are {str(parts)[:50]!r}; export the model again")
    for part in parts.values():
        check_part(part)
    return dict(parts)


def first_params(config: Mapping[str, Any]) -> int:
    """Parameters of the first teacher's transformer, by the config of a compressed one; 0 where it does not say."""
    record = config.get(RECORD)
    params = record.get("source_params") if isinstance(record, Mapping) else None
    return params if type(params) is int and 0 < params < MOST_NUMBER else 0


def pipeline_record(pipeline: Any, component: str = TRANSFORMER) -> Mapping[str, Any]:
    """Return what ppcl recorded in the config of a pipeline's transformer.

    Args:
        pipeline: A diffusers pipeline.
        component: Which transformer of it.

    Raises:
        ModelError: The pipeline was not compressed by ppcl.
    """
    config = getattr(getattr(pipeline, component, None), "config", None) or {}
    record = config.get(RECORD)
    if not record:
        raise ModelError(
            f"this {type(pipeline).__name__} was not compressed by ppcl: its {component} has no '{RECORD}' entry; "
            "on the teacher itself use diffusers' own calls"
        )
    if not isinstance(record, Mapping) or not isinstance(record.get("kept_blocks"), Mapping):
        raise ModelError(
            f"the '_ppcl' entry of the config of its {component} names no kept_blocks; export the pipeline again"
        )
    return record


def is_call(call: Any) -> bool:
    """Whether a record says a number of steps, a guidance scale at most beside it, and nothing else."""
    if not isinstance(call, Mapping) or not {"num_inference_steps"} <= call.keys() <= {"num_inference_steps", *SCALES}:
        return False
    steps, scales = call["num_inference_steps"], [call[name] for name in SCALES if name in call]
    return type(steps) is int and 0 < steps <= MOST_NUMBER and all(type(scale) in (int, float) for scale in scales)
