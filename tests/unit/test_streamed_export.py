"""An export whose transformer is never in memory: the files of the one that is, byte by byte."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_compressed import FLUX, QWEN, bundle_for
from tiny_models import DUAL, qwen_call, random_substitutes, shared_pipeline, tiny_flux, tiny_qwen
from torch import nn

import ppcl.export.streamed
from ppcl.common.files import read_json, write_json
from ppcl.config import ExportConfig
from ppcl.errors import ArtifactError
from ppcl.export.pipeline import export
from ppcl.export.streamed import export_streamed
from ppcl.student.bundle import Bundle, build_student, load_bundle, save_bundle
from ppcl.teacher.blocks import StreamedBlocks
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import adapter_for
from ppcl.teacher.loading import load_pipeline

CPU = torch.device("cpu")
SPARSITY = {
    "pattern": "unstructured",
    "criterion": "wanda",
    "allocation": "uniform",
    "zeros": 0.1,
    "zeros_in_layers": 0.5,
}


def stored(transformer: Any, folder: Path, **options: Any) -> str:
    """A whole pipeline's folder with this transformer, in bfloat16."""
    shared_pipeline().save_pretrained(folder)
    for file in (folder / "transformer").iterdir():
        file.unlink()
    transformer.bfloat16().save_pretrained(folder / "transformer", **options)
    index = read_json(folder / "model_index.json")
    write_json(folder / "model_index.json", index | {"transformer": ["diffusers", type(transformer).__name__]})
    return str(folder)


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def both(model: str, bundle: Bundle, tmp_path: Path, **options: Any) -> tuple[Path, Path]:
    """A bundle exported in both ways; configs apart, since a loaded one remembers its folder."""
    settings = ExportConfig(**options)
    pipeline = load_pipeline(model, CPU)
    save_bundle(bundle, tmp_path / "bundle", {}, pipeline.transformer)
    loaded = load_bundle(tmp_path / "bundle", pipeline.transformer, adapter_for(pipeline.transformer))
    student = build_student(pipeline.transformer, adapter_for(pipeline.transformer), loaded)
    resident = export(pipeline, student, loaded.plan, model, tmp_path / "resident", settings)
    source = StreamedBlocks(model, CPU)
    streamed = export_streamed(source, tmp_path / "bundle", model, tmp_path / "streamed", settings)
    for folder in (resident, streamed):
        config = read_json(folder / "transformer" / "config.json")
        config.pop("_name_or_path", None)
        write_json(folder / "transformer" / "config.json", config)
    return resident, streamed


@pytest.mark.parametrize(
    "options",
    [{}, {"max_shard_size": "20KB"}, {"variant": "fp16"}, {"variant": "bf16", "max_shard_size": "20KB"},
     {"dtype": "float32"}, {"remote_code": True}],
)  # fmt: skip
@pytest.mark.parametrize("family", ["qwen", "flux"])
def test_the_files_are_those_of_the_resident_export(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    teacher = tiny_qwen(6) if family == "qwen" else tiny_flux(3, 4)
    bundle = bundle_for(teacher, QWEN if family == "qwen" else FLUX)
    model = stored(teacher, tmp_path / "model", max_shard_size="60KB")
    resident, streamed = both(model, bundle, tmp_path, **options)
    assert files(resident) == files(streamed)
    assert read_json(streamed / "transformer" / "config.json")["pruning"]


def test_depth_alone_needs_nothing_of_ours_and_draws_alike(tmp_path: Path) -> None:
    teacher = tiny_qwen(5)
    bundle = bundle_for(teacher, {(DUAL, 1, 3): {}})
    model = stored(teacher, tmp_path / "model")
    resident, streamed = both(model, bundle, tmp_path)
    assert files(resident) == files(streamed)
    kind = type(teacher)
    loaded = [kind.from_pretrained(folder / "transformer").float() for folder in (resident, streamed)]
    with torch.no_grad():
        assert torch.equal(*(velocity(model, qwen_call(2)) for model in loaded))


def test_tuned_weights_lora_and_masks_are_in_it(tmp_path: Path) -> None:
    teacher = tiny_qwen(6)
    made = bundle_for(teacher, {(DUAL, 1, 2): {}})
    segments = made.plan.stacks[DUAL]
    stacks = {DUAL: (*segments[:-1], replace(segments[-1], sparsity=0.5))}
    plan, sparse = replace(made.plan, stacks=stacks, sparsity=SPARSITY), (DUAL, 5, 5)
    substitutes = {**made.substitutes, **random_substitutes(teacher, adapter_for(teacher), [sparse])}
    torch.manual_seed(1)
    weight = substitutes[sparse].attn.to_q.weight
    layer = "transformer_blocks.0.attn.to_k"
    bundle = Bundle(
        plan,
        substitutes,
        tuned={"proj_out.weight": torch.randn_like(teacher.proj_out.weight)},
        lora={f"{layer}.lora_A.weight": torch.randn(2, 32), f"{layer}.lora_B.weight": torch.randn(32, 2)},
        masks={"transformer_blocks/5-5/attn.to_q.weight": torch.rand_like(weight) > 0.5},
    )
    model = stored(teacher, tmp_path / "model")
    resident, streamed = both(model, bundle, tmp_path)
    assert files(resident) == files(streamed)
    parameters = dict(load_pipeline(str(streamed), CPU).transformer.named_parameters())
    assert 0.3 < (parameters["transformer_blocks.4.attn.to_q.weight"] == 0).float().mean() < 0.7
    assert not torch.equal(parameters[f"{layer}.weight"], teacher.get_parameter(f"{layer}.weight").float())


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_qwen(6)
    model = stored(teacher, tmp_path / "model")
    bundle = bundle_for(teacher, {(DUAL, 1, 2): {}})
    other = bundle_for(teacher, {(DUAL, 1, 3): {}})
    save_bundle(Bundle(other.plan, {(DUAL, 1, 3): nn.Linear(2, 2)}), tmp_path / "wrong", {}, teacher)
    save_bundle(bundle, tmp_path / "bundle", {}, teacher)
    source, out = StreamedBlocks(model, CPU), tmp_path / "out"
    with pytest.raises(ArtifactError, match="has other weights than its plan"):
        export_streamed(source, tmp_path / "wrong", model, out, ExportConfig())
    monkeypatch.setattr(ppcl.export.streamed, "safetensors_name", lambda dtype: "F64")
    with pytest.raises(ArtifactError, match="does not match its config"):
        export_streamed(source, tmp_path / "bundle", model, out, ExportConfig())
    assert not out.exists()
