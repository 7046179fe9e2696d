"""The page of a run or of an evaluation: one self-contained HTML file, and ``report.md`` of its numbers.

The page shows, in the order a stranger needs it: the result, the pictures, the numbers, the blocks that were redundant,
training, cost, and how to reproduce it. It is built from the folder's files alone, without torch; a part whose file is
absent says which stage writes it, and what an evaluation of finished models knows nothing of is left out.
"""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from ppcl.common.files import read_json, write_text
from ppcl.errors import ArtifactError
from ppcl.eval.markdown import report as markdown_report
from ppcl.eval.report_blocks import redundancy
from ppcl.eval.report_data import RunData, read_run
from ppcl.eval.report_html import render
from ppcl.eval.report_ladder import ladder_section
from ppcl.eval.report_numbers import numbers_section, plots_section
from ppcl.eval.report_pictures import readme_picture
from ppcl.eval.report_sections import (
    cost_section,
    headline,
    pictures_section,
    reproduce_section,
    strips_section,
    title_of,
    training_section,
)

__all__ = ["readme_picture", "rewrite", "write_report"]

TITLES = {
    "pictures": "Side by side",
    "numbers": "How good is it",
    "plots": "Against size and time",
    "ladder": "Many sizes",
    "blocks": "Which blocks, and why",
    "training": "Training",
    "cost": "Cost",
    "reproduce": "What was run",
}


def _sections(data: RunData) -> dict[str, Markup]:
    """The sections by their anchor; empty ones do not apply."""
    result = data.evaluation
    none = Markup()
    unmeasured = render("numbers.html", missing=data.missing("eval/metrics.json"))
    return {
        "pictures": pictures_section(data),
        "numbers": numbers_section(result) if result else unmeasured,
        "plots": plots_section(result) if result else none,
        "ladder": ladder_section(data),
        "blocks": redundancy(data) if data.is_run else strips_section(result) if result else none,
        "training": training_section(data) if data.is_run else none,
        "cost": cost_section(data),
        "reproduce": reproduce_section(data),
    }


def write_report(folder: Path) -> Path:
    """Write ``report.html`` and ``report.md`` into the folder of a run or an evaluation, from what it holds.

    Returns:
        The path of the page.

    Raises:
        ArtifactError: ``folder`` is not a directory.
        UserError: The report cannot be written.
    """
    data = read_run(Path(folder))
    sections = {anchor: html for anchor, html in _sections(data).items() if html}
    title = f"ppcl report: {data.config.get('model') or data.folder.name}"
    if not data.is_run and data.evaluation:
        title = f"ppcl evaluation: {title_of(data.evaluation)}"
    _write_markdown(data)
    path = data.folder / "report.html"
    page = render("page.html", title=title, headline=headline(data), sections=sections, titles=TITLES)
    write_text(path, f"{page}\n")
    return path


def _write_markdown(data: RunData) -> None:
    from ppcl.export.card import draw_plan

    path = data.folder / "report.md"
    if data.evaluation is None:
        path.unlink(missing_ok=True)  # of an evaluation that is gone
        return
    plan = draw_plan(data.plan) if data.plan else ""
    write_text(path, markdown_report(data.evaluation, plan, data.analysis))


def rewrite(folder: Path) -> Path:
    """Write the reports of a finished folder again: of a run, or of ``ppcl evaluate A B --out DIR``.

    Returns:
        The path of the page; ``report.md`` lies beside it.

    Raises:
        ArtifactError: The folder is neither, or its ``metrics.json`` is damaged or of another version.
    """
    ledger = read_json(folder / "stages.json") if (folder / "stages.json").is_file() else None
    if isinstance(ledger, dict) and "identity" in ledger:
        return write_report(folder)
    if not (folder / "metrics.json").is_file():
        raise ArtifactError(
            f"{folder} is neither a run nor an evaluation: it has no stages.json and no metrics.json; "
            "give what ppcl compress or ppcl evaluate got as --out"
        )
    data = read_run(folder)
    if data.evaluation is None:
        raise ArtifactError(data.problems["metrics.json"])
    return write_report(folder)
