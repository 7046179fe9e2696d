"""A compressed model as the teacher of another round: what its config says, what becomes of smaller modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ordinary_heads import heads_of
from test_lora_bridge import add_by_hand, lora_for, named
from tiny_compressed import CALLS, LINEAR, bundle_for, compressed, plan_with
from tiny_models import DUAL, SINGLE, describe_alone, flux_call, qwen_call, tiny_flux, tiny_qwen
from torch import nn

from ppcl.config import FitConfig, PlanConfig, RunConfig
from ppcl.errors import ModelError
from ppcl.export.card import draw_plan
from ppcl.inspection.limits import limits_of
from ppcl.modules.compressed import compress_class
from ppcl.modules.replacements import LowRankLinear, affine_of, apply_width
from ppcl.modules.slicing import kept_units, neurons_of
from ppcl.pipelines import load_lora
from ppcl.pipelines.bundle import Plugboard
from ppcl.pruning.unit_search import find_sites
from ppcl.student.assembly import RunKey
from ppcl.student.bundle import build_student
from ppcl.student.record import composed
from ppcl.teacher.blocks import ResidentBlocks
from ppcl.teacher.description import describe
from ppcl.teacher.families import adapter_for
from ppcl.teacher.trace import record_boundaries

Chosen = Mapping[RunKey, Mapping[str, Any]]
# of the students of tiny_compressed: Qwen-Image 0, [1, 2], 3, 4, 5; FLUX 0, 1, 2 and 0, [1, 2], 3
QWEN_AGAIN: Chosen = {(DUAL, 0, 1): {"img_mod.1": {"kind": "low_rank", "size": 2}}, (DUAL, 4, 4): {"img_mlp": LINEAR}}
FLUX_AGAIN: Chosen = {(DUAL, 1, 2): {}, (SINGLE, 0, 1): {"norm.linear": {"kind": "low_rank", "size": 1}}}


def next_round(teacher: Any, chosen: Chosen, seed: int = 5) -> Any:
    """A student of a model that may be compressed itself."""
    return build_student(teacher, adapter_for(teacher), bundle_for(teacher, chosen, seed))


@torch.no_grad()
def answer(transformer: Any, family: str) -> torch.Tensor:
    found: torch.Tensor = transformer(**CALLS[family](), return_dict=False)[0]
    return found


@pytest.mark.parametrize(("family", "chosen"), [("qwen", QWEN_AGAIN), ("flux", FLUX_AGAIN)])
def test_the_second_student_names_the_first_teachers_blocks_and_loads(
    family: str, chosen: Chosen, tmp_path: Path
) -> None:
    first = compressed(family)
    student = next_round(first, chosen)
    record = student.config["_ppcl"]
    if family == "qwen":
        assert record["kept_blocks"] == {DUAL: [[0, 2], 3, 4, 5]}
        assert set(student.config["pruning"]) == {
            # the substitute has the modules of block 0, from which it started; block 4 moved to place 2
            f"{DUAL}.0.img_mlp", f"{DUAL}.0.img_mod.1", f"{DUAL}.2.txt_mlp", f"{DUAL}.2.txt_mod.1", f"{DUAL}.3.img_mlp",
        }  # fmt: skip
        assert student.config["pruning"][f"{DUAL}.0.img_mod.1"] == {"kind": "low_rank", "size": 2}
    else:
        assert record["kept_blocks"] == {DUAL: [0, [1, 2]], SINGLE: [[0, 2], 3]}
        assert student.config["pruning"][f"{SINGLE}.0.norm.linear"]["size"] == 1
    assert len(record["rounds"]) == 1
    student.save_pretrained(tmp_path)
    loaded, info = type(student).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    torch.testing.assert_close(answer(loaded, family), answer(student, family), atol=1e-6, rtol=1e-5)
    third = next_round(loaded, {(DUAL, 0, 1): {}})
    assert third.config["_ppcl"]["kept_blocks"][DUAL] == ([[0, 3], 4, 5] if family == "qwen" else [[0, 2]])
    assert len(third.config["_ppcl"]["rounds"]) == 2


def test_a_plan_of_depth_alone_keeps_what_was_made_smaller_before(tmp_path: Path) -> None:
    student = next_round(compressed("qwen"), {(DUAL, 2, 3): {}})
    assert type(student).__name__ == "PPCLQwenImageTransformer2DModel"
    # block 0 stays, the old substitute too, and the new one starts at its middle, the plain block 3
    assert {path.split(".")[1] for path in student.config["pruning"]} == {"0", "1"}
    student.save_pretrained(tmp_path)
    torch.testing.assert_close(
        answer(type(student).from_pretrained(tmp_path), "qwen"), answer(student, "qwen"), atol=1e-6, rtol=1e-5
    )


def test_starts_are_followed_back_to_the_first_teacher() -> None:
    first = next_round(tiny_qwen(8), {(DUAL, 1, 3): {}})  # 0, [1, 3], 4, 5, 6, 7
    assert first.config["_ppcl"]["starts"] == {DUAL: [None, "middle", None, None, None, None]}
    second = next_round(first, {(DUAL, 1, 2): {}, (DUAL, 3, 4): {}})  # 0, [1, 4], [5, 6], 7
    assert second.config["_ppcl"]["kept_blocks"] == {DUAL: [0, [1, 4], [5, 6], 7]}
    assert second.config["_ppcl"]["starts"] == {DUAL: [None, 2, "middle", None]}


def test_a_lora_of_the_first_teacher_lands_on_the_second_student() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    teacher = tiny_qwen(8)
    student = next_round(next_round(teacher, {(DUAL, 1, 3): {}}), {(DUAL, 2, 3): {}})  # 0, [1, 3], [4, 5], 6, 7
    lora = lora_for(teacher, ("attn.to_q", "img_mlp.net.2"))
    expected = next_round(next_round(teacher, {(DUAL, 1, 3): {}}), {(DUAL, 2, 3): {}})
    add_by_hand(expected, lora, named({0: 0, 6: 3, 7: 4}))
    load_lora(QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, student), dict(lora))
    torch.testing.assert_close(answer(student, "qwen"), answer(expected, "qwen"), atol=1e-5, rtol=1e-4)


def test_units_of_units_are_units_of_the_whole_module() -> None:
    transformer = tiny_qwen(1)
    whole = neurons_of(transformer.transformer_blocks[0].img_mlp)
    assert whole is not None
    first = whole.part(range(0, whole.count, 2))
    thin = tiny_qwen(1)
    apply_width(thin, {f"{DUAL}.0.img_mlp": first})
    fewer = neurons_of(thin.transformer_blocks[0].img_mlp)
    assert fewer is not None and fewer.count == whole.count // 2
    second = fewer.part(range(1, fewer.count, 3))
    both = composed({"img_mlp": first}, {"img_mlp": second})["img_mlp"]
    assert kept_units(both) == list(range(2, whole.count, 6)) and both["of"] == whole.count
    apply_width(thin, {f"{DUAL}.0.img_mlp": second})
    apply_width(transformer, {f"{DUAL}.0.img_mlp": both})
    assert torch.equal(answer(thin, "qwen"), answer(transformer, "qwen"))


def test_what_replaces_a_module_replaces_all_that_was_smaller_in_it() -> None:
    low, gone = {"kind": "low_rank", "size": 2}, {"kind": "unit_gate", "size": 0}
    assert composed({"txt_mod.1": low}, {"txt_mod": gone}) == {"txt_mod": gone}
    none = {"kind": "no_output", "size": 0}
    heads = {"kind": "heads", "size": 1, "of": 2, "kept": "1", "rows": ["to_q"], "columns": ["to_out.0"]}
    for one, other in (({"attn": heads}, {"attn.to_add_out": none}), ({"attn.to_add_out": none}, {"attn": heads})):
        assert list(composed(one, other)) == ["attn", "attn.to_add_out"]  # built in this order


@pytest.mark.parametrize("make", [tiny_qwen, tiny_flux])
def test_a_text_stream_of_two_linear_maps_has_no_modulation_and_no_network_left(make: Any) -> None:
    transformer = make()
    spec = adapter_for(transformer).stacks[0]
    block = getattr(transformer, spec.name)[0]
    assert spec.of(block) == spec
    apply_width(block, {path: {"kind": kind, "size": 0} for path, kind in spec.text_parts.items()})
    left = spec.of(block)
    assert set(left.modulation) == set(left.ffn) == {"image"} and not left.text_parts
    adapter, call = adapter_for(transformer), qwen_call() if make is tiny_qwen else flux_call()
    calls, _ = record_boundaries(transformer, adapter, call, {(stack.name, 0) for stack in adapter.stacks})
    sites = find_sites(ResidentBlocks(transformer), calls, ["ffn", "attention"])
    assert {site.group for site in sites if site.place == (spec.name, 0)} == {"ffn.image", "attention"}


def test_heads_and_a_linear_text_stream_in_either_order() -> None:
    spec = adapter_for(tiny_qwen(1)).stacks[0]
    text: dict[str, Any] = {path: {"kind": kind, "size": 0} for path, kind in spec.text_parts.items()}
    made = []
    for order in ("heads first", "text first"):
        teacher = tiny_qwen(2)
        for step in ("heads", "text") if order == "heads first" else ("text", "heads"):
            parts = text
            if step == "heads":
                units = heads_of(teacher.transformer_blocks[0].attn)
                assert units is not None
                parts = {"attn": units.part([1])}
            teacher = next_round(teacher, {(DUAL, 0, 0): parts})
        again = type(teacher).from_config(dict(sorted(teacher.config.items())))
        again.load_state_dict(teacher.state_dict())
        torch.testing.assert_close(answer(again.eval(), "qwen"), answer(teacher, "qwen"), atol=1e-6, rtol=1e-5)
        made.append({name: p.shape for name, p in teacher.named_parameters()})
    assert made[0] == made[1]


def test_a_low_rank_layer_is_one_linear_layer_that_may_get_a_lower_rank() -> None:
    torch.manual_seed(0)
    layer, x = LowRankLinear(8, 12, 3), torch.randn(4, 8)
    weight, bias = affine_of(layer)
    torch.testing.assert_close(nn.functional.linear(x, weight, bias), layer(x))
    holder = nn.ModuleDict({"modulation": layer})
    apply_width(holder, {"modulation": {"kind": "low_rank", "size": 1}})
    assert {n: tuple(p.shape) for n, p in holder.named_parameters()} == {
        "modulation.down.weight": (1, 8), "modulation.up.weight": (12, 1), "modulation.up.bias": (12,),
    }  # fmt: skip


def test_the_plan_of_a_second_round_is_drawn_in_the_first_teachers_numbers() -> None:
    first = next_round(tiny_qwen(6), {(DUAL, 1, 3): {}})
    assert describe_alone(first).stacks[0].spans == ((0, 0), (1, 3), (4, 4), (5, 5))
    drawn = draw_plan(plan_with(first, {(DUAL, 1, 2): {}}))
    assert drawn.splitlines() == [f"{DUAL}: 6 -> 4 -> 3 blocks; became one block each: 1-4", "  0 [1 2 3 4] 5"]


def test_a_record_of_other_blocks_is_refused() -> None:
    student = next_round(tiny_qwen(6), {(DUAL, 1, 3): {}})
    student.register_to_config(_ppcl={"kept_blocks": {DUAL: [0, 1, 2]}})
    with pytest.raises(ModelError, match=r"lists 3 blocks of 'transformer_blocks', but there are 4; export"):
        describe(SimpleNamespace(transformer=student, components={}))
    student.register_to_config(_ppcl=["what"])
    with pytest.raises(ModelError, match="is a list"):
        describe(SimpleNamespace(transformer=student, components={}))


def test_a_budget_below_what_smaller_modules_can_give_up_is_bounded() -> None:
    """The bound looks at what is there: an affine map cannot become another one."""
    student = compressed("qwen")
    fit = FitConfig(width=["modulation", "ffn", "attention", "text"])
    config = RunConfig(plan=PlanConfig(keep=0.5), fit=fit)
    limits = limits_of(student, describe_alone(student), config)
    assert 0 < limits.param_ratio < 1


def test_a_bundle_of_the_second_round_changes_its_size_over_and_over() -> None:
    first = compressed("qwen")
    before = dict(first.config)
    bundle = bundle_for(first, QWEN_AGAIN)
    compress_class(first, first.config["pruning"])
    board = Plugboard(first, adapter_for(first), bundle)
    whole, half = [], []
    for _ in range(2):
        board.select(active=board.names)
        whole.append(dict(first.config))
        board.select(active=[])
        half.append(dict(first.config))
    assert whole[0] == whole[1] and half[0] == half[1]
    assert whole[0]["_ppcl"]["kept_blocks"] == {DUAL: [[0, 2], 3, 4, 5]}
    assert half[0]["pruning"] == before["pruning"]
    assert half[0]["_ppcl"]["kept_blocks"] == before["_ppcl"]["kept_blocks"]
