"""Which of many states are taken, where not all are: no timestep, branch, text length or prompt is left out by chance.

A sample of n of N states stands for all of them, so of every mark (a timestep, a branch of guidance, a shape, a prompt)
it has n / N of the states that bear it, to within one state wherever all marks can be had at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Mark:
    """What tells one state from another.

    Attributes:
        timestep: As the transformer is told.
        branch: Of classifier-free guidance.
        shape: Number of its shape: states of one shape go through the model together.
        size: Numbers in its arguments, which orders shapes by the length of their texts.
        prompt: Its text.
    """

    timestep: float
    branch: Hashable
    shape: int
    size: int
    prompt: str


def choose_states(marks: Sequence[Mark], count: int) -> list[int]:
    """Choose ``count`` states; a function of the marks alone.

    One state after the other, each time one whose marks are furthest behind their share. Timesteps and sizes are also
    counted in equal stretches, as many as there are states to choose, so that few states lie apart from each other;
    timesteps together with branches and with shapes, too.

    Args:
        marks: Of all states.
        count: Of those to choose.

    Returns:
        Their numbers, in order.
    """
    if count >= len(marks):
        return list(range(len(marks)))
    early = _stretches([mark.timestep for mark in marks], count)
    long = _stretches([mark.size for mark in marks], count)
    kinds: list[list[Hashable]] = [
        [mark.timestep for mark in marks],
        list(early),
        [mark.branch for mark in marks],
        [(mark.timestep, mark.branch) for mark in marks],
        [mark.shape for mark in marks],
        list(long),
        [(stretch, mark.shape) for stretch, mark in zip(early, marks, strict=True)],
        [mark.prompt for mark in marks],
    ]
    codes = [_numbered(kind) for kind in kinds]
    shares = [np.bincount(code) / len(marks) for code in codes]
    counts = [np.zeros(len(share)) for share in shares]
    taken = np.zeros(len(marks), dtype=bool)
    for number in range(1, count + 1):
        ahead = [(have - number * share)[code] for have, share, code in zip(counts, shares, codes, strict=True)]
        surplus = np.sum(ahead, axis=0).round(9)  # rounded: what is equal but for rounding goes by order
        chosen = int(np.where(taken, np.inf, surplus).argmin())
        taken[chosen] = True
        for have, code in zip(counts, codes, strict=True):
            have[code[chosen]] += 1
    return [int(number) for number in np.flatnonzero(taken)]


def _stretches(values: Sequence[float], count: int) -> list[int]:
    """The equal stretch of the sorted values in which each lies, of at most ``count``; equal values lie in one."""
    distinct, places, sizes = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    middles = (np.cumsum(sizes) - sizes / 2) / len(values)
    return [int(stretch) for stretch in np.floor(middles * min(count, len(distinct)))[places]]


def _numbered(values: Sequence[Hashable]) -> NDArray[np.int64]:
    """Values as numbers 0, 1, ... by their first occurrence."""
    numbers: dict[Hashable, int] = {}
    return np.asarray([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)


def allot(sizes: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
    """Share ``count`` places out to groups in proportion to their size, each rounded up or down at random.

    A group gets its exact share on average (systematic sampling), and all places are filled.
    """
    start = float(torch.rand(1, generator=generator, dtype=torch.float64))
    ends = itertools.accumulate(sizes, initial=0)
    edges = [min(count, int(start + count * end / sum(sizes))) for end in ends]
    return [end - first for first, end in itertools.pairwise(edges)]


def choose_rows(num_calls: int, count: int, size: int, generator: torch.Generator) -> dict[int, list[int]]:
    """Draw ``count`` of ``num_calls`` calls for each of ``size`` samples, one from each equal stretch.

    Within a stretch every call gets as many samples as any other (one more or less), so that no timestep and neither
    branch of classifier-free guidance is left out by chance, as it is where a whole batch shares one draw. The same
    samples stay together from stretch to stretch: what they share, the text above all, is then stored once.

    Returns:
        The rows of each call that has any, in order.
    """
    count = min(count, num_calls)
    edges = [i * num_calls // count for i in range(count + 1)]  # whole numbers, so that no call is drawn twice
    order = torch.randperm(size, generator=generator).tolist()
    rows: dict[int, list[int]] = {}
    for first, end in itertools.pairwise(edges):
        for part, call in enumerate(torch.randperm(end - first, generator=generator).tolist()):
            if chosen := order[part :: end - first]:
                rows[first + call] = sorted(chosen)
    return dict(sorted(rows.items()))
