"""Students, hybrids and patched teachers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import (
    DUAL,
    SINGLE,
    flux_call,
    noise,
    plan_for,
    qwen_call,
    random_substitutes,
    tiny_flux,
    tiny_qwen,
)
from torch import nn

from ppcl.analysis.probes import chained_probe
from ppcl.student.assembly import (
    FixedStates,
    LinearRun,
    assemble_student,
    patched,
    start_block,
    with_blocks,
)
from ppcl.student.record import register_plan
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import adapter_for
from ppcl.teacher.trace import record_boundaries

Build = Callable[[], tuple[Any, dict[str, Any], list[tuple[str, int, int]]]]


def qwen() -> tuple[Any, dict[str, Any], list[tuple[str, int, int]]]:
    return tiny_qwen(6), qwen_call(padded=True), [(DUAL, 1, 2), (DUAL, 3, 5)]


def flux() -> tuple[Any, dict[str, Any], list[tuple[str, int, int]]]:
    return tiny_flux(), flux_call(), [(DUAL, 0, 1), (SINGLE, 1, 3)]


both = pytest.mark.parametrize("build", [qwen, flux])


@both
@torch.no_grad()
def test_identity_plan_is_the_teacher(build: Build) -> None:
    teacher, call, _ = build()
    student = assemble_student(teacher, adapter_for(teacher), plan_for(teacher, []), {})
    assert type(student) is type(teacher)
    assert torch.equal(velocity(student, call), velocity(teacher, call))


@both
@torch.no_grad()
def test_hybrids_replace_exactly_the_active_runs(build: Build) -> None:
    teacher, call, runs = build()
    adapter = adapter_for(teacher)
    plan, substitutes = plan_for(teacher, runs), random_substitutes(teacher, adapter, runs)
    original = velocity(teacher, call)
    for active in ([], runs[:1], runs[1:], runs, None):
        hybrid = assemble_student(teacher, adapter, plan, substitutes, active)
        expected = {name: list(getattr(teacher, name)) for name in plan.stacks}
        for stack, first, last in sorted(runs if active is None else active, reverse=True):
            expected[stack][first : last + 1] = [substitutes[stack, first, last]]
        for name, blocks in expected.items():
            assert [id(b) for b in getattr(hybrid, name)] == [id(b) for b in blocks]
        assert torch.equal(velocity(hybrid, call), original) == (active == [])
    assert torch.equal(velocity(teacher, call), original)


@both
@torch.no_grad()
def test_patched_equals_a_hybrid_of_one_run(build: Build) -> None:
    """Replacing a run from recorded states gives what the whole forward pass gives."""
    teacher, call, runs = build()
    adapter = adapter_for(teacher)
    substitutes = random_substitutes(teacher, adapter, runs)
    calls, _ = record_boundaries(teacher, adapter, call, {run[:2] for run in runs})
    for run in runs:
        expected = velocity(assemble_student(teacher, adapter, plan_for(teacher, runs), substitutes, [run]), call)
        executed: list[int] = []
        before = list(getattr(teacher, run[0]))[: run[1]]
        handles = [block.register_forward_hook(lambda *_, log=executed: log.append(1)) for block in before]
        fast = velocity(patched(teacher, adapter, run, substitutes[run], calls[run[:2]].inputs), call)
        assert executed == []
        slow = velocity(patched(teacher, adapter, run, substitutes[run]), call)
        assert len(executed) == len(before)
        for handle in handles:
            handle.remove()
        assert torch.allclose(fast, expected, atol=1e-6)
        assert torch.allclose(slow, expected, atol=1e-6)
        assert not torch.allclose(expected, velocity(teacher, call), atol=1e-3)


def test_fixed_states_return_the_streams_in_the_blocks_order() -> None:
    teacher = tiny_qwen(1)
    adapter = adapter_for(teacher)
    states = {"image": noise(1, 2, 3), "text": noise(1, 4, 3, seed=1)}
    text, image = FixedStates(adapter, adapter.stacks[0], states, teacher.transformer_blocks[0])(1, other=2)
    assert text is states["text"]
    assert image is states["image"]


@pytest.mark.parametrize(("start", "index"), [("first", 1), ("middle", 2), ("last", 4)])
def test_start_is_a_copy_of_one_block(start: str, index: int) -> None:
    blocks = tiny_qwen(6).transformer_blocks
    block = start_block(blocks, 1, 4, start)
    for mine, theirs in zip(block.parameters(), blocks[index].parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
        assert mine.requires_grad
        assert not theirs.requires_grad


def test_mean_start_averages_the_weights() -> None:
    blocks = tiny_qwen(6).transformer_blocks
    mean = dict(start_block(blocks, 1, 3, "mean").named_parameters())
    for name in mean:
        members = [dict(blocks[i].named_parameters())[name] for i in (1, 2, 3)]
        assert torch.allclose(mean[name], (members[0] + members[1] + members[2]) / 3, atol=1e-6)


def test_unknown_start_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown start 'midle'; expected one of first, middle, last, mean"):
        start_block(tiny_qwen(2).transformer_blocks, 0, 1, "midle")


@both
def test_training_substitutes_leaves_the_teacher_alone(build: Build) -> None:
    teacher, call, runs = build()
    adapter = adapter_for(teacher)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    substitutes = random_substitutes(teacher, adapter, runs)
    student = assemble_student(teacher, adapter, plan_for(teacher, runs), substitutes)
    optimizer = torch.optim.SGD([p for block in substitutes.values() for p in block.parameters()], lr=0.1)
    velocity(student, call).square().mean().backward()
    optimizer.step()
    fresh = random_substitutes(teacher, adapter, runs)
    for run, block in substitutes.items():
        assert not torch.equal(
            nn.utils.parameters_to_vector(block.parameters()), nn.utils.parameters_to_vector(fresh[run].parameters())
        )
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert teacher.state_dict().keys() == before.keys()


@both
def test_config_tells_counts_and_kept_blocks(build: Build) -> None:
    teacher, _, runs = build()
    adapter = adapter_for(teacher)
    plan = plan_for(teacher, runs)
    old = dict(teacher.config)
    student = assemble_student(teacher, adapter, plan, random_substitutes(teacher, adapter, runs))
    register_plan(student, adapter, plan)
    assert dict(teacher.config) == old
    kept = student.config["_ppcl"]["kept_blocks"]
    for spec in adapter.stacks:
        blocks = adapter.blocks(student, spec)
        assert student.config[spec.count_field] == len(blocks) == len(kept[spec.name])
        merged = [entry for entry in kept[spec.name] if isinstance(entry, list)]
        assert merged == [list(run[1:]) for run in runs if run[0] == spec.name]
    empty = type(teacher).from_config({k: v for k, v in student.config.items() if not k.startswith("_")})
    assert empty.state_dict().keys() == student.state_dict().keys()


def test_linear_run_equals_probes_chained_by_hand() -> None:
    teacher, call = tiny_qwen(4), qwen_call()
    adapter = adapter_for(teacher)
    spec = adapter.stacks[0]
    probes = {}
    for index in range(4):
        for number, stream in enumerate(("image", "text")):
            probes[f"{DUAL}/{index}/{stream}/weight"] = 0.1 * noise(32, 32, seed=10 * index + number)
            probes[f"{DUAL}/{index}/{stream}/bias"] = noise(32, seed=100 + 10 * index + number)
    calls, _ = record_boundaries(teacher, adapter, call, {(DUAL, 1)})
    maps = chained_probe(probes, (DUAL, 1, 3), ["image", "text"], torch.device("cpu"))
    linear = LinearRun(adapter, spec, teacher.transformer_blocks[1], maps)
    assert list(linear.parameters()) == []
    output = adapter.call(spec, linear, calls[DUAL, 1].inputs, calls[DUAL, 1].arguments)
    for stream, h in calls[DUAL, 1].inputs.items():
        for index in (1, 2, 3):
            h = h + h @ probes[f"{DUAL}/{index}/{stream}/weight"] + probes[f"{DUAL}/{index}/{stream}/bias"]
        assert torch.allclose(output[stream], h, atol=1e-4, rtol=1e-4)


def test_a_hook_on_a_student_is_not_on_its_teacher() -> None:
    """A shallow copy has its modules' tables in common, hooks among them, unless it is given its own."""
    teacher = tiny_qwen()
    for own in (False, True):
        called: list[int] = []
        student = with_blocks(teacher, {DUAL: list(teacher.transformer_blocks)[:2]}, own)
        handles = [
            student.register_forward_hook(lambda *_, called=called, **__: called.append(1), with_kwargs=True),
            student.register_forward_pre_hook(lambda *_, called=called: called.append(2)),
        ]
        velocity(teacher, qwen_call())
        assert not called
        velocity(student, qwen_call())
        assert called == [2, 1]
        for handle in handles:
            handle.remove()
        velocity(student, qwen_call())
        assert called == [2, 1]
