"""What the analyze stage hands on."""

from __future__ import annotations

from dataclasses import dataclass, field

from ppcl.common.artifacts import SCHEMA_VERSION, STRICT, Count, Error, Index, Share
from ppcl.teacher.model_info import ModelInfo


@dataclass(frozen=True)
class Stability:
    """How often an interval is found again with other tokens: shares of the draws.

    Attributes:
        same: Draws with exactly this interval.
        first: Draws in which some interval starts where this one does.
        last: Draws in which some interval ends where this one does.
    """

    __pydantic_config__ = STRICT

    same: Share
    first: Share
    last: Share


@dataclass(frozen=True)
class StackAnalysis:
    """What the analysis found in one stack of M blocks.

    Attributes:
        cka: ``cka[u][k]`` for u <= k: CKA between the true output of block k and the chained
            probes u..k applied to block u's input, streams combined by token share; None for k < u (eq. 3).
        cka_by_stream: The same per stream.
        intervals: The paper's intervals [first, last] by eqs. 4-5 (runs of two or more blocks), found among the blocks
            that are not protected.
        probe_error: Held-out relative error of each block's probe, per stream.
        ridge: The ridge chosen per stream and block.
        influence: Block influence, 1 - mean cosine of a block's input and output (ShortGPT).
        ffn_linearity: Held-out relative error of the best linear map for each FFN, per stream (eq. 9).
        modulation_residual: Per stream and block, the share of a modulation layer's varying output that each rank
            0, 1, 2, ... misses on held-out prompts and timesteps that it was not fitted on; empty where a block has
            no such layer, or one whose input is not known before the blocks run.
        text_linearity: Held-out relative errors of a linear map from the preceding block's text signals
            (eq. 8): ``input`` for the text input of QKV, ``output`` for the block's text output.
        interval_draws: Draws of half of the held-out prompts that intervals were found with again; 0: none were made.
        interval_stability: For each interval, how often it was found.
    """

    __pydantic_config__ = STRICT

    name: str
    cka: tuple[tuple[float | None, ...], ...]
    cka_by_stream: dict[str, tuple[tuple[float | None, ...], ...]]
    intervals: tuple[tuple[Index, Index], ...]
    probe_error: dict[str, tuple[Error, ...]]
    ridge: dict[str, tuple[Error, ...]]
    influence: tuple[float, ...]
    ffn_linearity: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    text_linearity: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    modulation_residual: dict[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    interval_draws: Count = 0
    interval_stability: tuple[Stability, ...] = ()

    def check(self, num_blocks: int) -> None:
        """Refuse what is not of a stack of so many blocks.

        Raises:
            ValueError: A table or a list is of another length, or an interval is none.
        """
        lists = [self.cka, self.influence, *self.probe_error.values(), *self.ridge.values()]
        lists += [*self.cka, *self.ffn_linearity.values(), *self.text_linearity.values()]
        lists += [row for table in self.cka_by_stream.values() for row in (table, *table)]
        lists += self.modulation_residual.values()
        other = next((len(entries) for entries in lists if len(entries) != num_blocks), None)
        if other is not None:
            raise ValueError(f"{self.name}: numbers of {other} blocks, expected {num_blocks}")
        for first, last in self.intervals:
            if not first < last < num_blocks:
                raise ValueError(f"{self.name}: {first}-{last} is no interval of {num_blocks} blocks")
        if len(self.interval_stability) not in (0, len(self.intervals)):
            raise ValueError(f"{self.name}: {len(self.intervals)} intervals, but {len(self.interval_stability)} draws")


@dataclass(frozen=True)
class Analysis:
    """The result of the analyze stage (the probe matrices lie beside it as safetensors)."""

    __pydantic_config__ = STRICT

    model: ModelInfo
    stacks: tuple[StackAnalysis, ...]
    num_states: Count
    num_tokens: dict[str, Count]
    seconds: Error
    schema_version: int = SCHEMA_VERSION

    def check(self) -> None:
        """Refuse an analysis of other blocks than its model's.

        Raises:
            ValueError: A stack is missing or another's, or its numbers are not of its blocks.
        """
        self.model.check()
        if [stack.name for stack in self.stacks] != [stack.name for stack in self.model.stacks if stack.num_blocks]:
            raise ValueError(f"it has {[s.name for s in self.stacks]}, the model {[s.name for s in self.model.stacks]}")
        for stack in self.stacks:
            stack.check(self.model.stack(stack.name).num_blocks)
