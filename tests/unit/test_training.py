"""The training loop: resuming bit by bit, and stopping at NaN."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Running
from tiny_models import noise
from torch import nn

import ppcl
from ppcl.common.streams import Stream, step_generator
from ppcl.common.tensor_files import StoredTensors, read_tensors
from ppcl.errors import ArtifactError, TrainingError, UserError
from ppcl.training.distributed import SINGLE, Group
from ppcl.training.loop import schedule_at
from ppcl.training.settings import LoopSettings

SETTINGS = LoopSettings(
    steps=7, learning_rate=0.05, warmup_steps=2, weight_decay=0.1, ema_decay=0.9, checkpoint_every=2, seed=3
)


def new_loop(folder: Path, settings: LoopSettings = SETTINGS, fingerprint: str = "f", **changes: Any) -> Running:
    """A regression on random batches; weights start from a fixed seed, whatever ran before."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=index))

    def backward(step: int) -> dict[str, float]:
        x = torch.randn(16, 4, generator=step_generator(settings.seed, step, Stream.LOCAL_BATCH))
        loss = (model(x) - x[:, :2].sin()).square().mean()
        loss.backward()
        return {"loss": loss.item()}

    chosen = changes.pop("backward", backward)
    return Running({"model": model}, chosen, settings, folder, fingerprint, **changes)


def state_of(loop: Running) -> dict[str, torch.Tensor]:
    state = {f"weight/{k}": p.detach().clone() for k, p in loop.parameters.items()}
    state |= {f"ema/{k}": v.clone() for k, v in loop.ema.items()}
    for key, parameter in loop.parameters.items():
        (slots,) = [o.state[parameter] for o in loop.optimizers if parameter in o.state]
        state |= {f"{slot}/{key}": value.clone() for slot, value in slots.items()}
    return state


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def undisturbed(folder: Path, settings: LoopSettings = SETTINGS) -> dict[str, torch.Tensor]:
    loop = new_loop(folder, settings)
    assert loop.run() == settings.steps
    return state_of(loop)


MUON = replace(SETTINGS, muon_learning_rate=0.1)
needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")


@needs_muon
def test_muon_trains_the_matrices_and_resumes(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path / "a", MUON)
    assert {key for key in expected if key.startswith("momentum_buffer")} == {
        "momentum_buffer/model.0.weight",
        "momentum_buffer/model.2.weight",
    }
    assert new_loop(tmp_path / "b", MUON).run(until=3) == 3
    loop = new_loop(tmp_path / "b", MUON)
    loop.run()
    assert_same(expected, state_of(loop))


@needs_muon
def test_both_optimizers_follow_the_schedule(tmp_path: Path) -> None:
    loop = new_loop(tmp_path, MUON)
    loop.run(until=1)
    first = [group["lr"] for optimizer in loop.optimizers for group in optimizer.param_groups]
    assert first == pytest.approx([0.05, 0.1])


def test_muon_of_an_old_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(TrainingError, match=r"2\.9"):
        new_loop(tmp_path, MUON)


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_resuming_repeats_the_undisturbed_run(tmp_path: Path, stop: int) -> None:
    expected = undisturbed(tmp_path / "a")
    assert new_loop(tmp_path / "b").run(until=stop) == stop
    torch.manual_seed(12345)  # a resumed process has another global state
    steps: list[int] = []
    resumed = new_loop(tmp_path / "b", log=lambda row: steps.append(row["step"]))
    with torch.no_grad():
        for parameter in resumed.parameters.values():
            parameter.fill_(9.0)
    assert resumed.run() == 7
    assert steps == list(range(stop, 7))
    assert_same(state_of(resumed), expected)
    resumed.load_ema()
    assert all(torch.equal(p, expected[f"ema/{k}"]) for k, p in resumed.parameters.items())


CRASH = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_training import new_loop
loop = new_loop(Path(sys.argv[2]), log=lambda row: os._exit(7) if row["step"] == 4 else None)
loop.run()
"""


def test_a_killed_process_is_resumed_bit_by_bit(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path / "a")
    root = str(Path(ppcl.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(Path(__file__).parent), str(tmp_path / "b")],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["step-4"]
    resumed = new_loop(tmp_path / "b")
    assert resumed.run() == 7
    assert_same(state_of(resumed), expected)


def test_a_finished_run_is_loaded_not_repeated(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path)
    again = new_loop(tmp_path, backward=lambda step: pytest.fail(f"step {step} ran again"))
    assert again.run() == 7
    assert_same(state_of(again), expected)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nan_stops_with_the_last_good_state_kept(tmp_path: Path, kind: str) -> None:
    loop = new_loop(tmp_path, label="distill")
    healthy = loop.backward

    def backward(step: int) -> dict[str, float]:
        row = healthy(step)
        if step == 5 and kind == "gradient":
            next(iter(loop.parameters.values())).grad[0, 0] = math.inf
        return {"loss": math.nan} if step == 5 and kind == "loss" else row

    loop.backward = backward
    name = {"loss": "loss", "gradient": "the gradient"}[kind]
    with pytest.raises(TrainingError, match=f"distill: {name} became NaN or infinite at step 5") as caught:
        loop.run()
    kept = tmp_path / "step-5"
    assert str(kept) in str(caught.value)
    assert "lower the learning rate" in str(caught.value)
    tensors, meta = read_tensors(kept / "state.safetensors")
    assert meta["step"] == 5
    assert all(torch.isfinite(t).all() for t in tensors.values())
    reference = new_loop(tmp_path / "reference")
    reference.run(until=5)
    resumed = new_loop(tmp_path)
    assert resumed.resume() == 5
    assert_same(state_of(resumed), state_of(reference))


def test_nan_at_the_first_step(tmp_path: Path) -> None:
    loop = new_loop(tmp_path, backward=lambda _: {"loss": math.nan})
    with pytest.raises(TrainingError, match="at step 0"):
        loop.run()
    assert new_loop(tmp_path).resume() == 0


def test_learning_rate_schedule() -> None:
    settings = LoopSettings(steps=110, learning_rate=2.0, warmup_steps=10, final_fraction=0.1)
    rates = [settings.learning_rate * schedule_at(step, settings) for step in range(120)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert all(a > b for a, b in itertools.pairwise(rates[10:111]))
    assert rates[110:] == pytest.approx([0.2] * 10)
    assert schedule_at(0, LoopSettings(steps=1, learning_rate=1.0)) == 1.0


@pytest.mark.parametrize("steps", [10, 20, 40, 80, 240])
def test_a_short_stage_is_not_all_warm_up(steps: int) -> None:
    settings = LoopSettings(steps=steps, learning_rate=1.0, warmup_steps=20)
    rates = [schedule_at(step, settings) for step in range(steps)]
    assert rates.index(max(rates)) < max(1, steps // 10)
    assert sum(rates) / steps == pytest.approx(0.525, abs=0.12)  # of a whole cosine to 0.05
    first, last = sum(rates[: steps // 2]) / (steps // 2), sum(rates[-(steps // 2) :]) / (steps // 2)
    assert first > 0.75 > 0.35 > last  # all warm-up has the same mean rate, the wrong way round
    assert rates[-1] < 0.25


def test_a_stage_may_have_no_warm_up() -> None:
    assert LoopSettings(steps=100, learning_rate=1.0).warmup == 0


def test_the_schedule_clipping_and_average_are_applied(tmp_path: Path) -> None:
    """One parameter with a constant gradient: every number can be worked out by hand."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    settings = LoopSettings(
        steps=20, learning_rate=0.1, warmup_steps=20, clip_norm=0.5, ema_decay=0.5, checkpoint_every=20
    )

    def backward(_: int) -> dict[str, float]:
        (4 * module.weight).sum().backward()
        return {"loss": float(module.weight)}

    rows: list[dict[str, Any]] = []
    loop = Running({"m": module}, backward, settings, tmp_path, "f", rows.append)
    loop.run(until=3)
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.05, 0.1, 0.1])
    assert [row["gradient_norm"] for row in rows] == pytest.approx([4.0] * 3)
    assert loop.optimizers[0].state[module.weight]["exp_avg"].item() == pytest.approx(0.5 * (1 - 0.9**3), rel=1e-5)
    weights = [1 - 0.05, 1 - 0.15, 1 - 0.25]  # Adam steps by the rate where the gradient is constant
    assert module.weight.item() == pytest.approx(weights[-1], rel=1e-4)
    average = 1.0
    for step, weight in enumerate(weights):
        average += (1 - min(0.5, (1 + step) / (10 + step))) * (weight - average)
    assert loop.ema["m.weight"].item() == pytest.approx(average, rel=1e-4)


def test_gradients_do_not_leak_into_the_next_step(tmp_path: Path) -> None:
    loop = new_loop(tmp_path)
    loop.run(until=1)
    assert all(p.grad is None for p in loop.parameters.values())


def test_only_the_newest_checkpoint_is_kept(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    loop = new_loop(tmp_path, log=lambda _: seen.append(sorted(p.name for p in tmp_path.iterdir())))
    loop.run()
    assert seen == [[], [], ["step-2"], ["step-2"], ["step-4"], ["step-4"], ["step-6"]]
    assert [p.name for p in tmp_path.iterdir()] == ["step-7"]


class Whole:
    """Counts the whole tensors that a function gave and somebody still holds."""

    def __init__(self, give: Callable[..., torch.Tensor]) -> None:
        self.give, self.given = give, list[weakref.ref[torch.Tensor]]()

    def __call__(self, *arguments: Any) -> torch.Tensor:
        tensor = self.give(*arguments).detach().clone()
        self.given.append(weakref.ref(tensor))
        return tensor

    def held(self) -> int:
        return sum(ref() is not None for ref in self.given)


def test_a_whole_checkpoint_is_in_the_memory_of_the_first_process_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, read, held = Whole(lambda tensor: tensor), Whole(StoredTensors.__getitem__), []
    loop = new_loop(tmp_path)
    loop.run(until=2)
    monkeypatch.setattr("ppcl.training.loop.whole", whole)
    monkeypatch.setattr(Group, "on_main", lambda self, work: held.append(whole.held()))
    for rank in (0, 1):
        loop.group = Group(rank, 2)
        loop.save(3)
    assert held == [len(whole.given) // 2, 1]
    monkeypatch.setattr(StoredTensors, "__getitem__", lambda self, name: held.append(read.held()) or read(self, name))
    loop.group = SINGLE
    held.clear()
    assert loop.resume() == 2
    assert held[: len(loop.parameters)] == [0] * len(loop.parameters)


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    settings = LoopSettings(steps=11, learning_rate=0.01, checkpoint_every=20)
    loop = new_loop(tmp_path, settings)
    loop.run(until=9)
    kept = (tmp_path / "step-9" / "state.safetensors").read_bytes()
    loop.run()
    (tmp_path / "step-9").mkdir()
    (tmp_path / "step-9" / "state.safetensors").write_bytes(kept)
    assert new_loop(tmp_path, settings).resume() == 11


def test_a_checkpoint_of_another_run_is_ignored(tmp_path: Path) -> None:
    new_loop(tmp_path, fingerprint="old").run()
    other = new_loop(tmp_path, fingerprint="new")
    before = state_of_weights(other)
    assert other.resume() == 0
    assert_same(state_of_weights(other), before)
    assert other.run(until=2) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["step-2"]


def state_of_weights(loop: Running) -> dict[str, torch.Tensor]:
    return {k: p.detach().clone() for k, p in loop.parameters.items()}


def test_a_checkpoint_of_another_model_or_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    new_loop(tmp_path).run(until=2)
    other = Running({"other": nn.Linear(2, 2)}, lambda _: {}, SETTINGS, tmp_path, "f")
    with pytest.raises(ArtifactError, match="belongs to another model; delete"):
        other.resume()
    path = tmp_path / "step-2" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=re.escape(f"{path} is damaged")):
        new_loop(tmp_path).resume()


def test_frozen_parameters_are_neither_trained_nor_saved(tmp_path: Path) -> None:
    loop = new_loop(tmp_path)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    loop = Running({"m": model}, lambda _: {}, SETTINGS, tmp_path, "f")
    assert list(loop.parameters) == ["m.1.weight", "m.1.bias"]


def test_step_generators_differ_by_each_of_their_numbers() -> None:
    draws = {
        key: torch.rand(2, generator=step_generator(*key)).tolist()[0]
        for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (10**12, 5, 2)]
    }
    assert len(set(draws.values())) == len(draws)
    assert torch.rand(2, generator=step_generator(0, 0, 1)).tolist()[0] == draws[0, 0, 1]


def bad_at(loop: Running, *steps: int, value: float = math.nan) -> None:
    """Let the loss of some steps be something else."""
    healthy = loop.backward
    loop.backward = lambda step: {**healthy(step), **({"loss": value} if step in steps else {})}


def test_bad_steps_are_left_out_and_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    loop = new_loop(tmp_path / "a", replace(SETTINGS, max_bad_steps=2), log=rows.append)
    bad_at(loop, 2, 4)
    assert loop.run() == 7
    assert [row["bad_steps"] for row in rows] == [0, 0, 1, 1, 2, 2, 2]
    assert [row["loss"] is None for row in rows] == [step in (2, 4) for step in range(7)]
    assert int(loop.optimizers[0].state[loop.parameters["model.0.weight"]]["step"]) == 5
    resumed = new_loop(tmp_path / "a", replace(SETTINGS, max_bad_steps=2))
    assert (resumed.resume(), resumed.bad_steps) == (7, 2)


def test_more_bad_steps_than_allowed_stop(tmp_path: Path) -> None:
    loop = new_loop(tmp_path, replace(SETTINGS, max_bad_steps=1))
    bad_at(loop, 2, 4, 5)
    with pytest.raises(TrainingError, match="at step 4"):
        loop.run()
    resumed = new_loop(tmp_path, replace(SETTINGS, max_bad_steps=1))
    assert (resumed.resume(), resumed.bad_steps) == (4, 1)


def test_a_spike_is_left_out_where_asked(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=30, max_bad_steps=1, spike_factor=5.0)
    loop = new_loop(tmp_path, settings)
    bad_at(loop, 3, 25, value=1e6)  # the first one comes before there is an average
    loop._usual = 0.0
    loop.run(until=25)
    assert loop.bad_steps == 0
    loop._usual = 1.0
    loop.run(until=26)
    assert loop.bad_steps == 1


def test_so_many_checkpoints_stay(tmp_path: Path) -> None:
    new_loop(tmp_path, replace(SETTINGS, keep_checkpoints=2)).run()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-6", "step-7"]


def test_a_log_that_cannot_be_written_loses_nothing(tmp_path: Path) -> None:
    def full(row: dict[str, Any]) -> None:
        if row["step"] == 2:
            raise UserError("cannot write log.jsonl: No space left on device; free some space and run again")

    with pytest.raises(UserError, match="No space left"):
        new_loop(tmp_path, replace(SETTINGS, checkpoint_every=100), log=full).run()
    assert new_loop(tmp_path).resume() == 3


def test_a_body_that_takes_no_step_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="calls step"):
        for step in (loop := new_loop(tmp_path)):
            loop.backward(step)


def test_rows_have_throughput_and_time_left(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    new_loop(tmp_path, replace(SETTINGS, batch_size=16), log=rows.append).run()
    assert all(row["samples_per_second"] == pytest.approx(16 / row["seconds"], rel=1e-2) for row in rows)
    assert rows[-1]["seconds_left"] == 0


@pytest.mark.parametrize("released", [True, False])
def test_of_independent_modules_the_healthy_ones_take_a_bad_step(tmp_path: Path, released: bool) -> None:
    modules = {name: nn.Linear(2, 1) for name in ("ill", "well")}

    def backward(step: int) -> dict[str, float]:
        losses = {name: module(torch.ones(1, 2)).square().sum() for name, module in modules.items()}
        for name, loss in losses.items():
            (loss * (math.nan if name == "ill" and step == 2 else 1.0)).backward()
            if released:
                loop.release(name)
        return {"loss": math.nan if step == 2 else float(sum(losses.values()))}

    settings = LoopSettings(steps=4, learning_rate=0.1, clip_each=True, max_bad_steps=1, ema_decay=0.5)
    with torch.no_grad():
        for module in modules.values():
            module.weight.fill_(1.0)
    rows: list[dict[str, Any]] = []
    loop = Running(modules, backward, settings, tmp_path, "f", rows.append)
    seen: list[dict[str, float]] = []
    for step in loop:
        loop.add(backward(step))
        loop.step()
        seen.append({name: float(module.weight[0, 0]) for name, module in modules.items()})
    assert [row["bad_steps"] for row in rows] == [0, 0, 1, 1]
    assert seen[2]["ill"] == seen[1]["ill"] != seen[0]["ill"]
    assert len({step["well"] for step in seen}) == 4
    assert all(torch.isfinite(value).all() for value in loop.ema.values())
