"""How typed artifacts are stored: frozen dataclasses as JSON, checked when they are read."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from ppcl.common.files import read_json, write_json
from ppcl.errors import ArtifactError

SCHEMA_VERSION = 1


T = TypeVar("T")


def to_jsonable(value: Any) -> Any:
    """Turn dataclasses and tuples into plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        stored = [f.name for f in dataclasses.fields(value) if f.metadata.get("stored", True)]
        return {name: to_jsonable(getattr(value, name)) for name in stored}
    if isinstance(value, dict):
        return {str(k): to_jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(v) for v in value]
    return value


def _build(kind: Any, value: Any) -> Any:
    """Build an annotated type from JSON values; ValueError on a mismatch."""
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = set(value) - set(hints)
        if unknown:
            raise ValueError(f"unknown entry '{min(unknown)}'")
        return kind(**{k: _build(hints[k], v) for k, v in value.items()})  # type: ignore[operator]
    if typing.get_origin(kind) is not None:
        return _build_generic(typing.get_origin(kind), typing.get_args(kind), value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind):
        raise ValueError(f"{value!r} is not {kind.__name__}")
    return value


def _build_generic(origin: Any, arguments: tuple[Any, ...], value: Any) -> Any:
    """Build ``X | None``, tuples and dicts."""
    if origin is types.UnionType or origin is typing.Union:
        if value is None and type(None) in arguments:
            return None
        return _build(next(a for a in arguments if a is not type(None)), value)
    if origin is dict:
        return {k: _build(arguments[1], v) for k, v in value.items()}
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a list")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_build(arguments[0], v) for v in value)
    return tuple(_build(a, v) for a, v in zip(arguments, value, strict=True))


def save_artifact(artifact: Any, path: str | Path) -> None:
    """Write a dataclass artifact as JSON, atomically."""
    write_json(path, to_jsonable(artifact))


def load_artifact(kind: type[T], path: str | Path) -> T:
    """Read a dataclass artifact.

    Raises:
        ArtifactError: The file is missing, damaged, or of another schema version.
    """
    data = read_json(path)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(f"{path} has schema_version {version}, expected {SCHEMA_VERSION}; delete it and run again")
    try:
        return typing.cast(T, _build(kind, data))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{path} is not a valid {kind.__name__} ({error}); delete it and run again") from None
