"""A finished pipeline for other programs: what is written, what is said, and what is refused before anything is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from published import FLUX_DEV
from tiny_compressed import compressed, velocity_of
from tiny_pipeline import tiny_qwen_pipeline

from ppcl.common.files import read_json, write_json
from ppcl.common.tensor_files import StoredTensors, Unread, read_tensor_header
from ppcl.errors import ArtifactError, ConfigError, ModelError
from ppcl.export import formats
from ppcl.export.formats import export_as
from ppcl.export.gguf_file import write_gguf
from ppcl.export.stock import StockTransformer
from ppcl.export.support import format_table, refusal
from ppcl.export.trainers import TRAINERS, trainer_table
from ppcl.modules.compressed import compress_class
from ppcl.modules.replacements import apply_width
from ppcl.teacher.families import ADAPTERS

PARTS = {
    "transformer_blocks.0.img_mod.1": {"kind": "low_rank", "size": 3},
    "transformer_blocks.1.img_mlp": {"kind": "linear", "size": 0},
}
Call = Callable[..., tuple[object, str, str]]


def folder_of(transformer: Any, folder: Path) -> Path:
    transformer.save_pretrained(folder / "transformer", max_shard_size="50KB")
    write_json(
        folder / "model_index.json", {"_class_name": "P", "transformer": ["diffusers", type(transformer).__name__]}
    )
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: tiny-licence\n---\nx")
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed Qwen-Image with fewer blocks and smaller modules, in shards; do not write into it."""
    return folder_of(compressed("qwen"), tmp_path_factory.mktemp("qwen"))


def metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("family", ["qwen", "flux"])
def test_runs_and_smaller_modules_become_one_file_of_the_stock_class(family: str, tmp_path: Path) -> None:
    student = compressed(family)
    folder, file = folder_of(student, tmp_path / "folder"), tmp_path / "out.safetensors"
    written = export_as(folder, file, "single-file")
    stock = type(student).__mro__[1]
    loaded = stock.from_single_file(str(file), config=str(folder), subfolder="transformer")
    assert type(loaded) is stock
    assert torch.allclose(velocity_of(loaded, family), velocity_of(student, family), atol=1e-5)
    assert written.parameters == sum(p.numel() for p in loaded.parameters())
    assert written.multiplied_out == len(student.config["pruning"])
    assert written.load.endswith('subfolder="transformer")')


def test_blocks_are_numbered_without_a_gap_and_the_header_says_where_they_come_from(qwen: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.safetensors"
    export_as(qwen, file, "comfyui")
    names = read_tensor_header(file)
    assert {int(n.split(".")[1]) for n in names if n.startswith("transformer_blocks.")} == set(range(5))
    assert "txt_norm.weight" in names
    assert not any("down" in name for name in names)
    said = metadata(file)
    assert json.loads(said["kept_blocks"])["transformer_blocks"] == [0, [1, 2], 3, 4, 5]
    assert said["license_name"] == "tiny-licence"
    assert said["format"] == "pt"
    assert "transformer_blocks.0.img_mlp" in json.loads(said["multiplied_out"])


def test_a_run_becomes_a_pipeline_folder_of_stock_classes_with_the_same_pictures(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    import ppcl.pipelines

    assert ppcl.pipelines
    pipeline = tiny_qwen_pipeline(num_layers=2)
    apply_width(pipeline.transformer, PARTS)
    compress_class(pipeline.transformer, PARTS)
    pipeline.register_modules(transformer=pipeline.transformer)
    pipeline.save_pretrained(tmp_path / "run" / "pipeline")
    write_json(tmp_path / "run" / "stages.json", {})
    export_as(tmp_path / "run", tmp_path / "stock", "diffusers")
    index = read_json(tmp_path / "stock" / "model_index.json")
    assert index["transformer"] == ["diffusers", "QwenImageTransformer2DModel"]
    assert "pruning" not in read_json(tmp_path / "stock" / "transformer" / "config.json")
    assert "stock classes" in (tmp_path / "stock" / "README.md").read_text()
    pictures = []
    for folder in (tmp_path / "run" / "pipeline", tmp_path / "stock"):
        loaded = DiffusionPipeline.from_pretrained(folder)
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt", "generator": generator}
        pictures.append(loaded("a green frog", **options).images)
    assert torch.allclose(*pictures, atol=1e-4)


def test_the_published_flux_has_the_names_that_diffusers_own_conversion_reads() -> None:
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel

    with init_empty_weights():
        model = FluxTransformer2DModel.from_config({**FLUX_DEV, "num_layers": 2, "num_single_layers": 3})
    tensors = {n: Unread(t.shape, torch.bfloat16, lambda: torch.empty(0)) for n, t in model.state_dict().items()}
    stock = StockTransformer(model, tensors)
    assert formats._diffusers_converts(stock)
    names = formats._arranged(stock)
    assert tuple(names["single_blocks.2.linear1.weight"].shape) == (21504, 3072)
    assert tuple(names["double_blocks.1.img_attn.qkv.bias"].shape) == (9216,)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_gguf_has_architecture_types_and_provenance(kind: str, qwen: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    export_as(qwen, tmp_path / "out.gguf", "gguf", kind)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.get_field("general.architecture").contents() == "qwen_image"
    assert reader.get_field("general.license.name").contents() == "tiny-licence"
    assert json.loads(reader.get_field("ppcl.kept_blocks").contents())["transformer_blocks"][1] == [1, 2]
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert types["transformer_blocks.0.img_mlp.net.0.proj.weight"] == kind
    assert types["transformer_blocks.0.img_mlp.net.0.proj.bias"] == "F32"
    assert types["img_in.weight"] == types["proj_out.weight"] == "F32"  # not in a block


def test_narrow_matrices_of_gguf_stay_f16_and_small_ones_f32(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    sizes = {"wide": (40, 64), "narrow": (128, 36), "small": (32, 32)}
    tensors = {n: Unread(s, torch.float32, lambda s=s: torch.randn(s)) for n, s in sizes.items()}
    write_gguf(tmp_path / "x.gguf", "flux", tensors, sizes, "Q4_0", {})
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert types == {"wide": "Q4_0", "narrow": "F16", "small": "F32"}
    huge = {"x": Unread((40, 64), torch.float32, lambda: torch.full((40, 64), 1e5))}
    with pytest.raises(ValueError, match=r"x has values up to 1e\+05, F16 holds 65504; --gguf-type BF16"):
        write_gguf(tmp_path / "y.gguf", "flux", huge, huge, "F16", {})
    assert not (tmp_path / "y.gguf").exists()


def test_one_weight_is_in_memory_at_a_time(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[Any] = []
    read = StoredTensors.__getitem__

    def counted(self: StoredTensors, name: str) -> torch.Tensor:
        import weakref

        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        assert sum(reference() is not None for reference in alive) <= 2  # a low-rank layer's factors
        return tensor

    monkeypatch.setattr(StoredTensors, "__getitem__", counted)
    export_as(qwen, tmp_path / "out.safetensors", "comfyui")
    assert len(alive) > 100


def damaged(qwen: Path, folder: Path, what: str) -> Path:
    """A copy of the pipeline with something wrong."""
    shutil.copytree(qwen, folder)
    place = folder / "transformer"
    listing = place / "diffusion_pytorch_model.safetensors.index.json"
    config = read_json(place / "config.json")
    if what == "a missing block":
        index = read_json(listing)
        index["weight_map"] = {
            n: f for n, f in index["weight_map"].items() if not n.startswith("transformer_blocks.3.")
        }
        write_json(listing, index)
    elif what == "a missing shard":
        next(place.glob("*-00002-of-*")).unlink()
    elif what == "a block too many":
        write_json(place / "config.json", {**config, "num_layers": config["num_layers"] - 1})
    elif what == "another width":
        write_json(place / "config.json", {**config, "joint_attention_dim": 48})
    elif what == "quantised":
        write_json(place / "config.json", {**config, "quantization_config": {"quant_method": "torchao"}})
    elif what == "no pipeline":
        (folder / "model_index.json").unlink()
    elif what == "its transformer alone":
        return place
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a missing block", r"lacks transformer_blocks\.3\..* \(\d+ of the \d+ weights .* config.json asks for\)"),
        ("a missing shard", r"is missing \(1 of the \d+ files"),
        ("a block too many", r"transformer_blocks\.4\..* expected no such weight"),
        ("another width", r"txt_in.weight of shape \[32, 24\], expected \[32, 48\]"),
        ("quantised", r"is stored quantised \(torchao\)"),
        ("no pipeline", r"is not a diffusers pipeline"),
        ("its transformer alone", r"is the transformer of a pipeline; give its folder"),
    ],
)
@pytest.mark.parametrize("kind", ["single-file", "diffusers"])
def test_damaged_pipelines_are_refused(kind: str, what: str, message: str, qwen: Path, tmp_path: Path) -> None:
    folder = damaged(qwen, tmp_path / "folder", what)
    if what == "a block too many":  # smaller modules in the last block would be missed first
        config = read_json(folder / "transformer" / "config.json")
        config["pruning"] = {
            p: part for p, part in config["pruning"].items() if not p.startswith("transformer_blocks.4")
        }
        write_json(folder / "transformer" / "config.json", config)
    out = tmp_path / ("out.safetensors" if kind == "single-file" else "out")
    with pytest.raises((ModelError, ArtifactError), match=message) as caught:
        export_as(folder, out, kind)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*out*"))


def test_quantised_weights_without_a_word_in_the_config_are_refused(tmp_path: Path) -> None:
    student = compressed("flux")
    student.proj_out.weight.data = student.proj_out.weight.data.to(torch.float8_e4m3fn)
    folder = folder_of(student, tmp_path / "folder")
    with pytest.raises(ArtifactError, match=r"proj_out.weight of .* is stored as F8_E4M3"):
        export_as(folder, tmp_path / "out.safetensors", "single-file")


def test_a_text_stream_of_two_maps_is_refused(tmp_path: Path) -> None:
    from tiny_compressed import DUAL, bundle_for, teacher_for

    from ppcl.student.bundle import build_student
    from ppcl.teacher.families import adapter_for

    teacher = teacher_for("qwen")
    parts = {p: {"kind": kind, "size": 0} for p, kind in adapter_for(teacher).stacks[0].text_parts.items()}
    student = build_student(teacher, adapter_for(teacher), bundle_for(teacher, {(DUAL, 2, 2): parts}))
    folder = folder_of(student, tmp_path / "folder")
    with pytest.raises(ModelError, match=r"transformer_blocks\.2\..*--set fit.width=\[\]"):
        export_as(folder, tmp_path / "out.safetensors", "single-file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--format", "safetensors", "--out", "x.safetensors"), "--format safetensors is unknown"),
        (("--format", "gguf", "--out", "x.safetensors"), "--format gguf writes a .gguf file, got --out x.safetensors"),
        (("--format", "comfyui", "--out", "x"), "--format comfyui writes a .safetensors file"),
        (("--format", "gguf", "--gguf-type", "Q4_K_M", "--out", "x.gguf"), "cannot write it; write F16, then llama-q"),
        (("--format", "gguf", "--gguf-type", "Q80", "--out", "x.gguf"), "is unknown (did you mean 'Q8_0'?)"),
        (("--gguf-type", "Q8_0", "--out", "x.gguf"), "--gguf-type has no effect without --format gguf"),
        (("--format", "gguf", "--keep", "0.5", "--out", "x.gguf"), "--format converts what is written already"),
        (("--format", "gguf", "--set", "fit.width=[]", "--out", "x.gguf"), "--format converts what is written already"),
    ],
)
def test_bad_options_are_told_in_one_line(
    arguments: tuple[str, ...], message: str, ppcl: Call, qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = ppcl("export", qwen, *arguments)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_written_over(ppcl: Call, qwen: Path, tmp_path: Path) -> None:
    for kind, name in (("single-file", "out.safetensors"), ("diffusers", "folder")):
        (tmp_path / name).write_text("mine")
        code, _, err = ppcl("export", qwen, "--format", kind, "--out", tmp_path / name)
        assert (code, "is already there" in err) == (2, True)
        assert (tmp_path / name).read_text() == "mine"


def test_what_is_no_pipeline_is_told_so(ppcl: Call, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "stages.json", {})
    for source, message in (("emoji", "is no folder"), (tmp_path / "run", "a run without a pipeline yet")):
        code, _, err = ppcl("export", source, "--format", "single-file", "--out", tmp_path / "x.safetensors")
        assert (code, message in err) == (2, True), err


def test_a_second_transformer_is_not_forgotten_without_a_word(
    qwen: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(qwen, tmp_path / "two")
    index = read_json(tmp_path / "two" / "model_index.json")
    write_json(tmp_path / "two" / "model_index.json", {**index, "transformer_2": index["transformer"]})
    shutil.copytree(qwen / "transformer", tmp_path / "two" / "transformer_2")
    with caplog.at_level("WARNING"):
        export_as(tmp_path / "two", tmp_path / "x.safetensors", "comfyui")
    assert "has a transformer_2 too" in caplog.text
    caplog.clear()
    write_json(
        tmp_path / "two" / "model_index.json", {**index, "transformer_2": [None, None]}
    )  # Wan without a second one
    export_as(tmp_path / "two", tmp_path / "y.safetensors", "comfyui")
    assert "transformer_2" not in caplog.text


def test_networks_of_one_width_are_narrow_in_files_of_programs_that_read_it_off(tmp_path: Path) -> None:
    config = {"_ppcl": {"kept_blocks": {}, "uniform": {"pruning": {}, "fields": {}}}}
    assert not refusal("comfyui", "WanTransformer3DModel", config)
    assert not refusal("gguf", "WanTransformer3DModel", config)
    for name in ("Flux2Transformer2DModel", "JoyImageEditTransformer3DModel", "Ideogram4Transformer2DModel"):
        assert "takes the width of its networks for granted; without plan" in refusal("comfyui", name, config)
        assert not refusal("comfyui", name, {"_ppcl": {"kept_blocks": {}}})


def test_gguf_without_its_package_says_what_to_install(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'ppcl\[gguf\]'"):
        export_as(qwen, tmp_path / "x.gguf", "gguf")


def test_the_command_says_that_multiplying_out_saves_the_depth_alone(ppcl: Call, qwen: Path, tmp_path: Path) -> None:
    code, out, _ = ppcl("export", qwen, "--format", "single-file", "--out", tmp_path / "x.safetensors")
    assert code == 0
    assert "multiplied out to stock shapes: this saves the depth alone" in out
    assert "load: QwenImageTransformer2DModel.from_single_file(" in out


def test_depths_that_comfyui_takes_for_granted_are_refused() -> None:
    config = {"num_attention_heads": 24, "attention_head_dim": 64, "num_layers": 24}
    assert not refusal("comfyui", "SD3Transformer2DModel", config)
    why = refusal("comfyui", "SD3Transformer2DModel", {**config, "num_layers": 20})
    assert "the width / 64 for its number of blocks, and this one has 20; in diffusers it loads: --format single" in why
    for name, words in (
        ("MochiTransformer3DModel", "48"),
        ("OmniGen2Transformer2DModel", "32"),
        ("HiDreamImageTransformer2DModel", "16 and 32"),
    ):
        assert f"ComfyUI takes {words} for its number of blocks" in refusal("comfyui", name, {"num_layers": 12})


def test_the_table_has_a_line_for_every_family_and_is_the_one_in_docs() -> None:
    table = format_table()
    for name in ADAPTERS:
        assert f"| {name} |" in table
    assert {name for classes in TRAINERS.values() for name in classes} <= set(ADAPTERS)
    written = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    if version("diffusers") not in written:
        pytest.skip("the table is of another diffusers")
    assert (
        written
        == f"# Formats\n\n{table}\n\n{trainer_table()}\n\nCommand: `ppcl families --formats --table docs/formats.md`\n"
    )
