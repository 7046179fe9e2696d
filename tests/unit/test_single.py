"""Training that fits: one substitute at a time, gradients released, blocks streamed, small optimizer states."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed import assert_close
from tiny_models import DUAL, SINGLE, flux_call, noise, plan_for, tiny_flux, write_states
from train_worker import new_distiller, weights, write_all_states

from ppcl.capture.states import States
from ppcl.config import DistillConfig, load_config
from ppcl.distill import local as local_module
from ppcl.distill.one_at_a_time import Boundaries
from ppcl.distill.trainer import Distiller
from ppcl.errors import ConfigError, TrainingError
from ppcl.teacher.families import adapter_for
from ppcl.teacher.trace import record_boundaries
from ppcl.training.distributed import SINGLE as ALONE
from ppcl.training.loop import TrainingLoop
from ppcl.training.settings import LoopSettings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_all_states(tmp_path)
    return tmp_path


def trained(folder: Path, name: str = "local", **changes: Any) -> dict[str, torch.Tensor]:
    """Weights after a stage, in a folder of its own; gradients are not clipped unless asked."""
    own = folder / ("-".join(f"{key}-{value}" for key, value in changes.items()) or "plain")
    write_all_states(own)
    distiller = new_distiller(own, name, ALONE, **{"clip_norm": 1e9, **changes})
    distiller.run()
    return weights(distiller)


def test_one_at_a_time_trains_what_all_at_once_does(folder: Path) -> None:
    joint = trained(folder)
    assert_close(trained(folder, one_at_a_time=True), joint)
    assert_close(trained(folder, release_gradients=False), joint)
    assert_close(trained(folder, release_gradients=True, accumulate=3), joint)
    assert not list(folder.rglob("checkpoints/distill-local/states*"))


def test_each_substitute_is_clipped_by_itself(folder: Path) -> None:
    single = trained(folder, one_at_a_time=True, clip_norm=1e-4)
    assert_close(trained(folder, release_gradients=True, clip_norm=1e-4), single)
    assert_close(trained(folder, release_gradients=False, clip_norm=1e-4), single)
    free = trained(folder)
    assert any(not torch.allclose(single[k], free[k], 1e-5, 1e-6) for k in free)


@pytest.mark.parametrize(
    "changes",
    [{"sequence": "sequential"}, {"spike_factor": 3}, {"one_at_a_time": True}, {"sparsity": {"share": 0.5}}],
    ids=str,
)
def test_gradients_are_released_wherever_nothing_needs_them_together(changes: dict[str, Any]) -> None:
    assert DistillConfig().releases_gradients
    assert not DistillConfig(**changes).releases_gradients
    assert not DistillConfig(release_gradients=False).releases_gradients


def test_by_default_the_gradients_of_one_substitute_are_there_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[Any, list[int]] = {"auto": [], False: []}
    for setting, counts in seen.items():
        distiller = new_distiller(folder, "local", ALONE, release_gradients=setting, local_steps=1)
        blocks = distiller.substitutes.values()
        real = local_module.run_loss

        def count(*args: Any, blocks: Any = blocks, counts: list[int] = counts, real: Any = real) -> Any:
            counts.append(sum(any(p.grad is not None for p in block.parameters()) for block in blocks))
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(local_module, "run_loss", count)
            distiller.run()
        shutil.rmtree(folder / "local" / "checkpoints")
    assert seen == {"auto": [0, 0], False: [0, 1]}


def test_one_at_a_time_goes_on_where_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(folder, one_at_a_time=True)
    rows: list[dict[str, Any]] = []

    def stop(row: dict[str, Any]) -> None:
        rows.append(row)
        if len(rows) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        new_distiller(folder, "local", ALONE, stop, one_at_a_time=True, clip_norm=1e9).run()
    again: list[dict[str, Any]] = []
    resumed = new_distiller(folder, "local", ALONE, again.append, one_at_a_time=True, clip_norm=1e9)
    resumed.run()
    assert [row["step"] for row in again] == [1]  # the first run is done, and of the second one step
    assert_close(weights(resumed), expected)


def test_states_between_blocks_are_the_teachers(tmp_path: Path) -> None:
    teacher, calls = tiny_flux(), [flux_call(batch=3), flux_call(batch=2, seed=4)]
    adapter = adapter_for(teacher)
    write_states(tmp_path / "s", "train", calls)
    kept = Boundaries(tmp_path / "b", States(tmp_path / "s", "train"), teacher, adapter, "fp32")
    for run in [(DUAL, 0, 1), (DUAL, 2, 2), (SINGLE, 0, 1), (SINGLE, 2, 3)]:  # the third enters the second stack
        kept.keep(run)
        for number, arguments in enumerate(calls):
            expected, _ = record_boundaries(teacher, adapter, arguments)
            rows = [(number, row) for row in range(len(arguments["hidden_states"]))]
            start, end = kept.call(arguments, rows, run)
            for stream, state in expected[run[:2]].inputs.items():
                assert torch.allclose(start.inputs[stream], state, atol=1e-5)
            for stream, state in expected[run[0], run[2]].outputs.items():
                assert torch.allclose(end.outputs[stream], state, atol=1e-5)
    assert len(list((tmp_path / "b").iterdir())) == 2  # no others than those of the last run's ends


def test_a_second_stack_trains_one_at_a_time(tmp_path: Path) -> None:
    found = []
    for single in (False, True):
        teacher = tiny_flux()
        out = tmp_path / str(single)
        write_states(out / "s", "train", [flux_call(batch=7)])
        plan = plan_for(teacher, [(DUAL, 0, 1), (SINGLE, 1, 2)])
        settings = DistillConfig(local_steps=2, output_steps=0, batch_size=4, clip_norm=1e9, one_at_a_time=single)
        distiller = Distiller(teacher, adapter_for(teacher), plan, out / "s", out, settings, 0, "fp32")
        distiller.run()
        found.append(weights(distiller))
    assert_close(*found)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_blocks_that_wait_change_nothing(folder: Path, where: str) -> None:
    plain = trained(folder, "all", local_steps=2)
    assert_close(trained(folder, "all", local_steps=2, offload=where), plain)
    single = trained(folder, one_at_a_time=True)
    assert_close(trained(folder, one_at_a_time=True, offload=where), single)
    assert not list(folder.rglob(".offload-*"))


def test_checkpointing_changes_nothing(folder: Path) -> None:
    for name in ("alternating", "all"):
        assert_close(trained(folder, name, checkpointing=True), trained(folder, name))


def test_each_by_itself_does_not_go_with_the_sequential_ablation() -> None:
    with pytest.raises(ConfigError, match="one_at_a_time trains each run by itself"):
        load_config([], ["distill.one_at_a_time=true", "distill.sequence=sequential"])


def eight_bit_loop(folder: Path, optimizer: str = "adamw8bit") -> TrainingLoop:
    """A regression whose weight is just large enough for states of 8 bits."""
    layer = torch.nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.copy_(noise(64, 64) / 8)
        layer.bias.zero_()

    def backward(step: int) -> dict[str, float]:
        x = noise(16, 64, seed=step)
        loss = (layer(x) - x.sin()).square().mean()
        loss.backward()
        return {"loss": loss.item()}

    settings = LoopSettings(steps=6, learning_rate=0.01, checkpoint_every=2, optimizer=optimizer)
    return TrainingLoop({"layer": layer}, backward, settings, folder, "f")


def test_optimizer_states_of_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: function
    )  # torchao compiles its step, for minutes on a CPU
    exact, small = eight_bit_loop(tmp_path / "exact", "adamw"), eight_bit_loop(tmp_path / "small")
    start = small.parameters["layer.weight"].detach().clone()
    exact.run()
    small.run()
    theirs, mine = (loop.parameters["layer.weight"] for loop in (exact, small))
    assert (mine - theirs).norm() < 0.2 * (theirs - start).norm()
    (state,) = [o.state[mine] for o in small.optimizers]
    assert state["exp_avg"].codes.dtype == torch.uint8
    eight_bit_loop(tmp_path / "again").run(until=4)
    resumed = eight_bit_loop(tmp_path / "again")
    assert resumed.resume() == 4
    resumed.run()
    assert torch.equal(resumed.parameters["layer.weight"], mine)


def test_without_torchao_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(TrainingError, match="needs torchao"):
        eight_bit_loop(tmp_path)
