"""Pictures and captions made to end or hang a run: each is skipped, counted and listed, in time and in memory."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bounds import bounded
from PIL import EpsImagePlugin, Image
from test_sources import FakeTable, install

from ppcl.capture.sources import Skipped, choose_samples, open_source
from ppcl.common.outside import inside, open_regular
from ppcl.common.pictures import MAX_PIXELS, BadPicture, open_picture
from ppcl.config import CaptureConfig
from ppcl.errors import ArtifactError, UserError
from ppcl.eval.generate import read_picture
from ppcl.eval.report_pictures import small_picture


@pytest.fixture(autouse=True)
def in_time_and_memory() -> Iterator[None]:
    """Fail a test that takes over 10 s or 1 GB more than it began with."""
    with bounded(10, 1e9):
        yield


def encoded(kind: str = "PNG", size: tuple[int, int] = (12, 9)) -> bytes:
    """A plain picture."""
    file = io.BytesIO()
    Image.new("RGB", size, (200, 10, 10)).save(file, kind)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    """A part of a PNG."""
    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def png_header(width: int, height: int) -> bytes:
    """A PNG that says its size, and has a row or two."""
    about = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", about) + chunk(b"IDAT", zlib.compress(bytes(10**6)))


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"
CONTENTS: dict[str, tuple[bytes, str]] = {
    "postscript": (POSTSCRIPT, "corrupt picture"),
    "postscript in dos": (
        b"\xc5\xd0\xd3\xc6" + struct.pack("<6I", 32, 99, 0, 0, 0, 0) + bytes(4) + POSTSCRIPT, "corrupt picture",
    ),
    "pdf": (b"%PDF-1.4\n", "corrupt picture"),
    "icon": (encoded("ICO", (16, 16)), "corrupt picture"),
    "fits": (b"SIMPLE  =                    T".ljust(2880), "corrupt picture"),
    "windows metafile": (b"\xd7\xcd\xc6\x9a" + bytes(60), "corrupt picture"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "corrupt picture"),
    "html": (b"<html>not found</html>", "corrupt picture"),
    "nothing": (b"", "corrupt picture"),
    "cut": (encoded()[:40], "corrupt picture"),
    "400 megapixels": (png_header(20_000, 20_000), "too large picture"),
    "just too many pixels": (png_header(MAX_PIXELS // 1024 + 1, 1024), "too large picture"),
    "one endless row": (png_header(2**31 - 1, 1), "too large picture"),
    "a bitmap of 2 terapixels": (
        encoded("BMP")[:18] + struct.pack("<ii", 2**20, 2**21) + encoded("BMP")[26:], "too large picture",
    ),
    "a bomb of text": (
        encoded()[:33] + chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2 * 10**8))) + encoded()[33:], "corrupt picture",
    ),
}  # fmt: skip


@pytest.fixture
def ghostscript(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes that Ghostscript would have run."""
    ran: list[str] = []

    def run(*_: object, **__: object) -> Image.Image:
        ran.append("ran")
        return Image.new("RGB", (9, 9))

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    return ran


def use(data: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Choose from a source and read what was chosen; return captions by name, and reasons by name."""
    skipped = Skipped()
    chosen = choose_samples(open_source(CaptureConfig(data=str(data))), 100, [(8, 8)], (), skipped, 0)
    for sample in chosen:
        assert sample.picture().size == (8, 8)
    skipped.save(data.parent / "skipped.jsonl")  # what no UTF-8 file takes would end a run here
    rows = [json.loads(line) for line in (data.parent / "skipped.jsonl").read_text(encoding="utf-8").splitlines()]
    return {sample.entry.name: sample.caption for sample in chosen}, {row["name"]: row["reason"] for row in rows}


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_no_picture_is_skipped_everywhere(name: str, tmp_path: Path, ghostscript: list[str]) -> None:
    content, reason = CONTENTS[name]
    data = tmp_path / "data"
    data.mkdir()
    for stem, bytes_ in (("good", encoded()), ("bad", content)):
        (data / f"{stem}.png").write_bytes(bytes_)
        (data / f"{stem}.txt").write_text(f"a {stem} cat")
    assert use(data) == ({"good.png": "a good cat"}, {"bad.png": reason})
    with pytest.raises(ArtifactError, match=r"bad\.png cannot be used") as caught:
        read_picture(data / "bad.png")
    assert "\n" not in str(caught.value)
    assert small_picture(data / "bad.png", 100) is None
    assert not ghostscript


KINDS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")


@pytest.mark.parametrize("kind", KINDS)
def test_raster_formats_are_opened_whatever_their_file_is_called(kind: str, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded(kind))
    for source in (encoded(kind), tmp_path / "x.png"):
        assert open_picture(source).size == (12, 9)


def test_damaged_pictures_are_bad_samples_and_nothing_else() -> None:
    """Bytes changed at random: Pillow's decoders raise all kinds of errors."""
    draw = random.Random(0)
    for kind in KINDS:
        whole = encoded(kind)
        for _ in range(60):
            content = bytearray(whole[: draw.randrange(len(whole)) + 1])
            for _ in range(draw.randrange(4)):
                content[draw.randrange(len(content))] = draw.randrange(256)
            try:
                open_picture(bytes(content))
            except BadPicture as bad:
                assert bad.reason in ("corrupt picture", "too large picture")


def no_file(folder: Path, stem: str, make: Callable[[Path], None]) -> None:
    """A good sample of a name, and one whose picture and one whose caption are made otherwise."""
    (folder / f"{stem}-picture.txt").write_text("a cat")
    make(folder / f"{stem}-picture.png")
    (folder / f"{stem}-caption.png").write_bytes(encoded())
    make(folder / f"{stem}-caption.txt")


def sparse(path: Path) -> None:
    """100 GB that take no room on the disk."""
    with path.open("wb") as file:
        file.truncate(10**11)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "good.png").write_bytes(encoded())
    (data / "good.txt").write_text("a good cat")
    no_file(data, "pipe", os.mkfifo)
    no_file(data, "device", lambda path: path.symlink_to("/dev/zero"))
    no_file(data, "gone", lambda path: path.symlink_to("nowhere"))
    no_file(data, "loop", lambda path: path.symlink_to(path.name))
    no_file(data, "sparse", sparse)
    (data / "folder-caption.png").write_bytes(encoded())
    (data / "folder-caption.txt").mkdir()
    used, reasons = use(data)
    assert used == {"good.png": "a good cat"}
    assert reasons == {
        **{f"{stem}-picture.png": "unreadable picture" for stem in ("pipe", "device", "loop", "sparse")},
        **{f"{stem}-caption.png": "no caption" for stem in ("pipe", "device", "loop", "gone", "folder")},
        **{"gone-picture.png": "missing picture", "sparse-caption.png": "unreadable caption"},
    }
    for stem in ("pipe", "device", "sparse"):
        with pytest.raises(ArtifactError, match="cannot be used"):
            read_picture(data / f"{stem}-picture.png")
    with pytest.raises(OSError, match="regular file"):
        open_regular(Path("/dev/zero"), 10)


def test_listings_that_name_what_they_should_not(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    for path in (data / "good.png", data / "sub" / "deep.png"):
        path.write_bytes(encoded())
    os.mkfifo(data / "pipe.png")
    bad = ["", "good.png\0", "\ud800.png", 7, None, ["good.png"], {}, True]
    lines = [json.dumps({"file_name": name, "text": "a cat"}) for name in bad]
    lines += ["[" * 100_000, '{"file_name": ' * 50_000, f'{{"file_name": {"9" * 5000}}}', "null", "3", '"x"']
    lines += [json.dumps({"file_name": "good.png", "text": "x" * 2**20})]
    refused = {f"metadata.jsonl:{number}": "bad caption line" for number in range(1, len(lines) + 1)}
    names = {
        **{"good.png": "a good cat", "sub/deep.png": "a deep cat", "pipe.png": "a pipe", "x" * 300 + ".png": "long"},
        **{"\N{CAT FACE}.png": "no such cat", "/dev/zero": "no end", "../data": "a folder"},
    }
    lines += [json.dumps({"file_name": name, "text": text}) for name, text in names.items()]
    captions = {"nul\0": "a", "half \udc80": "b", "\ud83d": "c", "x" * 70_000: "d"}
    lines += [json.dumps({"file_name": "good.png", "text": text}) for text in captions]
    (data / "metadata.jsonl").write_text("\n".join(lines))
    used, reasons = use(data)
    assert used == {"good.png": "a good cat", "sub/deep.png": "a deep cat"}
    assert reasons.pop("good.png") in ("unusable caption", "too long caption")
    assert reasons == {
        **refused,
        **dict.fromkeys(("pipe.png", "x" * 300 + ".png", "/dev/zero", "../data"), "unreadable picture"),
        "\N{CAT FACE}.png": "missing picture",
    }


@pytest.mark.parametrize("name", ["a/b.txt", "a", "a b", "..a", "a..b/c"])
def test_names_inside(name: str, tmp_path: Path) -> None:
    assert inside(tmp_path, name, "x") == tmp_path / name


def test_a_name_that_is_no_utf8_is_a_name(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for stem in (b"\xff\xfe", b"ok"):
        Path(os.fsdecode(bytes(data) + b"/" + stem + b".png")).write_bytes(encoded())
    Path(os.fsdecode(bytes(data) + b"/\xff\xfe.txt")).write_text("a cat")
    used, reasons = use(data)
    assert list(used.values()) == ["a cat"]
    assert reasons == {"ok.png": "no caption"}
    Path(os.fsdecode(bytes(data) + b"/\xff\xfe.txt")).write_bytes(b"\xff")
    assert use(data)[1] == {"ok.png": "no caption", "\\udcff\\udcfe.png": "unreadable caption"}


def member(name: str, content: bytes, **about: object) -> bytes:
    """A file in a tar, with its header changed."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    headers = about.pop("pax_headers", None)
    if headers:
        info.pax_headers = headers  # type: ignore[assignment]
    for key, value in about.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.PAX_FORMAT if headers else tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def sized(header: bytes, size: bytes) -> bytes:
    """A header that says another size, in bytes."""
    changed = bytearray(header[:512])
    changed[124:136] = size.rjust(12, b"\0") if len(size) < 12 else size
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed) + header[512:]


NEGATIVE = b"\xff" * 10 + b"\xfe\x00"  # -512 as numbers of base 256 are written
HUGE = b"\x80" + b"\xff" * 11
SHARDS = {
    "a negative size": sized(member("b.png", encoded()), NEGATIVE),
    "a negative size of an attribute": member("b.png", encoded(), pax_headers={"size": "-1024"}),
    "a size beyond any disk": sized(member("b.png", encoded()), HUGE),
    "a long name of negative size": sized(member("b" * 200, b"x"), NEGATIVE),
    "a long name beyond any disk": sized(member("b" * 200, b"x"), HUGE),
    "attributes of negative size": sized(member("b.png", b"x", pax_headers={"comment": "x"}), NEGATIVE),
    "attributes in attributes": sized(member("b.png", b"", pax_headers={"x": "y"})[:512], b"0" * 11 + b"\0") * 5000,
    "garbage": random.Random(0).randbytes(5000),
    "a global header that ends": sized(member("b", b"x", pax_headers={"x": "y"}), b"77777777777\0"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_shards_that_lead_astray_keep_what_stood_before(name: str, tmp_path: Path) -> None:
    good = member("good.png", encoded()) + member("good.txt", b"a good cat")
    data = tmp_path / "data.tar"
    data.write_bytes(good + SHARDS[name] + bytes(1024))
    used, reasons = use(data)
    assert used == {"data.tar/good": "a good cat"}
    assert reasons["data.tar"] == "damaged shard"


def test_members_that_are_too_large_or_no_text(tmp_path: Path) -> None:
    pairs: dict[str, tuple[str, bytes]] = {
        "deep": ("json", b"[" * 100_000), "number": ("json", b'{"text": ' + b"9" * 5000 + b"}"),
        "half": ("json", b'{"text": "\\ud800"}'), "nul": ("txt", b"a\0b"), "long": ("txt", b"x" * 2**21),
        "good": ("txt", b"a good cat"),
    }  # fmt: skip
    content = b"".join(
        member(f"{stem}.png", encoded()) + member(f"{stem}.{suffix}", text) for stem, (suffix, text) in pairs.items()
    )
    data = tmp_path / "data.tar"
    data.write_bytes(content + bytes(1024))
    used, reasons = use(data)
    assert used == {"data.tar/good": "a good cat"}
    assert reasons == {
        "data.tar/deep": "unreadable caption", "data.tar/number": "unreadable caption",
        "data.tar/half": "unusable caption", "data.tar/nul": "unusable caption", "data.tar/long": "too large member",
    }  # fmt: skip


def test_a_shard_with_a_picture_of_gigabytes(tmp_path: Path) -> None:
    header = sized(member("big.png", b""), b"%011o\0" % (2**32))
    data = tmp_path / "data.tar"
    with data.open("wb") as file:
        file.write(header)
        file.seek(2**32, os.SEEK_CUR)
        file.write(member("big.txt", b"a cat") + bytes(1024))
    began = time.monotonic()
    assert use(data) == ({}, {"data.tar/big": "too large member"})
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "data", ["a" * 5000, "a/" * 3000, "\0x", "~nobody/x", "x" * 5000 + ".tar", "{0..99999999999}.tar"]
)
def test_names_of_no_data_are_one_line(data: str) -> None:
    with pytest.raises(UserError, match=r"^capture\.data = [^\n]*$"):
        open_source(CaptureConfig(data=data))


@pytest.mark.parametrize("name", ["hub:owner/cats", "rows.parquet"])
def test_rows_of_the_hub_name_no_files_of_this_machine(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("mine.png", "rows.parquet"):
        (tmp_path / file).write_bytes(encoded())
    rows = [{"image": value, "text": "a"} for value in ("mine.png", {"path": "mine.png"}, {"path": "/dev/zero"})]
    install(monkeypatch, load_dataset=lambda *_, **__: FakeTable(rows, columns=["image", "text"]))
    skipped = Skipped()
    samples = choose_samples(open_source(CaptureConfig(data=name)), 9, [(8, 8)], (), skipped, 0)
    reasons = [row["reason"] for row in skipped.rows]
    assert (len(samples), reasons) == ((0, ["missing picture"] * 3) if "hub" in name else (2, ["unreadable picture"]))
