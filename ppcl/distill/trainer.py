"""The distill stage: local, carried, alternating, output, few steps; writes the bundle."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.capture.jumps import CALL
from ppcl.capture.states import States
from ppcl.common.artifacts import to_jsonable
from ppcl.common.devices import autocast
from ppcl.common.files import read_mapping, remove
from ppcl.common.streams import Stream, step_generator
from ppcl.common.tensor_files import read_tensors, write_tensors
from ppcl.config import DistillConfig
from ppcl.distill.carried import CarriedRecovery
from ppcl.distill.compiled import blocks_of
from ppcl.distill.few_steps import train_few_steps
from ppcl.distill.local import local_backward
from ppcl.distill.one_at_a_time import OneAtATime
from ppcl.distill.recipe import Log, Part, Recipe
from ppcl.distill.run_by_run import RunByRun
from ppcl.distill.sequential import alternating_backward, checkpoint_blocks, draw_active, sequential_backward
from ppcl.distill.sparse import masks_for
from ppcl.distill.trainable import kept_blocks, thawed, tuned, with_factors
from ppcl.errors import ArtifactError
from ppcl.pruning.sparsity import sparse_plan
from ppcl.student.assembly import RunKey, assemble_student, run_name
from ppcl.student.bundle import Bundle, members, save_bundle
from ppcl.student.masks import Masks, zero_shares
from ppcl.student.plan import CompressionPlan
from ppcl.student.substitutes import new_substitutes
from ppcl.teacher.blocks import ResidentBlocks
from ppcl.teacher.families import Adapter
from ppcl.teacher.flops import count_params
from ppcl.teacher.model_info import ModelInfo
from ppcl.training.distributed import SINGLE, Group
from ppcl.training.lora import factored, factors, load_factors
from ppcl.training.offload import streamed
from ppcl.training.sharding import shard, split_blocks, unshard

logger = logging.getLogger(__name__)
Sample = Callable[[int, nn.Module], None]


class Distiller:
    """Trains one plan's substitutes; resumes where it was.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        plan: The plan.
        calibration: The captured states.
        out: The run directory; checkpoints go to ``out/checkpoints/distill-*``.
        settings: See :class:`DistillConfig`.
        seed: Fixes the batches.
        precision: Autocast of forward passes.
        log: Receives one dict a step, with its ``stage``.
        fitted: The fit stage's candidates behind ``from_fit``; ``out/candidates.safetensors`` if None.
        closed_forms: What the analyze stage wrote; ``out/analysis.safetensors`` if None.
        group: The processes that train; the first one writes.
        sample: Draws pictures with the student of the output stage, every ``sample_every`` steps, from (steps done,
            student); called in the first process, and in all of them where the student is split.
        states: What is trained on; the recorded ones of ``calibration`` if None.
        device: Where training happens; where the transformer is if None.
        keep_teacher: The transformer is used after training; else ``shard_teacher`` leaves it split.
        trajectories: What :func:`ppcl.capture.jumps.capture_jumps` wrote, for ``settings.few_steps``.

    Raises:
        ModelError: ``settings.sparsity`` does not fit the model.
        ConfigError: Its criterion cannot be used.
    """

    def __init__(
        self,
        transformer: nn.Module,
        adapter: Adapter,
        plan: CompressionPlan,
        calibration: Path,
        out: Path,
        settings: DistillConfig,
        seed: int,
        precision: str = "auto",
        log: Log | None = None,
        fitted: Path | None = None,
        closed_forms: Path | None = None,
        group: Group = SINGLE,
        sample: Sample | None = None,
        states: States | None = None,
        device: torch.device | None = None,
        keep_teacher: bool = True,
        trajectories: Path | None = None,
    ) -> None:
        plan = sparse_plan(plan, settings.sparsity)
        self.transformer, self.adapter, self.plan, self.out = transformer, adapter, plan, out
        self.settings, self.seed = settings, seed
        self.group, self.sample, self.keep_teacher, self.trajectories = group, sample, keep_teacher, trajectories
        self._trained: dict[str, nn.Module] | None = None  # of the whole student, once it is to be trained
        self.teacher_is_split = settings.splits_teacher(group.size)
        self.states = states or States(calibration, "train")
        self.held_out = States(calibration, "held-out") if any(calibration.glob("held-out-*")) else None
        self.device = device or next(transformer.parameters()).device
        source = (fitted or out / "candidates.safetensors") if settings.from_fit else None
        closed_forms = closed_forms or out / "analysis.safetensors"
        home = torch.device("cpu") if settings.one_at_a_time else self.device
        self.substitutes = new_substitutes(transformer, adapter, plan, source, closed_forms, home)
        self.student = assemble_student(transformer, adapter, plan, self.substitutes)
        self.masks = Masks({}, {})
        if settings.sparsity.zeros:
            common = (self.student, adapter, plan, self.substitutes, self.states, settings.sparsity, seed)
            with autocast(self.device, precision):
                self.masks = masks_for(*common, out / "checkpoints" / "distill-masks", group)
            self.plan = zero_shares(plan, self.masks.masks, count_params(self.student))
        folder = out / "checkpoints"
        self.recipe = Recipe(
            self.plan, settings, seed, self.states, folder, self.device, precision, log, group, self.masks
        )

    def run(self) -> Bundle:
        """Train all stages and write ``out/bundle``; before few steps, what they start from as ``out/recovered``.

        Closed-form starts of smaller modules can be closer to the teacher than any training with a rate meant for
        whole blocks; where training ends further away on held-out states, the start is kept.
        """
        start = self.out / "checkpoints" / "distill-start.safetensors"  # a copy in memory would be one of all of them
        if self.settings.keep_start:
            self.group.on_main(lambda: write_tensors(start, self._weights(), {}))
        with self._teacher_split(), ExitStack() as teacher:
            teacher.enter_context(self._teacher_waits())
            before = self._held_out_error()
            if self.substitutes and self.settings.local_steps:
                self._one_at_a_time() if self.settings.one_at_a_time else self._local()
            if self.substitutes and self.settings.walks:
                self._carried()
            if self.settings.alternating_steps or self.settings.output_steps or self.trajectories:
                teacher.close()
                for block in self.substitutes.values():
                    block.to(self.device)
            if self.substitutes and self.settings.alternating_steps:
                self._alternating()
            if self.settings.output_steps and (self.substitutes or self.settings.train != "substitutes"):
                self._output()
            if self.trajectories is None:
                return self._finished(before, start, "bundle")
            self._finished(before, start, "recovered")
            return self._few_steps(self.trajectories)

    def _weights(self) -> dict[str, Tensor]:
        """The substitutes' weights by run and name; they are not copied."""
        blocks = self.substitutes.items()
        return {f"{run_name(run)}/{name}": t for run, block in blocks for name, t in block.state_dict().items()}

    def _finished(self, before: float, start: Path, name: str) -> Bundle:
        """Write a bundle, of the start where training led away from the teacher."""
        bundle = self._bundle()
        after = self._held_out_error()
        if after > before:
            logger.warning(
                "training led away from the teacher (velocity error %.4f before, %.4f after, held-out states): the "
                "start is kept; lower distill.local_learning_rate and distill.output_learning_rate",
                *(before, after),
            )
            first, weights = read_tensors(start)[0], self._weights()
            with torch.no_grad():
                for key, tensor in weights.items():
                    tensor.copy_(first[key])
            bundle = Bundle(self.plan, self.substitutes, masks=self.masks.masks)
            self.student = assemble_student(self.transformer, self.adapter, self.plan, self.substitutes)
            self._trained = None
        self._save(bundle, name)
        self.group.on_main(lambda: remove(start))
        return bundle

    def _bundle(self) -> Bundle:
        """The student as it is."""
        lora = factors(kept_blocks(self.student, self.adapter, self.plan))
        return Bundle(self.plan, self.substitutes, self._tuned(), lora, self.masks.masks)

    def _save(self, bundle: Bundle, name: str, **measured: Any) -> None:
        how = {"distill": to_jsonable(self.settings.model_dump()), **measured}
        self.group.on_main(lambda: save_bundle(bundle, self.out / name, how, self.transformer))
        self.group.barrier()

    @torch.no_grad()
    def _held_out_error(self) -> float:
        """Relative velocity error of the student on held-out states, against recorded answers; 0 where nobody asks."""
        if not self.held_out or not self.settings.keep_start:
            return 0.0
        away = [b for b in self.substitutes.values() if next(b.parameters()).device != self.device]
        with streamed(away, self.device, back=False):
            return self.recipe.error(self.student, self.held_out)

    @property
    def _teacher_blocks(self) -> list[nn.Module]:
        return [block for spec in self.adapter.stacks for block in self.adapter.blocks(self.transformer, spec)]

    @contextmanager
    def _teacher_split(self) -> Iterator[None]:
        """Split the teacher's blocks over the processes, if ``distill.shard_teacher`` says so."""
        if not self.teacher_is_split:
            yield
            return
        home = next(self._teacher_blocks[0].parameters()).device
        with split_blocks(self._teacher_blocks, home if self.keep_teacher else None):
            yield

    @contextmanager
    def _teacher_waits(self) -> Iterator[None]:
        """Keep the teacher's blocks where ``distill.offload`` says while they do not run."""
        if self.settings.offload == "none":
            yield
            return
        blocks = self._teacher_blocks
        disk = self.out if self.settings.offload == "disk" else None
        with streamed(blocks, self.device, disk, back=bool(self.settings.output_steps)):
            yield

    @property
    def _blocks(self) -> tuple[nn.Module, ...]:
        return (*blocks_of(self.adapter, self.transformer, self.student), *self.substitutes.values())

    def _parts(self, stage: str, step: int) -> Iterator[Part]:
        return self.recipe.parts(stage, step, self._blocks)

    def _local(self) -> None:
        """Stage 1: substitutes on the teacher's own states (or, as an ablation, on the student's)."""
        settings, runs, common = self.settings, self.substitutes, (self.transformer, self.adapter)
        modules = {run_name(run): block for run, block in runs.items()}
        with self.recipe.training("local", modules, settings.local_steps, settings.local_learning_rate) as loop:

            def release(run: RunKey) -> None:
                loop.release(run_name(run))

            for step in loop:
                for part in self._parts("local", step):
                    arguments, share, kind = part.call.arguments, part.share, settings.loss
                    if settings.sequence == "sequential":
                        losses = sequential_backward(*common, self.student, arguments, runs, kind, share)
                    else:
                        done = release if settings.releases_gradients and part.is_last else None
                        losses = local_backward(*common, arguments, runs, kind, share=share, done=done)
                    by_run = {f"loss/{run_name(run)}": value for run, value in losses.items()}
                    loop.add({"loss": sum(losses.values()) / len(losses), **by_run})
                self.recipe.update(loop)

    def _one_at_a_time(self) -> None:
        """Stage 1 with one substitute in memory."""
        source = ResidentBlocks(self.transformer, self.device)
        stage = OneAtATime(self.recipe, source, lambda run: self.substitutes[run].to(self.device))
        stage.run(self.substitutes)
        self._read(stage)

    def _carried(self) -> None:
        """Between stage 1 and 2: substitutes on the student's own states, one block after the other."""
        homes = {run: next(block.parameters()).device for run, block in self.substitutes.items()}
        source = ResidentBlocks(self.transformer, self.device)
        held_out = self.held_out if self.settings.correct else None
        stage = CarriedRecovery(self.recipe, source, lambda run: self.substitutes[run].to(self.device), held_out)
        stage.run([run for run, _ in members(self.plan)])
        self._read(stage)
        for run, block in self.substitutes.items():
            block.to(homes[run])
        if self.settings.carried_kept:
            self._add_lora(stage.factors())

    def _add_lora(self, known: Mapping[str, Tensor]) -> None:
        """Give the student's kept blocks LoRA, if they have none: known factors, or such that do nothing yet."""
        if factored(kept_blocks(self.student, self.adapter, self.plan).values()):
            return
        rank, generator = self.settings.lora_rank, step_generator(self.seed, 0, Stream.STUDENT_LORA)
        self.student = with_factors(self.student, self.adapter, self.plan, rank, generator)
        for path, block in kept_blocks(self.student, self.adapter, self.plan).items():
            own = {n.removeprefix(f"{path}."): t for n, t in known.items() if n.startswith(f"{path}.")}
            if own:
                load_factors(block, own)

    def _read(self, stage: RunByRun) -> None:
        """Read what a stage trained, in another process or an earlier attempt, too."""
        for run, block in self.substitutes.items():
            block.load_state_dict(read_tensors(stage.path(run))[0])

    def _alternating(self) -> None:
        """Stage 2: hybrids of teacher and substitutes, drawn anew each step."""
        settings, common = self.settings, (self.transformer, self.adapter, self.plan)
        modules = {run_name(run): block for run, block in self.substitutes.items()}
        steps, rate = settings.alternating_steps, settings.output_learning_rate
        with self.recipe.training("alternating", modules, steps, rate) as loop:
            for step in loop:
                active = draw_active(list(self.substitutes), step_generator(self.seed, step, Stream.ALTERNATING_ACTIVE))
                chosen = (self.substitutes, active, settings.loss)
                for part in self._parts("alternating", step):
                    loop.add(
                        alternating_backward(*common, part.call.arguments, *chosen, part.share, settings.checkpointing)
                    )
                self.recipe.update(loop)

    def _output(self) -> None:
        """Stage 3: the whole student on the teacher's velocity."""
        split = bool(self.settings.shard) and self.group.size > 1
        again = self.settings.shard != "zero2"
        modules = self._whole_student(split, again)
        if split:
            shard(self.student, self.adapter, again=again)
        self._train_output(modules, split)
        if split:
            unshard(self.student)

    def _whole_student(self, split: bool = False, again: bool = True) -> Mapping[str, nn.Module]:
        """Make the student ready to be trained as a whole, once; returns what of it is trained, by name.

        Args:
            split: Whether it is about to be split over the processes.
            again: See :func:`ppcl.training.sharding.shard`.
        """
        if self._trained is not None:
            return self._trained
        modules: dict[str, nn.Module] = {run_name(run): block for run, block in self.substitutes.items()}
        if self.settings.train == "all":
            self.student = thawed(self.student, self.adapter, self.substitutes, self.group, split, again)
            modules = {"student": self.student}
        elif self.settings.train == "lora":
            self._add_lora({})
            runs = {run_name(run): block for run, block in self.substitutes.items() if run[2] > run[1]}
            modules = runs | kept_blocks(self.student, self.adapter, self.plan)
        if self.settings.checkpointing:
            checkpoint_blocks(self.student)
        self._trained = modules
        return modules

    def _few_steps(self, folder: Path) -> Bundle:
        """Last: the recovered student on the teacher's guided trajectories, in few steps without guidance."""
        modules, blocks = self._whole_student(), list(blocks_of(self.adapter, self.student))
        errors = train_few_steps(self.recipe, self.student, modules, blocks, folder)
        self.plan = replace(self.plan, call=read_mapping(folder / CALL))
        self._save(bundle := self._bundle(), "bundle", few_steps=errors)
        return bundle

    def _train_output(self, modules: Mapping[str, nn.Module], split: bool) -> None:
        """Train the student as it is placed now; the optimizer is gone after it."""
        steps, rate, every = self.settings.output_steps, self.settings.output_learning_rate, self.settings.sample_every
        # FSDP2 averages gradients over the processes, where the shares want them added up
        scale = float(self.group.size) if split else 1.0
        sample = self.sample if self.group.is_main or split or self.teacher_is_split else None

        def draw(done: int) -> None:
            if sample and every and done % every == 0:
                sample(done, self.student)

        self.recipe.on_velocity("output", modules, self.student, steps, rate, self._blocks, scale, draw)

    def _tuned(self) -> dict[str, Tensor]:
        """Weights of kept blocks and of the rest that the output stage changed."""
        if self.settings.train != "all" or self._trained is None:
            return {}
        return tuned(self.student, self.plan, self.substitutes)


def check_plan(plan: CompressionPlan, model: ModelInfo, path: Path) -> None:
    """Refuse a plan that was made for another model, or for other weights of it.

    Raises:
        ArtifactError: The descriptions differ.
    """
    if plan.model != model:
        raise ArtifactError(f"{path} was made for another model ({plan.model.transformer_class}); choose another --out")
