"""What is opened at all, how much of it is read, and how deep it may be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ppcl.common import files, tensor_files
from ppcl.common.reading import MOST_BYTES, parse_json, parse_yaml, read_bytes
from ppcl.errors import ArtifactError, ConfigError, ModelError


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "[" * 150 + "]" * 150,
        '{"a": ' + "1" * 5000 + "}",
        "",
        "nope",
        '{"a": 1',
        b"\xff\xfe\x00",
        b"\x00" * 50,
    ],
    ids=lambda text: str(text[:12]),
)
def test_json_of_every_kind_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_what_is_said_about_json_is_what_is_wrong() -> None:
    for text, says in (("[" * 200 + "]" * 200, "nested more than 100 deep"), ("1" * 130, "a number of 130 digits")):
        with pytest.raises(ValueError, match=says):
            parse_json(text)
    assert parse_json("[" * 90 + "]" * 90)
    assert parse_json('{"model_max_length": 1000000000000000019884624838656}')["model_max_length"] == int(1e30)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{now}: &{now} [{', '.join([f'*{before}'] * 9)}]\n" for before, now in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "alias"),
        ("a: &a {x: 1}\nb: {<<: *a}", "alias"),
        ("&a [*a]", "alias"),
        ("[" * 20_000, "nested more than 100 deep"),
        ("- " * 5_000 + "x", "nested more than 100 deep"),
        ("{a: " * 150 + "1" + "}" * 150, "nested more than 100 deep"),
        ("a: " + "1" * 5000, "a number of 5000 digits"),
        ("a: 1\nb: 2\na: 3", "the key 'a' stands there twice"),
        ("plan:\n  keep: 0.5\n  keep: 0.6", "the key 'keep' stands there twice"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: !!timestamp nope", ""),
        ("a: !!bool nope", ""),
        ("a: !!int ''", ""),
        ("a: 2024-99-99", ""),
        ("a: [", ""),
        ("a: \x00", ""),
        ("a: 1\n---\nb: 2", ""),
    ],
    ids=lambda value: str(value[:24]),
)
def test_yaml_of_every_kind_is_a_value_error(text: str, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_yaml(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ordinary_yaml_is_read() -> None:
    assert parse_yaml("a: {b: [1, 0x10, 1_000, 2.5, null, yes]}\nc: 12:30") == {
        "a": {"b": [1, 16, 1000, 2.5, None, True]},
        "c": 750,
    }


def test_only_regular_files_of_a_bounded_size_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    for path in (Path("/dev/zero"), Path("/dev/stdin"), tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            read_bytes(path)
    with pytest.raises(OSError, match="more than 33,554,432"):
        read_bytes(large)
    for path in (large, tmp_path / "pipe", tmp_path, tmp_path / "none"):
        for read in (files.read_json, files.read_mapping, files.read_yaml):
            for error in (ArtifactError, ModelError, ConfigError):
                with pytest.raises(error, match=str(path)):
                    read(path, error)
        for read_tensors in (tensor_files.read_tensor_header, tensor_files.read_tensors, tensor_files.read_metadata):
            with pytest.raises(ArtifactError, match=str(path)):
                read_tensors(path)


def test_a_mapping_is_asked_for_where_one_is_needed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("[1]")
    for read in (files.read_mapping, files.read_yaml):
        with pytest.raises(ModelError, match=r"a list, not a mapping.*fetch it again"):
            read(tmp_path / "a", ModelError, "fetch it again")
