"""The local stage one substitute at a time: what is in memory is one block and its optimizer, not all of them.

The teacher carries all recorded states forward once (:mod:`ppcl.distill.in_sweep`); a substitute is made when the sweep
has both ends of its run, trained by itself, and written to disk. Batches are those of the joint stage, and so is the
result.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from torch import nn

from ppcl.analysis.sweep import forward_sweep
from ppcl.capture.states import States
from ppcl.common.files import remove
from ppcl.distill.in_sweep import Ends, Trainees
from ppcl.distill.recipe import Recipe
from ppcl.distill.run_by_run import RunByRun, say_start_is_kept
from ppcl.student.assembly import RunKey
from ppcl.teacher.blocks import Blocks
from ppcl.training.distributed import SINGLE

Rows = list[dict[str, Any]]


class OneAtATime(RunByRun):
    """The local stage, a run after the other; several processes train another one each.

    Args:
        recipe: How a substitute is trained.
        source: The teacher's blocks.
        new: Makes a run's substitute, untrained, on the device.
        held_out: See :class:`RunByRun`.
    """

    def __init__(
        self, recipe: Recipe, source: Blocks, new: Callable[[RunKey], nn.Module], held_out: States | None = None
    ) -> None:
        super().__init__(recipe, source, "local", held_out)
        self.new = new

    def run(self, runs: Collection[RunKey]) -> None:
        """Train what is not finished yet; after it the weights of all runs are on disk."""
        group, unfinished = self.recipe.group, [run for run in runs if not self.is_finished(run)]
        if self.recipe.settings.local_steps == 0:
            group.spread(dict.fromkeys(unfinished), self._write_starts)
        elif unfinished:
            course = self.course()
            trainees = Trainees(course, unfinished, self._train, self._log)
            forward_sweep(course, [trainees], trainees.last)
            course.store.close()
        group.barrier()

    def _train(self, run: RunKey, ends: Ends) -> Rows:
        """Train a run's substitute in this process, and write it; returns the rows that nobody has logged."""
        recipe, rows = self.recipe, Rows()
        own = replace(recipe, group=SINGLE, log=recipe.log if recipe.group.is_main else rows.append)
        block = self.new(run)
        before = self.held_out_loss(block, ends)
        self.train(own, block, ends, recipe.settings.local_steps)
        after = self.held_out_loss(block, ends)
        if after > before:
            say_start_is_kept(run, before, after)
            block = self.new(run)
        self.write(run, block)
        remove(self.checkpoints(run))  # what is finished is kept without its optimizer
        return rows

    def _write_starts(self, own: dict[RunKey, None]) -> dict[RunKey, None]:
        for run in own:
            self.write(run, self.new(run))
        return own

    def _log(self, found: dict[RunKey, Rows]) -> None:
        """Log what other processes trained, in the first one."""
        if self.recipe.log and self.recipe.group.is_main:
            for row in (row for rows in found.values() for row in rows):
                self.recipe.log(row)
