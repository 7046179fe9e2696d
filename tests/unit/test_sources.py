"""Captioned pictures: folders, shards, tables; what cannot be used is left out, counted and listed."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from ppcl.capture.sources import Skipped, bucket_sizes, choose_samples, fit_picture, nearest_size, open_source
from ppcl.capture.sources.shards import expand
from ppcl.config import CaptureConfig
from ppcl.errors import ConfigError, UserError

SIZES = [(32, 32), (24, 40), (40, 24)]


def picture(color=(200, 10, 10), size=(20, 30), kind="PNG", mode="RGB") -> bytes:
    """A plain picture; ``size`` is (height, width)."""
    file = io.BytesIO()
    Image.new(mode, (size[1], size[0]), color).save(file, kind)
    return file.getvalue()


def use(data, *, count=100, exclude=(), seed=0, **settings):
    """Choose from a source; return (captions by name, reasons by name, samples)."""
    skipped = Skipped()
    source = open_source(CaptureConfig(data=str(data), **settings))
    samples = choose_samples(source, count, SIZES, exclude, skipped, seed)
    reasons = {row["name"]: row["reason"] for row in skipped.rows}
    return {sample.entry.name: sample.caption for sample in samples}, reasons, samples


def listed_folder(folder: Path, lines: list[str], files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_listed_folder_with_everything_that_can_be_wrong(tmp_path: Path) -> None:
    good = picture()
    lines = [
        json.dumps({"file_name": "good.png", "text": " a red cat "}),
        '{"file_name": "half.png", "te',
        json.dumps(["good.png", "a list"]),
        json.dumps({"text": "no name"}),
        json.dumps({"file_name": 7, "text": "no name"}),
        json.dumps({"file_name": "blank.png", "text": "  "}),
        json.dumps({"file_name": "bare.png"}),
        json.dumps({"file_name": "gone.png", "text": "a gone cat"}),
        json.dumps({"file_name": "cut.png", "text": "a cut cat"}),
        json.dumps({"file_name": "junk.png", "text": "no cat"}),
        json.dumps({"file_name": "test.png", "text": "kept for evaluation"}),
        "",
        json.dumps({"file_name": "wide.jpg", "text": "a boat"}),
    ]
    files = {name: good for name in ("good.png", "blank.png", "bare.png", "test.png")}
    files |= {"cut.png": good[: len(good) // 2], "junk.png": b"hello", "wide.jpg": picture(size=(20, 60), kind="JPEG")}
    folder = listed_folder(tmp_path / "data", lines, files)
    used, reasons, samples = use(folder, exclude=["kept for evaluation"])
    assert used == {"good.png": "a red cat", "wide.jpg": "a boat"}
    assert {sample.entry.name: sample.size for sample in samples} == {"good.png": (24, 40), "wide.jpg": (24, 40)}
    assert reasons == {
        **{f"metadata.jsonl:{number}": "bad caption line" for number in (2, 3, 4, 5)},
        **{"blank.png": "empty caption", "bare.png": "no caption", "gone.png": "missing picture"},
        **{"cut.png": "corrupt picture", "junk.png": "corrupt picture", "test.png": "evaluation prompt"},
    }


def test_captions_beside_their_pictures(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/b.jpg", "c.png", "d.png"):
        (tmp_path / name).write_bytes(picture())
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "sub" / "b.txt").write_text("two")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xff")
    used, reasons, _ = use(tmp_path)
    assert used == {"a.png": "one", "sub/b.jpg": "two"}
    assert reasons == {"c.png": "no caption", "d.png": "unreadable caption"}


def test_the_seed_decides_the_order_and_no_more_is_read_than_needed(tmp_path: Path) -> None:
    lines = [json.dumps({"file_name": "one.png", "text": str(i)}) for i in range(20)]
    folder = listed_folder(tmp_path / "data", lines, {"one.png": picture()})

    def captions(count: int, seed: int) -> list[str]:
        return [sample.caption for sample in use(folder, count=count, seed=seed)[2]]

    assert captions(20, 1) == captions(20, 1) != captions(20, 2)
    assert sorted(captions(20, 1)) == sorted(map(str, range(20)))
    assert captions(5, 1) == captions(20, 1)[:5]


def write_shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_shards(tmp_path: Path) -> None:
    good = picture()
    write_shard(
        tmp_path / "data-000.tar",
        {
            "x/0.png": good, "x/0.txt": b"zero", "x/1.jpg": picture(kind="JPEG"), "x/1.json": b'{"text": "one"}',
            "x/2.png": good, "x/3.txt": b"three", "x/4.png": good[:40], "x/4.txt": b"four",
            "x/5.png": good, "x/5.txt": b" ", "x/6.png": good, "x/6.json": b"{", "x/7.png": good, "x/7.json": b"[1]",
        },
    )  # fmt: skip
    write_shard(tmp_path / "data-002.tar", {f"{n}.{k}": v for n in "ab" for k, v in (("png", good), ("txt", b"late"))})
    whole = (tmp_path / "data-002.tar").read_bytes()
    (tmp_path / "data-002.tar").write_bytes(whole[: 512 * 2 + 100])  # inside of the second member's header
    (tmp_path / "data-003.tar").write_bytes(b"no archive at all")
    used, reasons, _ = use(tmp_path / "data-{000..003}.tar")
    assert used == {"data-000.tar/x/0": "zero", "data-000.tar/x/1": "one"}
    assert reasons == {
        "data-001.tar": "missing shard", "data-002.tar": "damaged shard", "data-003.tar": "damaged shard",
        "data-000.tar/x/2": "no caption", "data-000.tar/x/3": "missing picture",
        "data-000.tar/x/4": "corrupt picture", "data-000.tar/x/5": "empty caption",
        "data-000.tar/x/6": "unreadable caption", "data-000.tar/x/7": "no caption",
        "data-002.tar/a": "no caption",
    }  # fmt: skip
    assert use(tmp_path)[0] == used == use(tmp_path / "*.tar")[0]


def test_the_picture_to_start_from_has_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    red, blue = picture((255, 0, 0)), picture((0, 0, 255))
    write_shard(
        tmp_path / "a.tar", {"0.png": red, "0.source.png": blue, "0.txt": b"to red", "1.png": red, "1.txt": b"x"}
    )
    rows = [{"image": red, "before": blue, "text": "to red"}, {"image": red, "before": None, "text": "x"}]
    table = FakeTable(rows)
    table.column_names = ["image", "before", "text"]
    install(monkeypatch, load_dataset=lambda *_, **__: table)
    for data, column in ((tmp_path / "a.tar", "source"), ("hub:owner/pairs", "before")):
        used, reasons, (sample,) = use(data, source_column=column)
        assert (list(used.values()), list(reasons.values())) == (["to red"], ["missing picture"])
        assert sample.picture().getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(UserError, match=r"no column 'befor' \(did you mean 'before'\?\); set capture.source_column"):
        use("hub:owner/pairs", source_column="befor")


def test_number_ranges_are_written_out() -> None:
    assert expand("d-{008..010}.tar") == ["d-008.tar", "d-009.tar", "d-010.tar"]
    assert expand("{1..2}/d-{9..10}.tar") == ["1/d-10.tar", "1/d-9.tar", "2/d-10.tar", "2/d-9.tar"]


@pytest.mark.parametrize("data", ["nowhere", "nowhere-{000..003}.tar", "nowhere/*.tar", "*.parquet"])
def test_nothing_there_is_one_line(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"capture\.data = ") as caught:
        use(data)
    assert "\n" not in str(caught.value)


class FakeTable:
    """As much of a ``datasets.Dataset`` as is used, and of a stream where ``length`` is None."""

    def __init__(self, rows, fails_at=None, columns=("image", "caption")) -> None:
        self.rows, self.fails_at = rows, fails_at
        self.column_names, self.features = list(columns), {"image": FakeImage()}

    def cast_column(self, name, feature):
        assert (name, feature.decode) == ("image", False)
        return self

    def shuffle(self, seed, buffer_size):
        return self

    def __iter__(self):
        for number, row in enumerate(self.rows):
            if number == self.fails_at:
                raise ConnectionError("the network is gone\nand more")
            yield row


class FakeImage:
    def __init__(self, decode=True) -> None:
        self.decode = decode


class FakeMap(FakeTable):
    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


ROWS = [
    {"image": {"bytes": picture(), "path": None}, "caption": "red"},
    {"image": picture(), "caption": "bytes"},
    {"image": None, "caption": "nothing"},
    {"image": {"bytes": b"junk", "path": None}, "caption": "junk"},
    {"image": picture(), "caption": None},
    {"image": Image.new("L", (8, 8)), "caption": "decoded"},
]


def install(monkeypatch: pytest.MonkeyPatch, **functions) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(Image=FakeImage, **functions))


def test_a_stream_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name, **options):
        asked.append((name, options))
        return FakeTable(ROWS, fails_at=5)

    install(monkeypatch, load_dataset=load)
    used, reasons, _ = use("hub:owner/cats", caption_column="caption", data_split="validation")
    assert asked == [("owner/cats", {"split": "validation", "streaming": True})]
    assert list(used.values()) == ["red", "bytes"]
    assert sorted(reasons.values()) == [
        *("corrupt picture", "missing picture", "no caption", "unreadable rest of the data set")
    ]


def test_a_saved_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text("{}")
    install(monkeypatch, load_from_disk=lambda path: {"train": FakeMap(ROWS), "test": FakeMap(ROWS[:1])})
    used, reasons, _ = use(tmp_path, caption_column="caption")
    assert set(used.values()) == {"red", "bytes", "decoded"}
    assert len(reasons) == 3
    with pytest.raises(UserError, match=r"no split 'dev'; set capture.data_split to one of \['train', 'test'\]"):
        use(tmp_path, data_split="dev")
    with pytest.raises(UserError, match=r"no column 'captions' \(did you mean 'caption'\?\); set capture.caption_col"):
        use(tmp_path, caption_column="captions")


def test_tables_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_, **__):
        raise FileNotFoundError("Dataset 'owner/none' doesn't exist\nat all")

    install(monkeypatch, load_dataset=fail)
    with pytest.raises(UserError, match=r"owner/none cannot be read \(Dataset 'owner/none' doesn't exist\)"):
        use("hub:owner/none")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'ppcl\[data\]'"):
        use("hub:owner/none")


def test_a_real_parquet_file_and_a_saved_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    import pyarrow
    from pyarrow import parquet

    rows = {"image": [{"bytes": picture(), "path": "a"}, {"bytes": b"junk", "path": "b"}], "text": ["red", "junk"]}
    features = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pyarrow.table(rows).replace_schema_metadata(about)
    parquet.write_table(table, tmp_path / "part-0.parquet")
    saved = tmp_path / "saved"  # what Dataset.save_to_disk writes
    saved.mkdir()
    with pyarrow.ipc.new_stream(str(saved / "data.arrow"), table.schema) as stream:
        stream.write_table(table)
    (saved / "dataset_info.json").write_text(json.dumps({"features": features}))
    state = {"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "x", "_output_all_columns": False}
    state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_split": None}
    (saved / "state.json").write_text(json.dumps(state))
    for data in (tmp_path / "part-{0..1}.parquet", saved):
        used, reasons, _ = use(data)
        assert list(used.values()) == ["red"]
        assert "corrupt picture" in reasons.values()


def test_bucket_sizes_keep_the_area_and_the_patches() -> None:
    sizes = bucket_sizes(1024, 1024, CaptureConfig().aspect_ratios, 16)
    assert (1024, 1024) in sizes and len(sizes) == 7
    for height, width in sizes:
        assert height % 16 == width % 16 == 0
        assert abs(height * width / 1024**2 - 1) < 0.03
    assert bucket_sizes(512, 768, ["1:1"], 16) == [(512, 768), (624, 624)]
    assert bucket_sizes(16, 16, ["16:9"], 16) == [(16, 16), (16, 16)][:1]


def test_a_picture_goes_to_the_nearest_ratio_and_is_cut_in_the_centre() -> None:
    assert nearest_size((100, 100), SIZES) == (32, 32)
    assert nearest_size((100, 300), SIZES) == (24, 40)
    assert nearest_size((300, 100), SIZES) == (40, 24)
    wide = Image.new("RGB", (90, 30), (255, 0, 0))
    wide.paste((0, 0, 255), (30, 0, 60, 30))
    cut = fit_picture(wide, (32, 32))
    assert cut.size == (32, 32)
    assert cut.getpixel((2, 16))[2] > 200 and cut.getpixel((29, 16))[2] > 200  # the middle third alone


def test_what_is_transparent_becomes_white(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture((0, 0, 0, 0), mode="RGBA"))
    (tmp_path / "a.txt").write_text("air")
    sample = use(tmp_path)[2][0]
    assert sample.picture().getpixel((0, 0)) == (255, 255, 255)


def test_ratios_need_quotes_in_yaml() -> None:
    from ppcl.config import load_config

    with pytest.raises(ConfigError, match="aspect_ratios"):
        load_config([], ["capture.aspect_ratios=[4:3]"])
    assert load_config([], ["capture.aspect_ratios=['4:3']"]).capture.aspect_ratios == ("4:3",)


def test_settings_of_pictures_do_not_count_where_prompts_are_the_data() -> None:
    assert CaptureConfig().identity() == CaptureConfig(caption_column="other").identity()
    assert CaptureConfig(data="a").identity() != CaptureConfig(data="a", caption_column="other").identity()
    assert CaptureConfig(data="a").identity() != CaptureConfig(data="b").identity()
    assert "source_column" not in CaptureConfig(data="a").identity()  # runs from before it was there go on
    assert CaptureConfig(data="a", source_column="b").identity()["source_column"] == "b"


def test_a_folder_whose_name_looks_like_a_wildcard(tmp_path: Path) -> None:
    folder = tmp_path / "data[1]"
    folder.mkdir()
    write_shard(folder / "a.tar", {"0.png": picture(), "0.txt": b"zero"})
    assert use(folder)[0] == {"a.tar/0": "zero"}
