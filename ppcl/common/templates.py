"""Text from templates (jinja2): HTML is escaped, a name that is not given is an error."""

from __future__ import annotations

from pathlib import Path

import jinja2


def environment(folder: Path) -> jinja2.Environment:
    """The templates of a folder.

    In ``.html`` everything is escaped but what is ``Markup`` already; in Markdown nothing is, so that texts of other
    people go through :func:`ppcl.common.tables.plain` first.
    """
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=lambda name: bool(name and name.endswith(".html")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
