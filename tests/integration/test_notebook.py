"""The notebook runs as it stands, cell after cell; what it shows is made anew by `jupyter execute --inplace`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "quick_tour.ipynb"


@pytest.mark.slow
def test_the_quick_tour_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one process without Jupyter, which adds nothing but the pictures between the cells."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["run"].plan.predicted.param_ratio <= 0.5
    assert names["sheet"].getextrema() != ((255, 255),) * 3  # pictures were drawn onto it
    assert "average drop" in capsys.readouterr().out
    assert all(cell["outputs"] for cell in cells[1:]), "run `jupyter execute docs/quick_tour.ipynb --inplace`"
