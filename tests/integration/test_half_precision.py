"""A run whose teacher is bfloat16, as on a GPU: substitutes are float32 until they are exported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ppcl.config import load_config
from ppcl.distill import preparation
from ppcl.eval.results import load_evaluation
from ppcl.experiments.compare import compare_plans
from ppcl.experiments.ladder import measure_ladder
from ppcl.run import STAGES, Run
from ppcl.teacher import loading as teacher


@pytest.mark.slow
def test_every_stage_of_a_run_in_bf16(
    tiny_model: Path, prompts_file: Path, small_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = teacher.open_pipeline

    def in_bf16(model: str, device: torch.device, dtype: torch.dtype | None, variant: str | None = None) -> Any:
        return original(model, device, torch.bfloat16, variant)

    for module in (teacher, preparation):
        monkeypatch.setattr(module, "open_pipeline", in_bf16)
    config = load_config(
        [small_config], ["precision=bf16", "device=cpu", "plan.keep=0.8", "fit.width=[modulation,ffn]"]
    )
    run = Run(str(tiny_model), tmp_path / "run", config, prompts_file, "test")
    for stage in STAGES:
        run.run(stage)
    assert run.teacher.transformer.dtype == torch.bfloat16
    (row,) = load_evaluation(run.out / "eval" / "metrics.json").comparisons
    assert 0 < row.fidelity["velocity_error"].value < math.inf
    assert 0 < row.scale["velocity_error"] < math.inf
    assert "velocity error" in compare_plans(run)
    assert "keep 0.9" in measure_ladder(run, [0.9])
