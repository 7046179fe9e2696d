"""Atomic writes, and what is said about damaged files."""

from __future__ import annotations

import errno
import functools
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from tiny_models import noise

from ppcl.common import files, tensor_files
from ppcl.errors import ArtifactError, UserError


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"new": object()})
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        assert files.read_json(path) == {"old": 1}
        raise RuntimeError
    assert files.read_json(path) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


def test_tensors_one_by_one_are_those_of_any_other_file(tmp_path: Path) -> None:
    tensors = {"x": noise(2, 3), "turned": noise(4, 5).double().T, "empty": torch.empty(0, 7), "half": noise(5)}
    dtypes = {name: torch.bfloat16 if name == "half" else torch.float32 for name in tensors}
    path = tmp_path / "x.safetensors"
    waiting = {
        n: tensor_files.Unread(t.shape, dtypes[n], functools.partial(torch.clone, t)) for n, t in tensors.items()
    }
    tensor_files.write_one_by_one(path, waiting, {"format": "pt"})
    found, _ = tensor_files.read_tensors(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor.to(dtypes[name])) for name, tensor in tensors.items())
    assert tensor_files.read_tensor_header(path)["turned"]["shape"] == [5, 4]
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_tensor_of_another_shape_than_said_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="x is of shape"):
        tensor_files.write_one_by_one(tmp_path / "x", {"x": tensor_files.Unread((3,), torch.float32, lambda: noise(2))})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_follow_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    linked = tmp_path / "teacher.bin"
    linked.write_text("weights")
    linked.chmod(0o640)
    before = os.umask(umask)
    try:
        tensor_files.write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
        files.write_json(tmp_path / "a.json", {})
        with files.atomic_path(tmp_path / "folder") as temporary:
            temporary.mkdir()
            tensor_files.write_tensors(temporary / "inside" / "a.safetensors", {"a": torch.ones(1)})
            (temporary / "secret").touch(mode=0o600)
            (temporary / "linked.bin").hardlink_to(linked)
    finally:
        os.umask(before)
    written = ["a.safetensors", "a.json", "folder/inside/a.safetensors", "folder/secret"]
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in written} == {mode}
    assert stat.S_IMODE(linked.stat().st_mode) == 0o640  # of the teacher: not ours to change
    assert names(tmp_path) == ["a.json", "a.safetensors", "folder", "teacher.bin"]


def test_a_failed_folder_leaves_the_old_folder(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    for content in ("first", "second"):
        with files.atomic_path(path) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
        assert names(path) == [content]
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.mkdir()
        (temporary / "third").write_text("half")
        raise RuntimeError
    assert names(path) == ["second"]
    assert names(tmp_path) == ["bundle"]


def test_a_full_disk_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    files.write_text(path, "old")
    with (
        pytest.raises(UserError, match=r"cannot write .*a\.txt: No space left on device; free some space"),
        files.atomic_path(path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old"


def test_a_place_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="choose another --out"):
        files.write_text(tmp_path / "file" / "a.txt", "text")


def test_equal_data_give_equal_bytes(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a", {"x": 1, "y": "ü"})
    files.write_json(tmp_path / "b", {"y": "ü", "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; run the stage that writes it"),
        (b'{"a": ', "is damaged"),
        (b"\xff\xfe\xff", "is damaged"),
    ],
)
def test_bad_json(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=message) as caught:
        files.read_json(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_json_that_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        files.read_json(tmp_path)


def test_tensors_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.safetensors"
    base = noise(4, 6)
    tensors = {"x": base.T, "y": base[:, ::2], "flag": torch.tensor([True])}
    tensors |= {"half": base.bfloat16(), "empty": noise(0, 3)}
    tensor_files.write_tensors(path, tensors, {"rows": [1, None, "a"]})
    loaded, meta = tensor_files.read_tensors(path)
    assert meta == {"rows": [1, None, "a"]}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[k], tensors[k]) and loaded[k].dtype == tensors[k].dtype for k in tensors)
    tensor_files.write_tensors(path, {"x": base})
    assert tensor_files.read_tensors(path)[1] is None
    assert names(path.parent) == ["a.safetensors"]


@pytest.mark.parametrize("keep", [0, 4, 30, -1])
def test_truncated_tensors(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.safetensors"
    tensor_files.write_tensors(path, {"x": noise(100)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"a\.safetensors is damaged") as caught:
        tensor_files.read_tensors(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ArtifactError, match=r"a\.safetensors is (damaged|truncated)"):
        tensor_files.read_tensor_header(path)


def test_missing_tensors(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist; run the stage"):
        tensor_files.read_tensors(tmp_path / "a.safetensors")
    with pytest.raises(ArtifactError):
        tensor_files.read_tensor_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        b"\xff" * 64,
        b"<html>not found</html>",
        (2).to_bytes(8, "little") + b"[]",
        (13).to_bytes(8, "little") + b'{"x": {"a":1}}'[:13],
        (12).to_bytes(8, "little") + b'{"x":{"a":1}}'[:12],
        (13).to_bytes(8, "little") + b'{"x":{"a":1}}',
    ],
    ids=["lfs pointer", "garbage", "html", "list", "cut header", "cut header 2", "no offsets"],
)
def test_a_header_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.safetensors is (damaged|truncated)"):
        tensor_files.read_tensor_header(path)
    with pytest.raises(ArtifactError, match=r"model\.safetensors is damaged"):
        tensor_files.read_tensors(path)


def test_header_tells_shapes_without_data(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensor_files.write_tensors(path, {"x": noise(2, 3), "y": noise(5).bfloat16()}, {"some": "metadata"})
    header = tensor_files.read_tensor_header(path)
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "x": ("F32", [2, 3]),
        "y": ("BF16", [5]),
    }
    path.write_bytes(path.read_bytes() + b"tail")
    with pytest.raises(ArtifactError, match="truncated"):
        tensor_files.read_tensor_header(path)


def test_digests_see_content_names_and_order(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_text("1")
    first = files.digest(tmp_path / "d", {"x": 1, "y": 2})
    assert first == files.digest(tmp_path / "d", {"y": 2, "x": 1})
    assert len(first) == 16
    assert files.digest("ab", "c") != files.digest("a", "bc")
    assert files.digest({"x": 1}) != files.digest({"x": 2})
    (tmp_path / "d" / "a").rename(tmp_path / "d" / "b")
    renamed = files.digest(tmp_path / "d", {"x": 1, "y": 2})
    (tmp_path / "d" / "b").write_text("2")
    assert len({first, renamed, files.digest(tmp_path / "d", {"x": 1, "y": 2})}) == 3
    with pytest.raises(ArtifactError, match="cannot be read"):
        files.file_digest(tmp_path / "none")


def test_metadata_is_json_not_pickle(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensor_files.write_tensors(path, {"x": noise(1)}, {"b": 1, "a": 2})
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"] == {"ppcl": '{"a": 2, "b": 1}'}


def test_stored_tensors_are_read_one_by_one_and_the_later_file_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensor_files.write_tensors(first, {"x": torch.zeros(2), "y": torch.ones(3)})
    tensor_files.write_tensors(second, {"x": torch.full((2,), 2.0)})
    stored = tensor_files.StoredTensors(first, second, tmp_path / "missing.safetensors")
    assert set(stored) == {"x", "y"}
    assert torch.equal(stored["x"], torch.full((2,), 2.0))
    first.unlink()  # nothing is kept: what is not asked for is not read
    with pytest.raises(ArtifactError, match=r"a\.safetensors does not exist; run the stage"):
        stored["y"]
