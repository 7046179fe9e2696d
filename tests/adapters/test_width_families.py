"""Smaller modules of every supported family: found, cut, counted, stored, loaded; text streams as eq. 8 says."""

import copy
from functools import partial

import diffusers
import pytest
import tiny
import tiny_video
import torch
from test_adapters import model_info
from tiny import TINY
from tiny_base import make

import ppcl.pipelines  # noqa: F401 - makes the compressed classes known
from ppcl.analysis.findings import Findings
from ppcl.analysis.sweep import Batch, Course, forward_sweep
from ppcl.capture.store import StateStore
from ppcl.config import FitConfig
from ppcl.config.extensions import CRITERIA
from ppcl.modules.parts import FAMILIES, cuts_of, join, label
from ppcl.modules.replacements import apply_width
from ppcl.modules.slicing import joined, sliced
from ppcl.modules.text_stream import plain_norm
from ppcl.pipelines.lora_back import scattered
from ppcl.pipelines.lora_cut import cut_lora
from ppcl.pruning.criteria import unit_scores
from ppcl.pruning.fewer_units import KIND, UnitSums
from ppcl.pruning.options import shrunk
from ppcl.pruning.unit_search import find_sites, find_units
from ppcl.student.assembly import fill_width
from ppcl.student.bundle import Bundle, build_student
from ppcl.student.plan import CompressionPlan, Segment
from ppcl.student.prediction import predict
from ppcl.student.record import composed
from ppcl.teacher.blocks import ResidentBlocks
from ppcl.teacher.calls import Call, velocity
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


UNUSUAL = ["flux", "flux2", "prx", "joyimage", "wan", "krea2", "sana"]  # parallel, fused, wide norms, grouped, pixels


def sites_by_place(model, calls, index):
    return [site for site in find_sites(ResidentBlocks(model), calls, GROUPS) if site.place[1] == index]


def every_other(site, first=0):
    return joined([one.units.part(range(first, one.units.count, 2)) for one in site.sites])


@pytest.mark.parametrize("family", UNUSUAL)
def test_a_lora_of_the_whole_module_is_cut_to_what_it_does_there(family):
    model, _, adapter, calls = first_calls(family)
    for site in sites_by_place(model, calls, 0):
        block = adapter.blocks(model, next(s for s in adapter.stacks if s.name == site.place[0]))[0]
        whole, part = block.get_submodule(site.path), every_other(site)
        tuned, cut = copy.deepcopy(whole), sliced(whole, part)
        layers = {name for cut in cuts_of(part) for name in (*cut["rows"], *cut["columns"])}
        for name in sorted(name for name in layers if isinstance(whole.get_submodule(name), torch.nn.Linear)):
            o, i = whole.get_submodule(name).weight.shape
            down, up = torch.randn(2, i), torch.randn(o, 2)
            tuned.get_submodule(name).weight.data += up @ down
            pair = {"lora_A": down, "lora_B": up}
            down, up = (cut_lora(pair[key], f"{name}.{key}.weight", part)[0] for key in pair)
            cut.get_submodule(name).weight.data += up @ down
        expected = sliced(tuned, part).state_dict()
        for name, value in cut.state_dict().items():
            torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("family", UNUSUAL)
def test_a_lora_of_the_cut_module_acts_on_the_same_units_of_the_whole_one(family):
    model, _, adapter, calls = first_calls(family)
    for site in sites_by_place(model, calls, 0):
        block = adapter.blocks(model, next(s for s in adapter.stacks if s.name == site.place[0]))[0]
        whole, part = block.get_submodule(site.path), every_other(site)
        cut = sliced(whole, part)
        layers = {name for one in cuts_of(part) for name in (*one["rows"], *one["columns"])}
        for name in sorted(name for name in layers if isinstance(whole.get_submodule(name), torch.nn.Linear)):
            o, i = cut.get_submodule(name).weight.shape
            down, up = torch.randn(2, i), torch.randn(o, 2)
            wide = dict(zip(("lora_A", "lora_B"), scattered((down, up), name, part), strict=True))
            assert (len(wide["lora_B"]), wide["lora_A"].shape[1]) == tuple(whole.get_submodule(name).weight.shape)
            again = (cut_lora(wide[key], f"{name}.{key}.weight", part)[0] for key in wide)
            assert all(torch.equal(a, b) for a, b in zip(again, (down, up), strict=True))
            assert wide["lora_A"].count_nonzero() + wide["lora_B"].count_nonzero() == down.numel() + up.numel()


FOUR_HEADS = {
    **{key: {"num_attention_heads": 4} for key in ("flux", "flux2", "wan")},
    "prx": {"hidden_size": 32, "num_heads": 4},
    "joyimage": {"hidden_size": 64, "num_attention_heads": 4},
    "krea2": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "sana": {"num_attention_heads": 4, "num_cross_attention_heads": 4, "cross_attention_dim": 32},
}


@pytest.mark.parametrize("family", FOUR_HEADS)
def test_units_of_units_are_those_of_the_whole_module(family, monkeypatch):
    for module in (tiny, tiny_video):
        monkeypatch.setattr(module, "make", lambda name, **config: make(name, **{**config, **FOUR_HEADS[family]}))
    model, _, adapter, calls = first_calls(family)
    for spec in adapter.stacks:
        once = copy.deepcopy(adapter.blocks(model, spec)[0])
        first = {
            site.path: joined([one.units.part(range(one.units.count // 2 or 1)) for one in site.sites])
            for site in sites_by_place(model, calls, 0)
            if site.place[0] == spec.name
        }
        apply_width(once, first)
        again = {
            path: joined([units.part(range(1, units.count, 2)) for units in kinds])
            for path, kinds in find_units(adapter, spec, once, calls[spec.name, 0])
            if path in first
        }
        twice, whole = copy.deepcopy(once), copy.deepcopy(adapter.blocks(model, spec)[0])
        apply_width(twice, again)
        apply_width(whole, composed(first, again))
        assert again and again.keys() == first.keys()
        assert all(cut["of"] > 1 and cut["size"] * 2 == cut["of"] for part in again.values() for cut in cuts_of(part))
        expected = whole.state_dict()
        for name, value in twice.state_dict().items():
            assert torch.equal(value, expected[name])


@pytest.mark.parametrize("family", [*UNUSUAL, "lumina2"])
def test_the_sweep_fits_what_reads_the_units_that_stay(family, tmp_path):
    """The output comes nearer to the teacher's than by the plain cut, on the states that it was fitted on."""
    model, arguments, adapter, calls = first_calls(family)
    source, settings, findings = ResidentBlocks(model), FitConfig(width=["ffn", "attention"]), Findings(tmp_path)
    sites = sites_by_place(model, calls, 0)
    batches = [Batch(0, "train", 0, partial(Call, arguments, torch.zeros(0)), ((0, 0),))]
    course = Course(source, batches, StateStore(tmp_path / "sweep", ""))
    forward_sweep(course, [UnitSums(sites, (), settings, None, findings)])
    for site in sites:
        spec = source.stacks[site.place[0]]
        block, call = adapter.blocks(model, spec)[0], calls[spec.name, 0]
        names = list(findings.shapes(KIND, site.place))
        prefix = f"{spec.name}/0/"
        tensors = dict(zip(names, findings.tensors(KIND, site.place, *names), strict=True))
        tensors = {prefix + name: tensor for name, tensor in tensors.items()}
        parts = findings.numbers(KIND, site.place)[site.path]
        assert len({label(part) for part in parts}) == len(parts) > 0
        readers = [join(site.path, name) for name in site.sites[0].units.columns]
        for part in parts:
            errors = []
            for forms in ({}, tensors):
                smaller = shrunk(block, {site.path: part})
                fill_width(smaller, block, spec, 0, {site.path: part}, forms)
                outputs = [outputs_of(adapter, spec, module, call, readers) for module in (block, smaller)]
                errors.append(sum(float((a - b).norm()) ** 2 for a, b in zip(*outputs, strict=True)))
            assert errors[1] < errors[0]


def outputs_of(adapter, spec, block, call, paths):
    seen = []
    layers = [block.get_submodule(path) for path in paths]
    handles = [layer.register_forward_hook(lambda *given: seen.append(given[-1])) for layer in layers]
    adapter.call(spec, block, call.inputs, call.arguments)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", UNUSUAL)
def test_every_criterion_scores_every_kind_of_unit(family):
    model, arguments, adapter, calls = first_calls(family)
    sites = [one for site in sites_by_place(model, calls, 0) for one in site.sites]
    for name in CRITERIA:
        for site, scores in zip(sites, unit_scores(name, model, adapter, sites, [arguments], 0), strict=True):
            assert scores.shape == (site.units.count,)
            assert (scores >= 0).all()
            assert scores.any()
