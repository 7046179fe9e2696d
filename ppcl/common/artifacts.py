"""How typed artifacts are stored: frozen dataclasses as JSON, checked when they are read.

A field's type has its range (:data:`Count`, :data:`Error`); what several fields mean together stands in a method
``check`` of the artifact, which raises ``ValueError``.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, cast, runtime_checkable

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ppcl.common.files import read_json, write_json
from ppcl.common.reading import MOST_NUMBER, read_bytes
from ppcl.errors import ArtifactError, shortened

SCHEMA_VERSION = 1
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)  # of every artifact, as its ``__pydantic_config__``
Count = Annotated[int, Field(ge=0, lt=MOST_NUMBER)]
Amount = Annotated[int, Field(gt=-MOST_NUMBER, lt=MOST_NUMBER)]
Index = Annotated[int, Field(ge=0, lt=10_000)]  # of a block
Error = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


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


def save_artifact(artifact: Any, path: str | Path) -> None:
    """Write a dataclass artifact as JSON, atomically.

    Raises:
        ArtifactError: It could not be read again: numbers that are none, above all.
    """
    data = to_jsonable(artifact)
    reason = _fault(type(artifact), json.dumps(data).encode())[1]
    if reason:
        raise ArtifactError(
            f"{path} would be no valid {type(artifact).__name__} ({reason}); where numbers are NaN or infinite, run "
            "again with --set precision=fp32"
        )
    write_json(path, data)


def load_artifact(kind: type[T], path: str | Path) -> T:
    """Read a dataclass artifact: its types and ranges, and what its ``check`` says of what it means.

    Raises:
        ArtifactError: The file is missing, damaged, of another schema version, or cannot be meant.
    """
    data = read_json(path)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(f"{path} has schema_version {version}, expected {SCHEMA_VERSION}; delete it and run again")
    artifact, reason = _fault(kind, read_bytes(Path(path)))
    if reason:
        raise ArtifactError(f"{path} is not a valid {kind.__name__} ({reason}); delete it and run again")
    return cast(T, artifact)


@runtime_checkable
class _Checked(Protocol):
    def check(self) -> None: ...


def _fault(kind: Any, content: bytes) -> tuple[Any, str]:
    """The artifact that JSON holds, and what is wrong with it; nothing if that is empty."""
    try:
        artifact = _adapter(kind).validate_json(content, strict=True)
        if isinstance(artifact, _Checked):
            artifact.check()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return None, shortened(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
    except ValueError as error:
        return None, shortened(error)
    return artifact, ""


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
