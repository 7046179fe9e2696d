"""Smaller modules of every supported family: found, cut, counted, stored, loaded; text streams as eq. 8 says."""

import diffusers
import pytest
import torch
from test_adapters import model_info
from tiny import TINY

import ppcl.pipelines  # noqa: F401 - makes the compressed classes known
from ppcl.modules.parts import FAMILIES, join
from ppcl.modules.replacements import apply_width
from ppcl.modules.slicing import joined
from ppcl.modules.text_stream import plain_norm
from ppcl.pruning.options import shrunk
from ppcl.pruning.unit_search import find_sites
from ppcl.student.bundle import Bundle, build_student
from ppcl.student.plan import CompressionPlan, Segment
from ppcl.student.prediction import predict
from ppcl.teacher.blocks import ResidentBlocks
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import adapter_for
from ppcl.teacher.flops import count_params
from ppcl.teacher.trace import record_boundaries

GROUPS = ("modulation", "ffn", "attention")
DUAL = ["qwen", "flux", "sd3", "sd35_medium", "bria", "longcat", "ovis", "auraflow", "hunyuan_image", "hunyuan_video"]
DUAL += ["hunyuan_video15"]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def first_calls(family):
    model, arguments = TINY[family]()
    model.eval().requires_grad_(False)
    adapter = adapter_for(model)
    calls, _ = record_boundaries(model, adapter, arguments, {(s.name, 0) for s in adapter.stacks})
    return model, arguments, adapter, calls


def families_of(site):
    return {FAMILIES[one.units.kind] for one in site.sites}


def half(model, adapter, sites, groups):
    """Each module of some groups in the second block of each stack, cut to every other unit or to rank 2."""
    parts = {}
    for spec in adapter.stacks:
        layers = spec.of(adapter.blocks(model, spec)[1]).modulation.values() if "modulation" in groups else ()
        parts[spec.name] = {path: {"kind": "low_rank", "size": 2} for path in layers}
    for site in sites:
        if site.place[1] == 1 and families_of(site) & set(groups):
            units = [one.units for one in site.sites]
            parts[site.place[0]][site.path] = joined([u.part(range(0, u.count, 2)) for u in units])
    return parts


def student_of(model, adapter, parts):
    info, stacks, blocks = model_info(model, adapter), {}, {}
    for spec, stack in zip(adapter.stacks, info.stacks, strict=True):
        segments = [Segment(i, i) for i in range(stack.num_blocks)]
        if parts[spec.name]:
            block = adapter.blocks(model, spec)[1]
            smaller = blocks[spec.name, 1, 1] = shrunk(block, parts[spec.name])
            saved = count_params(block) - count_params(smaller)
            segments[1] = Segment(1, 1, width=parts[spec.name], saved_params=saved)
        stacks[spec.name] = tuple(segments)
    plan = CompressionPlan(info, "test", {"keep": 1.0}, stacks, predict(info, stacks))
    return plan, build_student(model, adapter, Bundle(plan, blocks))


@pytest.mark.parametrize("family", TINY)
def test_smaller_modules_of_all_groups_compute_are_counted_and_load_bit_for_bit(family, tmp_path):
    model, arguments, adapter, calls = first_calls(family)
    sites = find_sites(ResidentBlocks(model), calls, GROUPS)
    there = {name for site in sites for name in families_of(site)}
    there |= {"modulation" for spec in adapter.stacks if spec.modulation}
    assert there == set(GROUPS) - adapter.without.keys()
    left_out = {key.partition(".")[2] for key in adapter.without} - {""}
    assert not left_out & {site.path for site in sites}
    assert any(spec.text_parts for spec in adapter.stacks) == (family in DUAL)
    before = velocity(model, arguments)
    for groups in ([group] for group in GROUPS if group in there):
        plan, student = student_of(model, adapter, half(model, adapter, sites, groups))
        assert count_params(student) == plan.predicted.params < count_params(model)
        output = velocity(student, arguments)
        assert output.isfinite().all()
        assert not torch.equal(output, before)
    parts = half(model, adapter, sites, GROUPS)
    plan, student = student_of(model, adapter, parts)
    assert count_params(student) == plan.predicted.params
    student.save_pretrained(tmp_path)
    loaded, report = getattr(diffusers, type(student).__name__).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(velocity(loaded.eval(), arguments), velocity(student, arguments))
    assert loaded.config["pruning"].keys() == {join(stack, "1", path) for stack, here in parts.items() for path in here}


@pytest.mark.parametrize("family", DUAL)
def test_the_stock_forward_computes_two_linear_maps(family):
    """z = Norm(h) A + a at the projections, h + h W + w at the output."""
    model, _, adapter, calls = first_calls(family)
    spec = adapter.stacks[0]
    block, call = adapter.blocks(model, spec)[0], calls[spec.name, 0]
    norm_path, ffn_path = (
        next(path for path, kind in spec.text_parts.items() if kind == wanted)
        for wanted in ("text_input", "text_output")
    )
    norm = plain_norm(block.get_submodule(norm_path))
    before = adapter.call(spec, block, call.inputs, call.arguments)
    apply_width(block, {path: {"kind": kind, "size": 0} for path, kind in spec.text_parts.items()})
    seen = []
    block.get_submodule(spec.text_qkv).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    after = adapter.call(spec, block, call.inputs, call.arguments)
    h = call.inputs["text"]
    torch.testing.assert_close(seen[0], block.get_submodule(norm_path).linear(norm(h)))
    torch.testing.assert_close(after["text"], h + block.get_submodule(ffn_path)(h))
    assert (after["image"] - before["image"]).norm() > 1e-5 * before["image"].norm()  # it reads the new projections
