"""Smaller modules: their closed forms, and the models they make."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_models import (
    DUAL,
    SINGLE,
    describe_alone,
    fitted_options,
    flux_call,
    noise,
    plan_for,
    qwen_call,
    shared_pipeline,
    tiny_flux,
    tiny_qwen,
    write_states,
)
from torch import nn

import ppcl.pipelines  # noqa: F401 - makes the compressed classes known to diffusers
from ppcl.analysis.analyze import analyze
from ppcl.analysis.artifacts import Analysis
from ppcl.capture.states import States
from ppcl.common.tensor_files import read_tensors
from ppcl.config import AnalyzeConfig, DistillConfig, ExportConfig, FitConfig
from ppcl.distill.trainer import Distiller
from ppcl.errors import ArtifactError, ModelError
from ppcl.export.pipeline import export
from ppcl.modules.compressed import compressed_class
from ppcl.modules.replacements import (
    InputStatistics,
    LinearFeedForward,
    LowRankLinear,
    apply_width,
    fill_linear,
    fill_low_rank,
    replacement,
    residuals,
)
from ppcl.pruning.artifacts import WidthOption
from ppcl.pruning.selection import select_bundle
from ppcl.student.assembly import assemble_student
from ppcl.student.bundle import Bundle, build_student, load_bundle, save_bundle
from ppcl.student.plan import CompressionPlan
from ppcl.student.prediction import predict
from ppcl.student.substitutes import new_substitutes
from ppcl.teacher.blocks import ResidentBlocks
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import adapter_for
from ppcl.teacher.flops import count_flops, count_params

# Closed forms


def test_low_rank_is_the_best_one_for_the_inputs_that_occur() -> None:
    """Inputs on a curve in 12 dimensions: no other factors of that rank do better (Eckart and Young)."""
    t = torch.linspace(0, 1, 200)[:, None]
    x = torch.cat([torch.sin(3 * t), torch.cos(2 * t), t**2], 1) @ noise(3, 12) + 0.05 * noise(200, 12, seed=1) + 2
    layer = nn.Linear(12, 20)
    wanted = layer(x)
    for rank in (1, 2, 5):
        made = LowRankLinear(12, 20, rank)
        fill_low_rank(made, layer.weight, layer.bias, InputStatistics.of(x))
        error = (made(x) - wanted).pow(2).sum().item()
        centred = (wanted - wanted.mean(0)).double()
        best = torch.linalg.svdvals(centred)[rank:].pow(2).sum().item()
        assert error == pytest.approx(best, rel=1e-3)
        share = math.sqrt(best / centred.pow(2).sum().item())
        assert residuals(layer.weight, InputStatistics.of(x), InputStatistics.of(x))[rank].item() == pytest.approx(
            share, rel=1e-3
        )


def test_a_rank_above_what_was_seen_is_exact() -> None:
    x = noise(50, 2) @ noise(2, 8, seed=1)
    layer, made = nn.Linear(8, 10), LowRankLinear(8, 10, 6)
    fill_low_rank(made, layer.weight, layer.bias, InputStatistics.of(x))
    assert torch.allclose(made(x), layer(x), atol=1e-5)


def test_linear_feed_forward_is_called_as_the_network_was() -> None:
    made = LinearFeedForward(4, 6)
    weight, bias = noise(4, 6), noise(6, seed=1)
    fill_linear(made, weight, bias)
    x = noise(3, 4, seed=2)
    assert torch.allclose(made(x, "ignored", scale=2), x @ weight + bias, atol=1e-6)


@pytest.mark.parametrize(
    ("module", "kind"), [(nn.Linear(2, 2), "linear"), (nn.Sequential(nn.Linear(2, 2)), "low_rank"), (nn.GELU(), "x")]
)
def test_what_does_not_suit_is_refused(module: nn.Module, kind: str) -> None:
    with pytest.raises(ModelError, match=r"cannot be replaced"):
        replacement(module, {"kind": kind, "size": 1})
    with pytest.raises(ModelError, match="has no module 'nowhere'"):
        apply_width(module, {"nowhere": {"kind": kind, "size": 1}})


# Models


def scored(transformer: Any, folder: Path, call: Any = qwen_call) -> tuple[Analysis, tuple[WidthOption, ...]]:
    """Analysis files and width options of a tiny model."""
    adapter = adapter_for(transformer)
    for split, seed in (("train", 0), ("held-out", 9)):
        write_states(folder / "calibration", split, [call(6, seed=seed + i) for i in range(3)], transformer)
    one = call(1)
    stacks = {spec.name: list(adapter.blocks(transformer, spec)) for spec in adapter.stacks}
    flops = count_flops(transformer, stacks, lambda: velocity(transformer, one), 1)
    model = describe_alone(transformer, flops)
    analysis = analyze(
        ResidentBlocks(transformer),
        model,
        folder / "calibration",
        folder,
        AnalyzeConfig(cka_tokens=16, batch_size=6),
        0,
    )
    # a random FLUX spreads random texts over all directions: only a coarse rank does for those held out
    settings = FitConfig(width=("modulation", "ffn"), modulation_tolerances=(0.5, 0.1, 0.03, 0.01), eval_states=6)
    return analysis, fitted_options(transformer, analysis, folder, settings).width


def with_options(
    transformer: nn.Module, runs: list[Any], options: list[WidthOption], analysis: Analysis
) -> CompressionPlan:
    """A plan of these runs and options."""
    made = plan_for(transformer, runs)
    stacks = {}
    for name, pieces in made.stacks.items():
        changed = []
        for piece in pieces:
            own = [o for o in options if o.stack == name and o.block == piece.first]
            parts = {path: part for o in own for path, part in o.parts.items()}
            changed.append(
                replace(
                    piece,
                    width=parts,
                    saved_params=sum(o.saved_params for o in own),
                    saved_flops=sum(o.saved_flops for o in own),
                )
            )
        stacks[name] = tuple(changed)
    return replace(made, model=analysis.model, stacks=stacks, predicted=predict(analysis.model, stacks))


@pytest.mark.parametrize(
    ("build", "call", "networks"),
    [(lambda: tiny_qwen(4), qwen_call, ()), (tiny_flux, flux_call, ("ffn",))],  # FLUX's single-stream blocks have one
    ids=["qwen", "flux"],
)
def test_every_option_saves_what_it_says_and_costs_what_was_measured(
    build: Any, call: Any, networks: tuple[str, ...], tmp_path: Path
) -> None:
    transformer = build()
    adapter = adapter_for(transformer)
    analysis, options = scored(transformer, tmp_path, call)
    assert {o.group for o in options} == {"modulation", "ffn.image", "ffn.text", *networks}
    held_out = next(States(tmp_path / "calibration", "held-out").batches(6, 6))
    for option in options[::3]:
        chosen = with_options(transformer, [], [option], analysis)
        substitutes = new_substitutes(transformer, adapter, chosen, None, tmp_path / "analysis.safetensors")
        student = build_student(transformer, adapter, Bundle(chosen, substitutes))
        assert count_params(student) == chosen.predicted.params < analysis.model.params
        stacks = {spec.name: list(adapter.blocks(student, spec)) for spec in adapter.stacks}
        one = call(1)
        flops = count_flops(student, stacks, lambda student=student, one=one: velocity(student, one), 1)["total"]
        assert flops == round(analysis.model.flops / chosen.predicted.speedup)
        with torch.no_grad():
            target = velocity(transformer, held_out)
            error = ((velocity(student, held_out) - target).norm() / target.norm()).item()
        assert error == pytest.approx(option.error, rel=1e-3, abs=1e-5)


def mixed(transformer: Any, folder: Path) -> CompressionPlan:
    """Blocks 0 and 3 with smaller modules, 1-2 one block with a smaller modulation."""
    analysis, options = scored(transformer, folder)
    chosen = [next(o for o in options if o.block == 0 and o.group == "ffn.image")]
    chosen += [next(o for o in options if o.block == b and o.group == "modulation") for b in (1, 3)]
    return with_options(transformer, [(DUAL, 1, 2)], chosen, analysis)


def test_distilling_export_and_loading(tmp_path: Path) -> None:
    """One phase trains depth and width; a stock pipeline with the registered class draws the same."""
    pipeline = shared_pipeline()
    transformer, adapter = tiny_qwen(4), adapter_for(tiny_qwen(4))
    chosen = mixed(transformer, tmp_path)
    settings = DistillConfig(local_steps=3, output_steps=3, batch_size=4, from_fit=False)
    rows: list[dict[str, Any]] = []
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    distiller = Distiller(
        transformer, adapter, chosen, tmp_path / "calibration", tmp_path, settings, 0, "fp32", rows.append
    )
    kept = distiller.substitutes[DUAL, 3, 3]
    assert {n for n, p in kept.named_parameters() if p.requires_grad} == {
        n for n, _ in kept.named_parameters() if n.startswith(("img_mod.1.", "txt_mod.1."))
    }
    bundle = distiller.run()
    assert all(torch.equal(before[name], value) for name, value in transformer.state_dict().items())
    assert all(math.isfinite(row["loss"]) for row in rows)
    loaded = load_bundle(tmp_path / "bundle", transformer, adapter)
    first, second = (build_student(transformer, adapter, b) for b in (bundle, loaded))
    call = qwen_call()
    with torch.no_grad():
        assert torch.equal(velocity(first, call), velocity(second, call))
        hybrid = assemble_student(transformer, adapter, chosen, loaded.substitutes, active=())
        assert torch.equal(velocity(hybrid, call), velocity(transformer, call))
    assert type(first).__name__ == "PPCLQwenImageTransformer2DModel"
    assert isinstance(first, type(transformer))
    first.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    again, info = type(first).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(velocity(again, call), velocity(first, call))
        assert torch.equal(velocity(copy.deepcopy(again), call), velocity(first, call))
    del pipeline


def test_frozen_weights_of_kept_blocks_are_not_stored(tmp_path: Path) -> None:
    transformer = tiny_qwen(4)
    adapter = adapter_for(transformer)
    chosen = mixed(transformer, tmp_path)
    substitutes = new_substitutes(transformer, adapter, chosen, None, tmp_path / "analysis.safetensors")
    save_bundle(Bundle(chosen, substitutes), tmp_path / "bundle", {}, transformer)
    names = set(read_tensors(tmp_path / "bundle" / "substitutes.safetensors")[0])
    assert {n for n in names if n.startswith(f"{DUAL}/0-0/")} == {
        f"{DUAL}/0-0/img_mlp.weight",
        f"{DUAL}/0-0/img_mlp.bias",
    }
    tensors = read_tensors(tmp_path / "bundle" / "substitutes.safetensors")[0]
    tensors.pop(f"{DUAL}/0-0/img_mlp.bias")
    from ppcl.common.files import file_digest, read_json, write_json
    from ppcl.common.tensor_files import write_tensors

    write_tensors(tmp_path / "bundle" / "substitutes.safetensors", tensors)
    about = read_json(tmp_path / "bundle" / "bundle.json")
    about["files"]["substitutes.safetensors"] = file_digest(tmp_path / "bundle" / "substitutes.safetensors")
    write_json(tmp_path / "bundle" / "bundle.json", about)
    with pytest.raises(ArtifactError, match="other weights than its plan"):
        load_bundle(tmp_path / "bundle", transformer, adapter)


def test_a_whole_pipeline_of_a_compressed_class_saves_and_loads(tmp_path: Path) -> None:
    pipeline = shared_pipeline()
    transformer = pipeline.transformer
    adapter = adapter_for(transformer)
    plan_made = plan_for(transformer, [])
    pieces = list(plan_made.stacks[DUAL])
    pieces[1] = replace(pieces[1], width={"txt_mlp": {"kind": "linear", "size": 0}})
    chosen = replace(plan_made, stacks={DUAL: tuple(pieces)})
    block = copy.deepcopy(transformer.transformer_blocks[1])
    apply_width(block, pieces[1].width)
    student = build_student(transformer, adapter, Bundle(chosen, {(DUAL, 1, 1): block}))
    folder = export(pipeline, student, chosen, "tiny", tmp_path / "pipeline", ExportConfig())
    loaded = DiffusionPipeline.from_pretrained(folder)
    assert type(loaded.transformer) is compressed_class(type(transformer))
    assert adapter_for(loaded.transformer) is adapter
    loaded.save_pretrained(tmp_path / "again")
    again = DiffusionPipeline.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert again.transformer.dtype == torch.bfloat16
    assert again.transformer.config["pruning"] == {f"{DUAL}.1.txt_mlp": {"kind": "linear", "size": 0}}


def test_flux_keeps_the_stacks_apart(tmp_path: Path) -> None:
    transformer = tiny_flux()
    adapter = adapter_for(transformer)
    analysis, options = scored(transformer, tmp_path, flux_call)
    option = next(o for o in options if o.stack == SINGLE and o.block == 2 and o.group == "modulation")
    chosen = with_options(transformer, [(SINGLE, 0, 1)], [option], analysis)
    substitutes = new_substitutes(transformer, adapter, chosen, None, tmp_path / "analysis.safetensors")
    student = build_student(transformer, adapter, Bundle(chosen, substitutes))
    assert set(student.config["pruning"]) == {f"{SINGLE}.1.norm.linear"}  # block 2 is block 1 of the student
    student.save_pretrained(tmp_path / "saved")
    loaded = type(student).from_pretrained(tmp_path / "saved")
    call = flux_call()
    with torch.no_grad():
        assert torch.equal(velocity(loaded, call), velocity(student, call))


# One bundle, many sizes


def test_a_smaller_saving_of_the_same_bundle(tmp_path: Path) -> None:
    transformer = tiny_qwen(4)
    adapter = adapter_for(transformer)
    chosen = mixed(transformer, tmp_path)
    substitutes = new_substitutes(transformer, adapter, chosen, None, tmp_path / "analysis.safetensors")
    bundle = Bundle(chosen, substitutes)
    smaller = select_bundle(bundle, "keep", 0.9)
    assert 0 < len(smaller.substitutes) < len(substitutes)
    student = build_student(transformer, adapter, smaller)
    assert count_params(student) == smaller.plan.predicted.params
    hybrid = assemble_student(transformer, adapter, chosen, substitutes, set(smaller.substitutes))
    call = qwen_call()
    with torch.no_grad():
        assert torch.equal(velocity(student, call), velocity(hybrid, call))
    with pytest.raises(ArtifactError, match=r"distill\.train=substitutes"):
        select_bundle(Bundle(chosen, substitutes, {"proj_out.bias": torch.zeros(1)}), "keep", 0.9)
