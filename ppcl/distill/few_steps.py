"""Few steps: the recovered student learns to jump along the teacher's guided trajectories (:mod:`ppcl.capture.jumps`).

A step of training walks a batch of trajectories from noise to picture. At each of the few noise levels the student
answers, is held to the mean velocity to the teacher's next point, and goes on; nothing is differentiated beyond one
answer. Early it goes on from the teacher's point, later more and more from where it came itself, and then what it is
held to leads from there back to the teacher's next point: so it learns to make up for its own errors, which drawing
will hand on to it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ppcl.capture.jumps import in_place_of, latents_name, stacked
from ppcl.capture.states import Row, States
from ppcl.common.devices import autocast
from ppcl.distill.recipe import HELD_OUT, Recipe
from ppcl.teacher.call_arguments import to_device
from ppcl.teacher.calls import velocity
from ppcl.teacher.velocity import VelocityErrors
from ppcl.training.losses import velocity_loss

logger = logging.getLogger(__name__)


def share_of_own(step: int, steps: int) -> float:
    """How far a student goes on from where it came itself: not at all at first, all the way from half-time on."""
    return min(1.0, 2 * step / steps)


@dataclass(frozen=True)
class Step:
    """One of the few steps.

    Attributes:
        output: What the student answered, with its gradient.
        target: What leads to the teacher's next point.
        start: Latents that the answer is for.
        jump: How far they move for an answer of 1, (B, 1, ...).
    """

    output: Tensor
    target: Tensor
    start: Tensor
    jump: Tensor

    def end(self, answer: Tensor) -> Tensor:
        """Latents that an answer leads to."""
        return self.start + self.jump * answer.detach().float().reshape(self.start.shape)


class Trajectories:
    """Recorded trajectories of one split.

    Args:
        folder: What :func:`ppcl.capture.jumps.capture_jumps` wrote.
        split: ``train`` or ``held-out``.
        num_steps: The few.
        text_mask: See :class:`ppcl.capture.states.States`.

    Attributes:
        starts: The first state of each trajectory.
    """

    def __init__(self, folder: Path, split: str, num_steps: int, text_mask: str) -> None:
        self.num_steps, self._states = num_steps, States(folder, split, text_mask)
        rows = {row for group in self._states.groups for row in group if row[0] % num_steps == 0}
        self.starts = self._states.only(rows)

    def walk(self, student: nn.Module, starts: Sequence[Row], own: float, device: torch.device) -> Iterator[Step]:
        """Walk trajectories from noise to picture.

        Args:
            student: Answers, with gradients where they are on; each answer is to be used before the next is asked for.
            starts: Of trajectories that go through a model together.
            own: See :func:`share_of_own`.
            device: Where the student is.

        Yields:
            The steps in order.
        """
        here, name = None, latents_name(student)
        for index in range(self.num_steps):
            call = self._states.batch([(number + index, place) for number, place in starts])
            arguments, target = to_device(call.arguments, device), call.velocity.to(device).float()
            jump = torch.tensor([self._states.jumps[number] for number, _ in call.rows], device=device)
            taught = stacked(arguments[name]).float()
            jump = jump.reshape(-1, *[1] * (taught.ndim - 1))
            if here is None or not own:
                here = taught
            else:
                here = taught.lerp(here, own)
                arguments[name] = in_place_of(arguments[name], here)
                target = target + ((taught - here) / jump).reshape(target.shape)
            step = Step(velocity(student, arguments), target, here, jump)
            yield step
            here = step.end(step.output)

    @torch.no_grad()
    def error(self, student: nn.Module, count: int, batch_size: int, device: torch.device, precision: str) -> float:
        """Relative error of the latents in which the student's own way ends, against the teacher's.

        Args:
            student: The student.
            count: Trajectories, at most.
            batch_size: Walked at once.
            device: Where the student is.
            precision: Autocast.
        """
        errors = VelocityErrors()
        for rows in self.starts.by_shape(self.starts.spread(count), batch_size):
            with autocast(device, precision):
                *_, last = self.walk(student, rows, 1.0, device)
            errors.add(last.end(last.target), last.end(last.output))
        return errors.relative


def train_few_steps(
    recipe: Recipe, student: nn.Module, modules: Mapping[str, nn.Module], blocks: Sequence[nn.Module], folder: Path
) -> dict[str, float]:
    """Train a student to draw in few steps, and say how far its pictures are from the teacher's.

    Args:
        recipe: How; ``recipe.settings.few_steps`` has steps and rate.
        student: The student.
        modules: What of it is trained, by name.
        blocks: That ``distill.compile`` compiles.
        folder: What :func:`ppcl.capture.jumps.capture_jumps` wrote.

    Returns:
        The error of held-out trajectories before and after it, see :meth:`Trajectories.error`.
    """
    settings, few, device = recipe.settings, recipe.settings.few_steps, recipe.device
    routes, held_out = (
        Trajectories(folder, split, few.num_inference_steps, recipe.states.text_mask) for split in ("train", "held-out")
    )
    judged = (HELD_OUT, settings.batch_size, device, recipe.precision)
    before = held_out.error(student, *judged)
    recipe = replace(recipe, states=routes.starts)
    with recipe.training("few_steps", modules, few.training_steps, few.learning_rate) as loop:
        for step in loop:
            own = share_of_own(step, few.training_steps)
            for part in recipe.parts("few_steps", step, blocks):
                for walked in routes.walk(student, part.call.rows, own, device):
                    loss = part.share.samples * velocity_loss(walked.output, walked.target) / few.num_inference_steps
                    loss.backward()  # type: ignore[no-untyped-call]
                    loop.add({"loss": loss.item()})
            recipe.update(loop)
    after = held_out.error(student, *judged)
    if recipe.group.is_main:
        logger.info("distill: error of latents drawn in few steps %.4f -> %.4f (held-out)", before, after)
    return {"error_before": before, "error": after}
