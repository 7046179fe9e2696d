"""Choose usable samples, and give each picture the nearest of a few sizes."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from PIL import Image, ImageOps

from ppcl.capture.sources.base import BadSample, Entry, Skipped, Source
from ppcl.common.progress import Progress

logger = logging.getLogger(__name__)
Size = tuple[int, int]  # height and width, pixels


def bucket_sizes(height: int, width: int, ratios: Sequence[str], multiple: int) -> list[Size]:
    """The sizes that pictures are brought to: one for each aspect ratio, all of about the same area.

    Args:
        height: Of the run's pictures, pixels; with ``width`` it gives the area, and a size of its own.
        width: See ``height``.
        ratios: ``width:height``, e.g. ``4:3``.
        multiple: Sides are multiples of it, pixels.

    Returns:
        Different (height, width) pairs, sorted.
    """
    area = height * width
    sides: list[tuple[float, float]] = [(height, width)]
    for text in ratios:
        across, down = map(int, text.split(":"))
        sides.append((math.sqrt(area * down / across), math.sqrt(area * across / down)))
    return sorted({(_to_multiple(h, multiple), _to_multiple(w, multiple)) for h, w in sides})


def _to_multiple(side: float, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple


def nearest_size(size: Size, sizes: Sequence[Size]) -> Size:
    """The size whose aspect ratio is nearest, so that least is cut off.

    Args:
        size: Of a picture, (height, width).
        sizes: To choose from.
    """
    ratio = math.log(size[0] / size[1])
    return min(sizes, key=lambda s: (abs(math.log(s[0] / s[1]) - ratio), s))


def fit_picture(picture: Image.Image, size: Size) -> Image.Image:
    """Scale a picture until it covers ``size`` (height, width), and cut the centre out."""
    return ImageOps.fit(picture, (size[1], size[0]), method=Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class Sample:
    """A usable sample.

    Attributes:
        caption: Without white space around it.
        size: (height, width) that its picture gets.
        entry: Where it is.
    """

    caption: str
    size: Size
    entry: Entry

    def picture(self) -> Image.Image:
        """Read the picture and bring it to its size.

        Raises:
            BadSample: It cannot be read any more.
        """
        return fit_picture(self.entry.picture(), self.size)


def choose_samples(
    source: Source, count: int, sizes: Sequence[Size], exclude: Collection[str], skipped: Skipped, seed: int
) -> list[Sample]:
    """Look at samples until ``count`` usable ones are found.

    Args:
        source: Where they come from.
        count: At most so many.
        sizes: What pictures are brought to; see :func:`bucket_sizes`.
        exclude: Captions that must not be used: those of the evaluation.
        skipped: Receives what was left out.
        seed: Of the order.
    """
    chosen: list[Sample] = []
    held_back = set(exclude)
    with Progress("look at pictures", total=count) as progress:
        for entry in source.entries(seed, skipped):
            try:
                caption = entry.caption()
                if caption in held_back:
                    raise BadSample("evaluation prompt", caption)
                width, height = entry.picture().size
            except BadSample as bad:
                skipped.add(entry.name, bad)
                continue
            chosen.append(Sample(caption, nearest_size((height, width), sizes), entry))
            progress.advance()
            if len(chosen) == count:
                break
    return chosen
