"""Distillation along the chain: hybrids drawn by coins, and the sequential ablation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import DUAL, plan_for, qwen_call, random_substitutes, tiny_qwen, write_states

from ppcl.config import DistillConfig
from ppcl.distill.local import local_backward
from ppcl.distill.sequential import alternating_backward, draw_active, sequential_backward
from ppcl.distill.trainer import Distiller
from ppcl.student.assembly import assemble_student
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import adapter_for
from ppcl.training.losses import velocity_loss

RUNS = [(DUAL, 0, 1), (DUAL, 3, 4)]


def test_sequential_first_loss_is_local_and_later_ones_see_the_student() -> None:
    teacher = tiny_qwen(6)
    adapter = adapter_for(teacher)
    substitutes = random_substitutes(teacher, adapter, RUNS)
    student = assemble_student(teacher, adapter, plan_for(teacher, RUNS), substitutes)
    local = local_backward(teacher, adapter, qwen_call(), substitutes, backward=False)
    sequential = sequential_backward(teacher, adapter, student, qwen_call(), substitutes)
    assert sequential[RUNS[0]] == pytest.approx(local[RUNS[0]], rel=1e-5)
    assert sequential[RUNS[1]] != pytest.approx(local[RUNS[1]], rel=1e-3)
    assert all(any(p.grad is not None for p in block.parameters()) for block in substitutes.values())


@pytest.mark.parametrize("active", [RUNS[:1], RUNS[1:], RUNS])
def test_a_hybrid_trains_the_substitutes_that_are_in_it(active: list[tuple[str, int, int]]) -> None:
    teacher = tiny_qwen(6)
    adapter, plan = adapter_for(teacher), plan_for(teacher, RUNS)
    substitutes = random_substitutes(teacher, adapter, RUNS)
    losses = alternating_backward(teacher, adapter, plan, qwen_call(), substitutes, active)
    for run, block in substitutes.items():
        assert any(p.grad is not None for p in block.parameters()) == (run in active)
    assert all(p.grad is None for p in teacher.parameters())
    with torch.no_grad():
        hybrid = assemble_student(teacher, adapter, plan, substitutes, active)
        expected = velocity_loss(velocity(hybrid, qwen_call()), velocity(teacher, qwen_call())).item()
    assert losses["velocity"] == pytest.approx(expected, rel=1e-4)
    assert losses["loss"] == pytest.approx(losses["velocity"] + losses["states"])


def test_of_one_active_substitute_the_states_loss_is_the_local_one() -> None:
    teacher = tiny_qwen(6)
    adapter, plan = adapter_for(teacher), plan_for(teacher, RUNS)
    substitutes = random_substitutes(teacher, adapter, RUNS)
    local = local_backward(teacher, adapter, qwen_call(), substitutes, backward=False)
    for run in RUNS:
        losses = alternating_backward(teacher, adapter, plan, qwen_call(), substitutes, [run])
        assert losses["states"] == pytest.approx(local[run], rel=1e-4)


def test_coins_are_fair_and_never_leave_the_teacher_alone() -> None:
    drawn = [draw_active(RUNS, torch.Generator().manual_seed(seed)) for seed in range(400)]
    assert all(drawn)
    share = sum(RUNS[0] in chosen for chosen in drawn) / len(drawn)
    assert share == pytest.approx(0.5 + 0.25, abs=0.07)  # a quarter of the draws is empty and becomes all
    assert draw_active(RUNS, torch.Generator().manual_seed(3)) == draw_active(RUNS, torch.Generator().manual_seed(3))


def test_the_output_stage_learns_from_recorded_answers_alone(tmp_path: Path) -> None:
    """The teacher need not run, nor be in memory: capture wrote down what it answered."""
    teacher = tiny_qwen(6)
    write_states(tmp_path / "calibration", "train", [qwen_call(4, seed=s) for s in range(3)], teacher)
    settings = DistillConfig(local_steps=0, output_steps=20, batch_size=4, output_learning_rate=3e-3, warmup_steps=1)
    rows: list[dict[str, Any]] = []
    distiller = Distiller(
        teacher, adapter_for(teacher), plan_for(teacher, RUNS), tmp_path / "calibration", tmp_path, settings, 0,
        log=rows.append,
    )  # fmt: skip

    def refuse(**_: Any) -> None:
        raise AssertionError("the teacher ran")

    teacher.forward = refuse  # type: ignore[method-assign]
    distiller.run()
    losses = [row["loss"] for row in rows]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("rate", [3e-4, 3.0])
def test_training_that_leads_away_from_the_teacher_is_undone(rate: float, tmp_path: Path, caplog: Any) -> None:
    teacher = tiny_qwen(6)
    for split in ("train", "held-out"):
        write_states(tmp_path / "calibration", split, [qwen_call(4, seed=s) for s in range(3)], teacher)
    settings = DistillConfig(
        local_steps=0, output_steps=30, batch_size=4, output_learning_rate=rate, warmup_steps=1, ema_decay=0
    )
    adapter, plan = adapter_for(teacher), plan_for(teacher, RUNS)
    distiller = Distiller(teacher, adapter, plan, tmp_path / "calibration", tmp_path, settings, 0)
    start = {run: {k: v.clone() for k, v in b.state_dict().items()} for run, b in distiller.substitutes.items()}
    bundle = distiller.run()
    kept = all(
        torch.equal(v, start[run][k]) for run, b in bundle.substitutes.items() for k, v in b.state_dict().items()
    )
    assert kept == (rate > 1) == ("the start is kept" in caplog.text)
    assert bool(bundle.tuned) != kept
    assert (tmp_path / "bundle" / "bundle.json").is_file()
