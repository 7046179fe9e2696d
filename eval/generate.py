"""Drawing pictures: one PNG a prompt, one seed a picture, resumable.

Picture ``index`` starts from noise that (seed, index) alone decides, drawn on the CPU, so the
batch size and the device change nothing about it. A batch is drawn whole or not at all:
the last bits of a batched forward pass depend on its neighbours, and a resumed folder must
hold the same bytes as an undisturbed one.

Of a video the middle frame is kept: what judges pictures wants one view of each prompt, and frames
of one video are too alike to count as several. The velocity error sees all of them.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ppcl.common.files import atomic_path, read_json, write_json
from ppcl.common.pictures import BadPicture, open_picture
from ppcl.common.progress import Progress
from ppcl.common.streams import Stream, step_generator
from ppcl.errors import ArtifactError, UserError
from ppcl.eval.drawn import SETTINGS_FILE, set_of, unpack
from ppcl.teacher.pipeline_call import PicturedPrompt, call_pipeline

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1


def picture_generator(seed: int, index: int) -> torch.Generator:
    """The CPU generator of one picture; it depends on (seed, index) alone."""
    return step_generator(seed, index, Stream.PICTURE)


def accepted_kwargs(pipeline: Any, call_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keep the arguments that the pipeline's call knows; None means its default and is left out."""
    parameters = inspect.signature(pipeline.__call__).parameters
    given = {key: value for key, value in call_kwargs.items() if value is not None}
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return given
    if unused := sorted(set(given) - set(parameters)):
        logger.warning("%s does not take %s; ignored", type(pipeline).__name__, ", ".join(unused))
    return {key: value for key, value in given.items() if key in parameters}


def steps_of(steps: int, call_kwargs: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Steps that a model draws in, its own if its arguments say some; and the other arguments."""
    others = {name: value for name, value in call_kwargs.items() if name != "num_inference_steps"}
    return call_kwargs.get("num_inference_steps") or steps, others


def draw(
    pipeline: Any,
    prompts: Sequence[str],
    generators: list[torch.Generator],
    num_inference_steps: int,
    call_kwargs: dict[str, Any],
) -> list[Image.Image]:
    """Call the pipeline on one batch.

    Args:
        pipeline: A diffusers text-to-image or text-to-video pipeline.
        prompts: The batch.
        generators: One for each prompt; prompts that bring pictures are drawn one by one.
        num_inference_steps: Denoising steps.
        call_kwargs: Further arguments, all of which the pipeline takes.

    Returns:
        One PIL picture for each prompt; of a video, its middle frame.

    Raises:
        UserError: The pipeline failed, ran out of memory, or returned something else.
    """
    if len(prompts) > 1 and isinstance(prompts[0], PicturedPrompt):  # most pipelines take one picture at a time
        pairs = zip(prompts, generators, strict=True)
        return [draw(pipeline, [text], [noise], num_inference_steps, call_kwargs)[0] for text, noise in pairs]
    try:
        output = call_pipeline(
            pipeline,
            prompts,
            generator=generators,
            num_inference_steps=num_inference_steps,
            output_type="pil",
            **call_kwargs,
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory while drawing {len(prompts)} pictures at once; lower evaluate.batch_size"
        ) from error
    images = pictures_of(output)
    if images is None or len(images) != len(prompts):
        got = f"{len(images)} pictures" if images is not None else "no list of pictures"
        raise UserError(
            f"{type(pipeline).__name__} returned {got} for {len(prompts)} prompts; "
            "evaluate a text-to-image or text-to-video pipeline"
        )
    return images


def pictures_of(output: Any) -> list[Image.Image] | None:
    """One picture for each prompt of a pipeline's output; a video is represented by its middle frame.

    Args:
        output: What a pipeline returned: ``images``, a list of PIL pictures, or ``frames``, a list of videos
            that are lists of PIL pictures.

    Returns:
        The pictures, or None where the output holds neither.
    """
    images = getattr(output, "images", None)
    if isinstance(images, list):
        return images
    videos = getattr(output, "frames", None)
    if isinstance(videos, list) and videos and all(isinstance(video, list) and video for video in videos):
        return [video[len(video) // 2] for video in videos]
    return None


@contextlib.contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Turn the pipeline's own progress bar off for a while; ours is shown instead."""
    if not hasattr(pipeline, "set_progress_bar_config"):
        yield
        return
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


def _is_readable(path: Path) -> bool:
    try:
        open_picture(path)
    except BadPicture:
        return False
    return True


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings into a fresh folder, or make sure that it holds pictures of the same ones."""
    path = folder / SETTINGS_FILE
    if path.is_file():
        held = read_json(path)
        held = held if isinstance(held, dict) else {}
        if different := [key for key in settings if held.get(key) != settings[key]]:
            raise UserError(
                f"{folder} holds pictures of other settings (different: {', '.join(different)}); "
                "delete it, choose another folder, or go back to those settings"
            )
        return
    if any(folder.glob("*.png")):
        raise UserError(f"{folder} holds pictures but no {SETTINGS_FILE}; delete it or choose another folder")
    write_json(path, settings)


def picture_settings(
    model: str, prompts: Sequence[str], seed: int, num_inference_steps: int, call_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Everything that a set of pictures depends on, as it stands beside them; for the arguments see ``generate``."""
    settings: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "prompts": list(prompts),
        "seed": seed,
        "num_inference_steps": num_inference_steps,
        "kwargs": {key: value for key, value in call_kwargs.items() if value is not None},
    }
    if isinstance(prompts[0], PicturedPrompt):
        settings["pictures"] = [getattr(prompt, "name", None) for prompt in prompts]
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def generate(
    pipeline: Any,
    prompts: Sequence[str],
    folder: Path,
    *,
    seed: int,
    num_inference_steps: int,
    batch_size: int,
    call_kwargs: dict[str, Any],
    label: str,
    model: str = "",
    drawn: Path | None = None,
) -> list[Path]:
    """Draw every prompt once; pictures that are there already are kept.

    Args:
        pipeline: A diffusers text-to-image or text-to-video pipeline.
        prompts: What to draw.
        folder: Where ``0000.png``, ``0001.png`` ... and ``prompts.json`` go.
        seed: Seed of the initial noise, together with a picture's index.
        num_inference_steps: Denoising steps.
        batch_size: Prompts drawn together.
        call_kwargs: ``height``, ``width``, ``guidance_scale``, ``negative_prompt`` and the like; what the
            pipeline does not take is ignored with a warning, None means the pipeline's default. Steps in it count.
        label: Shown beside the progress bar.
        model: Identifies the weights; a folder of another model's pictures is refused.
        drawn: A store of sets that were drawn before (:mod:`ppcl.eval.drawn`); one of the same settings is taken
            from there.

    Returns:
        The pictures' paths, in the order of the prompts.

    Raises:
        UserError: The folder holds pictures of other settings, or drawing failed.
    """
    if not prompts or batch_size < 1:
        raise UserError(f"nothing to draw: {len(prompts)} prompts, batch size {batch_size}; give at least one of each")
    folder = Path(folder)
    num_inference_steps, call_kwargs = steps_of(num_inference_steps, call_kwargs)
    settings = picture_settings(model, prompts, seed, num_inference_steps, call_kwargs)
    _claim(folder, settings)
    paths = [folder / f"{index:04d}.png" for index in range(len(prompts))]
    if (known := set_of(drawn, settings)) and not all(map(_is_readable, paths)):
        unpack(known, paths)
    kwargs = accepted_kwargs(pipeline, call_kwargs)
    with Progress(label, total=len(prompts)) as progress, quiet(pipeline):
        for start in range(0, len(prompts), batch_size):
            batch = range(start, min(start + batch_size, len(prompts)))
            if not all(_is_readable(paths[index]) for index in batch):
                generators = [picture_generator(seed, index) for index in batch]
                texts = [prompts[index] for index in batch]
                images = draw(pipeline, texts, generators, num_inference_steps, kwargs)
                for index, image in zip(batch, images, strict=True):
                    with atomic_path(paths[index]) as temporary:
                        image.save(temporary, format="PNG")
            progress.advance(len(batch))
    return paths


def read_picture(path: Path) -> np.ndarray:
    """Read one picture as (H, W, 3) uint8; see :mod:`ppcl.common.pictures`.

    Raises:
        ArtifactError: The file is missing or damaged.
    """
    try:
        return np.array(open_picture(path))
    except BadPicture as bad:
        raise ArtifactError(f"picture {path} cannot be used ({bad}); replace or delete it") from None
