"""What searches that look at the teacher itself are given: the model, its recorded states, substitutes put in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.analysis.probes import chained_probe
from ppcl.capture.states import States
from ppcl.common.devices import autocast
from ppcl.common.progress import Progress
from ppcl.common.tensor_files import read_tensors
from ppcl.student.assembly import FixedStates, LinearRun, with_blocks
from ppcl.student.plan import CompressionPlan, Prediction, Segment, identity_segments
from ppcl.student.substitutes import new_substitutes
from ppcl.teacher.call_arguments import to_device
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import Adapter, StackSpec
from ppcl.teacher.families import States as StreamStates
from ppcl.teacher.model_info import ModelInfo
from ppcl.teacher.trace import record_boundaries
from ppcl.teacher.velocity import VelocityErrors

Piece = tuple[str, Segment]  # of a stack


@dataclass(frozen=True)
class Teacher:
    """A teacher and what is known of it. Its states are of the calibration prompts; evaluation data are out of reach.

    Attributes:
        transformer: The teacher's transformer; searches leave it as it is.
        adapter: Its family.
        folder: The run directory.
        precision: Autocast of passes.
    """

    transformer: nn.Module
    adapter: Adapter
    folder: Path
    precision: str = "auto"

    @cached_property
    def train(self) -> States:
        """States to train on."""
        return States(self.folder / "calibration", "train")

    @cached_property
    def held_out(self) -> States:
        """States to choose by; of other calibration prompts."""
        return States(self.folder / "calibration", "held-out")

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.transformer.parameters()).device

    def spec(self, stack: str) -> StackSpec:
        """A stack's description."""
        return next(spec for spec in self.adapter.stacks if spec.name == stack)

    def blocks(self, stack: str) -> nn.ModuleList:
        """A stack's blocks."""
        return self.adapter.blocks(self.transformer, self.spec(stack))

    def substitutes(self, model: ModelInfo, pieces: Sequence[Piece], linear: Sequence[bool]) -> list[nn.Module]:
        """Make what stands for pieces of a plan, as distillation would start it.

        Args:
            model: The teacher's sizes.
            pieces: Segments that are substitutes; they may overlap.
            linear: For each, whether its chained probes stand for it, without smaller modules inside: for runs that
                nobody fitted, as in their costs.

        Returns:
            One module a piece.
        """
        modules: dict[int, nn.Module] = {}
        left = []
        probes: Mapping[str, Tensor] = {}
        for number, (stack, segment) in enumerate(pieces):
            if not linear[number]:
                left.append(number)
                continue
            probes = probes or read_tensors(self.folder / "analysis.safetensors")[0]
            spec, run = self.spec(stack), (stack, segment.first, segment.last)
            maps = chained_probe(probes, run, list(spec.inputs), self.device)
            modules[number] = LinearRun(self.adapter, spec, self.blocks(stack)[segment.first], maps)
        dtype = next(self.transformer.parameters()).dtype
        while left:  # files are read once for all pieces that fit into one plan
            plan, inside = _layer(model, pieces, left)
            folder = self.folder
            substitutes = new_substitutes(
                self.transformer, self.adapter, plan, folder / "candidates.safetensors", folder / "analysis.safetensors"
            )
            for number in inside:
                stack, segment = pieces[number]
                block = substitutes[stack, segment.first, segment.last].to(self.device, dtype)
                modules[number] = block.requires_grad_(False)
            left = [number for number in left if number not in inside]
        return [modules[number] for number in range(len(pieces))]

    @torch.no_grad()
    def errors(
        self, routes: Sequence[Sequence[tuple[Piece, nn.Module]]], states: int, batch: int, label: str
    ) -> list[float]:
        """Squared relative velocity errors of models in which some pieces are replaced, on held-out states.

        Blocks before a model's first replacement are not executed: the teacher's states are there already.

        Args:
            routes: For each model its pieces in execution order, with what stands for them.
            states: How many, of all timesteps.
            batch: States at a time.
            label: Name shown beside the progress bar.

        Returns:
            ||v - v_teacher||^2 / ||v_teacher||^2 over all states, for each model.
        """
        errors = [VelocityErrors() for _ in routes]
        batches = list(self.held_out.batches(batch, states))
        firsts = {(stack, segment.first) for route in routes for (stack, segment), _ in route[:1]}
        with Progress(label, total=len(routes) * len(batches)) as progress:
            for arguments in batches if routes else ():
                with autocast(self.device, self.precision):  # substitutes may be float32 where the teacher is not
                    calls, target = record_boundaries(self.transformer, self.adapter, arguments, firsts)
                assert target is not None  # the pass was not stopped
                moved = to_device(arguments, self.device)
                for error, route in zip(errors, routes, strict=True):
                    output = target  # of a model in which nothing is replaced
                    if route:
                        stack, segment = route[0][0]
                        hybrid = self._hybrid(route, calls[stack, segment.first].inputs)
                        with autocast(self.device, self.precision):
                            output = velocity(hybrid, moved)
                    error.add(target, output)
                    progress.advance()
        return [error.squared for error in errors]

    def _hybrid(self, route: Sequence[tuple[Piece, nn.Module]], before: StreamStates) -> Any:
        """The transformer from the first replacement on."""
        (stack, start), _ = route[0]
        lists: dict[str, list[nn.Module]] = {}
        reached = False
        for spec in self.adapter.stacks:
            blocks = list(self.blocks(spec.name))
            modules: list[nn.Module] = []
            position = 0 if reached else len(blocks)
            if spec.name == stack:
                modules.append(FixedStates(self.adapter, spec, before, blocks[0]))
                position, reached = start.first, True
            for (name, segment), module in route:
                if name == spec.name:
                    modules += [*blocks[position : segment.first], module]
                    position = segment.last + 1
            lists[spec.name] = [*modules, *blocks[position:]]
        return with_blocks(self.transformer, lists)


def _layer(model: ModelInfo, pieces: Sequence[Piece], left: Sequence[int]) -> tuple[CompressionPlan, set[int]]:
    """A plan of as many of the pieces as do not overlap, first come first served."""
    stacks = {stack.name: list(identity_segments(stack.num_blocks)) for stack in model.stacks}
    inside: set[int] = set()
    taken: set[tuple[str, int]] = set()
    for number in left:
        stack, segment = pieces[number]
        blocks = {(stack, index) for index in range(segment.first, segment.last + 1)}
        if not blocks & taken:
            taken |= blocks
            inside.add(number)
            others = [s for s in stacks[stack] if (stack, s.first) not in blocks]
            stacks[stack] = sorted([*others, segment], key=lambda s: s.first)
    prediction = Prediction(model.params, 1.0, 1.0, 0, None)
    return CompressionPlan(model, "", {}, {name: tuple(s) for name, s in stacks.items()}, prediction), inside
