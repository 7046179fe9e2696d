"""What the analyze stage hands on."""

from __future__ import annotations

from dataclasses import dataclass, field

from ppcl.common.artifacts import SCHEMA_VERSION
from ppcl.teacher.model_info import ModelInfo


@dataclass(frozen=True)
class Stability:
    """How often an interval is found again with other tokens: shares of the draws.

    Attributes:
        same: Draws with exactly this interval.
        first: Draws in which some interval starts where this one does.
        last: Draws in which some interval ends where this one does.
    """

    same: float
    first: float
    last: float


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

    name: str
    cka: tuple[tuple[float | None, ...], ...]
    cka_by_stream: dict[str, tuple[tuple[float | None, ...], ...]]
    intervals: tuple[tuple[int, int], ...]
    probe_error: dict[str, tuple[float, ...]]
    ridge: dict[str, tuple[float, ...]]
    influence: tuple[float, ...]
    ffn_linearity: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    text_linearity: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    modulation_residual: dict[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)
    interval_draws: int = 0
    interval_stability: tuple[Stability, ...] = ()


@dataclass(frozen=True)
class Analysis:
    """The result of the analyze stage (the probe matrices lie beside it as safetensors)."""

    model: ModelInfo
    stacks: tuple[StackAnalysis, ...]
    num_states: int
    num_tokens: dict[str, int]
    seconds: float
    schema_version: int = SCHEMA_VERSION
