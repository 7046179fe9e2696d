"""States on the fly: pictures that are noised anew for every step of the distillation.

Recorded states are seen again and again; here each step draws pictures, noise, timestep and branch of guidance, and the
teacher answers at once. Nothing is stored, and far more pictures can be used than recorded states fit on a disk. The
price is a pass of the text encoder, the VAE and the teacher's transformer for each batch, in every process for the
whole batch: so that padding, and with it the result, does not depend on the number of processes.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ppcl.capture.pictures import branches_of, image_to_image, picture_sizes, record_noised
from ppcl.capture.sources import BadSample, Sample, Skipped, choose_samples, open_source
from ppcl.capture.states import States
from ppcl.common.tensor_files import read_tensors
from ppcl.config import CaptureConfig
from ppcl.errors import UserError
from ppcl.teacher.calls import Call
from ppcl.training.distributed import SINGLE, Group, Share

logger = logging.getLogger(__name__)


class FreshStates(States):
    """The recorded states of the training split, whose :meth:`parts` are drawn anew from pictures.

    Args:
        folder: What the capture stage wrote.
        pipeline: The teacher.
        samples: Pictures to draw from.
        settings: See :class:`CaptureConfig`.
    """

    def __init__(self, folder: Path, pipeline: Any, samples: Sequence[Sample], settings: CaptureConfig) -> None:
        super().__init__(folder, "train")
        self.sibling, self.settings = image_to_image(pipeline), settings
        sizes = sorted({sample.size for sample in samples})
        self.pictures = [[sample for sample in samples if sample.size == size] for size in sizes]

    def parts(
        self, size: int, generator: torch.Generator, group: Group = SINGLE, accumulate: int = 1
    ) -> Iterator[tuple[Call, Share]]:
        """Record a batch, and yield this process's parts of it; see :meth:`States.parts`."""
        call = self.record(size, generator, group)
        if call is None:
            logger.warning("none of the pictures drawn for a step could be read; recorded states are used instead")
            return super().parts(size, generator, group, accumulate)
        self.calls.append(call)  # for as long as its parts are taken
        rows = [(len(self.calls) - 1, row) for row in range(len(call.velocity))]
        return self._and_forget(self.share_out(rows, group, accumulate))

    def _and_forget(self, parts: Iterator[tuple[Call, Share]]) -> Iterator[tuple[Call, Share]]:
        try:
            yield from parts
        finally:
            self.calls.pop()

    def largest(self, size: int, parts: int = 1) -> dict[str, Any]:
        """See :meth:`States.largest`; a batch of pictures is of one shape."""
        return self._roomiest([-(-size // parts)] * len(self.together()))

    def pieces(self, size: int, parts: int = 1) -> int:
        """One: a batch of pictures is of one shape."""
        return 1

    def record(self, size: int, generator: torch.Generator, group: Group = SINGLE) -> Call | None:
        """Noise a batch of pictures of one size to one step; everything comes from the generator.

        Returns:
            The teacher's call, of one branch of guidance; None if one of the processes could read no picture.
        """
        shares = torch.tensor([float(len(samples)) for samples in self.pictures])
        samples = self.pictures[int(torch.multinomial(shares, 1, generator=generator))]
        picks = torch.randint(len(samples), (min(size, len(samples)),), generator=generator).tolist()
        step, coin = torch.rand(2, generator=generator).tolist()
        seeds = torch.randint(2**62, (len(picks),), generator=generator).tolist()
        ready: list[tuple[str, Image.Image, torch.Generator]] = []
        for pick, seed in zip(picks, seeds, strict=True):
            try:
                ready.append((samples[pick].caption, samples[pick].picture(), torch.Generator().manual_seed(seed)))
            except BadSample:  # it went away while the run trains
                continue
        if group.any(not ready):  # a teacher that is split needs all processes
            return None
        captions, pictures, noise = zip(*ready, strict=True)
        place = int(step * self.settings.num_inference_steps)
        branches = branches_of(
            record_noised(self.sibling, captions, pictures, place, noise, self.settings), len(captions)
        )
        call, at = branches[int(coin * len(branches))]
        return call.take(range(at, at + len(captions)))


def fresh_states(
    pipeline: Any, folder: Path, settings: CaptureConfig, count: int, exclude: Collection[str], seed: int, speaks: bool
) -> FreshStates:
    """What training draws from where states are made on the fly.

    Captions of held-out states and of the evaluation are left out.

    Args:
        pipeline: The teacher's, text encoder and VAE on its device.
        folder: What the capture stage wrote.
        settings: Where the pictures are; see :class:`CaptureConfig`.
        count: Pictures at most.
        exclude: Captions of the evaluation.
        seed: Fixes which pictures.
        speaks: Whether this process says what it found.

    Raises:
        UserError: No picture is usable.
    """
    held_out = {text for path in folder.glob("held-out-*.safetensors") for text in read_tensors(path)[1]["prompts"]}
    skipped, sizes = Skipped(), picture_sizes(pipeline, settings)
    samples = choose_samples(open_source(settings), count, sizes, {*held_out, *exclude}, skipped, seed)
    if not samples:
        raise UserError(f"distill.fresh: {settings.data} has no usable sample for training; left out: {skipped}")
    if speaks:
        logger.info("distill.fresh: %d pictures%s", len(samples), f"; left out: {skipped}" if skipped.rows else "")
    return FreshStates(folder, pipeline, samples, settings)
