"""The teacher as the planner sees it: blocks, parameters, FLOPs, bytes. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ppcl.common.artifacts import STRICT, Count, Index
from ppcl.config.names import TRANSFORMER


@dataclass(frozen=True)
class Stack:
    """One block list of a transformer.

    Attributes:
        name: Attribute path of the ModuleList, e.g. ``transformer_blocks``.
        count_field: Config field that holds its length, e.g. ``num_layers``.
        num_blocks: Its length in the teacher.
        block_params: Parameters of each block.
        block_flops: Forward FLOPs of each block for one sample of the calibration's shape.
        spans: Where the teacher is a compressed model itself, the blocks (first, last) of the first teacher that each
            block stands for; else empty.
    """

    __pydantic_config__ = STRICT

    name: str
    count_field: str
    num_blocks: Index
    block_params: tuple[Count, ...]
    block_flops: tuple[Count, ...] = ()
    spans: tuple[tuple[Index, Index], ...] = ()

    def first_teachers(self, first: int, last: int) -> tuple[int, int]:
        """The blocks of the first teacher that blocks first..last stand for."""
        return (self.spans[first][0], self.spans[last][1]) if self.spans else (first, last)


@dataclass(frozen=True)
class ModelInfo:
    """The teacher as the planner sees it.

    Attributes:
        transformer_class: Class name of the transformer.
        config_digest: Digest of its config; artifacts of another model are refused by it.
        params: Parameters of the whole transformer.
        flops: Forward FLOPs of the whole transformer for one sample (0: not counted).
        bytes_per_param: Bytes of one stored weight.
        other_bytes: Bytes of the pipeline's other components (text encoder, VAE).
        stacks: The block lists in execution order.
        weights_digest: Of the pipeline's files (:func:`ppcl.teacher.origin.weights_digest`); what was made of other
            weights is refused by it. Empty where it is not known.
        first_params: Where it is a compressed model itself, the parameters of the first teacher's transformer; 0 where
            they are not known.
        stored: Bytes of the transformer as it will be written, by its segments
            (:class:`ppcl.student.stored_size.StoredSize`); None: ``bytes_per_param`` for each parameter.
        component: Its name in the pipeline.
    """

    __pydantic_config__ = STRICT

    transformer_class: str
    config_digest: str
    params: Count
    flops: Count
    bytes_per_param: Count
    other_bytes: Count
    stacks: tuple[Stack, ...]
    weights_digest: str = ""
    first_params: Count = 0
    stored: Any = field(default=None, repr=False, compare=False, metadata={"stored": False})
    component: str = TRANSFORMER

    def stack(self, name: str) -> Stack:
        """Return a stack by its name.

        Raises:
            ValueError: There is none.
        """
        for stack in self.stacks:
            if stack.name == name:
                return stack
        raise ValueError(f"the model has no blocks '{name}'")

    def check(self) -> None:
        """Refuse numbers that do not belong together.

        Raises:
            ValueError: Lists of blocks are not as long as they say, or hold more than the whole.
        """
        if len({stack.name for stack in self.stacks}) < len(self.stacks):
            raise ValueError("two lists of blocks have one name")
        for stack in self.stacks:
            if len(stack.block_params) != stack.num_blocks or len(stack.block_flops) not in (0, stack.num_blocks):
                raise ValueError(f"{stack.name}: {stack.num_blocks} blocks, but numbers of {len(stack.block_params)}")
        for whole, parts in (
            (self.params, [n for stack in self.stacks for n in stack.block_params]),
            (self.flops, [n for stack in self.stacks for n in stack.block_flops]),
        ):
            if whole and sum(parts) > whole:
                raise ValueError(f"blocks of {sum(parts)} in a model of {whole}")
        if not self.params:
            raise ValueError("a model without parameters")
