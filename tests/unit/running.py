"""A training loop with its body, for tests that look at the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ppcl.training.loop import TrainingLoop
from ppcl.training.settings import LoopSettings

Backward = Callable[[int], Mapping[str, float]]


class Running(TrainingLoop):
    """A loop whose body is a function of the step, which leaves gradients and returns what is logged."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        backward: Backward,
        settings: LoopSettings,
        folder: Path,
        fingerprint: str,
        *log: Callable[[dict[str, Any]], None],
        **options: Any,
    ) -> None:
        super().__init__(modules, settings, folder, fingerprint, *log, **options)
        self.backward = backward

    def run(self, until: int | None = None) -> int:
        """Run to the end, or save and leave after ``until`` steps in all; returns the number of steps done."""
        for step in self:
            self.add(self.backward(step))
            self.step()
            if step + 1 == until:
                self.save(until)
                return until
        return self.settings.steps
