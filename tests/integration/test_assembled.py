"""A teacher put together from a transformer's folder, one file, a GGUF, quantised weights, with LoRAs folded in."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import PIPELINES

from ppcl.common.files import read_json
from ppcl.teacher.loading import check_folder, load_pipeline

Call = Callable[..., tuple[object, str, str]]
Refuses = Callable[..., str]
Says = tuple[str, ...]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformer of the tiny pipeline with other weights, alone in a folder; do not write into it."""
    folder = shutil.copytree(tiny_model / "transformer", tmp_path_factory.mktemp("tuned") / "transformer")
    tensors = {name: 1.25 * tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    check_folder(folder)
    return dict(load_pipeline(str(folder), torch.device("cpu")).transformer.state_dict())


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float = 0.0) -> bool:
    return first.keys() == second.keys() and all(
        (first[n].float() - second[n].float()).norm() <= tolerance * second[n].float().norm() for n in first
    )


@pytest.mark.parametrize("kind", ["folder", "file", "prefixed file"])
def test_a_transformer_of_ones_own_with_a_base(
    ppcl: Call, tiny_model: Path, tuned: Path, tmp_path: Path, kind: str
) -> None:
    given, expected = tuned, load_file(tuned / WEIGHTS)
    if kind != "folder":
        given = tmp_path / "checkpoint.safetensors"
        prefix = "model.diffusion_model." if kind == "prefixed file" else ""
        save_file({f"{prefix}{name}": tensor for name, tensor in expected.items()}, given)
    out = tmp_path / "teacher"
    code, printed, err = ppcl("teacher", given, "--base", tiny_model, "--out", out)
    assert (code, printed.strip()) == (0, f"ppcl compress {out} --out RUN"), err
    assert same(weights(out), expected)
    assert (out / "vae" / WEIGHTS).read_bytes() == (tiny_model / "vae" / WEIGHTS).read_bytes()
    assert str(tmp_path) not in (out / "transformer" / "config.json").read_text()


@pytest.mark.parametrize(
    ("family", "layout"), [("flux", "single-file"), ("sd3", "single-file"), ("wan", "comfyui"), ("z_image", "comfyui")]
)
def test_files_in_the_layouts_of_other_programs(ppcl: Call, tmp_path: Path, family: str, layout: str) -> None:
    torch.manual_seed(0)
    PIPELINES[family]().save_pretrained(tmp_path / "model")
    file, out = tmp_path / "model.safetensors", tmp_path / "teacher"
    assert ppcl("export", tmp_path / "model", "--format", layout, "--out", file)[0] == 0
    code, _, err = ppcl("teacher", file, "--base", tmp_path / "model", "--out", out)
    assert code == 0, err
    assert same(weights(out), load_file(tmp_path / "model" / "transformer" / WEIGHTS))


@pytest.mark.parametrize(("kind", "tolerance"), [("F16", 1e-3), ("Q8_0", 0.01)])
def test_a_gguf(ppcl: Call, tiny_model: Path, tuned: Path, tmp_path: Path, kind: str, tolerance: float) -> None:
    pytest.importorskip("gguf")
    whole = shutil.copytree(tiny_model, tmp_path / "whole")
    shutil.rmtree(whole / "transformer")
    shutil.copytree(tuned, whole / "transformer")
    file, out = tmp_path / "model.gguf", tmp_path / "teacher"
    assert ppcl("export", whole, "--format", "gguf", "--gguf-type", kind, "--out", file)[0] == 0
    code, _, err = ppcl("teacher", file, "--base", tiny_model, "--out", out, "--dtype", "float32")
    assert code == 0, err
    assert same(weights(out), load_file(tuned / WEIGHTS), tolerance)
    code, _, err = ppcl("teacher", file, "--base", tiny_model, "--out", tmp_path / "half")
    assert code == 0, err
    assert load_file(tmp_path / "half" / "transformer" / WEIGHTS)["img_in.weight"].dtype == torch.bfloat16


@pytest.fixture
def precision() -> Iterator[None]:
    """Torchao sets the precision of float32 products for the whole process."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("precision")
def test_a_pipeline_whose_transformer_is_quantised(ppcl: Call, tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from diffusers import QwenImageTransformer2DModel, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    quantised = shutil.copytree(tiny_model, tmp_path / "quantised")
    settings = TorchAoConfig(Int8WeightOnlyConfig())
    transformer = QwenImageTransformer2DModel.from_pretrained(
        tiny_model / "transformer", quantization_config=settings, dtype=torch.bfloat16
    )
    shutil.rmtree(quantised / "transformer")
    try:
        transformer.save_pretrained(quantised / "transformer")
    except (ValueError, NotImplementedError) as error:
        pytest.skip(f"this diffusers saves no such weights as safetensors: {error}")
    code, _, err = ppcl("compress", quantised, "--out", tmp_path / "run", "--keep", 0.8)
    assert code == 2
    assert "ppcl teacher" in err
    out = tmp_path / "teacher"
    code, _, err = ppcl("teacher", quantised, "--out", out)
    assert code == 0, err
    assert "quantization_config" not in read_json(out / "transformer" / "config.json")
    assert same(weights(out), load_file(tiny_model / "transformer" / WEIGHTS), 0.02)


def lora_file(path: Path, module: str = "transformer_blocks.1.attn.to_q", size: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"transformer.{module}.lora_A.weight": torch.randn(4, size, generator=generator),
        f"transformer.{module}.lora_B.weight": torch.randn(size, 4, generator=generator),
    }
    save_file(tensors, path)
    return tensors


def test_a_lora_is_folded_in(ppcl: Call, tiny_model: Path, tmp_path: Path) -> None:
    before = load_file(tiny_model / "transformer" / WEIGHTS)
    name = "transformer_blocks.1.attn.to_q"
    up, down = reversed(lora_file(tmp_path / "lora.safetensors", name, before[f"{name}.weight"].shape[0]).values())
    out = tmp_path / "teacher"
    arguments = ("--lora", tmp_path / "lora.safetensors", "--lora-scale", 0.5, "--out", out)
    code, _, err = ppcl("teacher", tiny_model, *arguments)
    assert code == 0, err
    after = weights(out)
    assert after.keys() == before.keys()
    assert [n for n in after if not torch.equal(after[n], before[n])] == [f"{name}.weight"]
    assert torch.allclose(after[f"{name}.weight"], before[f"{name}.weight"] + 0.5 * up @ down, atol=1e-6)


def without_a_block(tuned: Path, folder: Path) -> Path:
    tensors = {n: t for n, t in load_file(tuned / WEIGHTS).items() if not n.startswith("transformer_blocks.3.")}
    save_file(tensors, folder / "checkpoint.safetensors")
    return folder / "checkpoint.safetensors"


def with_a_block_more(tuned: Path, folder: Path) -> Path:
    tensors = load_file(tuned / WEIGHTS)
    more = {n.replace("blocks.5.", "blocks.6."): t.clone() for n, t in tensors.items() if "blocks.5." in n}
    save_file(tensors | more, folder / "checkpoint.safetensors")
    return folder / "checkpoint.safetensors"


def without_a_bias(tuned: Path, folder: Path) -> Path:
    tensors = load_file(tuned / WEIGHTS)
    del tensors["img_in.bias"]
    save_file(tensors, folder / "checkpoint.safetensors")
    return folder / "checkpoint.safetensors"


def with_scales(tuned: Path, folder: Path) -> Path:
    tensors = load_file(tuned / WEIGHTS) | {"img_in.scale_weight": torch.ones(1)}
    save_file(tensors, folder / "checkpoint.safetensors")
    return folder / "checkpoint.safetensors"


def of_another_class(_: Path, folder: Path) -> Path:
    save_file({"x.weight": torch.ones(2, 2)}, folder / "checkpoint.safetensors")
    return folder / "checkpoint.safetensors"


def no_checkpoint(_: Path, folder: Path) -> Path:
    (folder / "checkpoint.safetensors").write_text("not a checkpoint")
    return folder / "checkpoint.safetensors"


def no_gguf(_: Path, folder: Path) -> Path:
    pytest.importorskip("gguf")
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    return folder / "model.gguf"


@pytest.mark.parametrize(
    ("new", "says"),
    [
        (without_a_block, ("checkpoint.safetensors holds", "and the base's transformer")),
        (with_a_block_more, ("checkpoint.safetensors holds", "and the base's transformer")),
        (without_a_bias, ("checkpoint.safetensors cannot be loaded",)),
        (of_another_class, ("checkpoint.safetensors holds",)),
        (with_scales, ("quantised with scales of its own",)),
        (no_checkpoint, ("checkpoint.safetensors is damaged",)),
        (no_gguf, ("model.gguf cannot be loaded",)),
    ],
)
def test_a_file_that_is_not_the_bases_transformer(
    refuses: Refuses, tiny_model: Path, tuned: Path, tmp_path: Path, new: Callable[[Path, Path], Path], says: Says
) -> None:
    file = new(tuned, tmp_path)
    refuses("teacher", file, "--base", tiny_model, "--out", tmp_path / "teacher", says=says, watch=tmp_path)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"transformer.single_transformer_blocks.7.proj_mlp.lora_A.weight": (4, 32)}, ("does not have",)),
        ({"text_encoder.layers.0.q.lora_A.weight": (2, 2)}, ("has nothing for the transformer",)),
        (None, ("cannot be folded in",)),
    ],
)
def test_a_lora_that_does_not_fit(
    refuses: Refuses, tiny_model: Path, tmp_path: Path, tensors: dict[str, tuple[int, int]] | None, says: Says
) -> None:
    lora = tmp_path / "lora.safetensors"
    if tensors is not None:
        save_file({name: torch.ones(shape) for name, shape in tensors.items()}, lora)
    refuses("teacher", tiny_model, "--lora", lora, "--out", tmp_path / "teacher", says=says, watch=tmp_path)


def test_options_that_do_not_go_together(refuses: Refuses, tiny_model: Path, tuned: Path, tmp_path: Path) -> None:
    out, base = tmp_path / "teacher", ("--base", tiny_model)
    for arguments, says in (
        ((tuned,), ("is a transformer alone", "--base")),
        ((tiny_model, *base), ("is a pipeline of its own", "leave --base out")),
        ((tiny_model,), ("is a pipeline of plain weights already",)),
        ((tuned, *base, "--dtype", "float8"), ("float8", "bfloat16")),
        ((tmp_path / "nothing", *base), ("nothing",)),
    ):
        refuses("teacher", *arguments, "--out", out, says=says, watch=tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").write_text("x")
    refuses("teacher", tuned, *base, "--out", tmp_path / "mine", says=("is not empty",), watch=tmp_path)
    inside = shutil.copytree(tiny_model, tmp_path / "base")
    refuses("teacher", tuned, "--base", inside, "--out", inside / "mine", says=("lies in",), watch=tmp_path)
