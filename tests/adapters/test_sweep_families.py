"""The sweeps on every supported class: what they carry is what the whole transformer computes."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from tiny import TINY

from ppcl.analysis.backward import backward_sweep, random_signs
from ppcl.analysis.sweep import Batch, Course, forward_sweep, velocities
from ppcl.capture.store import StateStore
from ppcl.teacher.blocks import ResidentBlocks, StreamedBlocks
from ppcl.teacher.calls import Call, velocity
from ppcl.teacher.families import adapter_for
from ppcl.teacher.trace import run_traced

VECTORS = 2


class Notes:
    """Keeps all that it sees."""

    def __init__(self):
        self.calls, self.gradients = {}, {}

    def begin(self, stack, index, block):
        assert not any(parameter.is_meta for parameter in block.parameters())
        return ()

    def see(self, seen):
        place = (seen.call.stack.name, seen.call.index)
        self.calls[place] = seen.call
        self.gradients[place] = seen.gradients

    def finish(self):
        pass


@pytest.fixture(params=sorted(TINY))
def family(request):
    torch.manual_seed(0)
    model, arguments = TINY[request.param]()
    model.eval().requires_grad_(False)
    with torch.no_grad():
        return model, arguments, velocity(model, arguments)


def course_of(source, arguments, answer, folder):
    batch = Batch(0, "train", 0, lambda: Call(arguments, answer))
    return Course(source, [batch], StateStore(folder, "test"))


def swept(source, arguments, answer, folder):
    course, notes = course_of(source, arguments, answer, folder), Notes()
    forward_sweep(course, [notes])
    ((_, velocity),) = velocities(course)
    return notes.calls, velocity


def stored(model, folder):
    """A pipeline folder with the transformer alone, in several files."""
    model.save_pretrained(folder / "transformer", max_shard_size="40KB")
    entry = ["diffusers", type(model).__name__]
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline", "transformer": entry}))
    return str(folder)


def cast(tree, dtype):
    if isinstance(tree, dict):
        return {key: cast(value, dtype) for key, value in tree.items()}
    if isinstance(tree, list):
        return [cast(value, dtype) for value in tree]
    return tree.to(dtype) if isinstance(tree, torch.Tensor) and tree.is_floating_point() else tree


def same(one, other):
    assert one.keys() == other.keys()
    return all(one[stream] is other[stream] is None or torch.equal(one[stream], other[stream]) for stream in one)


def test_a_forward_sweep_is_the_transformer(family, tmp_path):
    model, arguments, answer = family
    traced = []
    with torch.no_grad():
        run_traced(model, adapter_for(model), arguments, traced.append)
    calls, found = swept(ResidentBlocks(model), arguments, answer, tmp_path / "states")
    assert list(calls) == [(call.stack.name, call.index) for call in traced]
    for call in traced:
        swept_call = calls[call.stack.name, call.index]
        assert same(swept_call.inputs, call.inputs)
        assert same(swept_call.outputs, call.outputs)
        assert swept_call.arguments.keys() == call.arguments.keys()
    assert torch.equal(found, answer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_streamed_blocks_are_those_of_the_loaded_transformer(family, dtype, tmp_path):
    model, arguments, answer = family
    folder = stored(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path / "transformer", dtype=dtype).eval().requires_grad_(False)
    given = cast(arguments, dtype)
    streamed = StreamedBlocks(folder, torch.device("cpu"), dtype)
    resident_calls, resident_answer = swept(ResidentBlocks(loaded), given, answer, tmp_path / "resident")
    calls, found = swept(streamed, given, answer, tmp_path / "streamed")
    assert found.dtype == resident_answer.dtype
    assert torch.equal(found, resident_answer)
    assert all(same(call.outputs, calls[place].outputs) for place, call in resident_calls.items())
    blocks = [
        block for spec in streamed.adapter.stacks for block in streamed.adapter.blocks(streamed.transformer, spec)
    ]
    assert all(parameter.is_meta for block in blocks for parameter in block.parameters())


def test_a_backward_sweep_is_autograd_through_the_whole_transformer(family, tmp_path):
    model, arguments, answer = family
    source = ResidentBlocks(model)
    course, notes = course_of(source, arguments, answer, tmp_path / "states"), Notes()
    for level in range(len(source.order)):
        course.store.hold(level)
    forward_sweep(course, [])
    backward_sweep(course, StateStore(tmp_path / "gradients", "test"), [notes], VECTORS, seed=3)

    outputs = {}

    def hook(block, args, output, place=None):
        states = output if isinstance(output, tuple) else (output,)
        if not outputs:  # from here on everything depends on something that needs gradients
            for state in states:
                state.requires_grad_()
        outputs[place] = states

    for stack, index in source.order:
        getattr(model, stack)[index].register_forward_hook(partial(hook, place=(stack, index)))
    found = velocity(model, arguments)
    signs = random_signs(course.batches[0], found, VECTORS, seed=3).to(found)
    states = [(place, n, state) for place, each in outputs.items() for n, state in enumerate(each)]
    for k in range(VECTORS):
        expected = torch.autograd.grad(
            found, [s for _, _, s in states], signs[k], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for (place, n, _), gradient in zip(states, expected, strict=True):
            spec = source.stacks[place[0]]
            carried = notes.gradients[place][spec.outputs[n]][k]
            torch.testing.assert_close(carried, spec.turn(gradient), rtol=1e-5, atol=1e-5)
    assert notes.gradients.keys() == outputs.keys()
    assert any(gradient.any() for gradient in notes.gradients[source.order[0]].values())
