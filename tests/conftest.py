"""A tiny pipeline and runs on it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml
from tiny_pipeline import PROMPTS, SMALL, tiny_qwen_pipeline

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny pipeline of six blocks; do not write into it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_qwen_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve prompts."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture(scope="session")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config under which all stages take seconds."""

    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


@pytest.fixture(scope="session")
def finished_run(
    tiny_model: Path, prompts_file: Path, small_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run directory with every stage done; do not write into it."""
    from ppcl.config import load_config
    from ppcl.run import STAGES, Run

    out = tmp_path_factory.mktemp("finished") / "run"
    run = Run(str(tiny_model), out, load_config([small_config], []), prompts_file, "test")
    for stage in STAGES:
        run.run(stage)
    return out
