"""Select by recovery: of some plans, which is nearest to the teacher once it was trained for a few steps?

A plan's error before training says what it costs, not what training makes up for. Each plan is recovered for some
steps, the best two of them anew for longer, and all are judged on held-out states: by the velocity that guidance makes
of both branches, and by what it magnifies, the difference that the caption makes. Each held-out prompt was drawn from a
noise of its own, so that there are as many noises as prompts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ppcl.capture.pairs import Pairs
from ppcl.capture.states import States
from ppcl.common.artifacts import load_artifact, save_artifact
from ppcl.common.devices import autocast
from ppcl.common.files import remove
from ppcl.config import DistillConfig
from ppcl.distill.recipe import Log
from ppcl.distill.trainer import Distiller
from ppcl.student.plan import CompressionPlan, Recovered, StudentErrors, plan_digest
from ppcl.teacher.call_arguments import to_device
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import Adapter
from ppcl.teacher.velocity import VelocityErrors

logger = logging.getLogger(__name__)
LAST, LONGER = 2, 3  # plans of the second round, and how many times the steps of the first they get
BATCH = 16  # states judged at once


class Judge:
    """Errors of students on held-out states.

    Args:
        teacher: Answers what was not recorded: states without their caption.
        states: Held-out ones.
        train: Others, which tell what a call without caption is.
        limit: How many are looked at, with caption and without.
        scale: Of guidance: v_u + scale (v_c - v_u); None where there is none.
        precision: Autocast of passes.
    """

    def __init__(
        self,
        teacher: nn.Module,
        states: States,
        train: States,
        limit: int,
        scale: float | None,
        precision: str = "auto",
    ) -> None:
        self.states, self.scale, self.precision = states, scale, precision
        self.device = next(teacher.parameters()).device
        pairs = Pairs(teacher, train).of(states, BATCH, limit)
        self.batches = [
            (call, bare, self._answer(teacher, bare)) if scale and bare else (call, None, None) for call, bare in pairs
        ]

    @torch.no_grad()
    def _answer(self, model: nn.Module, arguments: dict[str, object]) -> Tensor:
        with autocast(self.device, self.precision):
            return velocity(model, to_device(arguments, self.device)).float().cpu()

    def errors(self, student: nn.Module) -> StudentErrors:
        """How far a student is from the teacher."""
        plain, guided, caption = VelocityErrors(), VelocityErrors(), VelocityErrors()
        prompts: list[str] = []
        for call, bare, answer in self.batches:
            prompts += [self.states.marks[row].prompt for row in call.rows]
            target, output = call.velocity.float().cpu(), self._answer(student, call.arguments)
            plain.add(target, output)
            if bare is not None and answer is not None and self.scale:
                differences = target - answer, output - (alone := self._answer(student, bare))
                caption.add(*differences)
                guided.add(answer + self.scale * differences[0], alone + self.scale * differences[1])
        if not guided.total:
            return StudentErrors(plain.relative, noises=_by_noise([plain], prompts))
        return StudentErrors(plain.relative, guided.relative, caption.relative, _by_noise([guided, caption], prompts))


def _by_noise(errors: Sequence[VelocityErrors], prompts: Sequence[str]) -> tuple[float, ...]:
    """The geometric mean of some errors, for each prompt."""
    rows = {prompt: [i for i, other in enumerate(prompts) if other == prompt] for prompt in prompts}
    sums = [each.by_state() for each in errors]
    parts = ([float(s[0, r].sum() / s[1, r].sum().clamp_min(1e-300)) for s in sums] for r in rows.values())
    return tuple(math.prod(squares) ** (0.5 / len(squares)) for squares in parts)


@dataclass(frozen=True)
class Choice:
    """What plans are recovered with.

    Attributes:
        transformer: The teacher's.
        adapter: Its family.
        run: The run directory, of which states and starts are read.
        folder: Receives what is done; a killed choice goes on from it.
        recovery: How to train for so many steps.
        steps: Of the first round.
        seed: Fixes the batches.
        judge: Of students.
        precision: Autocast of passes.
        log: Receives one dict a step.
    """

    transformer: nn.Module
    adapter: Adapter
    run: Path
    folder: Path
    recovery: Callable[[int], DistillConfig]
    steps: int
    seed: int
    judge: Judge
    precision: str = "auto"
    log: Log | None = None

    def of(self, plans: Sequence[CompressionPlan]) -> CompressionPlan:
        """The plan that recovers best, with what was seen of all.

        Args:
            plans: The first one is the favourite so far.
        """
        seen = [self.recovered(plan, self.steps) for plan in plans]
        order = sorted(range(len(plans)), key=lambda number: seen[number].after[-1].score)
        for number in order[:LAST]:
            longer = self.recovered(plans[number], LONGER * self.steps)
            both = seen[number].steps + longer.steps, seen[number].after + longer.after
            seen[number] = replace(longer, steps=both[0], after=both[1])
        best = min(order[:LAST], key=lambda number: seen[number].after[-1].score)
        seen[best] = replace(seen[best], chosen=True)
        return replace(plans[best], recovered=tuple(seen))

    def recovered(self, plan: CompressionPlan, steps: int) -> Recovered:
        """What a plan's errors are before and after some steps; read where that was done before."""
        folder = self.folder / f"{plan_digest(plan)[:16]}-{steps}"
        path = folder / "errors.json"
        if path.is_file():
            return load_artifact(Recovered, path)
        distiller = Distiller(
            self.transformer,
            self.adapter,
            plan,
            self.run / "calibration",
            folder,
            self.recovery(steps),
            self.seed,
            self.precision,
            self.log,
            fitted=self.run / "candidates.safetensors",
            closed_forms=self.run / "analysis.safetensors",
        )
        before = self.judge.errors(distiller.student)
        distiller.run()
        after = self.judge.errors(distiller.student)
        widths = sum(bool(s.width) for segments in plan.stacks.values() for s in segments)
        runs = tuple(f"{name} {s.first}-{s.last}" for name, s in plan.runs)
        found = Recovered(runs, widths, plan.predicted.error, before, (steps,), (after,))
        save_artifact(found, path)
        for name in ("bundle", "checkpoints"):
            remove(folder / name)
        logger.info(
            "plan: %s, narrower inside %d blocks: error %.4f, %.4f after %d steps",
            ", ".join(runs) or "no runs",
            *(widths, before.score, after.score, steps),
        )
        return found
