"""Transformers of a few blocks, and calls of them, for the unit tests."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.analysis.artifacts import Analysis
from ppcl.analysis.findings import Findings
from ppcl.analysis.sweep import Batch, Course, forward_sweep
from ppcl.capture.store import StateStore
from ppcl.common.tensor_files import StoredTensors, write_tensors
from ppcl.config import FitConfig
from ppcl.distill.fit import fit
from ppcl.pruning.artifacts import Candidates
from ppcl.pruning.criteria import Site
from ppcl.pruning.fewer_units import KIND, UnitSums, scores_of_all
from ppcl.pruning.unit_search import CutSite
from ppcl.student.assembly import RunKey, start_block
from ppcl.student.plan import CompressionPlan, Segment
from ppcl.student.prediction import predict
from ppcl.teacher import call_arguments as trees
from ppcl.teacher.blocks import ResidentBlocks
from ppcl.teacher.calls import Call, velocity
from ppcl.teacher.description import describe
from ppcl.teacher.families import Adapter, adapter_for
from ppcl.teacher.model_info import ModelInfo

DUAL, SINGLE = "transformer_blocks", "single_transformer_blocks"
CAPTURE = {
    "num_prompts": 8,
    "batch_size": 4,
    "num_inference_steps": 3,
    "states_per_prompt": 2,
    "held_out_share": 0.25,
    "height": 16,
    "width": 16,
    "guidance_scale": 2.0,
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_qwen(num_layers: int = 4, seed: int = 0) -> Any:
    """A random Qwen-Image transformer of width 32, frozen."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    return transformer.eval().requires_grad_(False)


def tiny_flux(dual: int = 3, single: int = 4, seed: int = 0) -> Any:
    """A random FLUX transformer with two block lists, frozen."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=dual,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )
    return transformer.eval().requires_grad_(False)


def qwen_call(batch: int = 3, text: int = 5, seed: int = 0, padded: bool = False) -> dict[str, Any]:
    """Arguments of a Qwen-Image transformer: 6 image tokens; ``padded`` masks the end of all texts but the first."""
    mask = None
    if padded:
        mask = torch.ones(batch, text, dtype=torch.bool)
        for row in range(1, batch):
            mask[row, text - 1 - row % (text - 1) :] = False
    return {
        "hidden_states": noise(batch, 6, 16, seed=seed),
        "encoder_hidden_states": noise(batch, text, 24, seed=seed + 1),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.linspace(0.2, 0.9, batch),
        "img_shapes": [[(1, 2, 3)]] * batch,
    }


def padded_batch(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Qwen-Image calls of different text lengths as one, padded with noise that the mask hides."""
    length = max(call["encoder_hidden_states"].shape[1] for call in calls)
    texts, masks = [], []
    for call in calls:
        text, mask = call["encoder_hidden_states"], call["encoder_hidden_states_mask"]
        mask = torch.ones(text.shape[:2], dtype=torch.bool) if mask is None else mask
        missing = length - text.shape[1]
        texts.append(torch.cat([text, noise(len(text), missing, text.shape[2], seed=99)], 1))
        masks.append(torch.cat([mask, torch.zeros(len(text), missing, dtype=torch.bool)], 1))
    return {
        "hidden_states": torch.cat([call["hidden_states"] for call in calls]),
        "encoder_hidden_states": torch.cat(texts),
        "encoder_hidden_states_mask": torch.cat(masks),
        "timestep": torch.cat([call["timestep"] for call in calls]),
        "img_shapes": [shape for call in calls for shape in call["img_shapes"]],
    }


def flux_call(batch: int = 3, text: int = 5, seed: int = 0) -> dict[str, Any]:
    """Arguments of a FLUX transformer: 6 image tokens."""
    ids = torch.stack([torch.zeros(6), torch.arange(6.0) // 3, torch.arange(6.0) % 3], 1)
    return {
        "hidden_states": noise(batch, 6, 16, seed=seed),
        "encoder_hidden_states": noise(batch, text, 24, seed=seed + 1),
        "pooled_projections": noise(batch, 8, seed=seed + 2),
        "timestep": torch.linspace(0.2, 0.9, batch),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
    }


def write_states(folder: Path, split: str, calls: list[dict[str, Any]], transformer: nn.Module | None = None) -> None:
    """Write calls as the capture stage would, one a file; without a transformer its answers are zeros."""
    for index, call in enumerate(calls):
        tensors: dict[str, Tensor] = {}
        node = trees.flatten(call, "00", tensors)
        with torch.no_grad():
            answer = velocity(transformer, call) if transformer else torch.zeros(trees.batch_size(call), 1)
        tensors["velocity.00"] = answer
        write_tensors(folder / f"{split}-{index:04d}.safetensors", tensors, {"calls": [node], "alias": {}})


def describe_alone(transformer: nn.Module, flops: dict[str, Any] | None = None) -> ModelInfo:
    """The planner's view of a transformer without a pipeline around it."""
    return describe(SimpleNamespace(transformer=transformer, components={}), flops)


def plan_for(transformer: nn.Module, runs: list[RunKey]) -> CompressionPlan:
    """A plan that replaces the given runs."""
    adapter, model = adapter_for(transformer), describe_alone(transformer)
    stacks = {}
    for spec in adapter.stacks:
        own = [(first, last, "middle") for stack, first, last in runs if stack == spec.name]
        stacks[spec.name] = segments_from_runs(len(adapter.blocks(transformer, spec)), own)
    return CompressionPlan(model, "optimal", {"keep": 0.5}, stacks, predict(model, stacks))


def random_substitutes(
    transformer: nn.Module, adapter: Adapter, runs: list[RunKey], seed: int = 7
) -> dict[RunKey, nn.Module]:
    """Substitutes that differ from all of the teacher's blocks."""
    generator = torch.Generator().manual_seed(seed)
    substitutes = {}
    for run in runs:
        block = start_block(getattr(transformer, run[0]), run[1], run[2], "middle")
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        substitutes[run] = block
    return substitutes


@lru_cache(maxsize=1)
def shared_pipeline() -> Any:
    """A pipeline of four blocks that all unit tests share; leave it as it is."""
    from tiny_pipeline import tiny_qwen_pipeline

    pipeline = tiny_qwen_pipeline(num_layers=4)
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.eval().requires_grad_(False)
    return pipeline


def fitted_options(transformer: nn.Module, analysis: Analysis, folder: Path, settings: FitConfig) -> Candidates:
    """The fit stage of a run directory with states and analysis, for the sake of its smaller modules: exact costs."""
    quick = settings.model_copy(update={"steps": 0, "max_candidates": 1, "max_run": 2, "exact": "all"})
    forms = StoredTensors(folder / "analysis.safetensors")
    return fit(ResidentBlocks(transformer), analysis, forms, folder / "calibration", folder, quick, 0)


def cut_parts(
    transformer: nn.Module,
    site: Site,
    sets: Sequence[Sequence[dict[str, Any]]],
    settings: FitConfig,
    folder: Path,
    held_out: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """The replacements of one module of the first stack, one a size, by the criterion and the first set of states."""
    source, findings = ResidentBlocks(transformer), Findings(folder / "units")
    sites = [CutSite("ffn", (site,))]
    scores = scores_of_all(source, sites, [list(states) for states in sets], settings, 0, list(held_out))
    batches = [
        Batch(number, "train", 0, partial(Call, arguments, torch.zeros(0)), ((number, 0),))
        for number, arguments in enumerate(sets[0])
    ]
    course = Course(source, batches, StateStore(folder / "sweep", ""))
    forward_sweep(course, [UnitSums(sites, (), settings, scores, findings)])
    parts: list[dict[str, Any]] = findings.numbers(KIND, (site.stack, site.block))[site.path]
    return parts


def segments_from_runs(num_blocks: int, runs: Collection[tuple[int, int, str | None]]) -> tuple[Segment, ...]:
    """Turn non-overlapping runs (first, last, start) of one stack into its segments."""
    segments, position = [], 0
    for first, last, start in sorted(runs):
        segments += [Segment(i, i) for i in range(position, first)]
        segments.append(Segment(first, last, start))
        position = last + 1
    return (*segments, *(Segment(i, i) for i in range(position, num_blocks)))
