"""What the analyze stage hands on."""

from __future__ import annotations

from dataclasses import dataclass, field

from ppcl.common.artifacts import SCHEMA_VERSION
from ppcl.teacher.model_info import ModelInfo


@dataclass(frozen=True)
class StackAnalysis:
    """What the analysis found in one stack of M blocks.

    Attributes:
        cka: ``cka[u][k]`` for u <= k: CKA between the true output of block k and the chained
            probes u..k applied to block u's input, streams combined by token share; None for k < u (eq. 3).
        cka_by_stream: The same per stream.
        intervals: The paper's intervals [first, last] by eqs. 4-5 (runs of two or more blocks).
        probe_error: Held-out relative error of each block's probe, per stream.
        ridge: The ridge chosen per stream and block.
        influence: Block influence, 1 - mean cosine of a block's input and output (ShortGPT).
        ffn_linearity: Held-out relative error of the best linear map for each FFN, per stream (eq. 9).
        modulation_residual: Per stream and block, the share of a modulation layer's varying output that each rank
            0, 1, 2, ... misses for the inputs that occur.
        text_linearity: Held-out relative errors of a linear map from the preceding block's text signals
            (eq. 8): ``input`` for the text input of QKV, ``output`` for the block's text output.
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


@dataclass(frozen=True)
class Analysis:
    """The result of the analyze stage (the probe matrices lie beside it as safetensors)."""

    model: ModelInfo
    stacks: tuple[StackAnalysis, ...]
    num_states: int
    num_tokens: dict[str, int]
    seconds: float
    schema_version: int = SCHEMA_VERSION
