"""Compressed transformers of both kinds at once, fewer blocks and smaller modules inside them, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from tiny_models import DUAL, SINGLE, flux_call, plan_for, qwen_call, tiny_flux, tiny_qwen
from torch import nn

from ppcl.student.assembly import RunKey, substitute_block
from ppcl.student.bundle import Bundle, build_student, saved_params
from ppcl.student.plan import CompressionPlan, start_index
from ppcl.student.prediction import predict
from ppcl.teacher.families import adapter_for

LINEAR: dict[str, Any] = {"kind": "linear", "size": 0}
CALLS = {"qwen": qwen_call, "flux": flux_call}
# Teacher blocks (first, last) with the smaller modules of what stands for them
QWEN = {
    (DUAL, 0, 0): {"img_mlp": LINEAR, "img_mod.1": {"kind": "low_rank", "size": 3}},
    (DUAL, 1, 2): {"img_mod.1": {"kind": "low_rank", "size": 4}, "txt_mod.1": {"kind": "low_rank", "size": 4}},
    (DUAL, 4, 4): {"txt_mlp": LINEAR, "txt_mod.1": {"kind": "low_rank", "size": 2}},
}
FLUX = {
    (DUAL, 0, 0): {"ff": LINEAR, "norm1.linear": {"kind": "low_rank", "size": 3}},
    (SINGLE, 0, 0): {"norm.linear": {"kind": "low_rank", "size": 3}},
    (SINGLE, 1, 2): {"norm.linear": {"kind": "low_rank", "size": 4}},
}


def plan_with(transformer: nn.Module, parts: Mapping[RunKey, Mapping[str, Any]]) -> CompressionPlan:
    """The plan whose runs and smaller modules these are."""
    made = plan_for(transformer, [key for key in parts if key[2] > key[1]])
    stacks = {}
    for name, segments in made.stacks.items():
        blocks = transformer.get_submodule(name)
        pieces = [replace(s, width=dict(parts.get((name, s.first, s.last), {}))) for s in segments]
        starts = [blocks[start_index(s.first, s.last, s.start)] for s in pieces]
        saved = [saved_params(start, s) for start, s in zip(starts, pieces, strict=True)]
        stacks[name] = tuple(replace(s, saved_params=n) for s, n in zip(pieces, saved, strict=True))
    return replace(made, stacks=stacks, predicted=predict(made.model, stacks))


def bundle_for(transformer: nn.Module, parts: Mapping[RunKey, Mapping[str, Any]], seed: int = 3) -> Bundle:
    """That plan with random substitutes."""
    adapter, chosen = adapter_for(transformer), plan_with(transformer, parts)
    torch.manual_seed(seed)
    blocks = {spec.name: adapter.blocks(transformer, spec) for spec in adapter.stacks}
    bundle = Bundle(chosen, {})
    return Bundle(chosen, {key: substitute_block(blocks[key[0]], segment) for key, segment in bundle.members()})


def teacher_for(family: str) -> Any:
    """The tiny teacher of a family."""
    return tiny_qwen(6) if family == "qwen" else tiny_flux(3, 4)


def compressed(family: str) -> Any:
    """A compressed transformer; the same one for the same family."""
    teacher = teacher_for(family)
    return build_student(teacher, adapter_for(teacher), bundle_for(teacher, QWEN if family == "qwen" else FLUX))


@torch.no_grad()
def velocity_of(transformer: Any, family: str, seed: int = 0, **more: Any) -> torch.Tensor:
    """What a transformer says to the family's call."""
    found: torch.Tensor = transformer(**CALLS[family](seed=seed), **more, return_dict=False)[0]
    return found
