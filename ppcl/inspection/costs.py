"""What an estimate adds up: the work of a stage, and what all stages of a run start from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from ppcl.capture.store import MEMORY
from ppcl.config import RunConfig
from ppcl.config.sections import PROMPTS
from ppcl.inspection.hardware import CACHED, CONTEXT, FREE, PROGRAM, Hardware
from ppcl.inspection.shapes import Blueprint, Shapes
from ppcl.pruning.knapsack import Layout
from ppcl.pruning.planner import meets, segments, uniform_ladder
from ppcl.student.plan import Prediction, free_blocks, start_index
from ppcl.student.prediction import predict
from ppcl.student.stored_size import StoredSize
from ppcl.teacher.families import adapter_for

LAYER = 0.2  # of text encoders, that is on a GPU at once where they come layer by layer


@dataclass(frozen=True)
class StageCost:
    """What one stage takes.

    Attributes:
        stage: Its name.
        device: Bytes at the peak, on each device that takes part.
        ram: Bytes of RAM at the peak, of each process.
        disk: Bytes of the run directory at the peak, with what earlier stages left.
        left: Bytes of the run directory after it.
        flops: Of all devices.
        seconds: Of time.
        notes: What else is to be known.
    """

    stage: str
    device: float
    ram: float
    disk: float
    left: float
    flops: float
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass
class Work:
    """What a stage does and holds; added up while it is looked at.

    Attributes:
        flops: In half precision.
        float32: FLOPs in float32.
        float64: FLOPs in float64.
        moved: Bytes that optimizers move.
        weights: Bytes of streamed weights that are read while blocks compute.
        files: Bytes that are read or written while nothing computes.
        again: Bytes of states that are read again and again, if they lie on the disk.
        states: Bytes of such states that there are at a time.
        device: Bytes of the device beyond the teacher.
        ram: Bytes of RAM.
        disk: Bytes of the run directory at the peak, beyond what is there.
        kept: Bytes that stay there.
    """

    flops: float = 0.0
    float32: float = 0.0
    float64: float = 0.0
    moved: float = 0.0
    weights: float = 0.0
    files: float = 0.0
    again: float = 0.0
    states: float = 0.0
    device: float = 0.0
    ram: float = 0.0
    disk: float = 0.0
    kept: float = 0.0

    def store(self, size: float, written: float = 0.0, read: float = 0.0, memory: float = MEMORY) -> float:
        """Keep states: in RAM if they fit, else on disk.

        Args:
            size: Bytes of all levels together.
            written: Bytes that are written in all.
            read: Bytes that are read in all.
            memory: Bytes that may be in RAM.

        Returns:
            Bytes on disk.
        """
        if size <= memory:
            self.ram += size
            return 0.0
        self.files += written
        self.again += read
        self.states = max(self.states, size)
        return size


@dataclass(frozen=True)
class Costs:
    """What all stages start from.

    Attributes:
        blueprint: The model.
        config: Settings.
        hardware: The machine.
        streamed: Blocks are read as they run.
        drawn: Seeds whose pictures of the teacher need not be drawn.
    """

    blueprint: Blueprint
    config: RunConfig
    hardware: Hardware
    streamed: bool
    drawn: int = 0

    @property
    def shapes(self) -> Shapes:
        """Of the model."""
        return self.blueprint.shapes

    @property
    def on_gpu(self) -> bool:
        """Whether RAM and the device's memory are two things."""
        return self.hardware.kind != "cpu"

    @property
    def held_out(self) -> int:
        """Recorded states that are kept for selection."""
        settings = self.config.capture
        prompts = min(max(1, round(settings.held_out_share * settings.num_prompts)), settings.num_prompts - 1)
        return prompts * settings.states_per_prompt

    @property
    def num_states(self) -> int:
        """Recorded states, if there are as many prompts as the settings allow."""
        return self.config.capture.num_prompts * self.config.capture.states_per_prompt

    @property
    def train(self) -> int:
        """Recorded states to train on."""
        return self.num_states - self.held_out

    @property
    def branches(self) -> int:
        """Transformer passes of a denoising step: two with classifier-free guidance, a pipeline's usual default."""
        distilled = bool(self.blueprint.transformer.config.get("guidance_embeds"))
        scale = self.config.capture.guidance_scale
        return 2 if (scale is None or scale > 1) and not distilled else 1

    @property
    def block_flops(self) -> float:
        """Of one block on one state, on average."""
        return sum(part.count * part.flops for part in self.shapes.parts) / self.shapes.blocks

    @property
    def sampling(self) -> bool:
        """Whether states come from trajectories of the teacher, not from pictures."""
        return self.config.capture.data == PROMPTS

    @cached_property
    def plan(self) -> tuple[Layout, Prediction, bool]:
        """Evenly spread runs that meet the budget, what they give, and whether depth alone meets it."""
        info, settings = self.shapes.info, self.config.plan
        kind, value = settings.budget
        if kind == "fit_gb":
            value -= (self.shapes.text + self.shapes.vae) / 1e9
        if self.config.planned_format != "none":
            transformer = self.blueprint.transformer
            stored = StoredSize(transformer, adapter_for(transformer), self.config.planned_format)
            info = replace(info, stored=stored)
        layout, prediction = {}, None
        for runs in uniform_ladder(info, settings):
            layout = {s.name: segments(s, [run for run in runs if run[0] == s.name], {}) for s in info.stacks}
            prediction = predict(info, layout)
            if meets(prediction, kind, value):
                return layout, prediction, True
        if prediction is None:
            raise AssertionError("a ladder begins with nothing removed")
        return layout, prediction, False

    @property
    def num_runs(self) -> int:
        """Runs of the plan of depth alone."""
        return sum(segment.is_run for pieces in self.plan[0].values() for segment in pieces)

    @property
    def has_width(self) -> bool:
        """Whether the plan may have smaller modules."""
        allowed = self.config.plan.width
        return bool(self.config.fit.width) and (allowed is None or bool(set(allowed) & set(self.config.fit.width)))

    @property
    def num_substitutes(self) -> int:
        """Blocks that are trained: of runs, or with smaller modules all that may have any."""
        return self.shapes.blocks if self.has_width else self.num_runs

    @cached_property
    def trained(self) -> int:
        """Numbers of all blocks that are trained."""
        sizes = {stack.name: stack.block_params for stack in self.shapes.info.stacks}
        if self.has_width:
            return sum(map(sum, sizes.values()))
        runs = [(name, piece) for name, pieces in self.plan[0].items() for piece in pieces if piece.is_run]
        return sum(sizes[name][start_index(piece.first, piece.last, piece.start)] for name, piece in runs)

    @property
    def plan_note(self) -> str:
        """What is assumed of the plan, for the list of assumptions."""
        if self.has_width:
            return "; any block may get smaller modules, so all of them are counted, as large as the teacher's"
        return "" if self.plan[2] else "; these alone do not meet the budget"

    @property
    def ratio(self) -> float:
        """Share of the transformer that the student has."""
        kind, value = self.config.plan.budget
        return min(self.plan[1].param_ratio, value) if kind == "keep" else self.plan[1].param_ratio

    @cached_property
    def num_candidates(self) -> int:
        """Runs that one block might replace, the paper's intervals left aside."""
        total, longest = 0, self.config.fit.max_run
        for stack in self.shapes.info.stacks:
            low, high = free_blocks(self.shapes.info, stack, self.config.plan)
            total += sum(max(0, min(longest, high - first) - 1) for first in range(low, high))
        return total

    def teacher(self, alone: bool = False) -> float:
        """Bytes of the teacher on the device: two of its blocks where they are streamed, else the pipeline."""
        if self.streamed:
            return self.shapes.outside + 2 * self.shapes.block
        others = 0.0 if alone else self.shapes.text + self.shapes.vae
        return self.shapes.outside + self.shapes.in_blocks + others

    def drawing(self) -> tuple[float, float]:
        """Bytes of text encoders and VAE beside streamed blocks: on the device, and in RAM."""
        if not self.streamed:
            return 0.0, 0.0
        if not self.on_gpu:
            return self.shapes.text + self.shapes.vae, 0.0
        return self.shapes.vae + LAYER * self.shapes.text, self.shapes.text

    def passes(self, prompts: int, batch: int, steps: int) -> int:
        """Calls of a transformer that draw so many pictures."""
        branches = 1 if self.shapes.joined else self.branches
        return -(-prompts // batch) * steps * branches

    def samples(self, batch: int) -> int:
        """States of one call where so many pictures are drawn at once."""
        return batch * (self.branches if self.shapes.joined else 1)

    def _speed(self, work: Work, weights: bool) -> float:
        """Bytes a second of files that are read again and again: states, then weights, stay in RAM where they fit."""
        h, needed = self.hardware, PROGRAM + work.ram + work.states + (self.shapes.in_blocks if weights else 0.0)
        return CACHED if h.ram is not None and needed < FREE * h.ram else h.disk

    def cost(
        self, stage: str, work: Work, teacher: float, before: float, shared: bool = False, notes: tuple[str, ...] = ()
    ) -> StageCost:
        """Turn a stage's work into what it takes.

        Args:
            stage: Its name.
            work: What it does and holds.
            teacher: Bytes of the teacher on the device.
            before: Bytes that earlier stages left in the run directory.
            shared: All devices take part.
            notes: What else is to be known.
        """
        h = self.hardware
        computing = work.flops / h.speed + work.float32 / h.float32 + work.float64 / h.float64
        computing = (computing + work.moved / h.bandwidth) / (h.count if shared else 1)
        seconds = max(computing, work.weights / self._speed(work, weights=True))
        seconds += work.files / h.disk + work.again / self._speed(work, weights=False)
        device = work.device + teacher
        if self.on_gpu:
            device, ram = device + CONTEXT, work.ram + PROGRAM
        else:
            device = ram = device + work.ram + PROGRAM
        disk, left = before + max(work.disk, work.kept), before + work.kept
        flops = work.flops + work.float32 + work.float64
        return StageCost(stage, device, ram, disk, left, flops, seconds, notes)
