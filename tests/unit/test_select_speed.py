"""Changing the size of the embedded model in use: how long it takes, and that it is the exported model of that size."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from tiny_compressed import LINEAR, bundle_for
from tiny_models import DUAL

from ppcl.modules.compressed import compress_class
from ppcl.pipelines.bundle import Plugboard, _only
from ppcl.student.bundle import Bundle, build_student
from ppcl.teacher.families import adapter_for
from ppcl.teacher.flops import count_params
from ppcl.teacher.loading import load_pipeline

PARTS: dict[Any, Any] = {
    (DUAL, first, first + 1): {"img_mod.1": {"kind": "low_rank", "size": 4}} for first in (2, 6, 10, 14)
}
PARTS |= {(DUAL, i, i): {"txt_mod.1": {"kind": "low_rank", "size": 4}, "txt_mlp": LINEAR} for i in (4, 8, 12)}


def with_costs(teacher: Any, bundle: Bundle) -> Bundle:
    """What choosing by a budget needs to know of each substitute."""
    stacks = {}
    for name, segments in bundle.plan.stacks.items():
        blocks = getattr(teacher, name)
        known = []
        for s in segments:
            made = bundle.substitutes.get((name, s.first, s.last))
            saved = 0 if made is None else count_params(blocks[s.first]) - count_params(made)
            known.append(replace(s, saved_params=saved, error=None if made is None else 0.1))
        stacks[name] = tuple(known)
    return Bundle(replace(bundle.plan, stacks=stacks), bundle.substitutes)


@torch.no_grad()
def test_a_switch_takes_under_two_seconds_and_equals_a_fresh_export(record_property: Any) -> None:
    transformer = load_pipeline("emoji", torch.device("cpu")).transformer
    teacher = type(transformer).from_config(transformer.config).eval().requires_grad_(False)
    teacher.load_state_dict(transformer.state_dict())
    adapter = adapter_for(teacher)
    bundle = with_costs(teacher, bundle_for(teacher, PARTS))
    compress_class(transformer, {})
    board = Plugboard(transformer, adapter, bundle)
    config = transformer.config
    generator = torch.Generator().manual_seed(0)
    call = {
        "hidden_states": torch.randn(1, 4, config["in_channels"], generator=generator),
        "encoder_hidden_states": torch.randn(1, 3, config["joint_attention_dim"], generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 2, 2)]],
        "return_dict": False,
    }
    worst, outputs = 0.0, []
    for choice in ({"active": board.names}, {"active": board.names[:3]}, {"active": ()}, {"keep": 0.9}, {"keep": 0.8}):
        began = time.perf_counter()
        active = board.select(**choice)
        worst = max(worst, time.perf_counter() - began)
        assert "keep" in choice or set(active) == set(choice["active"])
        plan = _only(bundle, set(active))
        chosen = Bundle(plan, {})
        fresh = build_student(
            teacher, adapter, Bundle(plan, {key: bundle.substitutes[key] for key, _ in chosen.members()})
        )
        assert torch.equal(transformer(**call)[0], fresh(**call)[0])
        assert transformer.config["num_layers"] == fresh.config["num_layers"] == len(fresh.transformer_blocks)
        assert (transformer.config["pruning"] or {}) == (fresh.config.get("pruning") or {})
        assert count_params(transformer) <= choice.get("keep", 1) * count_params(teacher)
        outputs.append(transformer(**call)[0])
    record_property("seconds", worst)
    print(f"slowest switch: {1000 * worst:.0f} ms")
    assert worst < 2
    assert not any(torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
