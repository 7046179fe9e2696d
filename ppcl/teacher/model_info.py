"""The teacher as the planner sees it: blocks, parameters, FLOPs, bytes. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


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

    name: str
    count_field: str
    num_blocks: int
    block_params: tuple[int, ...]
    block_flops: tuple[int, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()

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
    """

    transformer_class: str
    config_digest: str
    params: int
    flops: int
    bytes_per_param: int
    other_bytes: int
    stacks: tuple[Stack, ...]
