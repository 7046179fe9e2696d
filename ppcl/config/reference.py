"""All settings as a reference: section by section, what each is, may be, and means. The models say it themselves."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from inspect import get_annotations
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ppcl.common.tables import markdown_table
from ppcl.config.schema import RunConfig

HEADER = ("setting", "default", "may be", "meaning")
NAMES = {bool: "`true` or `false`", int: "whole number", float: "number", str: "text"}
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def settings_reference() -> str:
    """A table for the run and for each subject of each section, in Markdown."""
    text = [markdown_table(HEADER, [*_rows(RunConfig, RunConfig.model_fields)], numbers=False)]
    for name, section in _sections(RunConfig).items():
        text += [f"## {name}", _about(section)]
        for subject, rows in _subjects(section, f"{name}."):
            text += [f"### {subject}"] * bool(subject) + [markdown_table(HEADER, rows, numbers=False)]
    return "\n\n".join(text)


def _about(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]


def _subjects(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, list[list[str]]]]:
    """A section's rows by subject: its own first, then those of each class that it is put together from or holds."""
    for kind in (section, *(base for base in reversed(section.__mro__) if base is not section)):
        names = get_annotations(kind).keys() & section.model_fields.keys()
        if rows := list(_rows(section, names, prefix)):
            yield "" if kind is section else _about(kind).rstrip("."), rows
    for name, kind in _sections(section).items():
        yield _about(kind).rstrip("."), list(_rows(kind, kind.model_fields, f"{prefix}{name}."))


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The sections inside a section, by name."""
    kinds = {name: field.annotation for name, field in model.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


def _rows(model: type[BaseModel], names: Collection[str], prefix: str = "") -> Iterator[list[str]]:
    """A row for each of some settings; sections inside a section are none."""
    for name, field in model.model_fields.items():
        if name in names and name not in _sections(model):
            default = _written(field.get_default(call_default_factory=True))
            yield [f"`{prefix}{name}`", f"`{default}`", _values(field), field.description or ""]


def _written(value: Any) -> str:
    """A default as a YAML file and ``--set`` take it."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_written, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if str(value).strip() else f"'{value}'"


def _values(field: FieldInfo) -> str:
    limits = [
        f"{SIGNS[n]} {bound:g}" for m in field.metadata for n in SIGNS if (bound := getattr(m, n, None)) is not None
    ]
    return ", ".join([_kind(field.annotation), *limits])


def _kind(annotation: Any) -> str:
    """What a type is called."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inside)
    if origin is Annotated:
        return _kind(inside[0])
    if origin in (Union, UnionType):
        return " or ".join("`null`" if kind is NoneType else _kind(kind) for kind in inside)
    if origin in (list, tuple):
        return f"list of {_kind(inside[0])}"
    return {bool: "`true` or `false`", int: "whole number", float: "number", str: "text"}.get(
        annotation, str(annotation)
    )
