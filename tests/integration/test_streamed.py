"""The real command with the transformer read from its files block by block."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
