"""The whole command with its default, depth and width together, on families of other shapes than Qwen-Image's."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from test_families import OPTIONS, draw
from tiny_pipelines import PIPELINES

import ppcl.pipelines  # noqa: F401 - makes the compressed classes known
from ppcl import cli
from ppcl.teacher.loading import loading_call

KEEP = {"flux": 0.75, "z_image": 0.95, "wan": 0.85}
KINDS = {"flux": {"low_rank"}, "z_image": set(), "wan": set()}  # beside those of feed-forward networks


@pytest.mark.parametrize(
    "family", ["flux", *(pytest.param(name, marks=pytest.mark.slow) for name in ("z_image", "wan"))]
)
def test_depth_and_width(family, prompts_file, small_config, tmp_path, monkeypatch):
    torch.manual_seed(0)
    teacher = PIPELINES[family]()
    teacher.save_pretrained(tmp_path / "model")
    arguments = ["compress", tmp_path / "model", "--out", tmp_path / "run", "--config", small_config]
    arguments += ["--prompts", prompts_file, "--keep", KEEP[family], "--set", "fit.width=[modulation,ffn,attention]"]
    # random texts in random embedders lie in no few directions: only a coarse rank does for those held out
    arguments += ["--set", "fit.modulation_tolerances=[0.5,0.1]"]
    arguments += [part for option in OPTIONS for part in ("--set", option)]
    monkeypatch.setattr(sys, "argv", ["ppcl", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert type(pipeline.transformer).__name__ == "PPCL" + type(teacher.transformer).__name__
    kinds = {part["kind"] for part in pipeline.transformer.config["pruning"].values()}
    assert KINDS[family] <= kinds
    assert kinds & {"narrow", "linear", "heads", "parallel"}
    params = sum(p.numel() for p in pipeline.transformer.parameters())
    assert params == json.loads((tmp_path / "run" / "plan.json").read_text())["predicted"]["params"]
    assert draw(pipeline)
    folder = tmp_path / "run" / "pipeline"
    assert loading_call(folder) == f'import ppcl.pipelines; DiffusionPipeline.from_pretrained("{folder}")'
    assert loading_call(tmp_path / "model") == f'DiffusionPipeline.from_pretrained("{tmp_path / "model"}")'
    assert "ppcl.pipelines" in (tmp_path / "run" / "pipeline" / "README.md").read_text()


@pytest.mark.slow
def test_the_same_command_makes_the_same_weights(prompts_file, small_config, tmp_path):
    """All kinds of smaller modules, in processes of their own: memory that is damaged shows in some of them only."""
    torch.manual_seed(0)
    PIPELINES["flux"]().save_pretrained(tmp_path / "model")
    arguments = ["compress", tmp_path / "model", "--config", small_config, "--prompts", prompts_file, "--keep", 0.6]
    arguments += [part for option in OPTIONS for part in ("--set", option)]
    arguments += ["--set", "fit.width=[modulation,ffn,attention,text]"]
    weights = []
    for name in ("one", "two"):
        command = [sys.executable, "-m", "ppcl", *map(str, arguments), "--out", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("  memory: ") == 2
        assert "cannot be predicted" not in done.stderr
        weights.append((tmp_path / name / "bundle" / "substitutes.safetensors").read_bytes())
    assert weights[0] == weights[1]
