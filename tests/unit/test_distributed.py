"""Several processes train what one process trains; the processes are real, started by torch's launcher."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from train_worker import main as worker
from train_worker import new_distiller, train_all, train_sparse, weights, write_all_states

import ppcl
from ppcl.common.tensor_files import read_tensors
from ppcl.errors import ConfigError
from ppcl.training.distributed import SINGLE, Group, Share, add_up, connect
from ppcl.training.launch import guarded
from ppcl.training.stopping import Stopped, on_signals

HERE = Path(__file__).parent
Together = Callable[[str], tuple[Path, dict[str, torch.Tensor]]]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def start(command: list[str], task: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join([str(Path(ppcl.__file__).parents[1]), str(HERE)])
    return subprocess.run(
        [*command, str(HERE / "train_worker.py"), task, str(folder)],
        env={**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert first.keys() == second.keys()
    same = {k: torch.allclose(first[k], second[k], tolerance, tolerance) for k in first}
    far = {k: float((first[k] - second[k]).abs().max()) for k in first if not same[k]}
    assert far == {}


def only_all(result: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of the output stage that trains everything."""
    return {k: v for k, v in result.items() if k.startswith("all/") and k != "all/losses"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Every stage trained by this process."""
    folder = tmp_path_factory.mktemp("alone")
    write_all_states(folder)
    return train_all(folder, SINGLE)


@pytest.fixture(scope="module")
def together(made_once: Callable[..., Path]) -> Together:
    """What two processes made of each task, which one launch does one after the other; its folder and weights."""

    def make(folder: Path) -> None:
        done = start(TORCHRUN, "pieces,padded,split,zero2,teacher,sparse", folder, ASKED="2")
        assert done.returncode == 0, done.stderr[-3000:]

    folder = made_once("two-processes", make)

    def of(task: str) -> tuple[Path, dict[str, torch.Tensor]]:
        result, meta = read_tensors(folder / task / "result.safetensors")
        assert meta == {"processes": 2}
        return folder / task, result

    return of


def check_split(folder: Path, split: dict[str, torch.Tensor], alone: dict[str, torch.Tensor]) -> None:
    """FSDP2: the same weights, and one process goes on from the checkpoint, which holds whole tensors."""
    assert_close({f"all/{k}": v for k, v in split.items()}, only_all(alone))
    resumed = new_distiller(folder, "all", SINGLE, lambda row: pytest.fail(f"step {row['step']} again"))
    resumed.run()
    assert_close(weights(resumed), split)


def test_two_processes_train_what_one_does_in_every_stage(
    alone: dict[str, torch.Tensor], together: Together, tmp_path: Path
) -> None:
    assert_close(together("pieces")[1], alone)
    assert len(alone["all/losses"]) == 3
    write_all_states(tmp_path)
    untrained = weights(new_distiller(tmp_path, "all", SINGLE))
    moved = [k for k, v in untrained.items() if not torch.allclose(v, alone[f"all/{k}"], 1e-5, 1e-5)]
    assert len(moved) > 50  # the comparison is of something


def test_padded_texts_train_what_pieces_do_in_one_process_and_in_two(
    alone: dict[str, torch.Tensor], together: Together, tmp_path: Path
) -> None:
    write_all_states(tmp_path, together=True)
    assert_close(train_all(tmp_path, SINGLE), alone)
    assert_close(together("padded")[1], alone)


@pytest.mark.parametrize("task", ["split", "zero2"])  # all, or gradients and optimizer states alone
def test_a_student_that_is_split_trains_what_a_whole_one_does(
    task: str, alone: dict[str, torch.Tensor], together: Together, tmp_path: Path
) -> None:
    folder, result = together(task)
    check_split(shutil.copytree(folder, tmp_path / task), result, alone)


def test_the_frozen_teacher_is_split_in_every_stage(alone: dict[str, torch.Tensor], together: Together) -> None:
    found = together("teacher")[1]
    whole = {f"all/{k.removeprefix('whole/')}": found.pop(k) for k in list(found) if k.startswith("whole/")}
    assert_close(whole, only_all(alone))  # a copy of blocks that are split is whole
    assert_close(found, {k: v for k, v in alone.items() if k in found})
    assert {k.split("/")[0] for k in found} == {"local", "sequential", "alternating", "output", "all", "few"}


def test_zeros_stay_where_weights_are_split_over_processes(together: Together, tmp_path: Path) -> None:
    alone = train_sparse(tmp_path / "alone", SINGLE)
    found = together("sparse")[1]
    assert_close({k: v.float() for k, v in found.items()}, {k: v.float() for k, v in alone.items()})
    masks = {k.removeprefix("mask/"): v for k, v in found.items() if k.startswith("mask/")}
    assert len(masks) == 36  # 3 blocks
    for name, mask in masks.items():
        stack, run, path = name.split("/")
        first, last = map(int, run.split("-"))
        assert (found[f"{(stack, first, last)}/{path}"][~mask] == 0).all()


def test_accumulating_changes_nothing(alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write_all_states(tmp_path)
    parts = train_all(tmp_path, SINGLE, ["local", "alternating"], accumulate=3)
    assert_close(parts, {k: v for k, v in alone.items() if k.startswith(("local", "alternating", "analysis", "fit"))})


@pytest.mark.slow
def test_a_killed_process_of_two_is_resumed_by_one(alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write_all_states(tmp_path)
    done = start(TORCHRUN, "kill", tmp_path)
    assert done.returncode not in (0, 2)
    assert [p.name for p in (tmp_path / "all" / "checkpoints" / "distill-output").iterdir()] == ["step-1"]
    steps: list[int] = []
    resumed = new_distiller(tmp_path, "all", SINGLE, lambda row: steps.append(row["step"]))
    resumed.run()
    assert steps == [1, 2]
    assert_close({f"all/{k}": v for k, v in weights(resumed).items()}, only_all(alone))


@pytest.mark.slow
def test_sigterm_to_one_of_two_stops_both_saved_with_exit_code_0(tmp_path: Path) -> None:
    write_all_states(tmp_path)
    done = start(TORCHRUN, "stop", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stopped by SIGTERM; the same command goes on from here" in done.stderr
    assert [p.name for p in (tmp_path / "all" / "checkpoints" / "distill-output").iterdir()] == ["step-2"]


def test_sigterm_in_one_process_saves(tmp_path: Path) -> None:
    write_all_states(tmp_path)
    with pytest.raises(Stopped), on_signals():
        worker("stop", tmp_path)
    assert [p.name for p in (tmp_path / "all" / "checkpoints" / "distill-output").iterdir()] == ["step-2"]


def test_another_number_of_processes_than_asked_stops() -> None:
    with pytest.raises(ConfigError, match=r"2 processes were asked for, 1 train.*--nproc_per_node 2 -m ppcl"):
        connect(cpu=True, asked=2)
    assert connect(cpu=True, asked=1) is SINGLE


def test_parts_weigh_what_they_count(tmp_path: Path) -> None:
    from ppcl.capture.states import States
    from ppcl.common.streams import Stream, step_generator

    write_all_states(tmp_path)
    states = States(tmp_path / "states", "train")
    mixed = 0
    for step in range(6):
        whole = list(states.parts(5, step_generator(0, step, Stream.LOCAL_BATCH)))
        mixed += len(whole) > 1
        parts = [
            list(states.parts(5, step_generator(0, step, Stream.LOCAL_BATCH), Group(rank, 2), 2)) for rank in (0, 1)
        ]
        assert len(parts[0]) == len(parts[1])  # a model that is split runs in both at once
        counted = [(call, share) for own in parts for call, share in own if share.samples]
        rows = [row for call, _ in counted for row in call.rows]
        assert rows == [row for call, _ in whole for row in call.rows]
        assert len(rows) == 5
        shares = [share for own in parts for _, share in own]
        assert sum(share.samples for share in shares) == pytest.approx(1)
        name = "encoder_hidden_states_mask"
        assert sum(share.of(name) for share in shares) == pytest.approx(1)
    assert 0 < mixed < 6
    assert Share(0.5, {name: 0.25}).of(name) == 0.25
    assert Share(0.5, {name: 0.25}).of("another") == Share(0.5).of(None) == 0.5
    assert add_up([{"a": 1.0}, {"a": 2.0}]) == {"a": 3.0}


@pytest.mark.parametrize(
    ("end", "code"), [(Stopped(), 0), (ConfigError("wrong"), 2), (KeyboardInterrupt(), 130), (SystemExit(130), 130)]
)
def test_an_open_group_cannot_change_the_exit_code(
    end: BaseException, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own way out with an open group of gloo ends by SIGABRT in one of two cases."""

    def stop() -> None:
        raise end

    def leave(code: int) -> None:
        codes.append(code)
        raise _LeftAtOnce

    codes: list[int] = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("os._exit", leave)
    monkeypatch.setattr("atexit._run_exitfuncs", lambda: None)
    with pytest.raises(_LeftAtOnce):
        guarded(stop)
    assert codes == [code]


class _LeftAtOnce(BaseException):
    """Stands for the end of the process."""
