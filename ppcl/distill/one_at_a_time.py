"""The local stage one substitute at a time: what is in memory is one block and its optimizer, not all of them.

The teacher carries all recorded states forward once (:mod:`ppcl.distill.in_sweep`); a substitute is made when the sweep
has both ends of its run, trained by itself, and written to disk. Batches are those of the joint stage, and so is the
result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl.analysis.sweep import forward_sweep
from ppcl.capture.states import States
from ppcl.common.devices import autocast
from ppcl.common.files import read_metadata, remove, write_tensors
from ppcl.common.progress import announce
from ppcl.common.streams import Stream
from ppcl.distill.in_sweep import Ends, Trainees, training_course
from ppcl.distill.recipe import HELD_OUT, Recipe
from ppcl.student.assembly import RunKey, run_name
from ppcl.teacher.blocks import Blocks
from ppcl.teacher.calls import Call
from ppcl.training.distributed import SINGLE, Share

Rows = list[dict[str, Any]]


class OneAtATime:
    """The local stage, a run after the other; several processes train another one each.

    Args:
        recipe: How a substitute is trained.
        source: The teacher's blocks.
        new: Makes a run's substitute, untrained, on the device.
        held_out: States that say whether training helped: a start that it led away from is kept. None: nobody asks.

    Attributes:
        folder: Receives the weights of finished substitutes, and states on the way.
    """

    def __init__(
        self, recipe: Recipe, source: Blocks, new: Callable[[RunKey], nn.Module], held_out: States | None = None
    ) -> None:
        self.recipe, self.source, self.new, self.held_out = recipe, source, new, held_out
        self.folder = recipe.folder / "distill-local"
        self.fingerprint = recipe.fingerprint("local", [])

    def run(self, runs: Collection[RunKey]) -> None:
        """Train what is not finished yet; after it the weights of all runs are on disk."""
        group, unfinished = self.recipe.group, [run for run in runs if not self.is_finished(run)]
        if self.recipe.settings.local_steps == 0:
            group.spread(dict.fromkeys(unfinished), self._write_starts)
        elif unfinished:
            splits = {"train": self.recipe.states} | ({"held-out": self.held_out} if self.held_out else {})
            course = training_course(
                self.source,
                splits,
                -(-self.recipe.settings.batch_size // self.recipe.settings.accumulate),
                self.folder / f"states-{self.fingerprint[:12]}",
                self.fingerprint,
                {"held-out": HELD_OUT},
                group,
                self.recipe.precision,
            )
            trainees = Trainees(course, unfinished, self._train, self._log)
            forward_sweep(course, [trainees], trainees.last)
            course.store.close()
        group.barrier()

    def path(self, run: RunKey) -> Path:
        """Where the weights of a finished substitute are."""
        return self.folder / f"{run_name(run).replace('/', '-')}.safetensors"

    def is_finished(self, run: RunKey) -> bool:
        """Whether an attempt with the same settings trained a run to its end."""
        meta = read_metadata(self.path(run)) if self.path(run).is_file() else None
        return meta is not None and meta.get("fingerprint") == self.fingerprint

    def _train(self, run: RunKey, ends: Ends) -> Rows:
        """Train a run's substitute in this process, and write it; returns the rows that nobody has logged."""
        recipe, rows = self.recipe, Rows()
        own = replace(recipe, group=SINGLE, log=recipe.log if recipe.group.is_main else rows.append)
        block, name, settings = self.new(run), run_name(run), recipe.settings
        before = self._held_out_loss(block, ends)

        def part(call: Call, share: Share) -> dict[str, float]:
            loss = ends.loss(block, call, share, settings.loss)
            loss.backward()  # type: ignore[no-untyped-call]
            return {"loss": loss.item(), f"loss/{name}": loss.item()}

        def backward(step: int) -> dict[str, float]:
            return own.in_parts(step, Stream.LOCAL_BATCH, part, [block])

        where = name.replace("/", "-")
        own.train("local", {name: block}, backward, settings.local_steps, settings.local_learning_rate, where)
        after = self._held_out_loss(block, ends)
        if after > before:
            announce(
                f"distill: training led {name} away from the teacher (state loss {before:.4f} before, {after:.4f} "
                "after, held-out states): its start is kept; lower distill.local_learning_rate"
            )
            block = self.new(run)
        self._write(run, block)
        remove(self.folder / where)  # what is finished is kept without its optimizer
        return rows

    @torch.no_grad()
    def _held_out_loss(self, block: nn.Module, ends: Ends) -> float:
        """Loss on held-out states; 0 where nobody asks."""
        recipe, total = self.recipe, 0.0
        if self.held_out:
            rows = self.held_out.spread(HELD_OUT)
            for call, share in self.held_out.weighed(rows, recipe.settings.batch_size):
                with autocast(recipe.device, recipe.precision):
                    total += ends.loss(block, call, share, recipe.settings.loss, "held-out").item()
        return total

    def _write(self, run: RunKey, block: nn.Module) -> None:
        write_tensors(self.path(run), block.to("cpu").state_dict(), {"fingerprint": self.fingerprint})

    def _write_starts(self, own: dict[RunKey, None]) -> dict[RunKey, None]:
        for run in own:
            self._write(run, self.new(run))
        return own

    def _log(self, found: dict[RunKey, Rows]) -> None:
        """Log what other processes trained, in the first one."""
        if self.recipe.log and self.recipe.group.is_main:
            for row in (row for rows in found.values() for row in rows):
                self.recipe.log(row)
