"""`ppcl compress` on a pipeline that it made: fewer blocks and every kind of smaller module, then another round."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from ordinary_heads import heads_of
from tiny_pipeline import tiny_qwen_pipeline
from tiny_pipelines import PIPELINES
from torch import nn

import ppcl.pipelines  # noqa: F401 - makes the compressed classes known
from ppcl.config import ExportConfig
from ppcl.export.pipeline import export
from ppcl.modules.slicing import neurons_of
from ppcl.student.assembly import substitute_block
from ppcl.student.bundle import Bundle, build_student
from ppcl.student.plan import CompressionPlan, Segment
from ppcl.student.prediction import predict
from ppcl.teacher.block_map import block_maps
from ppcl.teacher.description import describe
from ppcl.teacher.families import adapter_for
from ppcl.teacher.loading import load_pipeline

Cli = Callable[..., tuple[int, str]]


def with_all_kinds(pipeline: Any, folder: Path) -> dict[str, list[Any]]:
    """Export a student with a run, and in other blocks low ranks, an affine map, fewer units, a linear text stream."""
    transformer = pipeline.transformer.eval().requires_grad_(False)
    adapter, model = adapter_for(transformer), describe(pipeline)
    spec = adapter.stacks[0]
    block = getattr(transformer, spec.name)[0]
    low: dict[str, Any] = {path: {"kind": "low_rank", "size": 4} for path in spec.modulation.values()}
    units = neurons_of(block.get_submodule(spec.ffn["image"])), heads_of(block.attn)
    assert units[0] is not None and units[1] is not None
    narrow = {spec.ffn["image"]: units[0].part(range(0, units[0].count, 2)), "attn": units[1].part([1])}
    text: dict[str, Any] = {path: {"kind": kind, "size": 0} for path, kind in spec.text_parts.items()}
    pieces = (
        Segment(0, 0, width={**low, spec.ffn["text"]: {"kind": "linear", "size": 0}}),
        Segment(1, 2, "middle"),
        Segment(3, 3, width={**narrow, **text}),
        *(Segment(i, i) for i in range(4, model.stacks[0].num_blocks)),
    )
    stacks = {s.name: tuple(Segment(i, i) for i in range(s.num_blocks)) for s in model.stacks} | {spec.name: pieces}
    plan = CompressionPlan(model, "optimal", {"keep": 0.9}, stacks, predict(model, stacks))
    substitutes = {
        key: substitute_block(getattr(transformer, key[0]), segment) for key, segment in Bundle(plan, {}).members()
    }
    student = build_student(transformer, adapter, Bundle(plan, substitutes))
    export(pipeline, student, plan, "owner/first", folder, ExportConfig())
    kept: dict[str, list[Any]] = student.config["_ppcl"]["kept_blocks"]
    return kept


CASES = {
    "qwen-all": ("qwen", "[modulation,ffn,attention,text]", []),
    "qwen-streamed": ("qwen", "[modulation,ffn]", ["blocks=streamed"]),
    "flux-all": ("flux", "[modulation,ffn,attention,text]", []),
    "sd3-depth": ("sd3", "[]", []),
}


SLOW = ("qwen-streamed", "sd3-depth")


@pytest.mark.parametrize("case", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES])
def test_another_round_runs_and_names_the_first_teachers_blocks(
    case: str, run_cli: Cli, prompts_file: Path, small_config: Path, tmp_path: Path
) -> None:
    family, width, more = CASES[case]
    torch.manual_seed(0)
    teacher = tiny_qwen_pipeline() if family == "qwen" else PIPELINES[family]()
    with_all_kinds(teacher, tmp_path / "one")
    before = load_pipeline(str(tmp_path / "one"), torch.device("cpu")).transformer
    names = [s.name for s in adapter_for(before).stacks]
    options = [f"fit.width={width}", "fit.modulation_tolerances=[0.5,0.1]", "device=cpu", *more]
    if family == "flux":
        options += ["capture.guidance_scale=3.5"]
    code, err = run_cli(
        "compress", tmp_path / "one", "--out", tmp_path / "two", "--keep", 0.8, "--config", small_config,
        "--prompts", prompts_file, *(word for option in options for word in ("--set", option)),
    )  # fmt: skip
    assert code == 0, err
    assert "no estimate of time and memory" not in err
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "two" / "pipeline")
    after = pipeline.transformer
    assert type(after) is type(before)
    plan = json.loads((tmp_path / "two" / "plan.json").read_text())
    assert sum(p.numel() for p in after.parameters()) == plan["predicted"]["params"]
    assert plan["predicted"]["param_ratio"] <= 0.8
    maps, old = block_maps(after.config["_ppcl"]["kept_blocks"]), block_maps(before.config["_ppcl"]["kept_blocks"])
    for name in names:
        assert maps[name].num_teacher_blocks == old[name].num_teacher_blocks
        assert len(maps[name].spans) == len(getattr(after, name))
        assert {first for first, _ in maps[name].spans} <= {first for first, _ in old[name].spans}
    assert after.config["_ppcl"]["source_model"] == "owner/first"
    card = (tmp_path / "two" / "pipeline" / "README.md").read_text()
    assert "import ppcl.pipelines" in card and "this is round 2" in card and "# first, compressed" in card
    page = (tmp_path / "two" / "report.html").read_text()
    assert "was compressed before" in page and "import ppcl.pipelines" in page


def test_smaller_modules_of_kept_blocks_keep_their_weights(tmp_path: Path) -> None:
    """The blocks that a second round leaves alone answer as they did."""
    teacher = tiny_qwen_pipeline()
    with_all_kinds(teacher, tmp_path / "one")
    before = load_pipeline(str(tmp_path / "one"), torch.device("cpu")).transformer
    model, name = describe(load_pipeline(str(tmp_path / "one"), torch.device("cpu"))), "transformer_blocks"
    stacks = {name: (Segment(0, 0), Segment(1, 1), Segment(2, 2), Segment(3, 4, "first"))}
    plan = CompressionPlan(model, "optimal", {"keep": 0.8}, stacks, predict(model, stacks))
    blocks: nn.ModuleList = getattr(before, name)
    student = build_student(before, adapter_for(before), Bundle(plan, {(name, 3, 4): blocks[3]}))
    student.save_pretrained(tmp_path / "two")
    rebuilt = type(student).from_pretrained(tmp_path / "two")
    for index in range(3):
        for key, value in blocks[index].state_dict().items():
            assert torch.equal(getattr(rebuilt, name)[index].state_dict()[key], value), key
    assert rebuilt.config["_ppcl"]["kept_blocks"] == {name: [0, [1, 2], 3, [4, 5]]}
