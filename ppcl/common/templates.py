"""Text from templates (jinja2). Whatever is put into one is escaped; a name that is not given is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ppcl.common.tables import fenced, markdown_table, plain


class Templates:
    """The templates of a folder: ``.html``, and ``.md``. A text that is ``Markup`` already is put in as it is.

    Markdown has the filters ``fenced`` and ``table`` (of rows; the header is an argument), whose results are ready.
    """

    def __init__(self, folder: Path) -> None:
        settings: dict[str, Any] = {"undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
        loader = jinja2.FileSystemLoader(folder)
        self._html = jinja2.Environment(loader=loader, autoescape=True, **settings)
        self._markdown = jinja2.Environment(loader=loader, finalize=_as_markdown, **settings)
        self._markdown.filters["fenced"] = lambda text, language="": Markup(fenced(text, language))
        self._markdown.filters["table"] = lambda rows, header: Markup(markdown_table(header, rows))

    def html(self, template: str, /, **values: Any) -> Markup:
        """Fill a template of HTML."""
        return Markup(self._html.get_template(template).render(values))

    def markdown(self, template: str, /, **values: Any) -> str:
        """Fill a template of Markdown."""
        return self._markdown.get_template(template).render(values)


def _as_markdown(value: object) -> str:
    return value if isinstance(value, Markup) else plain(str(value))
