"""Which files are pictures, and what is seen in one: the same for calibration, references and report. No torch.

A picture is upright (as its EXIF says), RGB, and lies on white where it is transparent; of an animation the first frame
counts.

A file's name says nothing about its bytes, and Pillow goes by these: a PostScript file named ``.png`` would be run by
Ghostscript. So raster formats alone are opened, of regular files alone, and their sizes are looked at before anything
is decoded.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ppcl.common.outside import open_regular

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF")
MAX_PIXELS = 2**26  # 8192 x 8192; with what is transparent laid on white it takes 1 GB of memory
MAX_BYTES = 2**28


class BadPicture(Exception):
    """A picture that cannot be used.

    Args:
        reason: A few words, the same for all pictures of this kind.
        detail: What is particular about this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def is_picture(name: str) -> bool:
    """Whether a file is a picture by its name; hidden files are the system's own (``._0001.png``)."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def picture_files(folder: Path, on_error: Callable[[OSError], object] | None = None) -> list[Path]:
    """All pictures in a folder and the folders in it, in a fixed order, but for what hidden folders hold.

    Args:
        folder: Where to look.
        on_error: Is told of a folder that cannot be read.

    Returns:
        What has a picture's name and is no folder; it may be no regular file.
    """
    files = []
    for at, folders, names in os.walk(folder, onerror=on_error):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(at) / name for name in names if is_picture(name)]
    return sorted(files)


def open_picture(source: Path | bytes) -> Image.Image:
    """Read a picture as it is seen; see above.

    Args:
        source: A file, or the content of one.

    Raises:
        BadPicture: It is missing, no regular file, in no raster format, too large, or damaged.
    """
    from PIL import UnidentifiedImageError

    try:
        with _opened(source) as file, _bounded(file) as image:
            return as_seen(image)
    except BadPicture:
        raise
    except MemoryError:
        raise BadPicture("too large picture", "there is no memory for it") from None
    except UnidentifiedImageError:  # whose text names an address in memory
        raise BadPicture("corrupt picture", f"it is none of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's decoders let all kinds of errors through on damaged files
        raise BadPicture("corrupt picture", str(error) or type(error).__name__) from None


def _opened(source: Path | bytes) -> contextlib.AbstractContextManager[IO[bytes]]:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        return open_regular(source, MAX_BYTES)
    except FileNotFoundError:
        raise BadPicture("missing picture") from None
    except OSError as error:
        raise BadPicture("unreadable picture", error.strerror or str(error)) from None


def _bounded(file: IO[bytes]) -> Image.Image:
    """Read a picture's header, and refuse what it says of its size before memory is taken for it."""
    from PIL import Image

    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # older versions of Pillow know no AVIF
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadPicture("too large picture", str(error)) from None
    if image.width * image.height > MAX_PIXELS:
        raise BadPicture("too large picture", f"{image.width} x {image.height} are more than {MAX_PIXELS:,} pixels")
    return image


def as_seen(image: Image.Image) -> Image.Image:
    """Turn an opened picture upright, to RGB, on white; 16 bits a channel are scaled to 8."""
    import numpy as np
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits (Pillow 10 opens them as 32), which Pillow would clip, not scale
        return Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.getbands()[-1] in "Aa" or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
