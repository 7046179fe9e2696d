"""Carried recovery: substitutes learn on the student's own states, one block in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed import assert_close
from test_streamed_distill import SETTINGS, flux, qwen, saved, streamed
from tiny_models import DUAL, SINGLE, flux_call, plan_for, qwen_call, tiny_flux, tiny_qwen, write_states

from ppcl.analysis.sweep import forward_sweep
from ppcl.capture.states import States
from ppcl.common.tensor_files import read_tensors
from ppcl.config import DistillConfig, load_config
from ppcl.distill.carried import StudentWalk, kept_behind
from ppcl.distill.in_sweep import Ends, training_course
from ppcl.distill.trainer import Distiller
from ppcl.errors import ConfigError
from ppcl.student.assembly import assemble_student
from ppcl.student.bundle import build_student, load_bundle, members
from ppcl.student.plan import CompressionPlan
from ppcl.student.substitutes import new_substitutes
from ppcl.teacher.blocks import ResidentBlocks, StreamedBlocks
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import adapter_for
from ppcl.teacher.families.masks import valid_tokens
from ppcl.teacher.trace import record_boundaries
from ppcl.teacher.velocity import VelocityErrors

NAME = "substitutes.safetensors"


@pytest.mark.parametrize("new", [qwen, flux])
@pytest.mark.parametrize("memory", [1e12, 0])
def test_a_run_is_entered_by_the_students_states_and_left_by_the_teachers(
    new: Any, memory: float, tmp_path: Path
) -> None:
    """Substitutes stay as they start here, so that the student can be run whole beside them."""
    teacher, plan = new(tmp_path)
    adapter = adapter_for(teacher)
    substitutes = new_substitutes(teacher, adapter, plan, None)
    student = assemble_student(teacher, adapter, plan, substitutes)
    states = States(tmp_path / "states", "train")
    drawn = states.batch([(0, 4), (0, 1)])
    theirs, _ = record_boundaries(teacher, adapter, drawn.arguments)
    own, _ = record_boundaries(student, adapter, drawn.arguments)
    places = {run: (run[0], list(student_blocks(student, run[0])).index(substitutes[run])) for run in substitutes}
    course = training_course(ResidentBlocks(teacher), {"train": states}, 3, tmp_path / "store", "x", memory=memory)
    trained = []

    def train(run: Any, ends: Ends) -> Any:
        start, end = ends.calls(drawn)
        expected = own[places[run]]
        masks = valid_tokens(expected.stack, expected.arguments)
        for stream, state in expected.inputs.items():
            valid = masks.get(stream, torch.ones(state.shape[:2], dtype=torch.bool))
            assert torch.allclose(start.inputs[stream][valid], state[valid], atol=1e-5)
            target = theirs[run[0], run[2]].outputs[stream]
            assert torch.allclose(end.outputs[stream][valid], target[valid], atol=1e-5)
        trained.append(run)
        return substitutes[run]

    walk = StudentWalk(course, [run for run, _ in members(plan)], train)
    forward_sweep(course, [walk], walk.last)
    assert sorted(trained) == sorted(substitutes)
    course.store.close()


def student_blocks(student: Any, stack: str) -> Any:
    return getattr(student, stack)


def resident(folder: Path, teacher: Any, plan: CompressionPlan, name: str, log: Any = None, **changes: Any) -> Path:
    settings = DistillConfig(**{**SETTINGS, **changes})
    common = (teacher, adapter_for(teacher), plan, folder / "states", folder / name, settings, 0, "fp32", log)
    Distiller(*common).run()
    return folder / name / "bundle"


@pytest.mark.parametrize("steps", [{"carried_steps": 2}, {"correct": True}, {"carried_steps": 2, "correct": True}])
@pytest.mark.parametrize("new", [qwen, flux])
def test_streamed_is_resident_to_the_last_bit(new: Any, steps: dict[str, Any], tmp_path: Path) -> None:
    teacher, plan = new(tmp_path)
    steps = {"local_steps": 1, **steps}
    found = read_tensors(streamed(tmp_path, plan, "streamed", **steps) / NAME)[0]
    single = read_tensors(resident(tmp_path, teacher, plan, "single", one_at_a_time=True, **steps) / NAME)[0]
    assert all(torch.equal(found[name], single[name]) for name in single)
    joint = read_tensors(resident(tmp_path, teacher, plan, "joint", **steps) / NAME)[0]
    # least squares over a few states make more of another rounding
    assert_close(joint, single, 1e-4 if "correct" in steps else 1e-5)
    local = read_tensors(streamed(tmp_path, plan, "local", local_steps=1) / NAME)[0]
    changed = [any(not torch.equal(found[n], local[n]) for n in local if n.startswith(run)) for run in runs_of(local)]
    assert all(changed) if "carried_steps" in steps else any(changed)  # no correction where none helps
    assert not list(tmp_path.rglob("states-*"))


def runs_of(tensors: dict[str, torch.Tensor]) -> set[str]:
    return {"/".join(name.split("/")[:2]) for name in tensors}


@pytest.mark.parametrize("correct", [False, True])
def test_a_killed_stage_goes_on_at_its_block(correct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plan = qwen(tmp_path)
    steps = {"local_steps": 0, "carried_steps": 3, "correct": correct}
    whole = (streamed(tmp_path, plan, "whole", **steps) / NAME).read_bytes()
    from ppcl.training.distributed import SINGLE as ALONE

    monkeypatch.setattr("ppcl.distill.run_by_run.training_course.__defaults__", (None, ALONE, "fp32", 0))
    for row, ahead in ((2, 5), (5, 3), (9, 1)):
        rows: list[dict[str, Any]] = []

        def die(entry: dict[str, Any], rows: list[Any] = rows, row: int = row) -> None:
            rows.append(entry)
            if len(rows) == row:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            streamed(tmp_path, plan, f"killed-{row}", die, **steps)
        walked: list[int] = []
        walk = StreamedBlocks.walk

        def counted(self: Any, places: Any, walk: Any = walk, walked: list[int] = walked) -> Any:
            walked.append(len(places))
            return walk(self, places)

        again: list[dict[str, Any]] = []
        with monkeypatch.context() as patch:
            patch.setattr(StreamedBlocks, "walk", counted)
            killed = streamed(tmp_path, plan, f"killed-{row}", again.append, **steps)
        assert max(walked) == ahead
        assert [entry["stage"] for entry in again] == ["distill.carried"] * (9 - row + 1)
        assert (killed / NAME).read_bytes() == whole


def error(teacher: Any, bundle: Path, states: States) -> float:
    student = assemble_student(teacher, adapter_for(teacher), *loaded(teacher, bundle))
    errors = VelocityErrors()
    with torch.no_grad():
        for call in states.answered(8):
            errors.add(call.velocity, velocity(student, call.arguments))
    return errors.relative


def loaded(teacher: Any, bundle: Path) -> tuple[Any, Any]:
    found = load_bundle(bundle, teacher, adapter_for(teacher))
    return found.plan, found.substitutes


def test_the_student_ends_nearer_to_the_teacher_than_by_local_steps_alone(tmp_path: Path) -> None:
    teacher, calls = tiny_qwen(6), [qwen_call(batch=16, seed=seed) for seed in (3, 30, 60)]
    plan = saved(tmp_path, teacher, calls, {(DUAL, 0, 1): "first", (DUAL, 2, 3): "middle", (DUAL, 4, 5): "middle"})
    write_states(tmp_path / "states", "held-out", [qwen_call(batch=16, seed=200)], teacher)  # others than in training
    for path in (tmp_path / "states").glob("held-out-000[12]*"):
        path.unlink()
    held_out = States(tmp_path / "states", "held-out")
    common = {"batch_size": 16, "local_learning_rate": 2e-3, "checkpoint_every": 100, "clip_norm": 1.0}
    local = error(teacher, streamed(tmp_path, plan, "local", local_steps=60, **common), held_out)
    both = error(teacher, streamed(tmp_path, plan, "both", local_steps=30, carried_steps=30, **common), held_out)
    print(f"velocity error: local {local:.4f}, local and carried {both:.4f}")
    assert both < local


def test_settings_that_it_does_not_go_with_are_refused() -> None:
    for other in ("distill.shard_teacher=true", "sparsity.share=0.5"):
        with pytest.raises(ConfigError, match=r"distill\.carried_steps takes one substitute after the other"):
            load_config([], ["distill.carried_steps=3", other])
        with pytest.raises(ConfigError, match=r"distill\.correct takes one substitute after the other"):
            load_config([], ["distill.correct=true", other])
    assert "carried_steps" not in DistillConfig().identity()
    assert DistillConfig(carried_steps=3).identity() != DistillConfig().identity()
    assert "correct" not in DistillConfig().identity()
    assert DistillConfig(correct=True).identity() != DistillConfig().identity()


KEPT: dict[str, Any] = {"carried_kept": True, "train": "lora", "lora_rank": 3, "carried_steps": 3, "local_steps": 1}


def with_kept(folder: Path) -> tuple[Any, CompressionPlan]:
    """Two runs, and kept blocks before, between and after them."""
    teacher, calls = tiny_qwen(8), [qwen_call(batch=7, seed=3, padded=True), qwen_call(batch=2, text=4, seed=5)]
    return teacher, saved(folder, teacher, calls, {(DUAL, 1, 2): "first", (DUAL, 4, 5): "middle"})


def flux_with_kept(folder: Path) -> tuple[Any, CompressionPlan]:
    """A run in each stack; the second one has kept blocks behind it."""
    teacher = tiny_flux()
    return teacher, saved(folder, teacher, [flux_call(batch=7)], {(DUAL, 1, 2): "last", (SINGLE, 0, 1): "middle"})


@pytest.mark.parametrize("new", [with_kept, flux_with_kept])
def test_kept_blocks_learn_through_lora_alike_streamed_and_resident(new: Any, tmp_path: Path) -> None:
    teacher, plan = new(tmp_path)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    rows: list[dict[str, Any]] = []
    found = streamed(tmp_path, plan, "streamed", rows.append, **KEPT)
    single = resident(tmp_path, teacher, plan, "single", one_at_a_time=True, **KEPT)
    for name in (NAME, "lora.safetensors"):
        tensors, others = (read_tensors(folder / name)[0] for folder in (found, single))
        assert tensors.keys() == others.keys()
        assert all(torch.equal(value, others[key]) for key, value in tensors.items())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    adapter = adapter_for(teacher)
    behind = kept_behind(plan, ResidentBlocks(teacher))
    assert {".".join(name.split(".")[:2]) for name in tensors} == set(behind.values())
    carried = [row for row in rows if row["stage"] == "distill.carried"]
    assert len(carried) == 3 * (len(members(plan)) + len(behind))
    bundle = load_bundle(found, teacher, adapter)
    student = build_student(teacher, adapter, bundle)
    bare = build_student(teacher, adapter, replace(bundle, lora={}))
    call = next(States(tmp_path / "states", "held-out").batches(2))
    with torch.no_grad():
        assert not torch.equal(velocity(student, call), velocity(bare, call))


def test_only_blocks_behind_the_first_substitute_are_handed_something_else(tmp_path: Path) -> None:
    teacher, plan = with_kept(tmp_path)
    behind = {(DUAL, 3, 3): f"{DUAL}.2", (DUAL, 6, 6): f"{DUAL}.4", (DUAL, 7, 7): f"{DUAL}.5"}
    assert kept_behind(plan, ResidentBlocks(teacher)) == behind
    assert kept_behind(plan_for(teacher, []), ResidentBlocks(teacher)) == {}


@pytest.mark.parametrize("row", [7, pytest.param(4, marks=pytest.mark.slow), pytest.param(14, marks=pytest.mark.slow)])
def test_a_stage_killed_in_a_kept_block_goes_on_with_the_same_bits(
    row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plan = with_kept(tmp_path)
    whole = streamed(tmp_path, plan, "whole", **KEPT)
    rows: list[str] = []

    def die(entry: dict[str, Any]) -> None:
        rows.append(entry["stage"])
        if rows.count("distill.carried") == row:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streamed(tmp_path, plan, "killed", die, **KEPT)
    again: list[str] = []
    torch.manual_seed(99)
    killed = streamed(tmp_path, plan, "killed", lambda entry: again.append(entry["stage"]), **KEPT)
    assert again == ["distill.carried"] * (15 - row + 1)
    for name in (NAME, "lora.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_the_output_stage_goes_on_from_the_factors(tmp_path: Path) -> None:
    teacher, plan = with_kept(tmp_path)
    first = read_tensors(resident(tmp_path, teacher, plan, "first", **KEPT) / "lora.safetensors")[0]
    settings = {**KEPT, "output_steps": 1, "output_learning_rate": 1e-9}
    second = read_tensors(resident(tmp_path, teacher, plan, "second", **settings) / "lora.safetensors")[0]
    assert first.keys() <= second.keys()
    assert_close({name: second[name] for name in first}, first, 1e-4)


def test_kept_blocks_that_learn_bring_the_student_nearer(tmp_path: Path) -> None:
    teacher, calls = tiny_qwen(6), [qwen_call(batch=16, seed=seed) for seed in (3, 30, 60)]
    plan = saved(tmp_path, teacher, calls, {(DUAL, 0, 1): "first", (DUAL, 3, 4): "middle"})
    write_states(tmp_path / "states", "held-out", [qwen_call(batch=16, seed=200)], teacher)
    for path in (tmp_path / "states").glob("held-out-000[12]*"):
        path.unlink()
    held_out, errors = States(tmp_path / "states", "held-out"), {}
    common = {"batch_size": 16, "local_learning_rate": 2e-3, "checkpoint_every": 100, "clip_norm": 1.0}
    for kept in (False, True):
        steps = {"local_steps": 0, "carried_steps": 30, "carried_kept": kept, "train": "lora", "lora_rank": 8}
        bundle = load_bundle(streamed(tmp_path, plan, f"kept-{kept}", **common, **steps), teacher, adapter_for(teacher))
        student, error = build_student(teacher, adapter_for(teacher), bundle), VelocityErrors()
        with torch.no_grad():
            for call in held_out.answered(8):
                error.add(call.velocity, velocity(student, call.arguments))
        errors[kept] = error.relative
    print(f"velocity error: {errors}")
    assert errors[True] < errors[False]


@pytest.mark.parametrize(
    "others", [(), ("distill.carried_steps=3",), ("distill.train=lora",), ("distill.offload=cpu",)]
)
def test_kept_blocks_need_carried_steps_and_lora(others: tuple[str, ...]) -> None:
    both = ("distill.carried_steps=3", "distill.train=lora") if others == ("distill.offload=cpu",) else ()
    with pytest.raises(
        ConfigError, match=r"distill\.carried_kept .* needs distill\.carried_steps, distill\.train=lora"
    ):
        load_config([], ["distill.carried_kept=true", *others, *both])
    assert "carried_kept" not in DistillConfig(carried_steps=3, train="lora").identity()
    assert DistillConfig(carried_steps=3, train="lora", carried_kept=True).identity()["carried_kept"] is True
