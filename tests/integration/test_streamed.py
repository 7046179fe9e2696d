"""The real command with the transformer read from its files block by block."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipeline import tiny_qwen_pipeline

from ppcl.common.tensor_files import read_tensors
from ppcl.teacher import loading

Cli = Callable[..., tuple[int, str]]


def analysis_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The analysis without its seconds, and the matrices."""
    analysis = json.loads((folder / "analysis.json").read_text())
    del analysis["seconds"]
    return analysis, (folder / "analysis.safetensors").read_bytes()


def test_a_streamed_analysis_is_the_resident_one(
    run_cli: Cli, common: tuple[Path | str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, *options = common
    found = {}
    for blocks in ("resident", "streamed"):
        out = tmp_path / blocks
        assert run_cli("capture", model, "--out", out, *options)[0] == 0
        with monkeypatch.context() as patch:
            if blocks == "streamed":
                patch.setattr(loading, "open_pipeline", pytest.fail)
            code, err = run_cli("analyze", model, "--out", out, *options, "--set", f"blocks={blocks}")
        assert code == 0, err
        assert f"blocks are {blocks}: the transformer's weights take 0.0 GB" in err
        found[blocks] = analysis_of(out)
        assert not (out / "sweep").exists()
    assert found["streamed"] == found["resident"]


def test_streamed_distillation_is_the_resident_one(
    run_cli: Cli,
    common: tuple[Path | str, ...],
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of it but the output stage, which is left out in one line."""
    model, *options = common
    kept = ["--set", "distill.keep_start=false"]
    found = {}
    for blocks, changes in (
        ("resident", ["distill.one_at_a_time=true", "distill.output_steps=0"]),
        ("streamed", ["distill.train=substitutes"]),
    ):
        out = shutil.copytree(finished_run, tmp_path / blocks)
        settings = [word for change in (f"blocks={blocks}", *changes) for word in ("--set", change)]
        with monkeypatch.context() as patch:
            if blocks == "streamed":
                patch.setattr(loading, "open_pipeline", pytest.fail)
            code, err = run_cli("distill", model, "--out", out, *options, *kept, *settings)
        assert code == 0, err
        assert f"blocks are {blocks}" in err
        assert ("left out" in err and "output stage (3 steps)" in err) == (blocks == "streamed")
        assert err.count("memory: ") == 1
        assert ("streamed local stage" in err) == (blocks == "streamed")
        found[blocks] = (out / "bundle" / "substitutes.safetensors").read_bytes()
        assert not list(out.glob("checkpoints/**/states-*"))
    assert found["streamed"] == found["resident"]


def products_of(folder: Path) -> dict[str, str]:
    """Digests of what a run made, but for what holds times, machines or command lines."""
    files = tuple(f"{name}.safetensors" for name in ("analysis", "candidates", "width", "prices"))
    names = ("calibration", *files, "bundle", "pipeline", "eval/teacher", "eval/student")
    found = {}
    for path in sorted(path for name in names for path in (folder / name, *(folder / name).rglob("*"))):
        if path.is_file() and path.name not in ("README.md", "bundle.json", "prompts.json"):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    config = json.loads((folder / "pipeline/transformer/config.json").read_text())
    config.pop("_name_or_path", None)  # of a loaded one
    found["pipeline/transformer/config.json"] = str(config)
    return found


def test_a_streamed_run_makes_what_a_resident_one_makes(
    run_cli: Cli, finished_run: Path, common: tuple[Path | str, ...], tmp_path: Path
) -> None:
    """Of float32 weights, which resident ones always are on a CPU; without the stage that needs the whole student."""
    settings = ("distill.output_steps=0", "distill.one_at_a_time=true", "distill.keep_start=false", "device=cpu")
    options = [word for setting in settings for word in ("--set", setting)]
    products = {}
    for blocks in ("resident", "streamed"):
        out = tmp_path / blocks
        if blocks == "resident":
            shutil.copytree(finished_run, out)  # only what the settings change is made again
        code, err = run_cli("compress", *common, "--out", out, *options, "--set", f"blocks={blocks}")
        assert code == 0, err
        assert err.count(f"blocks are {blocks}: the transformer") == 1
        products[blocks] = products_of(out)
    assert products["streamed"] == products["resident"]
    notes = json.loads((tmp_path / "streamed" / "eval/metrics.json").read_text())["notes"]
    assert any("read block by block" in note for note in notes)


def test_half_precision_stays_what_it_is_from_capture_on(
    run_cli: Cli, common: tuple[Path | str, ...], tmp_path: Path
) -> None:
    """A stage that finds room for the whole transformer loads it in the dtype of the states that are there."""
    pipeline = tiny_qwen_pipeline()
    pipeline.transformer.bfloat16()
    pipeline.save_pretrained(tmp_path / "model")
    options, out = (tmp_path / "model", "--out", tmp_path / "run", *common[1:], "--set", "device=cpu"), tmp_path / "run"
    assert run_cli("capture", *options, "--set", "blocks=streamed")[0] == 0
    states = read_tensors(out / "calibration/train-0000.safetensors")[0]
    assert {tensor.dtype for tensor in states.values() if tensor.is_floating_point()} == {torch.bfloat16}
    found = {}
    for blocks in ("resident", "streamed"):
        code, err = run_cli("analyze", *options, "--set", f"blocks={blocks}")
        assert code == 0, err
        found[blocks] = analysis_of(out)
        (out / "analysis.json").unlink()
    assert found["streamed"] == found["resident"]


@pytest.mark.slow
def test_finished_models_are_judged_alike_streamed_or_whole(
    run_cli: Cli, finished_run: Path, common: tuple[Path | str, ...], tmp_path: Path
) -> None:
    metrics = {}
    for blocks in ("resident", "streamed"):
        out = tmp_path / blocks
        models = (common[0], finished_run / "pipeline")
        code, err = run_cli("evaluate", *models, "--out", out, *common[1:], "--set", f"blocks={blocks}")
        assert code == 0, err
        assert ("blocks are streamed: the transformers' weights take 0.0 GB" in err) == (blocks == "streamed")
        metrics[blocks] = json.loads((out / "metrics.json").read_text())
    for resident, streamed in zip(metrics["resident"]["models"], metrics["streamed"]["models"], strict=True):
        assert streamed["numbers"] == resident["numbers"]
        assert streamed["costs"]["flops"] == resident["costs"]["flops"]
        assert streamed["params"] == resident["params"]
    fidelity = [metrics[blocks]["comparisons"][0]["fidelity"] for blocks in metrics]
    assert fidelity[0] == fidelity[1]
    assert "velocity_error" in fidelity[0]


@pytest.mark.parametrize("mode", ["path", "learned"])
def test_a_search_that_looks_at_the_teacher_finds_the_same_streamed(
    mode: str, run_cli: Cli, run_copy: Path, common: tuple[Path | str, ...]
) -> None:
    plans = []
    for blocks in ("resident", "streamed"):
        settings = (f"blocks={blocks}", "device=cpu", "plan.search_steps=20", "plan.search_states=8")
        options = ("--keep", "0.8", "--mode", mode, *(word for setting in settings for word in ("--set", setting)))
        code, err = run_cli("plan", *common, "--out", run_copy, *options)
        assert code == 0, err
        plans.append(json.loads((run_copy / "plan.json").read_text()))
        (run_copy / "plan.json").unlink()
    assert plans[0] == plans[1]
