"""Which files are pictures, and what is seen in one: the same for calibration, references and report. No torch.

A picture is upright (as its EXIF says), RGB, and lies on white where it is transparent; of an animation the first frame
counts.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# what Pillow's decoders let through on damaged files
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


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


def picture_files(folder: Path) -> list[Path]:
    """All pictures in a folder and the folders in it, in a fixed order, but for what hidden folders hold."""
    files = sorted(path for path in folder.rglob("*") if is_picture(path.name) and path.is_file())
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def open_picture(source: Path | bytes) -> Image.Image:
    """Read a picture as it is seen; see above.

    Args:
        source: A file, or the content of one.

    Raises:
        BadPicture: It is missing, damaged, too large, or no picture.
    """
    from PIL import Image, UnidentifiedImageError

    content = read_bytes(source) if isinstance(source, Path) else source
    try:
        with Image.open(io.BytesIO(content)) as image:
            return as_seen(image)
    except UnidentifiedImageError:  # whose text names an address in memory
        raise BadPicture("corrupt picture", "it is in no format that Pillow knows") from None
    except Image.DecompressionBombError as error:
        raise BadPicture("too large picture", str(error)) from None
    except _DAMAGED as error:
        raise BadPicture("corrupt picture", str(error) or type(error).__name__) from None


def read_bytes(path: Path) -> bytes:
    """The content of a picture's file.

    Raises:
        BadPicture: It is not there, or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BadPicture("missing picture") from None
    except OSError as error:
        raise BadPicture("unreadable picture", str(error.strerror or error)) from None


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
