"""A picture is the same picture wherever it enters: calibration, references, evaluation, report."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ppcl.capture.sources import Skipped, open_source, tables
from ppcl.common.pictures import SUFFIXES, picture_files
from ppcl.config import CaptureConfig
from ppcl.errors import ArtifactError
from ppcl.eval.generate import read_picture
from ppcl.eval.pictures import reference_files
from ppcl.eval.report_pictures import small_picture

SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6  # the camera was held on its side


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def ramp(mode: str = "RGB") -> Image.Image:
    values = np.linspace(0, 255, 6 * 4 * 3).astype(np.uint8).reshape(6, 4, 3)
    return Image.fromarray(values).convert(mode)


def clear() -> Image.Image:
    image = ramp("RGBA")
    image.putalpha(Image.fromarray(np.linspace(0, 255, 24).astype(np.uint8).reshape(6, 4)))
    return image


PICTURES = {
    "plain.png": saved(ramp(), "PNG"),
    "sideways.jpg": saved(ramp(), "JPEG", exif=SIDEWAYS),
    "sideways.png": saved(ramp(), "PNG", exif=SIDEWAYS),
    "clear.png": saved(clear(), "PNG"),
    "clear.webp": saved(clear(), "WEBP", lossless=True),
    "palette.gif": saved(ramp("P"), "GIF", transparency=3),
    "grey.tiff": saved(ramp("L"), "TIFF"),
    "deep.png": saved(Image.fromarray((np.arange(24).reshape(6, 4) * 2500).astype(np.uint16)), "PNG"),
    "print.jpeg": saved(ramp("CMYK"), "JPEG"),
    "key.png": saved(ramp(), "PNG", transparency=(0, 3, 7)),
    "bits.bmp": saved(ramp("1"), "BMP"),
    "film.GIF": saved(ramp("P"), "GIF", save_all=True, append_images=[Image.new("P", (4, 6))]),
}


def of_calibration(data: Path) -> np.ndarray:
    (entry,) = open_source(CaptureConfig(data=str(data))).entries(0, Skipped())
    return np.array(entry.picture())


@pytest.mark.parametrize("name", PICTURES)
def test_every_entrance_sees_the_same(name: str, tmp_path: Path) -> None:
    content, folder, shard = PICTURES[name], tmp_path / "folder", tmp_path / "0.tar"
    folder.mkdir()
    (folder / name).write_bytes(content)
    with tarfile.open(shard, "w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    seen = {
        "references": read_picture(reference_files(folder)[0]),
        "calibration": of_calibration(folder),
        "shards": of_calibration(shard),
        "a row of bytes": np.array(tables._picture({"bytes": content, "path": None})),
        "a row with a path": np.array(tables._picture({"bytes": None, "path": str(folder / name)})),
        "a decoded row": np.array(tables._picture(Image.open(io.BytesIO(content)))),
        "report": np.array(small_picture(folder / name, 100)),
    }
    first = seen.pop("references")
    for entrance, picture in seen.items():
        assert picture.shape == first.shape and np.array_equal(picture, first), entrance
    assert first.shape == ((4, 6, 3) if "sideways" in name else (6, 4, 3))
    if name == "deep.png":  # scaled, not clipped
        assert len(np.unique(first)) > 20
    if name in ("clear.png", "clear.webp"):
        assert first[0, 0].tolist() == [255] * 3


def test_a_damaged_one_is_named_alike_and_hidden_files_are_no_pictures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(PICTURES["plain.png"][:60])
    for hidden in ("._bad.png", ".ipynb_checkpoints/bad-checkpoint.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"of the system")
    assert picture_files(tmp_path) == reference_files(tmp_path) == [bad]
    skipped = Skipped()
    source = open_source(CaptureConfig(data=str(tmp_path)))
    (entry,) = source.entries(0, skipped)
    with pytest.raises(Exception, match="corrupt picture"):
        entry.picture()
    with pytest.raises(ArtifactError, match=r"bad\.png cannot be used \(corrupt picture"):
        read_picture(bad)
    assert small_picture(bad, 10) is None and "corrupt picture" in caplog.text


def test_no_other_module_opens_pictures() -> None:
    root = Path(__file__).parents[2]
    own_data = {"ppcl/emoji/bake.py", "ppcl/emoji/data.py"}  # of the package itself
    opening = [
        str(path.relative_to(root))
        for folder in ("ppcl", "eval", "pipelines")
        for path in (root / folder).rglob("*.py")
        if "Image.open(" in path.read_text()
    ]
    assert sorted({*opening} - own_data) == ["ppcl/common/pictures.py"]
    assert ".tiff" in SUFFIXES
