"""A pipeline written in 4.5 bits: diffusers alone loads it; recovered, resumed, evaluated, refused as a teacher."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ppcl.common.artifacts import load_artifact
from ppcl.common.files import read_json
from ppcl.config import load_config
from ppcl.eval.report_data import read_run
from ppcl.run import Run
from ppcl.student.plan import CompressionPlan
from ppcl.training.loop import TrainingLoop

pytest.importorskip("torchao", minversion="0.17")
Call = Callable[..., tuple[object, str, str]]
WEIGHTS = "pipeline/transformer/diffusion_pytorch_model.safetensors"
SETTINGS = (
    "quantize=nvfp4",
    "export.recover_steps=12",
    "export.recover_learning_rate=1e-4",
    "distill.checkpoint_every=3",
)


@pytest.fixture
def open_copy(
    finished_run: Path, tiny_model: Path, prompts_file: Path, small_config: Path, tmp_path: Path
) -> Callable[..., Run]:
    """A copy of the finished run, opened with more settings."""

    def open_it(*settings: str, name: str = "run") -> Run:
        out = tmp_path / name
        if not out.exists():
            shutil.copytree(finished_run, out)
        return Run(str(tiny_model), out, load_config([small_config], list(settings)), prompts_file, "test")

    return open_it


@pytest.fixture(scope="module")
def quantised_run(
    finished_run: Path,
    tiny_model: Path,
    prompts_file: Path,
    small_config: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run from export on in nvfp4; do not write into it."""
    out = shutil.copytree(finished_run, tmp_path_factory.mktemp("quantised") / "run")
    run = Run(str(tiny_model), out, load_config([small_config], list(SETTINGS)), prompts_file, "test")
    for stage in ("export", "evaluate", "report"):
        assert run.run(stage)
    return out


def bytes_of(file: Path) -> int:
    """What the tensors of a file take."""
    with file.open("rb") as stream:
        return file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")


def test_diffusers_alone_loads_it_and_draws(quantised_run: Path) -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(quantised_run / "pipeline", dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.transformer.transformer_blocks[0].attn.to_q.weight).__name__ == "NVFP4Tensor"
    generator = torch.Generator().manual_seed(0)
    picture = pipe("red cat", height=16, width=16, num_inference_steps=2, generator=generator).images[0]
    assert picture.size == (16, 16)
    assert not list((quantised_run / "pipeline").rglob("*.bin"))


def test_recovery_lowers_the_error_that_quantising_made(quantised_run: Path) -> None:
    made = read_json(quantised_run / "pipeline" / "transformer" / "config.json")["_ppcl"]["quantised"]
    assert made["format"] == "nvfp4"
    assert made["distilled"] < made["quantised"]
    assert made["recovered"] < made["quantised"]


def test_evaluation_and_report_have_both_errors(quantised_run: Path) -> None:
    made = read_run(quantised_run)
    assert made.evaluation
    assert "velocity_error" in made.evaluation.comparisons[0].fidelity
    text = (quantised_run / "report.html").read_text()
    for words in ("in bfloat16", "in nvfp4 before recovery", "in nvfp4 after recovery", "and as stored"):
        assert words in text
    card = (quantised_run / "pipeline" / "README.md").read_text()
    assert "dtype=torch.bfloat16" in card
    assert "stored in nvfp4, the rest in bfloat16" in card


def test_bytes_are_those_that_were_said(quantised_run: Path) -> None:
    row = read_run(quantised_run).log["quantize"][-1]
    assert bytes_of(quantised_run / WEIGHTS) == row["bytes"]


def test_only_what_the_format_concerns_runs_again(open_copy: Callable[..., Run]) -> None:
    run = open_copy("quantize=int8", "export.recover_steps=0")
    assert [run.run(stage) for stage in ("capture", "analyze", "fit", "plan", "distill")] == [False] * 5
    assert not open_copy("quantize=int8", "export.recover_steps=0", name="run").is_done("export")


def test_a_killed_recovery_ends_as_an_undisturbed_one(
    open_copy: Callable[..., Run], quantised_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = TrainingLoop.step, []

    def dies(loop: TrainingLoop) -> None:
        if len(steps) == 7:
            raise KeyboardInterrupt
        steps.append(1)
        step(loop)

    monkeypatch.setattr(TrainingLoop, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        open_copy(*SETTINGS).run("export")
    monkeypatch.setattr(TrainingLoop, "step", lambda loop: (steps.append(1), step(loop)))
    run = open_copy(*SETTINGS)
    assert (run.out / "checkpoints" / "distill-recovery").is_dir()
    run.run("export")
    assert len(steps) == 7 + 6  # from the checkpoint after the sixth step on
    again, undisturbed = load_file(run.out / WEIGHTS), load_file(quantised_run / WEIGHTS)
    assert again.keys() == undisturbed.keys()
    assert all(
        torch.equal(again[n].view(torch.uint8), undisturbed[n].view(torch.uint8)) for n in again if again[n].ndim
    )
    assert not (run.out / "checkpoints").exists()


def test_a_budget_in_bytes_counts_those_of_the_format(open_copy: Callable[..., Run]) -> None:
    small = ("distill.local_steps=1", "distill.output_steps=0", "export.recover_steps=0", "quantize=int8")
    whole = load_artifact(CompressionPlan, open_copy().out / "plan.json").model
    budget = (whole.other_bytes + 1.02 * whole.params) / 1e9  # of float32 a quarter, of int8 nearly all
    run = open_copy(*small, "plan.keep=null", f"plan.fit_gb={budget}")
    for stage in ("plan", "distill", "export"):
        assert run.run(stage)
    plan = load_artifact(CompressionPlan, run.out / "plan.json")
    assert plan.predicted.param_ratio > 0.5
    assert plan.predicted.bytes <= budget * 1e9
    assert bytes_of(run.out / WEIGHTS) == plan.predicted.bytes - plan.model.other_bytes
    assert run.depends("plan") != open_copy("plan.keep=null", f"plan.fit_gb={budget}").depends("plan")


def test_another_size_of_a_bundle_is_quantised_too(
    ppcl: Call, open_copy: Callable[..., Run], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, out = open_copy("distill.train=substitutes", "distill.output_steps=0"), tmp_path / "sizes" / "whole"
    run.run("distill")
    code, _, err = ppcl("export", run.out, "--keep", 0.7, "--out", out, "--set", "quantize=int8")
    assert code == 0, err
    assert "is not recovered" in caplog.text
    config = read_json(out / "transformer" / "config.json")
    assert config["_ppcl"]["quantised"] == {"format": "int8"}
    assert config["quantization_config"]["quant_method"] == "torchao"
    assert [path.name for path in out.parent.iterdir()] == ["whole"]
    code, _, err = ppcl("export", run.out, "--keep", 0.7, "--out", tmp_path / "nf4", "--set", "quantize=nf4")
    assert code == 2
    assert "needs a CUDA device" in err


def test_it_is_refused_as_a_teacher_and_for_other_formats(ppcl: Call, quantised_run: Path, tmp_path: Path) -> None:
    pipeline = quantised_run / "pipeline"
    code, _, err = ppcl("compress", pipeline, "--out", tmp_path / "again", "--set", "quantize=int8")
    assert code == 2
    assert "stored quantised (torchao)" in err
    code, _, err = ppcl("export", pipeline, "--format", "comfyui", "--out", tmp_path / "file.safetensors")
    assert code == 2
    assert "quantised" in err


def test_a_device_that_does_not_make_the_format_is_refused_before_capture(
    ppcl: Call, tiny_model: Path, prompts_file: Path, tmp_path: Path
) -> None:
    arguments: list[Any] = ["compress", tiny_model, "--out", tmp_path / "run", "--prompts", prompts_file]
    code, _, err = ppcl(*arguments, "--set", "quantize=nf4", "--set", "device=cpu")
    assert code == 2
    assert "export.quantize=nf4 needs a CUDA device" in err
    assert not (tmp_path / "run" / "calibration").exists()
