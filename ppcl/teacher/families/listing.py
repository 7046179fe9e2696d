"""The table of all transformer classes of the installed diffusers: supported, refused, or not tested."""

from __future__ import annotations

from importlib import metadata

from ppcl.errors import ModelError
from ppcl.teacher.families import ADAPTERS, REFUSED
from ppcl.teacher.families.base import Adapter
from ppcl.teacher.families.generic import infer


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


def family_rows(classes: dict[str, type]) -> list[tuple[str, str, str]]:
    """Return (class, status, block lists or reason) of each class.

    The status is ``supported`` (the test suite passes), ``refused``, ``inferred`` (accepted with a
    warning, and checked on its first recorded call) or ``unknown`` (its source does not tell enough).
    """
    rows = []
    for name, kind in classes.items():
        if name in ADAPTERS:
            rows.append((name, "supported", describe_stacks(ADAPTERS[name])))
        elif name in REFUSED:
            rows.append((name, "refused", REFUSED[name]))
        else:
            try:
                rows.append((name, "inferred", describe_stacks(infer(kind))))
            except ModelError as error:
                rows.append((name, "unknown", str(error)))
    order = ("supported", "inferred", "refused", "unknown")
    return sorted(rows, key=lambda row: (order.index(row[1]), row[0]))


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
            "| class | status | block lists (count field; streams), or why not |",
            "| --- | --- | --- |",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
    )
