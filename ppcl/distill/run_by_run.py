"""What stages have in common that train one substitute after the other: files of finished ones, and a check of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ppcl.analysis.sweep import Course
from ppcl.capture.states import States
from ppcl.common.devices import autocast
from ppcl.common.progress import announce
from ppcl.common.tensor_files import read_metadata, write_tensors
from ppcl.distill.in_sweep import Ends, training_course
from ppcl.distill.recipe import HELD_OUT, Recipe
from ppcl.student.assembly import RunKey, in_dtypes_of, run_name
from ppcl.teacher.blocks import Blocks


class RunByRun:
    """A stage that trains one substitute after the other.

    Args:
        recipe: How a substitute is trained.
        source: The teacher's blocks.
        name: Of the stage.
        held_out: States that say whether training helped: a start that it led away from is kept. None: nobody asks.

    Attributes:
        folder: Receives the weights of finished substitutes, and states on the way.
    """

    def __init__(self, recipe: Recipe, source: Blocks, name: str, held_out: States | None) -> None:
        self.recipe, self.source, self.name, self.held_out = recipe, source, name, held_out
        self.folder = recipe.folder / f"distill-{name}"
        self.fingerprint = recipe.fingerprint(name, [])

    def path(self, run: RunKey) -> Path:
        """Where the weights of a finished substitute are."""
        return self.folder / f"{_file(run)}.safetensors"

    def is_finished(self, run: RunKey) -> bool:
        """Whether an attempt with the same settings trained a run to its end."""
        meta = read_metadata(self.path(run)) if self.path(run).is_file() else None
        return meta is not None and meta.get("fingerprint") == self.fingerprint

    def write(self, run: RunKey, block: nn.Module) -> None:
        """Write a finished substitute, which leaves the device."""
        weights = in_dtypes_of(block.to("cpu").state_dict(), self.source.module(run[:2]))
        write_tensors(self.path(run), weights, {"fingerprint": self.fingerprint})

    def checkpoints(self, run: RunKey) -> Path:
        """Where a substitute's checkpoints are while it is trained."""
        return self.folder / _file(run)

    def course(self) -> Course:
        """The sweep of the stage."""
        splits: Mapping[str, States] = {"train": self.recipe.states}
        if self.held_out:
            splits = {**splits, "held-out": self.held_out}
        return training_course(
            self.source,
            splits,
            -(-self.recipe.settings.batch_size // self.recipe.settings.accumulate),
            self.folder / f"states-{self.fingerprint[:12]}",
            self.fingerprint,
            {"held-out": HELD_OUT},
            self.recipe.group,
            self.recipe.precision,
        )

    def train(self, recipe: Recipe, block: nn.Module, ends: Ends, steps: int) -> None:
        """Train a run's substitute on the states at its ends.

        Args:
            recipe: That of the stage, or of this process alone.
            block: The substitute.
            ends: Of the run.
            steps: How long.
        """
        settings, name, folder = recipe.settings, run_name(ends.run), self.checkpoints(ends.run).name
        with recipe.training(self.name, {name: block}, steps, settings.local_learning_rate, folder) as loop:
            for step in loop:
                for part in recipe.parts(self.name, step, [block]):
                    loss = ends.loss(block, part.call, part.share, settings.loss)
                    loss.backward()  # type: ignore[no-untyped-call]
                    loop.add({"loss": loss.item(), f"loss/{name}": loss.item()})
                recipe.update(loop)

    @torch.no_grad()
    def held_out_loss(self, block: nn.Module, ends: Ends) -> float:
        """Loss on held-out states; 0 where nobody asks."""
        recipe, total = self.recipe, 0.0
        if self.held_out:
            rows = self.held_out.spread(HELD_OUT)
            for call, share in self.held_out.weighed(rows, recipe.settings.batch_size):
                with autocast(recipe.device, recipe.precision):
                    total += ends.loss(block, call, share, recipe.settings.loss, "held-out").item()
        return total


def say_start_is_kept(run: RunKey, before: float, after: float) -> None:
    """Say that training a run's substitute did not help."""
    announce(
        f"distill: training led {run_name(run)} away from the teacher (state loss {before:.4f} before, {after:.4f} "
        "after, held-out states): its start is kept; lower distill.local_learning_rate"
    )


def _file(run: RunKey) -> str:
    return run_name(run).replace("/", "-")
