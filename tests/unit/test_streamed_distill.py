"""Distillation with blocks that are read from files: what resident training gives, with two blocks in memory."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed import assert_close
from tiny_models import DUAL, SINGLE, flux_call, plan_for, qwen_call, tiny_flux, tiny_qwen, write_states

from ppcl.common.files import read_json, write_json
from ppcl.common.tensor_files import read_tensors
from ppcl.config import DistillConfig, load_config
from ppcl.distill.memory import STREAMED, estimate_streamed, weight_bytes
from ppcl.distill.streamed import Starts, distill_streamed
from ppcl.distill.trainer import Distiller
from ppcl.errors import ConfigError
from ppcl.student.bundle import load_bundle
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.blocks import StreamedBlocks
from ppcl.teacher.families import adapter_for

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {
    **{"local_steps": 3, "output_steps": 0, "batch_size": 5, "checkpoint_every": 1, "warmup_steps": 1},
    **{"local_learning_rate": 3e-4, "clip_norm": 1e9, "keep_start": False},
}


def saved(folder: Path, teacher: Any, calls: list[dict[str, Any]], starts: dict[Any, str]) -> CompressionPlan:
    """Write a pipeline of a transformer alone, with its states; a plan of runs and starts."""
    teacher.save_pretrained(folder / "model" / "transformer")
    entry = ["diffusers", type(teacher).__name__]
    write_json(folder / "model" / "model_index.json", {"_class_name": "Pipeline", "transformer": entry})
    for split in ("train", "held-out"):
        write_states(folder / "states", split, calls, teacher)
    plan = plan_for(teacher, list(starts))
    stacks = {
        name: tuple(replace(s, start=starts.get((name, s.first, s.last))) for s in segments)
        for name, segments in plan.stacks.items()
    }
    return replace(plan, stacks=stacks)


def qwen(folder: Path) -> tuple[Any, CompressionPlan]:
    teacher, calls = tiny_qwen(6), [qwen_call(batch=7, seed=3, padded=True), qwen_call(batch=2, text=4, seed=5)]
    return teacher, saved(folder, teacher, calls, {(DUAL, 0, 1): "first", (DUAL, 2, 3): "mean", (DUAL, 4, 5): "middle"})


def flux(folder: Path) -> tuple[Any, CompressionPlan]:
    teacher = tiny_flux()
    runs = {(DUAL, 1, 2): "last", (SINGLE, 0, 1): "middle", (SINGLE, 2, 3): "mean"}
    return teacher, saved(folder, teacher, [flux_call(batch=7)], runs)


def streamed(folder: Path, plan: CompressionPlan, name: str, log: Any = None, **changes: Any) -> Path:
    """Train with streamed blocks; returns the bundle."""
    settings = DistillConfig(**{**SETTINGS, **changes})
    source = StreamedBlocks(str(folder / "model"), CPU, torch.float32)
    distill_streamed(source, plan, folder / "states", folder / name, settings, 0, "fp32", log)
    assert not list((folder / name).rglob("states-*"))
    return folder / name / "bundle"


@pytest.mark.parametrize("new", [qwen, flux])
def test_streamed_training_is_resident_training_to_the_last_bit(new: Any, tmp_path: Path) -> None:
    teacher, plan = new(tmp_path)
    bundle = streamed(tmp_path, plan, "streamed")
    for name, changes in (("single", {"one_at_a_time": True}), ("joint", {})):
        settings = DistillConfig(**{**SETTINGS, **changes})
        common = (teacher, adapter_for(teacher), plan, tmp_path / "states", tmp_path / name, settings, 0, "fp32")
        Distiller(*common).run()
    files = {name: tmp_path / name / "bundle" / "substitutes.safetensors" for name in ("single", "joint", "streamed")}
    assert files["streamed"].read_bytes() == files["single"].read_bytes()
    assert_close(read_tensors(files["streamed"])[0], read_tensors(files["joint"])[0])
    loaded = load_bundle(bundle, teacher, adapter_for(teacher))
    assert loaded.plan == plan
    assert len(loaded.substitutes) == 3
    assert read_json(bundle / "bundle.json")["left_out"] == []


def test_one_block_beside_the_next_and_one_substitute_are_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plan = qwen(tmp_path)
    sources, there = [], []
    monkeypatch.setattr(StreamedBlocks, "__init__", keeping(sources))

    def count(row: dict[str, Any]) -> None:
        blocks = sources[0].transformer.transformer_blocks
        there.append(sum(not p.is_meta for block in blocks for p in list(block.parameters())[:1]))

    streamed(tmp_path, plan, "streamed", count)
    assert there == [1] * 9


def test_a_finished_substitute_is_gone_before_the_next_one_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, with its optimizer: not when the garbage collector happens to come."""
    _, plan = qwen(tmp_path)
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    real = Starts.__call__

    def watched(self: Any, run: Any) -> Any:
        alive.append(sum(block() is not None for block in made))
        block = real(self, run)
        made.append(weakref.ref(block))
        return block

    monkeypatch.setattr(Starts, "__call__", watched)
    gc.collect()
    gc.disable()
    try:
        streamed(tmp_path, plan, "streamed", carried_steps=1)
    finally:
        gc.enable()
    assert alive == [0] * 6


def keeping(sources: list[Any]) -> Any:
    """The constructor of streamed blocks, which leaves them in a list."""
    real = StreamedBlocks.__init__

    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        sources.append(self)

    return start


@pytest.mark.parametrize("memory", [1e12, 0])
@pytest.mark.parametrize("row", [5, pytest.param(2, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)])
def test_killed_training_goes_on_to_the_same_bits(
    row: int, memory: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plan = qwen(tmp_path)
    whole = streamed(tmp_path, plan, "whole")
    monkeypatch.setattr("ppcl.distill.in_sweep.training_course.__defaults__", (None, *defaults(memory)))
    rows: list[dict[str, Any]] = []

    def die(entry: dict[str, Any]) -> None:
        rows.append(entry)
        if len(rows) == row:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streamed(tmp_path, plan, "killed", die)
    again: list[dict[str, Any]] = []
    walked: list[int] = []
    walk = StreamedBlocks.walk

    def counted(self: Any, places: Any) -> Any:
        walked.append(len(places))
        return walk(self, places)

    monkeypatch.setattr(StreamedBlocks, "walk", counted)
    killed = streamed(tmp_path, plan, "killed", again.append)
    ends = {2: 1, 5: 3, 9: 5}  # where the run ends that was trained when it was killed
    assert max(walked) == (6 if memory else 6 - ends[row])
    assert len(again) == 9 - row + 1  # the step whose row was the last one is done again, and no other
    name = "substitutes.safetensors"
    assert (killed / name).read_bytes() == (whole / name).read_bytes()


def defaults(memory: float) -> tuple[Any, ...]:
    from ppcl.training.distributed import SINGLE as ALONE

    return ALONE, "fp32", memory


def test_a_start_that_training_leads_away_from_is_kept_by_substitute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, plan = qwen(tmp_path)
    untrained = read_tensors(streamed(tmp_path, plan, "none", local_steps=0) / "substitutes.safetensors")[0]
    far = {"keep_start": True, "local_learning_rate": 5.0}
    kept = read_tensors(streamed(tmp_path, plan, "far", **far) / "substitutes.safetensors")[0]
    assert all(torch.equal(kept[name], untrained[name]) for name in untrained)
    assert capsys.readouterr().err.count("its start is kept") == 3
    good = read_tensors(streamed(tmp_path, plan, "good", keep_start=True) / "substitutes.safetensors")[0]
    assert any(not torch.equal(good[name], untrained[name]) for name in untrained)


def test_what_needs_the_whole_student_is_left_out_in_one_line_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, plan = qwen(tmp_path)
    bundle = streamed(tmp_path, plan, "some", local_steps=0, output_steps=7, alternating_steps=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(lines) == 1
    assert "alternating stage (2 steps), output stage (7 steps)" in lines[0]
    assert read_json(bundle / "bundle.json")["left_out"] == ["alternating", "output"]
    for changes in ({"sparsity": {"share": 0.5}}, {"sequence": "sequential"}, {"fresh": 8}):
        with pytest.raises(ConfigError, match=r"needs the whole model in memory.* blocks=resident"):
            streamed(tmp_path, plan, "refused", **changes)
    with pytest.raises(ConfigError, match="blocks=streamed leaves no whole model for sparsity"):
        load_config([], ["blocks=streamed", "sparsity.share=0.5"])


def test_the_estimate_of_streamed_training_does_not_grow_with_depth() -> None:
    found = []
    for layers in (4, 8):
        teacher = tiny_qwen(layers)
        plan = plan_for(teacher, [(DUAL, i, i + 1) for i in range(0, layers, 2)])
        common = (teacher, adapter_for(teacher), plan, qwen_call(batch=4), DistillConfig(train="all"))
        (estimate,) = (estimates := estimate_streamed(*common)).values()
        assert set(estimates) == {STREAMED}
        found.append(estimate)
    block = weight_bytes(tiny_qwen(1).transformer_blocks[0])
    assert found[0] == found[1]
    assert found[0].trained == block
    assert found[0].teacher == weight_bytes(tiny_qwen(1)) + block
