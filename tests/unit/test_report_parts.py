"""The report's intervals, likeness of pairs, error by timestep, and what its gallery needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_file import comparison, model, number, step, write_evaluation
from PIL import Image

from ppcl.eval.fidelity import psnr
from ppcl.eval.report import write_report
from ppcl.eval.report_gallery import Card, extremes, gallery, lay_out, pair_psnr
from ppcl.eval.report_html import ranged
from ppcl.eval.report_pictures import Pair

SIDE = 24


def save(path: Path, pixels: np.ndarray) -> Path:
    """Write a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    """Six pairs; the noise between them grows, the first is equal."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(6):
        pixels = rng.integers(60, 190, (SIDE, SIDE, 3)).astype(np.int64)
        noise = rng.integers(-9 * index - 1, 9 * index + 1, pixels.shape) * (index > 0)
        first = save(tmp_path / "teacher" / f"{index}.png", pixels.astype(np.uint8))
        second = save(tmp_path / "student" / f"{index}.png", (pixels + noise).astype(np.uint8))
        made.append(Pair(f"prompt {index}", first, second))
    return made


def test_psnr_is_that_of_the_evaluation(pairs: list[Pair]) -> None:
    def tensor(path: Path) -> torch.Tensor:
        return torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)[None]

    for pair in pairs:
        expected = psnr(tensor(pair.teacher), tensor(pair.student)).values[0]
        assert pair_psnr(pair.teacher, pair.student) == pytest.approx(expected, abs=1e-4)
    assert pair_psnr(pairs[0].teacher, pairs[0].student) == 100.0


def test_what_cannot_be_compared_is_passed_over(pairs: list[Pair], tmp_path: Path) -> None:
    larger = save(tmp_path / "large.png", np.zeros((SIDE + 1, SIDE, 3), np.uint8))
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no picture")
    assert pair_psnr(pairs[0].teacher, larger) is None
    assert pair_psnr(pairs[0].teacher, damaged) is None
    worst, best = extremes([Pair("x", pairs[0].teacher, damaged), *pairs[:2]])
    assert [card.prompt for card in (*worst, *best)] == ["prompt 1", "prompt 0"]


def test_extremes_are_the_least_and_the_most_alike(pairs: list[Pair]) -> None:
    worst, best = extremes(pairs)
    assert [card.prompt for card in worst] == ["prompt 5", "prompt 4", "prompt 3"]
    assert [card.prompt for card in best] == ["prompt 0", "prompt 1", "prompt 2"]
    assert best[0].remark == "PSNR 100 dB"
    assert extremes(pairs[:1]) == ([], [])


def test_cards_of_unreadable_pictures_are_left_out(pairs: list[Pair]) -> None:
    pairs[1].student.write_bytes(b"")
    cards = [Card(pair.prompt, (("a", pair.teacher), ("<b>", pair.student))) for pair in pairs]
    whole, one = lay_out([cards, cards[:1]])
    assert len(whole) == 5
    assert len(one) == 1
    assert 'data-who="&lt;b&gt;"' in gallery(one)
    assert "<details>" not in gallery(whole)
    assert "Show the other 5" in gallery(whole * 5)
    assert gallery([]) == ""


def test_intervals_are_shown() -> None:
    assert ranged("1.5", (1.0, 2.5)) == "1.5 <small>1.00 to 2.50</small>"
    assert ranged("1.5", None) == "1.5"


def test_the_page_shows_intervals_and_the_error_by_timestep(tmp_path: Path) -> None:
    fid, recall = [number(31.0), number(36.4, 33.3, 38.8)], [number(0.5), number(0.4)]
    models = [model(f"m{i}", {"fid": fid[i], "recall": recall[i]}) for i in range(2)]
    row = comparison("m1", "m0", {"psnr": number(20.0)}, average_drop=number(2.0, 1.1, 2.7))
    row["velocity_error_by_timestep"] = [step(0.5, 1.0, 0.1), step(0.0, 0.5, 0.2)]
    write_evaluation(tmp_path, models, [row])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "36.4 <small>33.3 to 38.8</small>" in page
    assert "interval 1.1% to 2.7%" in page
    assert "its 95% bootstrap interval" in page
    assert "Velocity error by timestep" in page
    assert "Recall" in page
    assert "Density" not in page  # measured for neither
    assert page.count("<svg") == 3  # size, time, timesteps
