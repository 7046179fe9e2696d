"""The page of ``ppcl evaluate``: built from metrics.json and pictures alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ppcl.common.files import read_json, write_json
from ppcl.errors import ArtifactError
from ppcl.eval.report_models import measured, write_models_report

SIDE = 24
HOSTILE = "<script>alert(1)</script>"


def number(value: float, with_limits: bool = True) -> dict[str, Any]:
    """A number as metrics.json holds it."""
    low, high = (value - 0.5, value + 0.5) if with_limits else (None, None)
    return {"value": value, "low": low, "high": high, "count": 40, "over": "pictures"}


def write_evaluation(out: Path, num_models: int = 2, num_pictures: int = 4, side: int = SIDE) -> Path:
    """An evaluation of models whose pictures are noise."""
    rng = np.random.default_rng(0)
    models: list[dict[str, Any]] = []
    comparisons: list[dict[str, Any]] = []
    for index in range(num_models):
        label = f"model-{index}"
        folder = out / "pictures" / label / "seed-0"
        folder.mkdir(parents=True)
        write_json(folder / "prompts.json", {"prompts": [f"{HOSTILE} {i}" for i in range(num_pictures)]})
        for place in range(num_pictures):
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{place:04d}.png")
        costs = {"latency_ms": 20.0 - index, "latency_end_to_end_ms": None, "peak_memory_bytes": None}
        numbers = {"fid": number(11.0 + index), "kid": number(0.01, with_limits=False)}
        models.append({"label": label, "model": "a b", "params": 4_000_000 - index, "numbers": numbers, "costs": costs})
        made = {"label": label, "against": "model-0", "average_drop": number(2.5), "fidelity": {"psnr": number(31.25)}}
        made |= {"velocity_error_by_timestep": [], "param_ratio": 0.5, "speedup": 1.2, "verdict": f"{label} & others"}
        comparisons += [made] if index else []
    write_json(
        out / "metrics.json",
        {
            **{"features": "emoji", "prompts": num_pictures, "seed": 0, "num_inference_steps": 4, "level": 0.95},
            **{"resamples": 2000, "reference": None, "reference_count": None, "notes": ["few prompts"]},
            **{"models": models, "comparisons": comparisons},
        },
    )
    return out


def test_everything_is_on_the_page(tmp_path: Path) -> None:
    page = write_models_report(write_evaluation(tmp_path)).read_text(encoding="utf-8")
    assert "model-1 &amp; others." in page
    assert "few prompts" in page
    assert '<td data-value="31.25">31.2 <small>30.8 to 31.8</small></td>'
    assert "<th scope=col><button type=button>" in page
    assert page.count("<svg") == 2  # against size, against time
    assert page.count("<li class=pair>") == 4 + 2 + 2
    assert "ppcl evaluate &#x27;a b&#x27; &#x27;a b&#x27; --out DIR" in page
    assert HOSTILE not in page
    assert "https://" not in page.replace("http://www.w3.org", "")


def test_numbers_of_a_comparison_join_the_models(tmp_path: Path) -> None:
    first, second = measured(read_json(write_evaluation(tmp_path) / "metrics.json"))
    assert "psnr" not in first
    assert "average_drop" not in first
    assert second["psnr"]["value"] == 31.25
    assert second["average_drop"]["value"] == 2.5


def test_one_model_alone(tmp_path: Path) -> None:
    page = write_models_report(write_evaluation(tmp_path, num_models=1)).read_text(encoding="utf-8")
    assert "<h1>model-0</h1>" in page
    assert "Least alike" not in page
    assert page.count("<li class=pair>") == 4


def test_without_pictures_or_with_a_damaged_one(tmp_path: Path) -> None:
    out = write_evaluation(tmp_path)
    (out / "pictures" / "model-1" / "seed-0" / "0002.png").write_bytes(b"x")
    assert write_models_report(out).read_text(encoding="utf-8").count("<li class=pair>") == 3 + 1 + 1
    for path in (out / "pictures" / "model-1").rglob("*.png"):
        path.unlink()
    assert "There are no pictures of all models" in write_models_report(out).read_text(encoding="utf-8")


def test_many_models_show_fewer_prompts(tmp_path: Path) -> None:
    page = write_models_report(write_evaluation(tmp_path, num_models=5, num_pictures=60, side=8)).read_text("utf-8")
    assert page.count("<li class=pair>") == 256 // 5 + 4 * (4 + 4)
    assert len(page) < 5_000_000


@pytest.mark.parametrize("content", [None, [], {"schema_version": 1}])
def test_a_folder_without_an_evaluation_is_refused(tmp_path: Path, content: object) -> None:
    if content is not None:
        write_json(tmp_path / "metrics.json", content)
    with pytest.raises(ArtifactError):
        write_models_report(tmp_path)


def test_no_torch_needed() -> None:
    code = "import sys, ppcl.eval.report_models; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
