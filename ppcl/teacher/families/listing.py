"""The table of all transformer classes of the installed diffusers: supported, refused, or not tested."""

from __future__ import annotations

from importlib import metadata
from typing import get_args

from ppcl.config.names import Width
from ppcl.errors import ModelError
from ppcl.teacher.families import ADAPTERS, REFUSED
from ppcl.teacher.families.base import Adapter
from ppcl.teacher.families.generic import infer

COLUMNS = ("depth", *get_args(Width))


def transformer_classes() -> dict[str, type]:
    """Transformer classes that the installed diffusers exports, by name."""
    import diffusers
    from diffusers.models import transformers

    found = {name: getattr(transformers, name) for name in dir(transformers)}
    return {
        name: kind
        for name, kind in sorted(found.items())
        if isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)
    }


def family_rows(classes: dict[str, type]) -> list[tuple[str, ...]]:
    """Return class, status, block lists or reason, and a cell of depth and of each group of smaller modules.

    The status is ``supported`` (the test suite passes), ``refused``, ``inferred`` (accepted with a
    warning, and checked on its first recorded call) or ``unknown`` (its source does not tell enough).
    """
    rows: list[tuple[str, ...]] = []
    none = ["-"] * len(COLUMNS)
    for name, kind in classes.items():
        if name in REFUSED:
            rows.append((name, "refused", REFUSED[name], *none))
            continue
        status = "supported" if name in ADAPTERS else "inferred"
        try:
            adapter = ADAPTERS[name] if name in ADAPTERS else infer(kind)
            rows.append((name, status, describe_stacks(adapter), "yes", *width_cells(adapter, status)))
        except ModelError as error:
            rows.append((name, "unknown", str(error), *none))
    order = ("supported", "inferred", "refused", "unknown")
    return sorted(rows, key=lambda row: (order.index(row[1]), row[0]))


def width_cells(adapter: Adapter, status: str) -> list[str]:
    """Whether a family has smaller modules of each group, or why not; one cell a group."""
    cells = []
    for group in get_args(Width):
        named = {
            "modulation": any(stack.modulation for stack in adapter.stacks),
            "text": any(stack.text_parts for stack in adapter.stacks),
        }
        if group in adapter.without:
            cells.append(adapter.without[group])
        elif group in named:
            streams = {stream for stack in adapter.stacks for stream in stack.inputs}
            cells.append("yes" if named[group] else "no text stream" if group == "text" and len(streams) == 1 else "no")
        else:
            kept = {key.removeprefix(f"{group}."): why for key, why in adapter.without.items() if f"{group}." in key}
            but = [f", without `{path}`: {why}" for path, why in kept.items()]
            cells.append("".join(["yes", *but]) if status == "supported" else "what a call shows")
    return cells


def describe_stacks(adapter: Adapter) -> str:
    """Name a family's block lists, count fields and streams, e.g. ``layers (num_layers; image)``."""
    parts = []
    for stack in adapter.stacks:
        tail = ", last one stays" if stack.fixed_tail else ""
        parts.append(f"`{stack.name}` (`{stack.count_field}`; {' + '.join(stack.inputs)}{tail})")
    return ", ".join(parts)


def family_table() -> str:
    """The table as Markdown, with a line that says what the words mean."""
    rows = family_rows(transformer_classes())
    counts = {status: sum(row[1] == status for row in rows) for status in ("supported", "inferred", "refused")}
    return "\n".join(
        [
            f"diffusers {metadata.version('diffusers')}: {counts['supported']} of {len(rows)} transformer classes are "
            f"supported (each passes the whole adapter suite), {counts['inferred']} are inferred from their source "
            f"(accepted with a warning and checked on the first recorded call), {counts['refused']} are refused.",
            "",
            "Depth and the groups of `fit.width`: what a supported class has, the suite cuts, counts, stores and loads "
            "bit for bit; where there is nothing to cut the reason stands.",
            "",
            f"| class | status | block lists (count field; streams), or why not | {' | '.join(COLUMNS)} |",
            f"| --- | --- | --- |{' --- |' * len(COLUMNS)}",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
    )
