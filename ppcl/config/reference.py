"""All settings as a reference: section by section, what each is, may be, and means. The models say it themselves."""

from __future__ import annotations

from collections.abc import Iterator
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
    """A table for the run and for each section, in Markdown."""
    text = [markdown_table(HEADER, _rows(RunConfig), numbers=False)]
    for name, section in _sections(RunConfig).items():
        text += [f"## {name}", (section.__doc__ or "").strip().splitlines()[0]]
        text.append(markdown_table(HEADER, _rows(section, f"{name}."), numbers=False))
    return "\n\n".join(text)


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The sections inside a section, by name."""
    kinds = {name: field.annotation for name, field in model.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}


def _rows(model: type[BaseModel], prefix: str = "") -> Iterator[list[str]]:
    """A row a setting; a section inside a section brings its own."""
    sections = _sections(model)
    for name, field in model.model_fields.items():
        if name not in sections:
            means = field.description or ""
            yield [
                f"`{prefix}{name}`",
                f"`{_written(field.get_default(call_default_factory=True))}`",
                _values(field),
                means,
            ]
        elif prefix:
            yield from _rows(sections[name], f"{prefix}{name}.")


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
