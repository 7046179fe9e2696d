"""`ppcl compress` on a pipeline with two transformers, one for much noise and one for little (Wan 2.2)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import wan_two_experts

import ppcl.pipelines  # noqa: F401 - makes the compressed classes known
from ppcl.capture.states import States
from ppcl.config import load_config
from ppcl.errors import BudgetError, UserError
from ppcl.run import experts
from ppcl.teacher.call_arguments import timesteps

Cli = Callable[..., tuple[int, str]]
BOUNDARY = 700  # of 1000 steps: above it the first expert draws
FEW = [
    "device=cpu", "capture.num_frames=1", "capture.num_inference_steps=4", "evaluate.num_inference_steps=4",
    "capture.height=16", "capture.width=16", "evaluate.num_prompts=2", "evaluate.speed_batch_sizes=[1]",
    "evaluate.speed_steps=[1]", "evaluate.teacher_seeds=1", "fit.exact=none", "fit.vectors=1", "fit.steps=1",
]  # fmt: skip
# What a user runs who has diffusers alone.
STOCK = """
import sys
sys.modules["ppcl"] = None
import numpy, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "PPCLWanTransformer3DModel" in (type(pipeline.transformer).__name__, type(pipeline.transformer_2).__name__)
pipeline.set_progress_bar_config(disable=True)
numpy.save(sys.argv[2], pipeline("red cat", height=16, width=16, num_frames=1, num_inference_steps=4,
                                 max_sequence_length=16, output_type="np",
                                 generator=torch.Generator().manual_seed(0)).frames)
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts") / "wan22"
    torch.manual_seed(0)
    wan_two_experts().save_pretrained(folder)
    return folder


@pytest.fixture
def compress(run_cli: Cli, prompts_file: Path, small_config: Path, teacher: Path) -> Callable[..., tuple[int, str]]:
    def call(out: Path, *more: object, settings: tuple[str, ...] = (), keep: float = 0.8) -> tuple[int, str]:
        return run_cli(
            "compress", teacher, "--out", out, "--prompts", prompts_file, "--config", small_config, "--keep", keep,
            *more, *(word for option in (*FEW, *settings) for word in ("--set", option)),
        )  # fmt: skip

    return call


def drawn(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "red cat", height=16, width=16, num_frames=1, num_inference_steps=4, output_type="np",
        max_sequence_length=16, generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip


def parameters(folder: Path) -> dict[str, int]:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    parts = {name: getattr(pipeline, name) for name in ("transformer", "transformer_2")}
    return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}


def steps(run: Path) -> list[float]:
    return [step for call in States(run / "calibration", "train").calls for step in timesteps(call.arguments)]


def plan_of(run: Path) -> Any:
    return json.loads((run / "plan.json").read_text())


def test_the_second_expert_is_recorded_where_it_draws_and_compressed(
    compress: Any, teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    code, err = compress(out, "--component", "transformer_2", settings=("blocks=streamed",))
    assert code == 0, err
    assert "only 'transformer_2' is compressed, --component both takes the two" in caplog.text
    assert max(steps(out)) < BOUNDARY
    plan = plan_of(out)
    assert plan["model"]["component"] == "transformer_2" and plan["predicted"]["param_ratio"] <= 0.8
    before, after = parameters(teacher), parameters(out / "pipeline")
    assert after == {**before, "transformer_2": plan["predicted"]["params"]}
    assert not np.array_equal(drawn(teacher), drawn(out / "pipeline"))
    metrics = json.loads((out / "eval" / "metrics.json").read_text())
    assert metrics["comparisons"][0]["param_ratio"] == pytest.approx(plan["predicted"]["param_ratio"])
    assert any("numbers of a transformer are those of transformer_2" in note for note in metrics["notes"])
    assert "`transformer` is as it was" in (out / "pipeline" / "README.md").read_text()


@pytest.mark.slow
def test_both_share_one_budget_and_go_on_after_a_stop(
    compress: Any, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ppcl.training.loop import TrainingLoop

    out, save = tmp_path / "run", TrainingLoop.save
    first = out / "transformer"
    asked = ("--component", "both")
    settings = ("fit.width=[ffn]", "export.remote_code=true", "evaluate.features=emoji")

    def stopped(self: Any, step: int) -> None:
        save(self, step)
        if (first / "pipeline").is_dir():  # the second one trains
            raise UserError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "save", stopped)
        code, err = compress(out, *asked, settings=settings)
    assert code == 2 and "stopped" in err
    assert "has another transformer" not in caplog.text
    files = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    code, err = compress(out, *asked, settings=settings)
    assert code == 0, err
    assert "keep 0.8 of both, shared by their predicted errors: transformer 0." in err
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()} == files
    assert min(steps(first)) > BOUNDARY > max(steps(out))
    plans = {"transformer": plan_of(first), "transformer_2": plan_of(out)}
    before, after = parameters(teacher), parameters(out / "pipeline")
    assert after == {name: plan["predicted"]["params"] for name, plan in plans.items()}
    assert sum(after.values()) <= 0.8 * sum(before.values()) and all(after[name] < before[name] for name in after)
    notes = json.loads((out / "eval" / "metrics.json").read_text())["notes"]
    share = sum(after.values()) / sum(before.values())
    assert any(f"with transformer it keeps {share:.1%} of the parameters" in note for note in notes)
    assert any(note.startswith("velocity error of transformer: ") for note in notes)
    assert "`transformer` was compressed, too" in (out / "pipeline" / "README.md").read_text()
    mine = drawn(out / "pipeline")
    assert not np.array_equal(drawn(teacher), mine)
    command = [sys.executable, "-c", STOCK, str(out / "pipeline"), str(tmp_path / "stock.npy")]
    home = {"HF_HOME": str(tmp_path / "hub"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **home}, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "stock.npy"), mine, atol=1e-5)


def test_what_cannot_be_is_one_line(
    refuses: Any, teacher: Path, tiny_model: Path, small_config: Path, tmp_path: Path
) -> None:
    common = ("--out", tmp_path / "run", "--config", small_config)
    refuses("compress", teacher, *common, "--component", "vae", says=("no transformer 'vae'", "transformer_2"))
    refuses("compress", tiny_model, *common, "--component", "both", says=("has 1 transformer,", "both"))
    refuses("compress", tiny_model, *common, "--component", "transformer_2", says=("no transformer 'transformer_2'",))
    refuses("compress", teacher, *common, "--component", "both", "--rounds", 2, says=("plan.rounds", "leave one"))
    refuses("capture", teacher, *common, "--set", "capture.component=both", says=("ppcl compress alone",))
    second = (*common, "--component", "transformer_2")
    for setting in ("plan.recover=2", "distill.few_steps.num_inference_steps=2", "export.quantize=nf4"):
        name = setting.partition("=")[0].removesuffix(".num_inference_steps")
        refuses("compress", teacher, *second, "--set", setting, says=(name, "component=transformer_2", "leave"))
        refuses("compress", teacher, *common, "--component", "both", "--set", setting, says=(name, "=both", "leave"))
    refuses("inspect", tiny_model, "--component", "both", says=("has 1 transformer,",))
    refuses("inspect", teacher, "--component", "transformer_3", says=("no transformer 'transformer_3'",))
    assert not (tmp_path / "run").exists()


def test_inspect_shows_each_transformer(ppcl: Any, teacher: Path) -> None:
    small = ("--component", "both", "--height", 16, "--width", 16)
    code, out, err = ppcl("inspect", teacher, *small, "--keep", 0.8)
    assert code == 0, err
    assert f"{teacher}: WanTransformer3DModel" in out and f"{teacher}, transformer_2: WanTransformer3DModel" in out
    code, out, err = ppcl("inspect", teacher, *small, "--json")
    assert [entry["model"]["component"] for entry in json.loads(out)] == ["transformer", "transformer_2"]
    code, out, err = ppcl("inspect", teacher, *small, "--estimate", "--device", "24GB,100TFLOPS")
    assert code == 0 and out.count("estimate for") == 2 and "both transformers, at most:" in out


def runs_of(mode: str = "optimal") -> Any:
    config = load_config([], [f"plan.mode={mode}"])
    return [SimpleNamespace(component=name, config=config) for name in ("one", "two")]


@pytest.mark.parametrize(("kind", "due"), [("keep", 0.6), ("speedup", 1.5)])
def test_the_budget_goes_where_it_saves_most(kind: str, due: float, monkeypatch: pytest.MonkeyPatch) -> None:
    slopes = {"one": 4.0, "two": 1.0}

    def predicted(run: Any, kind: str, value: float) -> float:
        left = value if kind == "keep" else 1 / value
        if run.component == "two" and left < 0.45:
            raise BudgetError("no plan")
        return slopes[run.component] * (1 - left)

    monkeypatch.setattr(experts, "_predicted", predicted)
    monkeypatch.setattr(experts, "_calls_of", lambda run: 10)
    monkeypatch.setattr(experts, "_sizes", lambda runs, kind: [10.0, 10.0])
    values = experts.share(runs_of(), kind, due)
    left = [value if kind == "keep" else 1 / value for value in values]
    assert left[0] > left[1] >= 0.45
    assert sum(left) == pytest.approx(2 * (due if kind == "keep" else 1 / due))
    slopes["two"] = 4.0
    assert experts.share(runs_of(), kind, due) == pytest.approx([due, due])


def test_a_search_that_looks_at_the_teacher_gets_equal_shares(capsys: pytest.CaptureFixture[str]) -> None:
    assert experts.share(runs_of("path"), "keep", 0.7) == [0.7, 0.7]
    assert "both transformers get the same share" in capsys.readouterr().err
