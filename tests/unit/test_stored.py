"""How weights are stored, and what a model is known by wherever it is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppcl.common.tensor_files import needed_variant, variant_of, weights_variant
from ppcl.errors import ArtifactError, ModelError
from ppcl.export.pipeline import write_components
from ppcl.teacher.blocks import StreamedBlocks, loaded_bytes
from ppcl.teacher.loading import check_model, fetch_files, load_pipeline, stored_dtype
from ppcl.teacher.origin import lasting_name, model_files, teacher_of, weights_digest
from ppcl.teacher.stored import differences

CPU = torch.device("cpu")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A pipeline folder that a test may change."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def rename(model: Path, variant: str, parts: tuple[str, ...] = ("transformer", "vae", "text_encoder")) -> None:
    for part in parts:
        for file in sorted((model / part).glob("*.safetensors")):
            file.rename(file.with_name(file.name.replace(".safetensors", f".{variant}.safetensors")))


def refused(model: Path | str) -> str:
    with pytest.raises((ModelError, ArtifactError)) as caught:
        check_model(str(model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_variants_by_name() -> None:
    names = {
        "model.safetensors": None,
        "model.fp16.safetensors": "fp16",
        "diffusion_pytorch_model-00001-of-00002.safetensors": None,
        "model.fp16-00001-of-00002.safetensors": "fp16",
        "diffusion_pytorch_model-00001-of-00002.bf16.safetensors": "bf16",
        "config.json": None,
    }
    assert {name: variant_of(name) for name in names} == names
    assert needed_variant(["vae/model.safetensors", "vae/model.fp16.safetensors", "one.fp16.safetensors"]) is None
    assert needed_variant(["vae/m.safetensors", "transformer/m.fp16.safetensors", "a/b/m.x.safetensors"]) == "fp16"


@pytest.mark.parametrize("parts", [("transformer", "vae", "text_encoder"), ("transformer",), ("vae",)])
def test_variants_alone_are_loaded(model: Path, parts: tuple[str, ...]) -> None:
    before = load_pipeline(str(model), CPU).transformer.state_dict()
    rename(model, "bf16", parts)
    assert weights_variant(model) == "bf16"
    after = load_pipeline(str(model), CPU).transformer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert stored_dtype(str(model)) == torch.float32
    assert loaded_bytes(str(model), torch.float32)["transformer"] == 4 * sum(t.numel() for t in before.values())
    block = StreamedBlocks(str(model), CPU).copy(("transformer_blocks", 1))
    assert torch.equal(block.attn.to_q.weight, before["transformer_blocks.1.attn.to_q.weight"])


def test_variants_in_shards_are_checked_by_their_own_list(model: Path) -> None:
    pipeline = load_pipeline(str(model), CPU)
    shutil.rmtree(model / "transformer")
    pipeline.transformer.save_pretrained(model / "transformer", max_shard_size="200KB", variant="fp16")
    (model / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(  # as the hub's cache has it
        '{"weight_map": {"a": "diffusion_pytorch_model-00001-of-00009.safetensors"}}'
    )
    assert load_pipeline(str(model), CPU).transformer.config.num_layers == 6
    shard = sorted((model / "transformer").glob("*-of-*"))[1]
    shard.unlink()
    assert f"{shard} is missing" in refused(model)


def test_float8_is_read_and_exported_in_bfloat16(model: Path) -> None:
    weights = {k: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for k, v in load_file(model / WEIGHTS).items()}
    save_file(weights, model / WEIGHTS, {"format": "pt"})
    assert stored_dtype(str(model)) == torch.bfloat16
    loaded = load_pipeline(str(model), CPU, torch.float32).transformer.state_dict()
    name = "transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(loaded[name], weights[name].float())
    save_file({**weights, "transformer_blocks.0.attn.to_q.scale_weight": torch.ones(1)}, model / WEIGHTS)
    assert "quantised with scales of its own" in refused(model) and "in bf16 or fp16" in refused(model)


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "gguf", "modelopt"])
def test_a_quantised_transformer_is_refused(model: Path, method: str) -> None:
    path = model / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": method}}))
    assert f"stored quantised ({method})" in refused(model) and f"ppcl teacher {model} --out DIR" in refused(model)


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_a_lora_left_in_is_refused(model: Path, part: str) -> None:
    file = next((model / part).glob("*.safetensors"))
    save_file({"layer.base_layer.weight": torch.ones(2), "layer.lora_A.fast.weight": torch.ones(2)}, file)
    line = refused(model)
    assert f"{file} holds a LoRA beside its layers" in line and "pipe.fuse_lora(), pipe.unload_lora_weights()" in line


def test_what_is_missing_is_named(model: Path) -> None:
    file = next((model / "text_encoder").glob("*.safetensors"))
    file.rename(model / "elsewhere")
    assert f"{model / 'text_encoder'} holds no weights" in refused(model)
    shutil.rmtree(model / "vae")
    (model / "elsewhere").rename(file)
    assert f"{model / 'vae'} is missing (model_index.json names it)" in refused(model)


def test_what_is_no_pipeline_names_the_way(model: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(model / "transformer", tmp_path / "finetuned")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    cache = tmp_path / "models--owner--name"
    (cache / "snapshots" / "abc").mkdir(parents=True)
    lora, run, empty = (tmp_path / name for name in ("lora", "run", "empty"))
    for folder, name in ((lora, "pytorch_lora_weights.safetensors"), (run, "stages.json"), (empty, "notes.txt")):
        folder.mkdir()
        (folder / name).write_text("{}")
    ways = {
        alone / "diffusion_pytorch_model.safetensors": "--base PIPELINE --out DIR, and compress DIR",
        empty / "notes.txt": "is a file that holds no weights; give the pipeline's folder",
        tmp_path / "x.gguf": "is one file, and a pipeline folder of plain weights is needed; put it into its pipeline",
        alone: f"is a model without its pipeline; put it into its pipeline once: ppcl teacher {alone} --base",
        model / "transformer": f"is the transformer of a pipeline; give its folder, {model}",
        model / "model_index.json": f"is a pipeline's index; give its folder, {model}",
        cache: "is the hub's cache of owner/name; give owner/name",
        lora: f"is a LoRA, not a diffusers pipeline; fold it in: ppcl teacher PIPELINE --lora {lora}",
        run: f"is a run of ppcl, not a diffusers pipeline; give {run / 'pipeline'}",
        empty: "model_index.json is missing; give the pipeline's top folder",
    }
    for path, way in ways.items():
        assert way in refused(path), path


def test_an_exported_pipeline_loads_without_the_variant_of_its_teacher(model: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(str(model), CPU)
    shutil.rmtree(model / "text_encoder")
    pipeline.text_encoder.save_pretrained(model / "text_encoder", max_shard_size="2MB")
    names = {path.name for path in (model / "text_encoder").iterdir()}
    rename(model, "bf16")
    listing = model / "text_encoder" / "model.safetensors.index.json"
    listing.write_text(listing.read_text().replace(".safetensors", ".bf16.safetensors"))
    listing.rename(listing.with_name("model.safetensors.index.bf16.json"))
    assert load_pipeline(str(model), CPU)
    for link in (False, True):
        out = tmp_path / f"out-{link}"
        out.mkdir()
        write_components(pipeline, model, out, link)
        pipeline.transformer.save_pretrained(out / "transformer")
        assert {path.name for path in (out / "text_encoder").iterdir()} == names and len(names) > 3
        assert weights_variant(out) is None and load_pipeline(str(out), CPU)


# Identity


def test_what_is_not_loaded_does_not_count(model: Path) -> None:
    before = model_files(str(model))
    rubbish = [
        ".DS_Store",
        "README.md",
        "assets/sample.png",
        ".cache/huggingface/download/transformer/config.json.metadata",
        "transformer/README.md",
        "vae/.DS_Store",
        "whole.safetensors",
        "LICENSE.md",
        ".gitattributes",
        "notes/a.json",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
    ]
    for name in rubbish:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model / WEIGHTS, model / name)
    assert model_files(str(model)) == before
    moved = model.rename(model.with_name("elsewhere"))
    assert model_files(str(moved)) == before and WEIGHTS in before and "model_index.json" in before
    for name in ("scheduler/scheduler_config.json", WEIGHTS, "tokenizer/tokenizer.json"):
        with (moved / name).open("ab") as file:
            file.write(b" ")
        assert differences(before, model_files(str(moved))) == f"{name} is another one"
        before = model_files(str(moved))
    (moved / "tokenizer" / "tokenizer.json").rename(moved / "tokenizer" / "vocab.json")
    said = differences(before, model_files(str(moved)))
    assert said == "tokenizer/tokenizer.json is missing, tokenizer/vocab.json is new"


def hub_cache(model: Path, home: Path, commit: str) -> Path:
    """The hub's layout: blobs, a snapshot of links, and the commit that the name stands for."""
    root = home / "models--owner--tiny"
    for file in sorted(path for path in model.rglob("*") if path.is_file()):
        place = root / "snapshots" / commit / file.relative_to(model)
        blob = root / "blobs" / f"{commit}-{'-'.join(file.relative_to(model).parts)}"
        for folder in (place.parent, blob.parent, root / "refs"):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        place.symlink_to(os.path.relpath(blob, place.parent))
    (root / "refs" / "main").write_text(commit)
    return root / "snapshots" / commit


def test_a_hub_model_is_its_files(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants
    import huggingface_hub.file_download as file_download

    for module in (constants, file_download):
        if hasattr(module, "HF_HUB_CACHE"):
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("ppcl.teacher.loading._download", lambda model: fetched.append(model) or missing)
    fetched: list[str] = []
    missing = hub_cache(model, tmp_path / "hub", "a" * 40)
    assert fetch_files("owner/tiny") == missing
    assert model_files("owner/tiny") == model_files(str(model))
    (model / "README.md").write_text("another commit, the same weights")
    hub_cache(model, tmp_path / "hub", "b" * 40)
    assert weights_digest("owner/tiny") == weights_digest(str(model))
    with (model / "transformer" / "config.json").open("a") as file:
        file.write("\n")
    hub_cache(model, tmp_path / "hub", "c" * 40)
    assert differences(model_files(str(missing)), model_files("owner/tiny")) == "transformer/config.json is another one"
    assert not fetched
    missing = hub_cache(model, tmp_path / "hub", "d" * 40)
    (missing / WEIGHTS).unlink()
    with pytest.raises(ModelError, match="holds no weights"):  # after an attempt to fetch the rest
        fetch_files("owner/tiny")
    assert fetched == ["owner/tiny"]


def test_the_teacher_of_a_moved_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "half"
    run.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert lasting_name("model") == str(model) and lasting_name("emoji") == "emoji" and lasting_name("a/b") == "a/b"
    ledger = {"model": str(model), "teacher_from_here": "../../model", "made_of": {"files": model_files("model")}}
    (run / "stages.json").write_text(json.dumps(ledger))
    monkeypatch.chdir(run)
    assert teacher_of(run) == str(model)
    whole = shutil.move(tmp_path / "runs", shutil.move(model, tmp_path / "there" / "model").parent)
    assert Path(teacher_of(Path(whole) / "half")) == tmp_path / "there" / "model"
    apart = Path(shutil.copytree(Path(whole) / "half", tmp_path / "apart"))
    with pytest.raises(ModelError, match=f"is not at {model}; say where it is now with --teacher"):
        teacher_of(apart)
    assert teacher_of(apart, str(tmp_path / "there" / "model")).endswith("there/model")
    (tmp_path / "there" / "model" / "transformer" / "more.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is not the teacher of .*: transformer/more.json is new"):
        teacher_of(apart, str(tmp_path / "there" / "model"))
    (apart / "stages.json").write_text("[]")
    with pytest.raises(ArtifactError, match="a list, not a mapping"):
        teacher_of(apart)
