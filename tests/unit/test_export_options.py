"""Export: dtype, shards, variant, linked components, provenance, model card."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_file import comparison, evaluation, model, number
from huggingface_hub import ModelCard
from test_bundle_export import draw, student_and_pipeline
from tiny_models import DUAL, plan_for, shared_pipeline, tiny_flux, tiny_qwen

from ppcl import __version__
from ppcl.common.artifacts import load_artifact, save_artifact
from ppcl.common.files import link_file
from ppcl.common.outside import check_links, real_places
from ppcl.common.tensor_files import read_tensor_header, weights_variant
from ppcl.config import ExportConfig, load_config
from ppcl.errors import ConfigError
from ppcl.eval.markdown import measured_table
from ppcl.eval.results import Evaluation
from ppcl.export.card import (
    PLACEHOLDER,
    Facts,
    Making,
    draw_plan,
    model_card,
    pipeline_tag,
    shown_command,
    source_licence,
)
from ppcl.export.pipeline import cast, check_source, export
from ppcl.student.plan import CompressionPlan, plan_digest
from ppcl.teacher.loading import load_pipeline, source_name, stored_dtype

LARGE = ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
TEACHER = model(
    "teacher",
    {"fid": number(23.27), "clip_score": number(59.2)},
    14_354_320,
    spread={"fid": {"mean": 23.0, "std": 0.59, "values": [22.6, 23.4]}},
)
STUDENT = model("student", {"fid": number(27.97), "clip_score": number(37.93)}, 8_416_400)
ROW = comparison("student", "teacher", {"velocity_error": number(0.36)}, average_drop=number(52.4))
METRICS = evaluation([TEACHER, STUDENT], [ROW], reference="real pictures", reference_count=1806)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's folder with what published ones have beside the components; half its weights are in float16."""
    folder = tmp_path_factory.mktemp("source") / "teacher"
    pipeline = shared_pipeline()
    pipeline.save_pretrained(folder)
    half = tiny_qwen(2).half()
    for file in (folder / "transformer").glob("*.safetensors"):
        file.unlink()
    half.save_pretrained(folder / "transformer")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-licence\n---\nthe teacher's card")
    (folder / "LICENSE.md").write_text("terms")
    (folder / "whole-model.safetensors").write_bytes(b"all of it again")
    return folder


def exported(source: Path, out: Path, **settings: Any) -> Path:
    student, pipeline, bundle = student_and_pipeline()
    return export(pipeline, student, bundle.plan, str(source), out, ExportConfig(**settings))


def kinds(folder: Path) -> set[str]:
    """Dtypes in the files of a transformer."""
    return {e["dtype"] for f in (folder / "transformer").glob("*.safetensors") for e in read_tensor_header(f).values()}


def test_auto_is_the_dtype_that_the_teacher_is_stored_in(source: Path, tmp_path: Path) -> None:
    assert stored_dtype(str(source)) == torch.float16
    assert kinds(exported(source, tmp_path / "auto")) == {"F16"}
    assert kinds(exported(source, tmp_path / "chosen", dtype="float32")) == {"F32"}
    assert stored_dtype("owner/not-here") is None
    assert stored_dtype("no hub id/at/all") is None


def test_a_variant_beside_plain_files_does_not_decide_the_dtype(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    tiny_qwen(2).half().save_pretrained(folder / "transformer")
    tiny_qwen(4).to(torch.bfloat16).save_pretrained(folder / "transformer", variant="bf16")
    assert stored_dtype(str(folder)) == torch.float16


def test_what_a_class_keeps_in_float32_stays_there() -> None:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=24, freq_dim=16,
        ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    before = model.scale_shift_table.clone()
    cast(model, torch.bfloat16)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert model.scale_shift_table.dtype == torch.float32
    assert torch.equal(model.scale_shift_table, before)  # not by way of bfloat16


def test_shards_and_variant_load_as_diffusers_own(source: Path, tmp_path: Path) -> None:
    out = exported(source, tmp_path / "pipeline", dtype="bfloat16", variant="bf16", max_shard_size="100KB")
    names = sorted(file.name for file in (out / "transformer").iterdir())
    assert "diffusion_pytorch_model.safetensors.index.bf16.json" in names
    assert sum(name.startswith("diffusion_pytorch_model.bf16-0000") for name in names) > 1
    kind = type(shared_pipeline())
    loaded = kind.from_pretrained(out, variant="bf16")
    loaded.set_progress_bar_config(disable=True)
    assert draw(loaded).shape == (1, 16, 16, 3)
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        kind.from_pretrained(out)
    assert f'from_pretrained("{PLACEHOLDER}", variant="bf16")' in (out / "README.md").read_text()
    assert weights_variant(out) == "bf16"
    assert load_pipeline(str(out), torch.device("cpu"), variant="bf16").transformer.dtype == torch.float32


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_there_are_as_many_files_of_weights_as_asked_for(count: int, source: Path, tmp_path: Path) -> None:
    place = exported(source, tmp_path / "pipeline", dtype="bfloat16", shards=count) / "transformer"
    names = sorted(file.name for file in place.glob("*.safetensors"))
    plain = ["diffusion_pytorch_model.safetensors"]
    numbered = [f"diffusion_pytorch_model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert names == (numbered if count > 1 else plain)
    assert type(tiny_qwen()).from_pretrained(place).num_parameters() > 0


def test_more_files_than_weights_are_refused_and_nothing_is_written(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"export.shards=100000: the weights divide into \d+ files like that"):
        exported(source, tmp_path / "pipeline", shards=100_000)
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("max_shard_size=5 gigabytes", "expected a whole number and KB, MB, GB or TB"),
        ("dtype=fp16", "'auto', 'bfloat16', 'float16' or 'float32'"),
        ("variant=b/f", "should match pattern"),
        ("components=move", "'copy' or 'link'"),
    ],
)
def test_wrong_settings_are_found_before_the_work(setting: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config([], [f"export.{setting}"])


def test_only_what_the_index_names_is_taken_along(source: Path, tmp_path: Path) -> None:
    out = exported(source, tmp_path / "pipeline")
    assert weights_variant(out) is None
    assert weights_variant(tmp_path) is None
    assert {path.name for path in out.iterdir()} == {
        *("scheduler", "text_encoder", "tokenizer", "transformer", "vae"),
        *("model_index.json", "README.md", "LICENSE.md"),
    }
    assert not any((out / name).samefile(source / name) for name in LARGE)


def state(folder: Path) -> dict[str, str]:
    """Digest of every file of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_linked_weights_are_the_teachers_files(source: Path, tmp_path: Path) -> None:
    before = state(source)
    out = exported(source, tmp_path / "pipeline", components="link")
    exported(source, out, components="link")  # over an older one, which is removed
    for name in LARGE:
        assert (out / name).samefile(source / name)
        assert not (out / name).is_symlink()
    for file in ("vae/config.json", "text_encoder/config.json", "model_index.json", "tokenizer/tokenizer.json"):
        assert not (out / file).samefile(source / file)  # tools rewrite these in place
    assert state(source) == before
    loaded = type(shared_pipeline()).from_pretrained(out)
    loaded.save_pretrained(out)  # what a user might do
    assert state(source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def refuse(*_: Any) -> None:
    raise OSError(18, "Invalid cross-device link")


@pytest.mark.parametrize("possible", [True, False])
def test_a_linked_pipeline_can_be_compressed_again_and_pushed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, possible: bool
) -> None:
    """On another file system, too: links that lead out of a model's folder would be refused there."""
    if not possible:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    out = exported(source, tmp_path / "deeper" / "pipeline", components="link")
    assert not any(path.is_symlink() for path in out.rglob("*"))
    check_source(str(out))
    check_links([out], real_places(out))


def test_copies_with_a_warning_where_no_link_is_possible(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with caplog.at_level(logging.WARNING):
        out = exported(source, tmp_path / "pipeline", components="link")
    assert "(2 in all) had to be written anew" in caplog.text
    for name in LARGE:
        assert not (out / name).is_symlink()
        assert (out / name).read_bytes() == (source / name).read_bytes()


def test_a_link_leads_to_the_file_behind_a_link(tmp_path: Path) -> None:
    """The hub's cache: a snapshot's files are links to blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a1").write_text("weights")
    (tmp_path / "name.safetensors").symlink_to("blobs/a1")
    assert link_file(tmp_path / "name.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").is_symlink()
    assert (tmp_path / "out.safetensors").samefile(tmp_path / "blobs" / "a1")


@pytest.mark.parametrize("components", ["copy", "link"])
def test_a_failed_export_leaves_the_old_one_and_the_teacher(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, components: str
) -> None:
    out = exported(source, tmp_path / "pipeline", components=components)
    before, old = state(source), state(out)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ppcl.export.pipeline._check", stop)
    with pytest.raises(KeyboardInterrupt):
        exported(source, out, components=components, dtype="bfloat16")
    assert state(source) == before
    assert state(out) == old
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]


def test_components_come_from_the_cache_of_the_hub(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub id: the snapshot's own files, not what was loaded (in another dtype)."""
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _, name: str(source / name))
    student, pipeline, bundle = student_and_pipeline()
    monkeypatch.setattr("ppcl.export.pipeline.model_card", lambda *_: "card")
    out = export(pipeline, student, bundle.plan, "owner/name", tmp_path / "out", ExportConfig(components="link"))
    assert all((out / name).samefile(source / name) for name in LARGE)
    assert kinds(out) == {"F16"}


def test_provenance_survives_loading_and_saving(source: Path, tmp_path: Path) -> None:
    out = exported(source, tmp_path / "pipeline")
    kind = type(shared_pipeline().transformer)
    records = []
    for folder in (out / "transformer", tmp_path / "again", tmp_path / "once more"):
        loaded = kind.from_pretrained(folder)
        records.append(json.loads((folder / "config.json").read_text())["_ppcl"])
        loaded.save_pretrained(tmp_path / ("again" if len(records) == 1 else "once more"))
    assert records[0] == records[1] == records[2] == loaded.config["_ppcl"]
    _, _, bundle = student_and_pipeline()
    assert records[0]["kept_blocks"] == {DUAL: [[0, 1], [2, 3]]}
    assert records[0]["source_model"] == "teacher"  # a folder's name, not where it lies
    assert records[0]["plan_sha256"] == plan_digest(bundle.plan)
    assert records[0]["ppcl_version"] == __version__


def test_the_plan_digest_is_of_the_artifact_and_nothing_else(tmp_path: Path) -> None:
    plan = plan_for(tiny_flux(), [(DUAL, 0, 1)])
    save_artifact(plan, tmp_path / "plan.json")
    told = json.loads((tmp_path / "plan.json").read_text())
    assert (told.pop("recovered"), told.pop("call")) == ([], {})  # how it was chosen, and no call of its own
    canonical = json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert plan_digest(plan) == hashlib.sha256(canonical.encode()).hexdigest()
    assert plan_digest(load_artifact(CompressionPlan, tmp_path / "plan.json")) == plan_digest(plan)
    assert plan_digest(replace(plan, mode="paper")) != plan_digest(plan)
    assert plan_digest(replace(plan, call={"num_inference_steps": 4})) != plan_digest(plan)


def test_the_plan_as_text() -> None:
    plan = plan_for(tiny_flux(), [(DUAL, 0, 1), ("single_transformer_blocks", 1, 3)])
    assert draw_plan(plan).splitlines() == [
        "transformer_blocks: 3 -> 2 blocks; became one block each: 0-1",
        "  [0 1] 2",
        "single_transformer_blocks: 4 -> 2 blocks; became one block each: 1-3",
        "  0 [1 2 3]",
    ]
    low, cut = {"kind": "low_rank", "size": 4}, {"kind": "narrow", "size": 32, "of": 64, "kept": "0"}
    both = {"kind": "parallel", "size": 33, "cuts": [cut, {"kind": "heads", "size": 1, "of": 2, "kept": "1"}]}
    texts = {"norm1_context": {"kind": "text_input"}, "ff_context": {"kind": "text_output"}}
    dual, single = plan.stacks.values()
    dual = (replace(dual[0], width={"norm1.linear": low, **texts}), replace(dual[1], width={"norm1.linear": low}))
    stacks = dict(zip(plan.stacks, (dual, (replace(single[0], width={"": both}), single[1])), strict=True))
    assert draw_plan(replace(plan, stacks=stacks)).splitlines()[4:] == [
        "smaller modules inside the blocks:",
        "  heads and neurons: 1 of 2 heads, 32 of 64 neurons in 1 block",
        "  norm1.linear: rank 4 in 2 blocks",
        "  norm1_context: two linear maps in 1 block",
    ]
    long = draw_plan(plan_for(tiny_qwen(60), [(DUAL, 35, 39)])).splitlines()
    assert max(map(len, long)) <= 100
    assert any("[35 36 37 38 39]" in line for line in long)  # a run is not torn apart


def test_the_card_has_a_valid_header_numbers_and_counts(source: Path) -> None:
    plan = plan_for(tiny_qwen(), [(DUAL, 1, 2)])
    facts = Facts(
        source="owner/Model-1",
        pipeline_class="QwenImagePipeline",
        dtype="bfloat16",
        making=Making(("ppcl compress owner/Model-1 --out run --keep 0.5",), 3, "ppcl 1, torch 2", "cpu"),
        measured=measured_table(Evaluation.model_validate(METRICS)),
        licence=source_licence(str(source)),
    )
    card = ModelCard(model_card(plan, facts))
    assert card.data.to_dict() == {
        "base_model": "owner/Model-1",
        "library_name": "diffusers",
        "license": "other",
        "license_name": "tiny-licence",
        "pipeline_tag": "text-to-image",
        "tags": ["diffusers", "ppcl", "compressed", "depth-pruning", "distillation"],
    }
    for words in (
        "# Model-1, compressed by ppcl",
        "0 [1 2] 3",
        "| FID ↓ | 23.3 ± 0.59 | 28.0 |",
        "| Parameters (M) | 14.35 | 8.416 |",
        "128 prompts that were not used for calibration",
        "compare with real pictures (1,806)",
        "| Velocity error ↓ | - | 0.360 |",
        "ppcl compress owner/Model-1 --out run --keep 0.5",
        "Seed 3, cpu. Versions: ppcl 1, torch 2.",
        "states tiny-licence; it holds for this compressed model too",
        f'DiffusionPipeline.from_pretrained("{PLACEHOLDER}")',
        "stored in bfloat16",
    ):
        assert words in card.text
    assert "KID |" not in card.text  # was not measured


def test_a_card_without_numbers_licence_or_hub_id(source: Path) -> None:
    text = model_card(plan_for(tiny_qwen(), [(DUAL, 1, 2)]), Facts(str(source), "QwenImagePipeline"))
    assert "base_model" not in ModelCard(text).data.to_dict()  # the hub refuses a folder there
    assert str(source.parent) not in text
    assert "Nothing yet" in text
    assert "Licence" not in text


@pytest.mark.parametrize("content", ["no header", "---\n[1, 2\n---\n", "---\nlicense: [mit]\n---\n", "---\n- 1\n---\n"])
def test_a_source_whose_card_states_no_licence(tmp_path: Path, content: str) -> None:
    (tmp_path / "README.md").write_text(content)
    assert source_licence(str(tmp_path)) == {}
    assert source_licence(str(tmp_path / "empty")) == {}
    assert source_licence("owner/offline") == {}


def test_names_and_tags(source: Path) -> None:
    assert source_name(str(source)) == "teacher"
    assert source_name("owner/name") == "owner/name"
    assert source_name("emoji") == "emoji"
    assert shown_command("ppcl compress /home/me/model --out runs/a --prompts '/home/me/my prompts.txt'") == (
        "ppcl compress model --out runs/a --prompts 'my prompts.txt'"
    )
    assert shown_command("it's") == "it's"
    assert shown_command("ppcl.compress(...)") == "ppcl.compress(...)"
    assert pipeline_tag("WanPipeline", "WanTransformer3DModel") == "text-to-video"
    assert pipeline_tag("WanImageToVideoPipeline", "WanTransformer3DModel") == "image-to-video"
    assert pipeline_tag("QwenImageEditPipeline", "QwenImageTransformer2DModel") == "image-to-image"
    assert pipeline_tag("StableDiffusion3Pipeline", "SD3Transformer2DModel") == "text-to-image"
