"""Calls of a transformer: arguments and the velocity that it answers with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.teacher import call_arguments as trees


@dataclass(frozen=True)
class Call:
    """One call of the transformer.

    Attributes:
        arguments: By name.
        velocity: What the teacher answered, (B, ...).
        rows: Where each sample was recorded, (call, row), if it came from :class:`States`.
        per_sample: Which arguments have an entry for each sample, see :func:`ppcl.teacher.call_arguments.per_sample`; found if empty.
        whole_rows: The row of each sample in the call that the pipeline made, which tells its prompt; all of them in
            order if empty.
    """

    arguments: dict[str, Any]
    velocity: Tensor
    rows: tuple[tuple[int, int], ...] = ()
    per_sample: frozenset[str] = frozenset()
    whole_rows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.per_sample:
            object.__setattr__(self, "per_sample", trees.per_sample(self.arguments))
        if not self.whole_rows:
            object.__setattr__(self, "whole_rows", tuple(range(trees.batch_size(self.arguments))))

    def take(self, chosen: Sequence[int]) -> Call:
        """The same call of some of its samples."""
        picked = trees.take(self.arguments, list(chosen), self.per_sample)
        rows = tuple(self.whole_rows[row] for row in chosen)
        return Call(picked, self.velocity[list(chosen)], per_sample=self.per_sample, whole_rows=rows)


def velocity(transformer: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """Run the transformer on a batch of states; return its output (a list of tensors is stacked)."""
    return _velocity_of(transformer(**arguments, return_dict=False))


def _velocity_of(output: Any) -> Tensor:
    """The tensor in what a transformer returns: a tuple, an output class, or a list of one tensor a sample."""
    output = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    return torch.stack(output) if isinstance(output, list) else output
