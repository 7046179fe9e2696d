"""Recorded states with their caption and without it: the two answers that classifier-free guidance takes apart.

What is recorded of a trajectory is one branch of guidance at a time. The other branch of a captioned state has the same
latents at the same timestep; all the rest of it is alike for all captions, so that any recorded call without caption
gives it.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator
from typing import Any

from torch import Tensor, nn

from ppcl.capture.states import Row, States
from ppcl.teacher import call_arguments as trees
from ppcl.teacher.calls import Call

ALIKE = 1e-2  # relative distance of two texts that are one, encoded in different batches


class Pairs:
    """Which recorded states are without caption, and what they have in common.

    Args:
        transformer: Whose calls were recorded.
        states: Of several prompts.

    Attributes:
        branch: The branch of guidance that is told the same of all prompts; None if there is none, or no other.
    """

    def __init__(self, transformer: nn.Module, states: States) -> None:
        latents = next(iter(inspect.signature(transformer.forward).parameters))  # which a transformer takes first
        self.states, self.latents = states, latents
        branches: dict[Hashable, dict[str, Row]] = {}
        for row, mark in states.marks.items():
            branches.setdefault(mark.branch, {}).setdefault(mark.prompt, row)
        alike = [branch for branch, rows in branches.items() if self._tells_one_text(list(rows.values())[:2])]
        self.branch = alike[0] if len(alike) == 1 and len(branches) > 1 else None
        bare = [] if self.branch is None else [r for r, mark in states.marks.items() if mark.branch == self.branch]
        self._by_shape = {self._shape(states.batch([row])): row for row in bare}

    def of(self, states: States, size: int, limit: int | None = None) -> Iterator[tuple[Call, dict[str, Any] | None]]:
        """Yield captioned states, each batch with the same states without caption.

        Args:
            states: To choose from.
            size: Most states of a batch.
            limit: How many; see :meth:`States.spread`.

        Returns:
            Calls with the teacher's answers, and arguments for the same samples; None where the teacher knows no
            guidance.
        """
        captioned = states.only({row for row, mark in states.marks.items() if mark.branch != self.branch})
        for call in captioned.answered(size, limit):
            row = self._by_shape.get(self._shape(call))
            if row is None:
                yield call, None
                continue
            bare = self.states.batch([row] * trees.batch_size(call.arguments)).arguments
            moved = {self.latents, *trees.TIMESTEPS}
            yield call, {name: call.arguments[name] if name in moved else value for name, value in bare.items()}

    def _tells_one_text(self, rows: list[Row]) -> bool:
        texts = [self._text(row) for row in rows]
        if len(texts) < 2 or len({str({n: t.shape for n, t in text.items()}) for text in texts}) > 1:
            return False
        return all(float((t - texts[1][n]).norm()) <= ALIKE * float(t.norm()) for n, t in texts[0].items())

    def _text(self, row: Row) -> dict[str, Tensor]:
        """The tensors that a state's call has beside latents and timestep."""
        arguments, tensors = self.states.batch([row]).arguments, dict[str, Tensor]()
        others = {name: value for name, value in arguments.items() if name not in (self.latents, *trees.TIMESTEPS)}
        trees.flatten(others, "", tensors)
        return {name: tensor.double() for name, tensor in tensors.items()}

    def _shape(self, call: Call) -> str:
        return trees.signature({self.latents: call.arguments[self.latents]}, call.per_sample)
