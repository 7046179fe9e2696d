"""Bundles on disk, and pipelines that need nothing of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import (
    DUAL,
    SINGLE,
    flux_call,
    plan_for,
    qwen_call,
    random_substitutes,
    shared_pipeline,
    tiny_flux,
    tiny_qwen,
)
from torch import nn

from ppcl.common.tensor_files import read_tensor_header
from ppcl.config import ExportConfig
from ppcl.errors import ArtifactError
from ppcl.export.pipeline import export
from ppcl.student.assembly import assemble_student
from ppcl.student.bundle import Bundle, build_student, load_bundle, save_bundle
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import adapter_for
from ppcl.teacher.flops import count_params

RUNS = [(DUAL, 0, 1), (DUAL, 2, 3)]


def new_bundle(transformer: nn.Module, runs: list[tuple[str, int, int]], tuned: bool = False) -> Bundle:
    adapter = adapter_for(transformer)
    substitutes = random_substitutes(transformer, adapter, runs)
    plan = plan_for(transformer, runs)
    student = assemble_student(transformer, adapter, plan, substitutes)
    own = {id(p) for block in substitutes.values() for p in block.parameters()}
    changed = {n: p + 0.02 for n, p in student.named_parameters() if id(p) not in own} if tuned else {}
    return Bundle(plan, substitutes, changed)


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize(
    ("transformer", "call", "runs"),
    [
        (tiny_qwen(5), qwen_call(padded=True), [(DUAL, 1, 2)]),
        (tiny_flux(), flux_call(), [(DUAL, 0, 1), (SINGLE, 1, 3)]),
    ],
    ids=["qwen", "flux"],
)
def test_round_trip(tmp_path: Path, transformer: Any, call: dict[str, Any], runs: list[Any], tuned: bool) -> None:
    adapter, bundle = adapter_for(transformer), new_bundle(transformer, runs, tuned)
    save_bundle(bundle, tmp_path / "bundle", {"steps": 3}, transformer)
    loaded = load_bundle(tmp_path / "bundle", transformer, adapter)
    assert loaded.plan == bundle.plan
    assert set(loaded.substitutes) == set(runs)
    first, second = (build_student(transformer, adapter, b) for b in (bundle, loaded))
    with torch.no_grad():
        assert torch.equal(velocity(first, call), velocity(second, call))
        assert not torch.allclose(velocity(first, call), velocity(transformer, call), atol=1e-3)
        if not tuned:
            hybrid = assemble_student(transformer, adapter, bundle.plan, bundle.substitutes)
            assert torch.equal(velocity(first, call), velocity(hybrid, call))
    about = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert about["steps"] == 3
    assert ("tuned.safetensors" in about["files"]) == tuned


def test_tuned_weights_reach_the_student_and_not_the_teacher() -> None:
    transformer = tiny_qwen(4)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    bundle = new_bundle(transformer, [(DUAL, 1, 2)], tuned=True)
    student = build_student(transformer, adapter_for(transformer), bundle)
    weights = dict(student.named_parameters())
    assert torch.equal(weights["proj_out.weight"], before["proj_out.weight"] + 0.02)
    # block 3 of the teacher is block 2 of the student
    assert torch.equal(weights[f"{DUAL}.2.attn.to_q.weight"], before[f"{DUAL}.3.attn.to_q.weight"] + 0.02)
    assert all(torch.equal(tensor, before[name]) for name, tensor in transformer.state_dict().items())


def test_a_student_shares_nothing_with_the_teacher() -> None:
    transformer = tiny_qwen(4)
    bundle = new_bundle(transformer, [(DUAL, 1, 2)])
    student = build_student(transformer, adapter_for(transformer), bundle, torch.bfloat16)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in transformer.parameters()} == {torch.float32}
    assert {p.dtype for block in bundle.substitutes.values() for p in block.parameters()} == {torch.float32}
    mine = build_student(transformer, adapter_for(transformer), bundle)
    taken = {p.data_ptr() for m in (transformer, *bundle.substitutes.values()) for p in m.parameters()}
    assert not taken & {p.data_ptr() for p in mine.parameters()}
    assert not any(p.requires_grad for p in mine.parameters())
    assert not mine.training
    assert transformer.config["num_layers"] == 4
    assert mine.config["num_layers"] == 3


@pytest.mark.parametrize("name", ["plan.json", "substitutes.safetensors", "tuned.safetensors"])
def test_damaged_and_missing_files_are_named(tmp_path: Path, name: str) -> None:
    transformer = tiny_qwen(4)
    save_bundle(new_bundle(transformer, [(DUAL, 1, 2)], tuned=True), tmp_path / "bundle", {}, transformer)
    path = tmp_path / "bundle" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=f"{name} is damaged or of another bundle; delete"):
        load_bundle(tmp_path / "bundle", transformer, adapter_for(transformer))
    path.unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        load_bundle(tmp_path / "bundle", transformer, adapter_for(transformer))


def test_a_missing_bundle(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        load_bundle(tmp_path / "bundle", tiny_qwen(2), adapter_for(tiny_qwen(2)))


def test_a_failed_save_leaves_the_old_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = tiny_qwen(4)
    save_bundle(new_bundle(transformer, [(DUAL, 1, 2)]), tmp_path / "bundle", {}, transformer)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ppcl.student.bundle.write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        save_bundle(new_bundle(transformer, [(DUAL, 2, 3)]), tmp_path / "bundle", {}, transformer)
    assert set(load_bundle(tmp_path / "bundle", transformer, adapter_for(transformer)).substitutes) == {(DUAL, 1, 2)}
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


# What a user runs who has diffusers and has never heard of this project.
STOCK = """
import sys
sys.modules["ppcl"] = None
import numpy, torch
from diffusers import DiffusionPipeline
folder, out = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(folder)
_, info = type(pipeline.transformer).from_pretrained(folder, subfolder="transformer", output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
assert not any(name.split(".")[0] == "ppcl" and module for name, module in sys.modules.items())
assert all(p.dtype == torch.float32 and not p.is_meta for p in pipeline.transformer.parameters())
pipeline.set_progress_bar_config(disable=True)
picture = pipeline("red cat", negative_prompt=" ", true_cfg_scale=2.0, height=16, width=16, num_inference_steps=2,
                   generator=torch.Generator().manual_seed(0), output_type="np").images
numpy.save(out, picture)
"""


def draw(pipeline: Any) -> np.ndarray:
    return pipeline(
        "red cat",
        negative_prompt=" ",
        true_cfg_scale=2.0,
        height=16,
        width=16,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images


def student_and_pipeline() -> tuple[Any, Any, Bundle]:
    """A teacher, and its student of two blocks."""
    pipeline = shared_pipeline()
    bundle = new_bundle(pipeline.transformer, RUNS, tuned=True)
    return build_student(pipeline.transformer, adapter_for(pipeline.transformer), bundle), pipeline, bundle


@pytest.mark.slow
def test_an_exported_pipeline_needs_stock_diffusers_alone(tmp_path: Path) -> None:
    student, pipeline, bundle = student_and_pipeline()
    kind = type(pipeline)
    expected = draw(kind(**{**pipeline.components, "transformer": student}))
    assert np.abs(expected - draw(pipeline)).max() > 1e-3
    pipeline.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("the teacher's card")
    out = export(pipeline, student, bundle.plan, str(tmp_path / "source"), tmp_path / "pipeline", ExportConfig())
    done = subprocess.run(
        [sys.executable, "-I", "-c", STOCK, str(out), str(tmp_path / "picture.npy")],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.abs(np.load(tmp_path / "picture.npy") - expected).max() < 1e-4
    assert "ppcl" not in (out / "model_index.json").read_text()
    for name in ("vae", "text_encoder"):  # copied byte by byte
        for file in sorted((tmp_path / "source" / name).iterdir()):
            assert (out / name / file.name).read_bytes() == file.read_bytes()
    config = json.loads((out / "transformer" / "config.json").read_text())
    assert config["num_layers"] == 2
    assert config["_ppcl"]["kept_blocks"] == {DUAL: [[0, 1], [2, 3]]}
    card = (out / "README.md").read_text()
    assert "the teacher's card" not in card
    assert "[0 1] [2 3]" in card


def test_export_of_a_hub_model_writes_all_components_in_the_wanted_dtype(tmp_path: Path) -> None:
    """A source that is not a folder: the components are saved from memory."""
    student, pipeline, bundle = student_and_pipeline()
    out = export(pipeline, student, bundle.plan, "owner/name", tmp_path / "pipeline", ExportConfig(dtype="bfloat16"))
    header = read_tensor_header(next((out / "transformer").glob("*.safetensors")))
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert sum(np.prod(entry["shape"]) for entry in header.values()) == count_params(student)
    index = json.loads((out / "model_index.json").read_text())
    assert {name for name, value in index.items() if isinstance(value, list) and value[0]} == {
        "scheduler",
        "text_encoder",
        "tokenizer",
        "transformer",
        "vae",
    }
    loaded = type(pipeline).from_pretrained(out)
    loaded.set_progress_bar_config(disable=True)
    assert draw(loaded).shape == (1, 16, 16, 3)


def test_an_export_that_does_not_load_back_is_not_published(tmp_path: Path) -> None:
    student, pipeline, bundle = student_and_pipeline()
    student.register_to_config(num_layers=3)  # one block more than there is
    with pytest.raises(ArtifactError, match="does not match its config"):
        export(pipeline, student, bundle.plan, "owner/name", tmp_path / "pipeline", ExportConfig())
    assert list(tmp_path.iterdir()) == []
