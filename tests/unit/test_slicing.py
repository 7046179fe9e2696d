"""Fewer neurons, fewer heads, linear text streams: exact cuts, exact savings, models that load."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from ordinary_heads import heads_of
from test_replacements import with_options
from tiny_models import (
    DUAL,
    describe_alone,
    fitted_options,
    flux_call,
    noise,
    qwen_call,
    tiny_flux,
    tiny_qwen,
    write_states,
)
from torch import nn

import ppcl.pipelines  # noqa: F401 - makes the compressed classes known to diffusers
from ppcl.analysis.analyze import analyze
from ppcl.analysis.artifacts import Analysis
from ppcl.capture.states import States
from ppcl.config import AnalyzeConfig, DistillConfig, FitConfig, PlanConfig, load_config
from ppcl.distill.trainer import Distiller
from ppcl.errors import ConfigError, ModelError
from ppcl.modules.replacements import apply_width
from ppcl.modules.slicing import Units, corrected, kept_units, masked, neurons_of, pack_kept, sliced
from ppcl.pruning.artifacts import Candidates, WidthOption
from ppcl.pruning.criteria import CRITERIA, Site
from ppcl.pruning.fewer_units import sizes_of
from ppcl.pruning.knapsack import choices_of
from ppcl.pruning.options import saved_time
from ppcl.pruning.planner import plan
from ppcl.student.assembly import with_blocks
from ppcl.student.bundle import Bundle, build_student, load_bundle
from ppcl.student.substitutes import new_substitutes
from ppcl.teacher.blocks import ResidentBlocks
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import adapter_for
from ppcl.teacher.flops import count_flops, count_params

# Cuts


class Gated(nn.Module):
    """SwiGLU of three layers, as Z-Image has it."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(6, 20, False), nn.Linear(20, 6, False), nn.Linear(6, 20, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


def networks() -> list[nn.Module]:
    from diffusers.models.attention import FeedForward

    kinds = ("gelu-approximate", "geglu", "swiglu")
    return [*(FeedForward(6, mult=4, activation_fn=kind) for kind in kinds), Gated()]


@pytest.mark.parametrize("number", range(4))
def test_a_network_of_fewer_neurons_is_the_whole_one_without_the_others(number: int) -> None:
    torch.manual_seed(0)
    network = networks()[number]
    units = neurons_of(network)
    assert units is not None
    part = units.part([1, 4, 5, 11, 19])
    x = noise(7, 6)
    torch.testing.assert_close(sliced(network, part)(x), masked(network, part)(x))
    assert kept_units(part) == [1, 4, 5, 11, 19]


def test_what_cannot_be_told_is_not_offered() -> None:
    assert neurons_of(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))) is None  # which one reads?
    assert neurons_of(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4))) is None
    assert heads_of(networks()[0]) is None
    with pytest.raises(ModelError, match="keeps 1 units of 8"):
        kept_units({"kind": "narrow", "size": 2, "of": 8, "kept": pack_kept([3], 8)})
    with pytest.raises(ModelError, match="no linear layer 'nowhere'"):
        sliced(networks()[0], {**Units("narrow", 8, ("nowhere",), ()).part([0])})


def test_the_correction_is_exact_where_the_dropped_follow_from_the_kept() -> None:
    h = noise(200, 4)
    h = torch.cat([h, h @ noise(4, 3, seed=1) + 2], 1).double()
    layer = nn.Linear(7, 5)
    part = Units("narrow", 7, ("a",), ("b",)).part(range(4))
    moment = h.mean(0), torch.cov(h.T, correction=0)
    weight, bias = corrected(layer.weight, layer.bias, part, moment, ridge=1e-9)
    torch.testing.assert_close(h[:, :4] @ weight.T + bias, layer(h.float()).double(), atol=1e-5, rtol=1e-5)


# Criteria


def site_of(transformer: Any, index: int, path: str) -> Site:
    module = getattr(transformer, DUAL)[index].get_submodule(path)
    units = heads_of(module) or neurons_of(module)
    assert units is not None
    return Site(DUAL, index, path, units)


def test_taylor_sees_units_where_student_is_teacher_and_the_distillation_loss_sees_none() -> None:
    transformer = tiny_qwen(2)
    adapter, call = adapter_for(transformer), qwen_call(4)
    sites = [site_of(transformer, 0, "attn"), site_of(transformer, 0, "img_mlp")]
    calls = [call] * 12  # the same states with other signs
    heads, neurons = CRITERIA["taylor"].score(transformer, adapter, sites, calls, 0)
    assert (heads > 0).all()
    assert (neurons > 0).all()

    # what a gate moves, by a small step, against its score
    target = velocity(transformer, call)
    layer, step = transformer.transformer_blocks[0].img_mlp.net[2], 1e-2
    moved = []
    for unit in range(0, 128, 8):
        with torch.no_grad():
            column = layer.weight[:, unit].clone()
            layer.weight[:, unit] *= 1 - step
            moved.append(float((velocity(transformer, call) - target).norm()) / step)
            layer.weight[:, unit] = column
    effect = torch.tensor(moved).double()
    assert torch.corrcoef(torch.stack([effect, neurons[::8]]))[0, 1] > 0.8

    student = copy.deepcopy(transformer).requires_grad_(True)
    ((velocity(student, call) - target) ** 2).sum().backward()
    assert all(not p.grad.any() for p in student.parameters() if p.grad is not None)
    assert not any(p.grad is not None for p in transformer.parameters())


@pytest.mark.parametrize("name", sorted({*CRITERIA} - {"random"}))
def test_a_unit_that_does_nothing_scores_least(name: str) -> None:
    transformer = tiny_qwen(2)
    with torch.no_grad():
        transformer.transformer_blocks[0].img_mlp.net[2].weight[:, 7] = 0
        transformer.transformer_blocks[0].img_mlp.net[0].proj.weight[7] = 0
    sites = [site_of(transformer, 0, "img_mlp")]
    (score,) = CRITERIA[name].score(transformer, adapter_for(transformer), sites, [qwen_call()], 0)
    assert score.shape == (128,)
    assert (score >= 0).all()
    assert int(score.argmin()) == 7


def test_an_unknown_criterion_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'taylor'.*valid: activation, bip, gblm, magnitude, nirvana"):
        load_config([], ["fit.criterion=tailor"])
    with pytest.raises(ConfigError, match="between 0 and 1"):
        load_config([], ["fit.width_shares=[1.5]"])
    assert all(FitConfig(criterion=name).criterion == name for name in CRITERIA)


# Models


@lru_cache(maxsize=2)
def prepared(family: str) -> tuple[Any, Analysis, Candidates, TemporaryDirectory[str]]:
    """A tiny teacher with its analysis and width options, in a run directory."""
    transformer, call = (tiny_qwen(3), qwen_call) if family == "qwen" else (tiny_flux(2, 2), flux_call)
    holder = TemporaryDirectory()
    folder, adapter = Path(holder.name), adapter_for(transformer)
    for split, seed, calls in (("train", 0, 12), ("held-out", 99, 3)):  # rows enough for 64 neurons
        write_states(folder / "calibration", split, [call(4, seed=seed + 3 * i) for i in range(calls)])
    one = call(1)
    stacks = {spec.name: list(adapter.blocks(transformer, spec)) for spec in adapter.stacks}
    flops = count_flops(transformer, stacks, lambda: velocity(transformer, one), 1)
    config = AnalyzeConfig(cka_tokens=16, batch_size=6)
    model = describe_alone(transformer, flops)
    analysis = analyze(ResidentBlocks(transformer), model, folder / "calibration", folder, config, 0)
    settings = FitConfig(width=("modulation", "ffn", "attention", "text"), width_shares=(0.5,), eval_states=6)
    return transformer, analysis, fitted_options(transformer, analysis, folder, settings), holder


def chosen_options(options: tuple[WidthOption, ...]) -> list[WidthOption]:
    """The first option of each new kind."""
    kinds = {
        "narrow image": lambda o: o.group == "ffn.image" and "narrow" in str(o.parts),
        "narrow text": lambda o: o.group == "ffn.text" and "narrow" in str(o.parts),
        "heads": lambda o: o.group == "attention",
        "text": lambda o: o.group == "text",
    }
    return [next(o for o in options if test(o)) for test in kinds.values()]


@pytest.mark.parametrize("family", ["qwen", "flux"])
def test_every_option_saves_what_it_says_costs_what_was_measured_and_loads(family: str, tmp_path: Path) -> None:
    transformer, analysis, found, holder = prepared(family)
    adapter, folder = adapter_for(transformer), Path(holder.name)
    held_out = next(States(folder / "calibration", "held-out").batches(6, 6))
    one = qwen_call(1) if family == "qwen" else flux_call(1)
    with torch.no_grad():
        target = velocity(transformer, held_out)
    for number, option in enumerate(chosen_options(found.width)):
        wanted = with_options(transformer, [], [option], analysis)
        student = build_student(
            transformer,
            adapter,
            Bundle(wanted, new_substitutes(transformer, adapter, wanted, None, folder / "analysis.safetensors")),
        )
        assert count_params(student) == wanted.predicted.params == analysis.model.params - option.saved_params
        stacks = {spec.name: list(adapter.blocks(student, spec)) for spec in adapter.stacks}
        flops = count_flops(student, stacks, lambda student=student: velocity(student, one), 1)["total"]
        assert flops == analysis.model.flops - option.saved_flops
        with torch.no_grad():
            error = ((velocity(student, held_out) - target).norm() / target.norm()).item()
        assert error == pytest.approx(option.error, rel=1e-3, abs=1e-5)
        assert error < 0.9
        student.save_pretrained(tmp_path / str(number))
        again, info = type(student).from_pretrained(tmp_path / str(number), output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            torch.testing.assert_close(velocity(again, one), velocity(student, one))
            if family == "flux" and option.group == "attention":
                student.fuse_qkv_projections()
                torch.testing.assert_close(velocity(student, one), velocity(again, one), atol=1e-5, rtol=1e-4)


def test_the_correction_lowers_the_error() -> None:
    transformer, analysis, found, holder = prepared("qwen")
    option = chosen_options(found.width)[0]
    block = copy.deepcopy(transformer.transformer_blocks[option.block])
    plain = sliced(block.img_mlp, option.parts["img_mlp"])
    made = new_substitutes(
        transformer,
        adapter_for(transformer),
        with_options(transformer, [], [option], analysis),
        None,
        Path(holder.name) / "analysis.safetensors",
    )[DUAL, option.block, option.block].img_mlp
    call = qwen_call(6, seed=99)
    seen: list[torch.Tensor] = []
    handle = transformer.transformer_blocks[option.block].img_mlp.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    velocity(transformer, call)
    handle.remove()
    errors = [float((network(seen[0]) - block.img_mlp(seen[0])).norm()) for network in (made, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_distilling_all_of_them_at_once(tmp_path: Path) -> None:
    transformer, analysis, found, holder = prepared("qwen")
    adapter, folder = adapter_for(transformer), Path(holder.name)
    by_block = [("attention", 0), ("ffn.image", 0), ("text", 1), ("modulation.image", 1), ("ffn.text", 2)]
    options = [
        next(o for o in found.width if (o.group, o.block) == key and "'linear'" not in str(o.parts)) for key in by_block
    ]
    wanted = with_options(transformer, [], options, analysis)
    settings = DistillConfig(
        local_steps=3, output_steps=2, batch_size=4, from_fit=False, train="substitutes", keep_start=False
    )
    rows: list[dict[str, Any]] = []
    distiller = Distiller(
        transformer, adapter, wanted, folder / "calibration", tmp_path, settings, 0, "fp32", rows.append,
        closed_forms=folder / "analysis.safetensors",
    )  # fmt: skip
    bundle = distiller.run()
    assert len(rows) == 5
    loaded = load_bundle(tmp_path / "bundle", transformer, adapter)
    students = [build_student(transformer, adapter, b) for b in (bundle, loaded)]
    assert count_params(students[0]) == wanted.predicted.params
    with torch.no_grad():
        assert torch.equal(velocity(students[0], qwen_call()), velocity(students[1], qwen_call()))


def test_the_planner_uses_them() -> None:
    _, analysis, found, _ = prepared("qwen")
    chosen = plan(analysis, Candidates((), 0, 0.0, found.width), PlanConfig(keep=0.6))
    parts = [part for segment in chosen.stacks[DUAL] for part in segment.width.values()]
    assert chosen.predicted.param_ratio <= 0.6
    assert {"narrow", "heads", "text_input"} & {part["kind"] for part in parts}
    less = plan(analysis, Candidates((), 0, 0.0, found.width), PlanConfig(keep=0.95, width=("attention",)))
    assert {part["kind"] for segment in less.stacks[DUAL] for part in segment.width.values()} == {"heads"}


def test_a_text_stream_is_replaced_or_its_modules_are() -> None:
    def option(group: str, path: str, saved: int, error: float) -> WidthOption:
        return WidthOption("s", 0, group, {path: {"kind": "x", "size": 0}}, saved, saved, error)

    options = [
        option("text", "txt_mod", 9, 0.2),
        option("modulation.text", "txt_mod.1", 5, 0.1),
        option("modulation.image", "img_mod.1", 5, 0.1),
        option("ffn.text", "txt_mlp", 4, 0.3),
    ]
    for by_flops in (False, True):
        groups = {frozenset(o.group for o in chosen) for chosen in choices_of(options, by_flops)}
        assert frozenset({"text", "modulation.image", "ffn.text"}) in groups
        assert not any({"text", "modulation.text"} <= chosen for chosen in groups)


def test_the_time_of_a_smaller_network_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppcl.pruning.options.ROUNDS", 7)
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=32, num_attention_heads=8,
        joint_attention_dim=24, axes_dims_rope=(8, 12, 12),
    ).eval()  # fmt: skip
    adapter = adapter_for(transformer)
    arguments = {
        **qwen_call(1), "hidden_states": torch.randn(1, 400, 16), "img_shapes": [[(1, 20, 20)]],
    }  # fmt: skip
    smaller = copy.deepcopy(adapter.blocks(transformer, adapter.stacks[0])[0])
    apply_width(smaller, {"img_mlp": {"kind": "linear", "size": 0}})
    student = with_blocks(transformer, {DUAL: [smaller]})
    assert 0.2 < saved_time(transformer, student, arguments) < 0.95  # the network has two thirds of the FLOPs
    assert saved_time(transformer, transformer, arguments) < 0.3


@pytest.mark.parametrize(
    ("count", "multiple", "sizes"),
    [
        (12288, 64, [3072, 6144, 9216]),
        (13824, 64, [3456, 6912, 10368]),
        (13824, 256, [3584, 6912, 10240]),  # columns that K-quants take
        (10240, 256, [2560, 5120, 7680]),
        (128, 64, [32, 64, 96]),  # few neurons: finer steps
        (128, 256, []),  # never finer than was asked for
        (12288, 32, [3072, 6144, 9216]),
        (13824, 96, [3456, 6912, 10368]),
    ],
)
def test_neurons_stay_in_multiples(count, multiple, sizes):
    assert sizes_of(Units("narrow", count, (), ()), (0.25, 0.5, 0.75), multiple) == sizes
    assert all(size % multiple == 0 for size in sizes) or multiple == 64


def test_a_multiple_of_neurons_is_another_result_and_the_default_none():
    plain, wide = load_config([], []).fit, load_config([], ["fit.width_multiple=256"]).fit
    assert "width_multiple" not in plain.identity()
    assert wide.identity()["width_multiple"] == 256
