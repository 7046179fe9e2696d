"""Pictures of the student while it is trained: the same prompts and the same noise every time.

They are there to look at, and change nothing: all noise has generators of its own, and whatever fails is said once and
ends the drawing, not the training.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ppcl.common.devices import autocast
from ppcl.common.files import atomic_path, read_json, write_json
from ppcl.config import RunConfig
from ppcl.config.names import TRANSFORMER
from ppcl.errors import UserError
from ppcl.eval.generate import accepted_kwargs, draw, picture_generator
from ppcl.teacher.pipeline_call import guidance_arguments
from ppcl.training.distributed import SINGLE, Group
from ppcl.training.tracking import PICTURE

logger = logging.getLogger(__name__)
Log = Callable[[dict[str, Any]], None]


class _Elsewhere(Exception):
    """Another process failed to draw."""


class SampleSheet:
    """Draws a few prompts with the student, one row of pictures a sheet.

    Writes ``samples/step-000200.png`` below ``out``, once ``teacher.png`` beside it, and ``prompts.json``.

    Args:
        pipeline: The teacher's; it is not changed.
        prompts: One picture each.
        out: The run directory.
        num_inference_steps: Denoising steps of a picture.
        call_kwargs: Size and guidance; see :func:`ppcl.teacher.pipeline_call.guidance_arguments`.
        seed: Of the noise; that of the evaluation's first pictures, where it is the run's.
        precision: Autocast of the transformer, as in training.
        component: Which of the pipeline's transformers the student stands for.
        group: The processes that draw together, where the student is split over them: if one fails, all end the
            drawing, before any of them waits for the others inside the student.
        log: Receives ``{"stage": "samples", "step": ..., "picture": ...}`` with the path below ``out``; None in all
            processes but the first, which draw (a student that is split needs all of them) and write nothing.
    """

    def __init__(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        out: Path,
        num_inference_steps: int,
        call_kwargs: dict[str, Any],
        seed: int,
        precision: str = "auto",
        log: Log | None = None,
        group: Group = SINGLE,
        teacher_is_split: bool = False,
        component: str = TRANSFORMER,
    ) -> None:
        self.pipeline, self.prompts, self.out, self.log = pipeline, list(prompts), out, log
        self.num_inference_steps, self.call_kwargs = num_inference_steps, accepted_kwargs(pipeline, call_kwargs)
        self.seed, self.precision = seed, precision
        self.group, self.teacher_is_split, self.component = group, teacher_is_split, component
        self._failed = self._inside = False

    def __call__(self, step: int, student: nn.Module) -> None:
        """Draw a sheet with the student's weights after ``step`` steps."""
        if self._failed:
            return
        folder = self.out / "samples"
        reason = None
        try:
            self._teacher_sheet(folder)
            with self._in_step(student):
                sheet = self._draw(student)
            if self.log:
                path = folder / f"step-{step:06d}.png"
                self._write(path, sheet)
                self.log({"stage": "samples", "step": step, PICTURE: str(path.relative_to(self.out))})
        except _Elsewhere:
            self._failed = True  # said by the process that failed
            return
        except (UserError, RuntimeError, ValueError, OSError) as error:
            if self._inside and self.group.size > 1:
                raise  # the other processes wait for this one's weights, or have taken others for them
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.warning("samples of step %d could not be drawn (%s); training goes on without them", step, reason)
        self._failed = self.group.any(reason is not None)

    @contextlib.contextmanager
    def _in_step(self, student: nn.Module) -> Iterator[None]:
        """Ask before each pass of the student whether all processes are about to run it; else none may wait there."""

        def ask(*_: Any) -> None:
            if self.group.any(False):
                raise _Elsewhere
            self._inside = True

        def leave(*_: Any) -> None:
            self._inside = False

        before_fsdp = student.register_forward_pre_hook(ask, prepend=True)  # whose own hook gathers weights
        with before_fsdp, student.register_forward_hook(leave):
            yield

    def _teacher_sheet(self, folder: Path) -> None:
        """Draw the teacher's pictures, unless those of the same prompts are there; one that is split needs all."""
        about, beside = {"prompts": self.prompts, "seed": self.seed}, folder / "prompts.json"

        def is_there() -> bool:
            try:
                return (folder / "teacher.png").is_file() and beside.is_file() and read_json(beside) == about
            except OSError:  # what is wrong there is said when it is written
                return False

        if self.group.on_main(is_there) if self.teacher_is_split else (is_there() or not self.log):
            return
        teacher = getattr(self.pipeline, self.component)
        with self._in_step(teacher) if self.teacher_is_split else contextlib.nullcontext():
            sheet = self._draw(teacher)
        if self.log:
            self._write(folder / "teacher.png", sheet)
            write_json(beside, about)

    def _draw(self, transformer: nn.Module) -> Image.Image:
        """A row of pictures; they are drawn one by one, since training has filled the memory."""
        pipeline = copy.copy(self.pipeline)
        # past the pipeline's own __setattr__, which would write the class of a split student into its config
        object.__setattr__(pipeline, self.component, transformer)
        device = next(transformer.parameters()).device
        pictures = []
        with _others_on(pipeline, device, self.component), autocast(device, self.precision):
            for index, prompt in enumerate(self.prompts):
                noise = [picture_generator(self.seed, index)]
                pictures += draw(pipeline, [prompt], noise, self.num_inference_steps, self.call_kwargs)
        height = max(picture.height for picture in pictures)
        sheet = Image.new("RGB", (sum(picture.width for picture in pictures), height), (255, 255, 255))
        left = 0
        for picture in pictures:
            sheet.paste(picture, (left, 0))
            left += picture.width
        return sheet

    @staticmethod
    def _write(path: Path, sheet: Image.Image) -> None:
        with atomic_path(path) as temporary:
            sheet.save(temporary, "PNG")


def sample_sheet(
    pipeline: Any | None, config: RunConfig, prompts: Sequence[str], out: Path, log: Log, group: Group
) -> SampleSheet | None:
    """What draws the sheets of a run with the teacher's pipeline, or None where the run asks for none."""
    settings = config.distill
    if pipeline is None or not settings.sample_every:
        return None
    return SampleSheet(
        pipeline,
        prompts[: settings.sample_prompts],
        out,
        config.evaluate.num_inference_steps,
        guidance_arguments(pipeline, config.capture),
        config.seed,
        config.precision,
        log if group.is_main else None,
        group if settings.shard or settings.shard_teacher else SINGLE,
        settings.splits_teacher(group.size),
        config.capture.component,
    )


@contextlib.contextmanager
def _others_on(pipeline: Any, device: torch.device, component: str) -> Iterator[None]:
    """Bring all other components to the device for the block, if training had them wait elsewhere."""
    moved: list[tuple[nn.Module, torch.device]] = []
    try:
        for name, module in pipeline.components.items():
            if name == component or not isinstance(module, nn.Module):
                continue
            here = next((p.device for p in module.parameters()), device)
            if here != device:
                moved.append((module.to(device), here))
        yield
    finally:
        for module, place in moved:
            module.to(place)
