"""Carried recovery: substitutes learn on the student's own states, block by block, with the teacher's as targets.

    teacher  h_0 -> [T_1] -> h_1 -> [T_2] -> h_2 -> [T_3] -> h_3 ...
    student  h_0 -> [T_1] -> h_1 -> [     S    ] -> s_3 -> [T_4] ...     S learns |S(s) - h|, then carries s on

Both walk together: a block that the student keeps runs on the states of both. When the block at a run's end leaves, its
substitute is corrected in closed form (:mod:`ppcl.distill.correction`) or trained, or both, from the states that the
student so far hands on, and then it hands them on itself, so that later substitutes make up for the errors of earlier
ones. Nothing is differentiated beyond one substitute: memory holds one
block (two where they are streamed), and one substitute with its optimizer.

The student's states lie beside the teacher's in one store, so a killed stage goes on at the block for both of them.
Inside a run they are those that enter it.

With ``distill.carried_kept`` a kept block behind the first substitute is treated as a run of its own: a copy that
shares the teacher's weights learns through LoRA, so that beside the block no more than factors and their optimizer are
in memory.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ppcl.analysis.entries import Entry, enter
from ppcl.analysis.sweep import Batch, Course, Seen, forward_sweep
from ppcl.capture.states import States as Recorded
from ppcl.capture.store import StateStore
from ppcl.common.devices import autocast
from ppcl.common.files import remove
from ppcl.common.progress import announce
from ppcl.common.streams import Stream, step_generator
from ppcl.common.tensor_files import read_tensors, write_tensors
from ppcl.distill.correction import correct
from ppcl.distill.in_sweep import Ends, in_precision_of
from ppcl.distill.recipe import Recipe
from ppcl.distill.run_by_run import RunByRun, say_start_is_kept
from ppcl.errors import ArtifactError
from ppcl.student.assembly import RunKey, run_name
from ppcl.student.bundle import members
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.blocks import Blocks
from ppcl.teacher.families import StackSpec
from ppcl.teacher.trace import BlockCall
from ppcl.training.lora import factors, load_factors, with_lora

logger = logging.getLogger(__name__)


class CarriedRecovery(RunByRun):
    """The stage: a sweep of teacher and student together.

    Args:
        recipe: How a substitute is trained; several processes share each batch.
        source: The teacher's blocks.
        load: The substitute of a run as the stage before left it, on the device. Kept blocks are taken from ``source``.
        held_out: See :class:`RunByRun`; ``distill.correct`` needs them.
        finished: Called in the first process for a run whose weights are on disk.

    Raises:
        ArtifactError: There are no held-out states for a correction.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: Blocks,
        load: Callable[[RunKey], nn.Module],
        held_out: Recorded | None = None,
        finished: Callable[[RunKey], None] = lambda _: None,
    ) -> None:
        super().__init__(recipe, source, "carried", held_out)
        if recipe.settings.correct and held_out is None:
            raise ArtifactError(
                "distill.correct needs held-out states, and the calibration has none; run capture again"
            )
        self.load, self.finished = load, finished
        self.kept = kept_behind(recipe.plan, source) if recipe.settings.carried_kept else {}

    def run(self, runs: Sequence[RunKey]) -> None:
        """Train what is not finished yet; after it the weights of all runs are on disk."""
        runs = [*runs, *self.kept]
        if not all([self.is_finished(run) for run in runs]):
            course = self.course()
            walk = StudentWalk(course, runs, self._trained)
            forward_sweep(course, [walk], walk.last)
            course.store.close()
        self.recipe.group.barrier()

    def _trained(self, run: RunKey, ends: Ends) -> nn.Module:
        """A run's substitute at the end of its training, on the device; it is on disk, too."""
        recipe = self.recipe
        if not self.is_finished(run):
            block = self._train(run, ends) if recipe.settings.carried_steps else self._start(run, ends)
            recipe.group.on_main(lambda: self.write(run, block))
            recipe.group.on_main(lambda: remove(self.checkpoints(run)))
            recipe.group.on_main(lambda: self.finished(run))
        elif run in self.kept:
            load_factors(block := self._with_lora(run), read_tensors(self.path(run))[0])
        else:
            block = self.load(run)
            block.load_state_dict(read_tensors(self.path(run))[0])
        return block.to(recipe.device)

    def write(self, run: RunKey, block: nn.Module) -> None:
        """Write what is trained of a block: a finished substitute, or a kept block's factors."""
        if run not in self.kept:
            super().write(run, block)
            return
        own = {name.removeprefix("."): tensor for name, tensor in factors({"": block}).items()}
        write_tensors(self.path(run), own, {"fingerprint": self.fingerprint})

    def factors(self) -> dict[str, Tensor]:
        """The LoRA of kept blocks, by their path in the student."""
        read = {path: read_tensors(self.path(run))[0] for run, path in self.kept.items()}
        return {f"{path}.{name}": tensor for path, tensors in read.items() for name, tensor in tensors.items()}

    def _with_lora(self, run: RunKey) -> nn.Module:
        """A kept block, which is lent now, with LoRA that does nothing yet."""
        recipe, number = self.recipe, self.source.order.index(run[:2])
        generator = step_generator(recipe.seed, number, Stream.CARRIED_LORA)
        block = self.source.module(run[:2]).requires_grad_(False)
        return with_lora(block, recipe.settings.lora_rank, {}, generator)

    def _start(self, run: RunKey, ends: Ends) -> nn.Module:
        """What is trained before its training: a substitute is corrected if that is asked for."""
        if run in self.kept:
            return self._with_lora(run)
        block, group = self.load(run), self.recipe.group
        if self.recipe.settings.correct:
            losses = correct(block, ends, lambda: self.held_out_loss(block, ends), group)
            if group.is_main and losses:
                logger.info("distill: correction of %s: state loss %.4f -> %.4f", run_name(run), *losses)
            elif group.is_main:
                announce(
                    f"distill: {run_name(run)} is not corrected: its streams do not end in a linear layer it trains"
                )
        return block

    def _train(self, run: RunKey, ends: Ends) -> nn.Module:
        block, recipe, settings = self._start(run, ends), self.recipe, self.recipe.settings
        before, judged = self.held_out_loss(block, ends), settings.keep_start and self.held_out is not None
        trained = {n for n in block.state_dict() if run not in self.kept or ".lora_" in n}
        start = {n: t.to("cpu", copy=True) for n, t in block.state_dict().items() if judged and n in trained}
        with torch.enable_grad():
            self.train(recipe, block, ends, settings.carried_steps)
        after = self.held_out_loss(block, ends)
        if judged and recipe.group.any(after > before):
            say_start_is_kept(run, before, after)
            block.load_state_dict(start, strict=run not in self.kept)
        return block


def kept_behind(plan: CompressionPlan, source: Blocks) -> dict[RunKey, str]:
    """Kept blocks that are handed another state than the teacher's, by their path in the student."""
    substitutes = [source.order.index(run[:2]) for run, _ in members(plan)]
    return {
        (name, segment.first, segment.last): f"{name}.{position}"
        for name in source.stacks
        for position, segment in enumerate(plan.stacks[name])
        if not segment.is_substitute and source.order.index((name, segment.first)) > min(substitutes, default=math.inf)
    }


class StudentWalk:
    """A consumer of the teacher's sweep that takes the student along.

    Args:
        course: The teacher's sweep.
        runs: All runs of the student, kept blocks that are trained included; they do not overlap.
        trained: The trained substitute of a run, given the states at its ends, the student's before and the
            teacher's after it.

    Attributes:
        last: Position of the last block that any run needs.
    """

    def __init__(self, course: Course, runs: Sequence[RunKey], trained: Callable[[RunKey, Ends], nn.Module]) -> None:
        self.course, self.trained, self._adapter = course, trained, course.source.adapter
        order = course.source.order
        self.run_at = {order.index((run[0], index)): run for run in runs for index in range(run[1], run[2] + 1)}
        self.last = max(self.run_at)
        store = _Beside(course.store, len(course.batches), first=min(self.run_at))
        self.student = replace(course, store=store)

    def begin(self, stack: StackSpec, index: int, block: nn.Module) -> Sequence[str] | None:
        """Before the first run there is nothing to do: the student's states are the teacher's."""
        self.position, self.stack, self.block = self.course.source.order.index((stack.name, index)), stack, block
        return () if self.position >= min(self.run_at) else None

    def see(self, seen: Seen) -> None:
        """Run a kept block on the student's states; inside a run they wait."""
        run, index = self.run_at.get(self.position), seen.call.index
        if run is None:
            states = self.student.read(self.position - 1, seen.batch) if index else self._enter(seen.batch).states
            with autocast(self.course.source.device, self.course.precision):
                outputs = self._adapter.call(self.stack, self.block, states, seen.call.arguments)
            self.student.write(self.position, seen.batch, outputs, {})
        elif index < run[2] and run[1]:  # what enters a stack is asked for again
            self.student.write(self.position, seen.batch, self.student.read(self.position - 1, seen.batch), {})

    def finish(self) -> None:
        """At a run's end train its substitute, and let it hand the states on."""
        run = self.run_at.get(self.position)
        if run is None or self.course.source.order[self.position][1] != run[2]:
            return
        self.course.group.barrier()  # the others have written their states of this block
        block = self.trained(run, Ends(run, self.student, self.course, self.position - 1))
        for batch in self.course.own:
            entry = self._enter(batch)
            states = self.student.read(self.position - 1, batch) if run[1] else entry.states
            call = in_precision_of(block, BlockCall(self.stack, run[2], dict(entry.arguments[run[1]]), states, {}))
            with autocast(self.course.source.device, self.course.precision):
                outputs = self._adapter.call(self.stack, block, call.inputs, call.arguments)
            # what follows is the teacher's own block
            kept = {stream: state.to(states[stream].dtype) for stream, state in outputs.items()}
            self.student.write(self.position, batch, kept, {})

    def _enter(self, batch: Batch) -> Entry:
        """How the student's states of a batch enter the present stack."""
        course, before = self.student, self.student.before(batch, self.stack.name)
        return enter(course.source, self.stack, batch.load().arguments, before, course.precision)


class _Beside(StateStore):
    """The student's part of a store: batches of its own from a level on, the teacher's before."""

    def __init__(self, store: StateStore, count: int, first: int) -> None:
        super().__init__(store.folder, store.fingerprint, store.memory, store.group)
        self.store, self.count, self.first = store, count, first

    def write(self, level: int, number: int, states: Mapping[str, Tensor]) -> None:
        """Write a batch's states at a level."""
        self.store.write(level, self._own(level, number), states)

    def read(
        self, level: int, number: int, device: torch.device, wanted: Callable[[str], bool] = lambda _: True
    ) -> dict[str, Tensor]:
        """Read a batch's states at a level, of wanted names."""
        return self.store.read(level, self._own(level, number), device, wanted)

    def rows(
        self, level: int, number: int, rows: Sequence[int], axis: int, wanted: Callable[[str], bool] = lambda _: True
    ) -> dict[str, Tensor]:
        """Read some states of a batch at a level."""
        return self.store.rows(level, self._own(level, number), rows, axis, wanted)

    def _own(self, level: int, number: int) -> int:
        return number + self.count if level >= self.first else number
