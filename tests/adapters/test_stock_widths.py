"""One width of all feed-forward networks: which classes have a config for it, and that it builds the same model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_format_families import output
from tiny import TINY

from ppcl.common.files import read_json
from ppcl.modules.compressed import compress_class
from ppcl.modules.parts import cuts_of, join
from ppcl.modules.replacements import apply_width
from ppcl.modules.slicing import joined
from ppcl.pruning.unit_search import find_sites
from ppcl.student.assembly import assemble_student, substitute_block
from ppcl.student.plan import CompressionPlan, Segment, start_index
from ppcl.student.prediction import predict
from ppcl.student.record import register_plan
from ppcl.student.stock_width import shapes_of
from ppcl.teacher.block_map import RECORD, smaller_modules
from ppcl.teacher.blocks import ResidentBlocks
from ppcl.teacher.description import describe
from ppcl.teacher.families import ADAPTERS, adapter_for
from ppcl.teacher.trace import record_boundaries

WITH_FIELD = [name for name, make in TINY.items() if adapter_for(make()[0]).ffn_field]


def tiny(name: str) -> tuple[Any, dict[str, Any]]:
    """The tiny model, at a width that halves: Lumina-Next's networks go in steps of 256 neurons otherwise."""
    model, inputs = TINY[name]()
    if name == "lumina_next":
        config = {key: value for key, value in model.config.items() if not key.startswith("_")}
        torch.manual_seed(0)
        model = type(model).from_config({**config, "multiple_of": 1})
    return model, inputs


def narrow_parts(model: Any, inputs: Mapping[str, Any]) -> dict[tuple[str, int], Any]:
    """For each block its feed-forward networks with each second of their neurons; heads stay."""
    adapter = adapter_for(model)
    calls, _ = record_boundaries(model, adapter, inputs, {(stack.name, 0) for stack in adapter.stacks})
    parts: dict[tuple[str, int], Any] = {}
    for site in find_sites(ResidentBlocks(model), calls, ("ffn", "attention")):
        units = [one.units for one in site.sites]
        if any(u.kind == "narrow" for u in units):
            part = joined([u.part(range(0, u.count, 2 if u.kind == "narrow" else 1)) for u in units])
            parts.setdefault(site.place, {})[site.path] = part
    return parts


def student_of(model: Any, parts: Mapping[tuple[str, int], Any]) -> tuple[Any, CompressionPlan]:
    """The student whose second and third block became one, with smaller modules in all of them; and its plan."""
    adapter, info = adapter_for(model), describe(SimpleNamespace(transformer=model, components={}))
    stacks, substitutes = {}, {}
    for spec in adapter.stacks:
        blocks, segments = adapter.blocks(model, spec), []
        for first, last in [(0, 0), (1, 2), *((i, i) for i in range(3, len(blocks)))]:
            start = start_index(first, last, "middle")
            segment = Segment(first, last, "middle" if last > first else None, dict(parts[spec.name, start]))
            block = substitute_block(blocks, segment)
            saved = sum(p.numel() for p in blocks[start].parameters()) - sum(p.numel() for p in block.parameters())
            segments.append(replace(segment, saved_params=saved))
            substitutes[spec.name, first, last] = block
        stacks[spec.name] = tuple(segments)
    plan = CompressionPlan(info, "optimal", {"keep": 0.5}, stacks, predict(info, stacks))
    student = assemble_student(model, adapter, plan, substitutes)
    register_plan(student, adapter, plan)
    return student.eval(), plan


@pytest.mark.parametrize("name", WITH_FIELD)
def test_the_stock_class_builds_the_narrower_model(name: str, tmp_path: Path) -> None:
    model, inputs = tiny(name)
    field = adapter_for(model).ffn_field
    student, plan = student_of(model, narrow_parts(model, inputs))
    assert type(student) is type(model)
    assert plan.predicted.params == sum(p.numel() for p in student.parameters())
    assert plan.predicted.params < sum(p.numel() for p in model.parameters())
    student.save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    assert config["_class_name"] in ADAPTERS
    assert "pruning" not in config
    assert config[RECORD]["uniform"]["fields"] == {field: model.config[field]}
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(output(loaded, inputs), output(student, inputs))
    kept = smaller_modules(loaded.config)
    apply_width(whole := type(model).from_config({**config, field: model.config[field]}), kept)
    compress_class(whole, kept)
    whole.load_state_dict(loaded.state_dict())
    assert torch.allclose(output(whole, inputs), output(loaded, inputs), atol=1e-5)


@pytest.mark.parametrize("name", WITH_FIELD)
def test_a_network_that_is_whole_or_of_another_width_needs_the_own_class(name: str) -> None:
    model, inputs = tiny(name)
    parts = narrow_parts(model, inputs)
    place = next(iter(parts))
    student, _ = student_of(model, {**parts, place: {}})
    assert type(student).__name__ == f"PPCL{type(model).__name__}"


def numbers(config: Mapping[str, Any], counts: set[str]) -> dict[str, Any]:
    """Each number of a config that is no count of blocks, doubled; None might be a number."""
    values = {key: value for key, value in config.items() if not key.startswith("_") and key not in counts}
    return {k: 2 * (v or 1) for k, v in values.items() if v is None or (type(v) in (int, float) and v)}


@pytest.mark.parametrize("name", TINY)
def test_every_number_that_sets_all_networks_and_nothing_else_is_known(name: str) -> None:
    """Such a number changes, in blocks alone, the outputs of some layers and the inputs of the others."""
    model, inputs = tiny(name)
    adapter = adapter_for(model)
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    before = shapes_of(type(model), config)
    assert before is not None
    networks = {
        f"{stack}.{block}.{join(path, layer)}"
        for (stack, block), parts in narrow_parts(model, inputs).items()
        for path, part in parts.items()
        for cut in cuts_of(part)
        if cut["kind"] == "narrow"
        for layer in (*cut["rows"], *cut["columns"], *cut.get("between", ()))
    }
    fields = []
    for field, value in numbers(config, {stack.count_field for stack in adapter.stacks}).items():
        after = shapes_of(type(model), {**config, field: value})
        if after is not None and after.keys() == before.keys():
            changed = {key.rpartition(".")[0] for key in before if before[key] != after[key]}
            fields += [field] if changed and changed == networks else []
    assert {*fields} - {"multiple_of"} == ({adapter.ffn_field} if adapter.ffn_field else set())
