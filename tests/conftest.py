"""A tiny pipeline and runs on it, and a check that no test changes the process for the others."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from global_state import changes, global_state
from tiny_pipeline import PROMPTS, SMALL, tiny_qwen_pipeline

# what the command line sets, too
os.environ.update(TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error", TQDM_DISABLE="1", HF_HUB_OFFLINE="1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as open_clip does when imported
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


STATE_BEFORE = pytest.StashKey[dict[str, object]]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture: the same random numbers whatever ran before, and the state that the test must leave."""
    torch.manual_seed(0)
    item.stash[STATE_BEFORE] = global_state()


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that changes the process it runs in, and undo nothing: the next one would hide who it was."""
    yield
    assert not (left := changes(request.node.stash[STATE_BEFORE], global_state())), f"global state changed: {left}"


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


@pytest.fixture
def ppcl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str, str]]:
    """Run the command line in this process; returns (exit code, stdout, stderr)."""
    from ppcl import cli

    def call(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["ppcl", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
            raise SystemExit(0)
        printed = capsys.readouterr()
        return stop.value.code or 0, printed.out, printed.err

    return call
