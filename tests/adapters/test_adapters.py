"""The suite that every adapter passes on a tiny random model of diffusers' own class."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tiny import TINY

from ppcl.errors import ModelError
from ppcl.student.assembly import assemble_student, patched, start_block
from ppcl.student.bundle import Bundle, build_student
from ppcl.student.plan import CompressionPlan, Segment, identity_segments
from ppcl.student.prediction import predict
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import ADAPTERS, adapter_for
from ppcl.teacher.flops import count_params
from ppcl.teacher.model_info import ModelInfo, Stack
from ppcl.teacher.trace import record_boundaries, run_traced


@pytest.fixture(params=sorted(TINY))
def family(request):
    torch.manual_seed(0)
    model, arguments = TINY[request.param]()
    model.eval().requires_grad_(False)
    return model, arguments, adapter_for(model)


def model_info(model, adapter) -> ModelInfo:
    stacks = tuple(
        Stack(s.name, s.count_field, len(adapter.blocks(model, s)), tuple(map(count_params, adapter.blocks(model, s))))
        for s in adapter.stacks
    )
    return ModelInfo(type(model).__name__, "x", count_params(model), 0, 4, 0, stacks)


def make_plan(model, adapter, runs: dict[str, list[tuple[int, int]]]) -> CompressionPlan:
    info = model_info(model, adapter)
    stacks = {}
    for stack in info.stacks:
        merged = {i for first, last in runs.get(stack.name, []) for i in range(first, last + 1)}
        pieces = [Segment(a, b, "middle") for a, b in runs.get(stack.name, [])]
        pieces += [s for s in identity_segments(stack.num_blocks) if s.first not in merged]
        stacks[stack.name] = tuple(sorted(pieces, key=lambda s: s.first))
    return CompressionPlan(info, "test", {"keep": 1.0}, stacks, predict(info, stacks))


def substitutes_for(model, adapter, plan):
    specs = {s.name: s for s in adapter.stacks}
    return {
        (name, s.first, s.last): start_block(adapter.blocks(model, specs[name]), s.first, s.last, "middle")
        for name, s in plan.runs
    }


def test_every_supported_class_is_in_the_suite():
    covered = {type(make()[0]).__name__ for make in TINY.values()}
    assert covered == set(ADAPTERS)


def test_identity_plan_is_the_teacher_exactly(family):
    model, arguments, adapter = family
    student = assemble_student(model, adapter, make_plan(model, adapter, {}), {})
    assert torch.equal(velocity(student, arguments), velocity(model, arguments))


def test_capture_sees_every_block_and_chains(family):
    model, arguments, adapter = family
    calls = []
    output = run_traced(model, adapter, arguments, calls.append)
    assert [(c.stack.name, c.index) for c in calls] == [
        (s.name, i) for s in adapter.stacks for i in range(len(adapter.blocks(model, s)))
    ]
    assert torch.equal(output, velocity(model, arguments))
    for before, after in pairwise(calls):
        if before.stack is after.stack:
            assert all(torch.equal(before.outputs[s], after.inputs[s]) for s in after.inputs)


def test_blocks_replayed_from_captured_inputs_give_the_captured_outputs(family):
    model, arguments, adapter = family
    calls, _ = record_boundaries(model, adapter, arguments)
    for call in calls.values():
        again = adapter.call(call.stack, adapter.blocks(model, call.stack)[call.index], call.inputs, call.arguments)
        assert all(torch.equal(again[s], call.outputs[s]) for s in again)


def test_a_run_patched_from_recorded_states_equals_the_full_hybrid(family):
    model, arguments, adapter = family
    calls, _ = record_boundaries(model, adapter, arguments)
    for spec in adapter.stacks:
        block = start_block(adapter.blocks(model, spec), 1, 2, "middle")
        run = (spec.name, 1, 2)
        full = velocity(patched(model, adapter, run, block), arguments)
        short = velocity(patched(model, adapter, run, block, calls[spec.name, 1].inputs), arguments)
        torch.testing.assert_close(short, full, rtol=1e-5, atol=1e-6)
        assert not torch.equal(full, velocity(model, arguments))


@pytest.mark.parametrize("where", ["front", "middle", "end"])
def test_removed_blocks_survive_save_and_stock_load(family, where, tmp_path):
    model, arguments, adapter = family
    runs = {}
    for spec in adapter.stacks:
        count = len(adapter.blocks(model, spec))
        runs[spec.name] = {"front": [(0, 1)], "middle": [(1, 2)], "end": [(count - 2, count - 1)]}[where]
    plan = make_plan(model, adapter, runs)
    student = build_student(model, adapter, Bundle(plan, substitutes_for(model, adapter, plan)))
    assert count_params(student) == plan.predicted.params < count_params(model)
    student.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(loaded) is type(model)
    torch.testing.assert_close(velocity(loaded, arguments), velocity(student, arguments), rtol=1e-5, atol=1e-6)
    assert loaded.config["_ppcl"]["kept_blocks"]


def test_building_a_student_leaves_the_teacher_alone(family):
    model, arguments, adapter = family
    before = velocity(model, arguments)
    config = dict(model.config)
    spec = adapter.stacks[0]
    plan = make_plan(model, adapter, {spec.name: [(1, 2)]})
    student = build_student(model, adapter, Bundle(plan, substitutes_for(model, adapter, plan)))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert torch.equal(velocity(model, arguments), before)
    assert dict(model.config) == config


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_the_student_has_the_teachers_dtypes(name):
    """Wan keeps some weights in float32, its first parameter among them, whatever the rest is loaded in."""
    model = TINY[name]()[0].to(torch.bfloat16)
    if name == "wan":
        model.scale_shift_table.data = model.scale_shift_table.data.float()
        for block in model.blocks:
            block.norm2.float()
    adapter = adapter_for(model)
    spec = adapter.stacks[0]
    plan = make_plan(model, adapter, {spec.name: [(1, 2)]})
    trained = {run: block.float() for run, block in substitutes_for(model, adapter, plan).items()}
    student = build_student(model, adapter, Bundle(plan, trained))
    assert {n: p.dtype for n, p in student.named_parameters()}.items() <= {
        n: p.dtype for n, p in model.named_parameters()
    }.items()


def test_unsupported_class_is_named():
    with pytest.raises(ModelError, match="Linear is not supported"):
        adapter_for(torch.nn.Linear(1, 1))


def test_missing_block_list_is_named(family):
    model, _, adapter = family
    wrong = replace(adapter.stacks[0], name="nonsense")
    with pytest.raises(ModelError, match="nonsense"):
        adapter.blocks(model, wrong)
