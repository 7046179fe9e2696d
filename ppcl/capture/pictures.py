"""States made from captioned pictures instead of the teacher's own trajectories.

A picture is encoded by the VAE and noised to one step of the sampler (flow matching: x_t = (1 - s) x_0 + s e, or
whatever the scheduler's own rule is), and the teacher answers there. The pipeline's image-to-image sibling in diffusers
does all of it with its own code (packing, text, guidance, timesteps): its ``strength`` names the step, and it is
interrupted after that one. So nothing of a family is written down here, and a family without such a sibling is refused.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ppcl.capture.prompts import cut_note
from ppcl.capture.sources import BadSample, Sample, Skipped, bucket_sizes, choose_samples, open_source
from ppcl.capture.spread import choose_rows
from ppcl.capture.trajectories import forget_others, prompt_length, recording, split_prompts, write_calls
from ppcl.common.progress import Progress
from ppcl.common.streams import Stream, captured_noise, step_generator
from ppcl.config import CaptureConfig
from ppcl.config.names import TRANSFORMER
from ppcl.config.sections import PROMPTS
from ppcl.errors import ModelError, UserError
from ppcl.teacher import call_arguments as trees
from ppcl.teacher.calls import Call
from ppcl.teacher.pipeline_call import call_pipeline, guidance_arguments, other_transformers, picture_arguments

logger = logging.getLogger(__name__)
SKIPPED = "skipped.jsonl"
DEFAULT_SIDE = 1024  # pixels, where a pipeline names no size of its own
_NEEDED = {"image", "strength", "callback_on_step_end"}


def image_to_image(pipeline: Any) -> Any:
    """The pipeline's image-to-image sibling, of the same components.

    Args:
        pipeline: A text-to-image pipeline, ``FluxPipeline`` for one; the sibling is ``FluxImg2ImgPipeline``.

    Raises:
        ModelError: diffusers has none that takes ``strength``, so pictures cannot be calibration data here.
    """
    import diffusers

    name = type(pipeline).__name__
    kind = getattr(diffusers, name.replace("Pipeline", "Img2ImgPipeline"), None) if name.endswith("Pipeline") else None
    if not (isinstance(kind, type) and set(inspect.signature(kind.__call__).parameters) >= _NEEDED):
        raise ModelError(
            f"{name} has no image-to-image sibling in diffusers, which noised pictures need; set capture.data=prompts "
            "(Qwen-Image, FLUX.1, SD3, Z-Image and Chroma have one)"
        )
    if others := other_transformers(pipeline):
        raise ModelError(
            f"{name} calls {' or '.join((TRANSFORMER, *others))} by how much noise there is, and noised pictures do "
            "not know which; set capture.data=prompts"
        )
    accepted = inspect.signature(kind).parameters
    sibling = kind(**{part: module for part, module in pipeline.components.items() if part in accepted})
    sibling.set_progress_bar_config(disable=True)
    return sibling


def picture_sizes(pipeline: Any, settings: CaptureConfig) -> list[tuple[int, int]]:
    """The (height, width) buckets of a run, in multiples of what the latents' patches cover."""
    scale = getattr(pipeline, "vae_scale_factor", 8)
    side = (getattr(pipeline, "default_sample_size", None) or DEFAULT_SIDE // scale) * scale
    return bucket_sizes(settings.height or side, settings.width or side, settings.aspect_ratios, 2 * scale)


def record_noised(
    sibling: Any,
    prompts: Sequence[str],
    pictures: Sequence[Image.Image],
    step: int,
    generators: Sequence[torch.Generator],
    settings: CaptureConfig,
) -> list[Call]:
    """Noise pictures to one step of the sampler; return the transformer's calls there (guidance may make it two).

    Args:
        sibling: See :func:`image_to_image`.
        prompts: A caption for each picture.
        pictures: All of one size.
        step: Of ``settings.num_inference_steps``; 0 is almost all noise.
        generators: One for the noise of each picture.
        settings: Steps and guidance.

    Raises:
        ModelError: The pipeline refuses pictures of this size, or its sampler noises none.
    """
    width, height = pictures[0].size

    def interrupt(pipeline: Any, *_: Any) -> dict[str, Any]:
        pipeline._interrupt = True  # diffusers' own way to end a sampling early
        return {}

    with recording(getattr(sibling, settings.component)) as calls:
        call_pipeline(  # SD3 has positions for so many rows and columns, and some samplers cannot noise a picture
            sibling,
            prompts,
            f"set capture.aspect_ratios, or capture.height and capture.width (here {width}x{height}), or "
            "capture.data=prompts",
            image=list(pictures),
            # the first step is int(steps - steps * strength); half a step more than that cannot be rounded off
            strength=1 - (step + 0.5) / settings.num_inference_steps,
            generator=list(generators),
            num_inference_steps=settings.num_inference_steps,
            output_type="latent",
            callback_on_step_end=interrupt,
            **{**guidance_arguments(sibling, settings), "height": height, "width": width},
        )
    return calls


def branches_of(calls: Sequence[Call], count: int) -> list[tuple[Call, int]]:
    """Where guidance's answers with and without the prompt are: two calls, or one of twice the batch.

    Args:
        calls: See :func:`record_noised`.
        count: Pictures.

    Returns:
        For each branch the call, and the row of the first picture in it.
    """
    return [(call, at) for call in calls for at in range(0, trees.batch_size(call.arguments), count)]


def check_data(pipeline: Any, settings: CaptureConfig, noised: bool) -> None:
    """Find out what can be wrong with ``capture.data`` before anything is done.

    Args:
        pipeline: The teacher.
        settings: See :class:`CaptureConfig`.
        noised: Whether pictures are noised, now or while substitutes are trained.

    Raises:
        UserError: See :func:`image_to_image` and :func:`ppcl.capture.sources.open_source`.
    """
    if noised:
        image_to_image(pipeline)
    if settings.data != PROMPTS:
        open_source(settings)
    if settings.source_column and not picture_arguments(pipeline):
        raise UserError(
            f"{type(pipeline).__name__} starts from no picture, so capture.source_column has no use; leave it out"
        )


@dataclass(frozen=True)
class _Job:
    """One file of states."""

    path: Path
    number: int
    samples: list[Sample]


def capture_pictures(pipeline: Any, folder: Path, settings: CaptureConfig, seed: int, exclude: Collection[str]) -> None:
    """Record states of captioned pictures into ``folder``; files that are there are kept.

    Args:
        pipeline: The teacher.
        folder: Receives what :func:`ppcl.capture.trajectories.capture` writes, and ``skipped.jsonl``.
        settings: See :class:`CaptureConfig`; ``num_prompts`` pictures are used at most.
        seed: Fixes the order of pictures, noise, split and choice of timesteps.
        exclude: Captions kept for evaluation.

    Raises:
        ModelError: The family cannot noise pictures.
        UserError: There are fewer than two usable samples with different captions.
    """
    sibling, source = image_to_image(pipeline), open_source(settings)
    skipped = Skipped()
    sizes = picture_sizes(pipeline, settings)
    samples = choose_samples(source, settings.num_prompts, sizes, exclude, skipped, seed)
    skipped.save(folder / SKIPPED)
    captions = list(dict.fromkeys(sample.caption for sample in samples))
    if len(captions) < 2:
        left_out = f"; left out: {skipped} ({folder / SKIPPED}{skipped.example})" if skipped.rows else ""
        raise UserError(
            f"capture.data = {settings.data}: {len(samples)} usable samples with {len(captions)} different captions, "
            f"at least 2 are needed{left_out}"
        )
    listed = len(skipped.rows)
    if skipped.rows:
        logger.warning(
            "capture.data: %d samples are used; left out: %s; listed in %s", len(samples), skipped, folder / SKIPPED
        )
    if note := cut_note(pipeline, captions):
        logger.warning("%s", note)
    forget_others(folder, [[sample.entry.name, sample.caption, sample.size] for sample in samples])
    jobs = _jobs(pipeline, samples, captions, folder, settings, seed)
    with Progress("capture", total=len(jobs)) as progress:
        for job in jobs:
            if not job.path.is_file():
                _record(sibling, job, settings, seed, skipped)
            progress.advance()
    if len(skipped.rows) > listed:  # pictures that went away in between
        skipped.save(folder / SKIPPED)
    if any(not list(folder.glob(f"{split}-*.safetensors")) for split in ("train", "held-out")):
        raise UserError(f"capture.data = {settings.data}: its pictures went away while they were used; run again")


def _jobs(
    pipeline: Any, samples: list[Sample], captions: list[str], folder: Path, settings: CaptureConfig, seed: int
) -> list[_Job]:
    """Share the samples out to files: of one side of the split, one size, and captions of like length."""
    jobs: list[_Job] = []
    for split, chosen in split_prompts(captions, settings.held_out_share, seed).items():
        lengths = {text: prompt_length(pipeline, text) for text in chosen}
        index = 0
        for size in sorted({sample.size for sample in samples}):
            own = [sample for sample in samples if sample.size == size and sample.caption in lengths]
            own.sort(key=lambda sample: (lengths[sample.caption], sample.caption, sample.entry.name))
            for start in range(0, len(own), settings.batch_size):
                path = folder / f"{split}-{index:04d}.safetensors"
                jobs.append(_Job(path, len(jobs), own[start : start + settings.batch_size]))
                index += 1
    return jobs


def _record(sibling: Any, job: _Job, settings: CaptureConfig, seed: int, skipped: Skipped) -> None:
    """Write one file; nothing where none of its pictures can be read any more."""
    ready: list[tuple[Sample, Image.Image]] = []
    for sample in job.samples:
        try:
            ready.append((sample, sample.picture()))
        except BadSample as bad:
            skipped.add(sample.entry.name, bad)
    if not ready:
        return
    generator = step_generator(seed, job.number, Stream.CAPTURED_STEPS)
    steps = choose_rows(settings.num_inference_steps, settings.states_per_prompt, len(ready), generator)
    noise = captured_noise(seed, job.number, len(ready))  # one a picture, which goes on from state to state
    calls: list[Call] = []
    numbers: list[int] = []  # of the branch of each
    for place, (step, rows) in enumerate(steps.items()):
        prompts, pictures = [ready[i][0].caption for i in rows], [ready[i][1] for i in rows]
        found = record_noised(sibling, prompts, pictures, step, [noise[i] for i in rows], settings)
        branches = branches_of(found, len(rows))  # each gets its share of the pictures
        for number, (call, at) in enumerate(branches):
            if own := [at + i for i in range((number + place) % len(branches), len(rows), len(branches))]:
                # the call is of the step's pictures alone, and what is recorded are numbers of the file's captions
                calls.append(replace(call.take(own), whole_rows=tuple(rows[i - at] for i in own)))
                numbers.append(number)
    about = {"prompts": [sample.caption for sample, _ in ready], "pictures": [sample.entry.name for sample, _ in ready]}
    write_calls(job.path, calls, **about, of=settings.num_inference_steps, branches=numbers)
