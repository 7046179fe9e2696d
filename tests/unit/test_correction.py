"""The closed-form correction: what a substitute's last linear layers can make up for, they do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_carried import error, resident
from test_streamed_distill import qwen, saved, streamed
from tiny_models import DUAL, SINGLE, flux_call, qwen_call, tiny_flux, tiny_qwen, write_states

from ppcl.analysis.sweep import forward_sweep
from ppcl.capture.states import States
from ppcl.common.tensor_files import read_tensors
from ppcl.distill.carried import StudentWalk
from ppcl.distill.correction import correct
from ppcl.distill.in_sweep import Ends, training_course
from ppcl.errors import ArtifactError
from ppcl.student.bundle import build_student, load_bundle
from ppcl.teacher.blocks import ResidentBlocks
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import adapter_for
from ppcl.training.distributed import SINGLE as ALONE

NAME = "substitutes.safetensors"


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("new", "place", "layers"),
    [
        (tiny_qwen, (DUAL, 2), ("img_mlp.net.2", "txt_mlp.net.2")),
        (tiny_flux, (DUAL, 1), ("ff.net.2", "ff_context.net.2")),
        (tiny_flux, (SINGLE, 2), ("proj_out",)),
    ],
)
def test_spoilt_last_layers_are_found_again(new: Any, place: Any, layers: tuple[str, ...], tmp_path: Path) -> None:
    """A block of the teacher with other numbers in its last layers, and states of equal gates."""
    teacher, call = new(), (qwen_call if new is tiny_qwen else flux_call)(batch=7)
    for name in call.keys() & {"timestep", "pooled_projections"}:
        call[name] = call[name][:1].expand_as(call[name]).clone()
    write_states(tmp_path / "states", "train", [call])
    run, good = (*place, place[1]), getattr(teacher, place[0])[place[1]]
    states = States(tmp_path / "states", "train")
    course = training_course(ResidentBlocks(teacher), {"train": states}, 3, tmp_path / "store", "x")
    block = copy.deepcopy(good).requires_grad_(True)
    with torch.no_grad():
        for name in layers:
            for parameter in block.get_submodule(name).parameters():
                parameter.add_(0.3 * parameter.roll(1, 0) + 0.1)
    spoilt = copy.deepcopy(block.state_dict())
    losses = []

    def train(_: Any, ends: Ends) -> Any:
        def loss() -> float:
            return float(ends.loss(block, states.batch(states.spread()[:7])))

        losses.extend(correct(block, ends, loss, ALONE) or ())
        return block

    walk = StudentWalk(course, [run], train)
    forward_sweep(course, [walk], walk.last)
    course.store.close()
    assert losses[1] < 1e-3 * losses[0]
    changed = {name for name, tensor in block.state_dict().items() if not torch.equal(tensor, spoilt[name])}
    assert changed == {f"{name}.{part}" for name in layers for part in ("weight", "bias")}
    assert all(parameter.requires_grad for parameter in block.parameters())


def test_the_student_comes_nearer_to_the_teacher_without_training(tmp_path: Path) -> None:
    teacher, calls = tiny_qwen(6), [qwen_call(batch=16, seed=seed) for seed in (3, 30, 60)]
    plan = saved(tmp_path, teacher, calls, {(DUAL, 0, 1): "first", (DUAL, 2, 3): "middle", (DUAL, 4, 5): "middle"})
    write_states(tmp_path / "states", "held-out", [qwen_call(batch=16, seed=200)], teacher)
    for path in (tmp_path / "states").glob("held-out-000[12]*"):
        path.unlink()
    held_out = States(tmp_path / "states", "held-out")
    before = error(teacher, streamed(tmp_path, plan, "before", local_steps=0), held_out)
    bundle = streamed(tmp_path, plan, "after", local_steps=0, correct=True)
    after = error(teacher, bundle, held_out)
    print(f"velocity error: {before:.4f}, corrected {after:.4f}")
    assert after < 0.8 * before
    built: Any = build_student(teacher, adapter_for(teacher), load_bundle(bundle, teacher, adapter_for(teacher)))
    built.save_pretrained(tmp_path / "student")
    stock = type(teacher).from_pretrained(tmp_path / "student")
    assert type(stock) is type(teacher)
    with torch.no_grad():
        assert torch.equal(velocity(stock, qwen_call(seed=5)), velocity(built, qwen_call(seed=5)))


def test_a_kill_between_two_corrections_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan = qwen(tmp_path)
    whole = (streamed(tmp_path, plan, "whole", local_steps=1, correct=True) / NAME).read_bytes()
    monkeypatch.setattr("ppcl.distill.run_by_run.training_course.__defaults__", (None, ALONE, "fp32", 0))
    asked = []

    def once(*arguments: Any) -> Any:
        asked.append(arguments)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return correct(*arguments)

    monkeypatch.setattr("ppcl.distill.carried.correct", once)
    with pytest.raises(KeyboardInterrupt):
        streamed(tmp_path, plan, "killed", local_steps=1, correct=True)
    assert (streamed(tmp_path, plan, "killed", local_steps=1, correct=True) / NAME).read_bytes() == whole
    assert len(asked) == 4  # three runs, one of them twice


def test_training_that_leads_away_ends_at_the_correction(tmp_path: Path) -> None:
    teacher, plan = qwen(tmp_path)
    steps = {"local_steps": 0, "correct": True, "keep_start": True}
    corrected = read_tensors(streamed(tmp_path, plan, "corrected", **steps) / NAME)[0]
    far = {"carried_steps": 3, "local_learning_rate": 5.0, **steps}
    for bundle in (streamed(tmp_path, plan, "far", **far), resident(tmp_path, teacher, plan, "resident", **far)):
        kept = read_tensors(bundle / NAME)[0]
        assert all(torch.equal(kept[name], corrected[name]) for name in corrected)


def test_held_out_states_are_asked_for(tmp_path: Path) -> None:
    _, plan = qwen(tmp_path)
    for path in (tmp_path / "states").glob("held-out-*"):
        path.unlink()
    with pytest.raises(ArtifactError, match=r"distill\.correct needs held-out states"):
        streamed(tmp_path, plan, "none", local_steps=0, correct=True)
