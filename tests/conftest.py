"""A tiny pipeline and runs on it, and a check that no test changes the process for the others."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from global_state import changes, global_state
from tiny_pipeline import PROMPTS, SMALL, tiny_qwen_pipeline

# what the command line sets, too
os.environ.update(TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error", TQDM_DISABLE="1", HF_HUB_OFFLINE="1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as open_clip does when imported
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


STATE_BEFORE = pytest.StashKey[dict[str, object]]()


def pytest_collection_finish() -> None:
    """What imports left stays: the collector need not look at it each time, which takes it half a second."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session", autouse=True)
def short_timing() -> Iterator[None]:
    """Times of tiny modules are noise however long they are taken."""
    from ppcl.pruning import options

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "ROUNDS", 2)
        yield


MakeOnce = Callable[[str, Callable[[Path], object]], Path]


def written(folder: Path) -> dict[str, list[int]]:
    """Size and time of every file, by name; of locks the time says nothing."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".lock"))
    return {str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeOnce]:
    """A function that makes a folder once for all processes of a session: of its name, and of what fills it.

    No test may write into such a folder: the end of the session fails if one did.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made-once"
    shared.mkdir(exist_ok=True)

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        place, done = shared / name, shared / f"{name}.json"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(place, ignore_errors=True)  # of a maker that failed
                place.mkdir()
                make(place)
                done.write_text(json.dumps(written(place)))
        return place

    yield folder
    changed = [
        done.stem for done in shared.glob("*.json") if json.loads(done.read_text()) != written(shared / done.stem)
    ]
    assert not changed, f"tests wrote into what all share: {changed}"


@pytest.fixture(scope="session")
def tiny_model(made_once: MakeOnce) -> Path:
    """The folder of a tiny pipeline of six blocks; do not write into it."""
    return made_once("tiny", lambda folder: tiny_qwen_pipeline().save_pretrained(folder / "model")) / "model"


@pytest.fixture(scope="session")
def prompts_file(made_once: MakeOnce) -> Path:
    """Twelve prompts."""
    text = "\n".join(PROMPTS) + "\n"
    return made_once("prompts", lambda folder: (folder / "prompts.txt").write_text(text)) / "prompts.txt"


@pytest.fixture(scope="session")
def small_config(made_once: MakeOnce) -> Path:
    """A config under which all stages take seconds."""
    text = yaml.safe_dump(SMALL)
    return made_once("config", lambda folder: (folder / "small.yaml").write_text(text)) / "small.yaml"


@pytest.fixture(scope="session")
def finished_run(tiny_model: Path, prompts_file: Path, small_config: Path, made_once: MakeOnce) -> Path:
    """A run directory with every stage done; do not write into it."""
    from ppcl.config import load_config
    from ppcl.run import STAGES, Run

    def make(folder: Path) -> None:
        run = Run(str(tiny_model), folder / "run", load_config([small_config], []), prompts_file, "test")
        for stage in STAGES:
            run.run(stage)

    return made_once("finished", make) / "run"


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
