"""Training that fits: one substitute at a time, gradients released, blocks streamed, small optimizer states."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Running
from test_distributed import assert_close
from tiny_models import DUAL, SINGLE, flux_call, noise, plan_for, qwen_call, tiny_flux, tiny_qwen, write_states
from train_worker import new_distiller, weights, write_all_states

from ppcl.analysis.sweep import forward_sweep
from ppcl.capture.states import States
from ppcl.config import DistillConfig, load_config
from ppcl.distill import local as local_module
from ppcl.distill.in_sweep import Ends, Trainees, training_course
from ppcl.distill.trainer import Distiller
from ppcl.errors import ConfigError, UserError
from ppcl.teacher.blocks import ResidentBlocks
from ppcl.teacher.families import adapter_for
from ppcl.teacher.families.masks import valid_tokens
from ppcl.teacher.trace import record_boundaries
from ppcl.training.distributed import SINGLE as ALONE
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


def test_padded_texts_train_what_pieces_do(folder: Path) -> None:
    expected = trained(folder)
    for single in (False, True):
        own = folder / f"together-{single}"
        write_all_states(own, together=True)
        distiller = new_distiller(own, "local", ALONE, clip_norm=1e9, one_at_a_time=single)
        assert distiller.states.pieces(5) == 1
        distiller.run()
        assert_close(weights(distiller), expected)


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch of one shape; one of several pieces is accumulated."""
    write_states(tmp_path / "states", "train", [qwen_call(batch=7, padded=True)])
    seen: dict[Any, list[int]] = {"auto": [], False: []}
    for setting, counts in seen.items():
        distiller = new_distiller(tmp_path, "local", ALONE, release_gradients=setting, local_steps=1)
        blocks = distiller.substitutes.values()
        real = local_module.run_loss

        def count(*args: Any, blocks: Any = blocks, counts: list[int] = counts, real: Any = real) -> Any:
            counts.append(sum(any(p.grad is not None for p in block.parameters()) for block in blocks))
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(local_module, "run_loss", count)
            distiller.run()
        shutil.rmtree(tmp_path / "local" / "checkpoints")
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


@pytest.mark.parametrize("memory", [1e12, 0])
def test_the_ends_of_a_run_are_the_teachers(memory: float, tmp_path: Path) -> None:
    """For batches that the sweep never had, of several text lengths, in both stacks."""
    teacher, calls = tiny_qwen(4), [qwen_call(batch=3, padded=True), qwen_call(batch=2, text=4, seed=4)]
    check_ends(tmp_path / "qwen", teacher, calls, [(DUAL, 0, 1), (DUAL, 1, 3), (DUAL, 2, 2)], memory)
    calls = [flux_call(batch=3), flux_call(batch=2, seed=4)]
    runs = [(DUAL, 0, 1), (DUAL, 2, 2), (SINGLE, 0, 1), (SINGLE, 2, 3)]  # the third enters the second stack
    check_ends(tmp_path / "flux", tiny_flux(), calls, runs, memory)


def check_ends(folder: Path, teacher: Any, calls: list[dict[str, Any]], runs: list[Any], memory: float) -> None:
    """What a run's substitute is trained on, against the teacher run on the same batch."""
    adapter = adapter_for(teacher)
    write_states(folder, "train", calls)
    states = States(folder, "train", "encoder_hidden_states_mask")
    course = training_course(ResidentBlocks(teacher), {"train": states}, 2, folder / "states", "x", memory=memory)
    drawn = states.batch([(1, 1), (0, 2), (0, 0)])
    trained = []

    def train(run: Any, ends: Ends) -> None:
        start, end = ends.calls(drawn)
        expected, _ = record_boundaries(teacher, adapter, drawn.arguments)
        first, last = expected[run[:2]], expected[run[0], run[2]]
        for stream, valid in valid_or_all(first).items():
            assert torch.allclose(start.inputs[stream][valid], first.inputs[stream][valid], atol=1e-5)
            assert torch.allclose(end.outputs[stream][valid], last.outputs[stream][valid], atol=1e-5)
        assert ends.loss(adapter.blocks(teacher, start.stack)[run[1]], drawn).requires_grad is False
        assert torch.is_grad_enabled()
        trained.append(run)

    trainees = Trainees(course, runs, train)
    forward_sweep(course, [trainees], trainees.last)
    assert sorted(trained) == sorted(runs)
    assert not trainees.open
    course.store.close()


def valid_or_all(call: Any) -> dict[str, torch.Tensor]:
    """Which tokens of each stream count."""
    masks = valid_tokens(call.stack, call.arguments)
    return {stream: masks.get(stream, torch.ones(s.shape[:2], dtype=torch.bool)) for stream, s in call.inputs.items()}


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


def eight_bit_loop(folder: Path, optimizer: str = "adamw8bit") -> Running:
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
    return Running({"layer": layer}, backward, settings, folder, "f")


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
    with pytest.raises(UserError, match="needs the package torchao, which is not installed"):
        eight_bit_loop(tmp_path)
