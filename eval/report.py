"""The report of a run: one self-contained HTML page, and a contact sheet for a README.

The page shows, in the order a stranger needs it: the result, the pictures, the numbers,
the blocks that were redundant, training, cost, and how to reproduce it. It is built from
the run directory's files alone, without torch; a part whose file is absent says which
stage writes it.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from ppcl.common.files import read_json, write_text
from ppcl.errors import ArtifactError
from ppcl.eval.report_blocks import redundancy
from ppcl.eval.report_data import read_run
from ppcl.eval.report_gallery import MAX_MEASURED
from ppcl.eval.report_html import page, text
from ppcl.eval.report_ladder import ladder_section
from ppcl.eval.report_models import write_models_report
from ppcl.eval.report_pictures import find_pairs, readme_picture
from ppcl.eval.report_scores import metrics_section
from ppcl.eval.report_sections import cost, headline, pictures, reproduce, training
from ppcl.eval.results import Evaluation
from ppcl.eval.results import report as report_of_models
from ppcl.eval.run_metrics import write_run_report

__all__ = ["readme_picture", "rewrite", "write_report"]

CONTENTS = {
    "pictures": "Side by side",
    "numbers": "How good is it",
    "ladder": "Many sizes",
    "blocks": "Which blocks, and why",
    "training": "Training",
    "cost": "Cost",
    "reproduce": "What was run",
}


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run directory from whatever artifacts it holds, and ``report.md`` of its numbers.

    Returns:
        The path of the page.

    Raises:
        ArtifactError: ``run`` is not a directory.
        UserError: The report cannot be written.
    """
    data = read_run(Path(run))
    sizes = ladder_section(data)
    shown = {anchor: title for anchor, title in CONTENTS.items() if sizes or anchor != "ladder"}
    contents = "".join(f'<a href="#{anchor}">{text(title)}</a>' for anchor, title in shown.items())
    body = "\n".join(
        [
            headline(data),
            f"<nav>{contents}</nav>",
            pictures(data, find_pairs(data.folder), find_pairs(data.folder, MAX_MEASURED)),
            metrics_section(data),
            sizes,
            redundancy(data),
            training(data),
            cost(data),
            reproduce(data),
        ]
    )
    write_run_report(data.folder)
    path = data.folder / "report.html"
    model = data.config.get("model")
    write_text(path, page(f"ppcl report: {model or data.folder.name}", body))
    return path


def rewrite(folder: Path) -> Path:
    """Write the reports of a finished folder again: of a run, or of ``ppcl evaluate A B --out DIR``.

    Returns:
        The path of the page; ``report.md`` lies beside it.

    Raises:
        ArtifactError: The folder is neither, or its ``metrics.json`` is damaged or of another version.
    """
    if (folder / "stages.json").is_file():
        return write_report(folder)
    if not (folder / "metrics.json").is_file():
        raise ArtifactError(
            f"{folder} is neither a run nor an evaluation: it has no stages.json and no metrics.json; "
            "give what ppcl compress or ppcl evaluate got as --out"
        )
    path = write_models_report(folder)
    try:
        result = Evaluation.model_validate(read_json(folder / "metrics.json"))
    except ValidationError as error:
        raise ArtifactError(
            f"{folder / 'metrics.json'} is of another version ({error.error_count()} entries do not fit); "
            "run ppcl evaluate again, it keeps the pictures"
        ) from None
    write_text(folder / "report.md", report_of_models(result))
    return path
