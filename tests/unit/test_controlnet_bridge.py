"""ControlNet residuals of the teacher on depth-pruned transformers, and the examples of using a pipeline."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_lora_bridge import KEPT, flux_pipe, lora_for, qwen_pipe, student_of
from tiny_models import DUAL, SINGLE, flux_call, noise, qwen_call, tiny_flux, tiny_qwen
from torch import Tensor, nn

from ppcl.errors import ModelError
from ppcl.pipelines import attach_controlnet, detach_controlnet
from ppcl.pipelines.controlnet import control_family, expand_residuals
from ppcl.teacher.block_map import block_maps

EXAMPLES = Path(__file__).parents[2] / "pipelines" / "examples"


def qwen_controlnet() -> Any:
    from diffusers import QwenImageControlNetModel

    torch.manual_seed(5)
    model = QwenImageControlNetModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    with torch.no_grad():
        for parameter in [*model.controlnet_blocks.parameters(), *model.controlnet_x_embedder.parameters()]:
            parameter.normal_(0, 0.1)  # they start as zeros
    return model.eval().requires_grad_(False)


def flux_controlnet() -> Any:
    from diffusers import FluxControlNetModel

    return FluxControlNetModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=8,
        axes_dims_rope=[4, 6, 6],
    )


def residuals(count: int, seed: int = 0) -> list[Tensor]:
    return [noise(3, 6, 32, seed=seed + i) for i in range(count)]


@torch.no_grad()
def by_hand(transformer: Any, call: dict[str, Any], sites: dict[str, list[Tensor]]) -> Tensor:
    """Run a transformer and add one given residual to the picture's stream after each block."""
    handles = []
    for stack, added in sites.items():
        for block, residual in zip(getattr(transformer, stack), added, strict=True):
            handles.append(block.register_forward_hook(lambda m, i, out, r=residual: (out[0], out[1] + r)))
    found = transformer(**call, return_dict=False)[0]
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 7])
def test_qwen_equals_residuals_added_by_hand(count: int) -> None:
    pipe, samples = qwen_pipe(), residuals(count)
    interval = -(-6 // count)
    at = [samples[i // interval] for i in range(6)]  # the teacher's sites
    expected = by_hand(pipe.transformer, qwen_call(), {DUAL: [at[0], at[1] + at[2] + at[3], at[4], at[5]]})
    plain = pipe.transformer(**qwen_call(), controlnet_block_samples=samples, return_dict=False)[0]
    attach_controlnet(pipe, qwen_controlnet())
    controlled = attach_controlnet(pipe, qwen_controlnet())  # twice: the residuals must not be spread twice
    found = controlled.transformer(**qwen_call(), controlnet_block_samples=samples, return_dict=False)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (plain - expected).norm() > 0.01 * expected.norm()  # what diffusers does without the bridge
    bare = by_hand(pipe.transformer, qwen_call(), {})
    torch.testing.assert_close(pipe.transformer(**qwen_call(), return_dict=False)[0], bare)
    detach_controlnet(pipe)
    detach_controlnet(pipe)
    again = pipe.transformer(**qwen_call(), controlnet_block_samples=samples, return_dict=False)[0]
    assert torch.equal(again, plain)


def test_identity_plan_equals_diffusers() -> None:
    pipe, teacher, samples = qwen_pipe([]), tiny_qwen(6), residuals(4)
    attach_controlnet(pipe, qwen_controlnet())
    call = {**qwen_call(), "controlnet_block_samples": samples, "return_dict": False}
    assert torch.equal(pipe.transformer(**call)[0], teacher(**call)[0])
    positional = list(call.values())[:2]
    names = ("timestep", "img_shapes", "controlnet_block_samples", "return_dict")
    rest = {name: call[name] for name in names}
    assert torch.equal(pipe.transformer(*positional, **rest)[0], teacher(*positional, **rest)[0])


@pytest.mark.parametrize("repeats", [False, True])
def test_flux_both_stacks(repeats: bool) -> None:
    pipe, dual, single = flux_pipe(), residuals(2), residuals(3, seed=50)  # runs: dual 0-1 of 3, single 1-2 of 4
    controlled = attach_controlnet(pipe, flux_controlnet())
    assert type(controlled).__name__ == "FluxControlNetPipeline"
    sites = {
        DUAL: [dual[0] + dual[1], dual[0]] if repeats else [2 * dual[0], dual[1]],
        SINGLE: [single[0], single[0] + single[1], single[1]],
    }
    expected = by_hand(student_of(tiny_flux(3, 4), [(DUAL, 0, 1), (SINGLE, 1, 2)]), flux_call(), sites)
    found = controlled.transformer(
        **flux_call(),
        controlnet_block_samples=dual,
        controlnet_single_block_samples=single,
        controlnet_blocks_repeat=repeats,
        return_dict=False,
    )[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_all_residuals_are_used_once() -> None:
    samples = residuals(6)
    expanded = expand_residuals(samples, block_maps(KEPT)[DUAL], control_family(tiny_qwen(1)))
    assert isinstance(expanded, list)
    torch.testing.assert_close(sum(expanded), sum(samples))


def test_controlnet_errors() -> None:
    with pytest.raises(ModelError, match="expected QwenImageControlNetModel"):
        attach_controlnet(qwen_pipe(), flux_controlnet())
    with pytest.raises(ModelError, match="was not compressed"):
        attach_controlnet(SimpleNamespace(transformer=tiny_qwen(2)), qwen_controlnet())

    other = nn.Linear(1, 1)
    other.config = {"_ppcl": {"kept_blocks": KEPT}}
    with pytest.raises(ModelError, match="no ControlNet bridge for Linear"):
        attach_controlnet(SimpleNamespace(transformer=other), qwen_controlnet())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A depth-compressed pipeline folder."""
    from tiny_pipeline import tiny_qwen_pipeline

    pipe = tiny_qwen_pipeline(num_layers=4)
    pipe.register_modules(transformer=student_of(pipe.transformer, [(DUAL, 1, 2)]))
    folder = tmp_path_factory.mktemp("exported") / "pipeline"
    pipe.save_pretrained(folder)
    return folder


def run_example(name: str, folder: Path, out: Path, *more: str) -> None:
    import importlib

    from PIL import Image

    main = importlib.import_module(f"ppcl.pipelines.examples.{name}").main
    main([str(folder), "red cat", "--size", "16", "--steps", "2", "--out", str(out), *more])
    assert Image.open(out).size == (16, 16)


def test_examples(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import QwenImageControlNetModel
    from PIL import Image
    from safetensors.torch import save_file
    from tiny_pipeline import tiny_qwen_pipeline

    teacher = tiny_qwen_pipeline(num_layers=4).transformer
    save_file(lora_for(teacher, ("attn.to_q",)), tmp_path / "lora.safetensors")
    control = QwenImageControlNetModel.from_transformer(teacher, 2, 16, 2)
    control.save_pretrained(tmp_path / "controlnet")
    picture = tmp_path / "in.png"
    Image.new("RGB", (20, 20), "red").save(picture)
    out = tmp_path / "out.png"
    converted = tmp_path / "converted.safetensors"
    run_example("lora", exported, out, "--lora", str(tmp_path / "lora.safetensors"), "--convert", str(converted))
    assert "transformer_blocks.3 -> transformer_blocks.2" in capsys.readouterr().out and converted.is_file()
    run_example("controlnet", exported, out, "--controlnet", str(tmp_path / "controlnet"), "--image", str(picture))
    run_example("cpu_offload", exported, out, "--how", "group")
    run_example("image_to_image", exported, out, "--image", str(picture), "--strength", "0.9")
    run_example("torch_compile", exported, out, "--backend", "eager")
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            run_example("cpu_offload", exported, out)
        assert "needs an accelerator" in capsys.readouterr().err


def test_examples_run_as_scripts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import runpy

    monkeypatch.setattr(sys, "argv", ["lora.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / "lora.py"), run_name="__main__")
    assert "--lora LORA" in capsys.readouterr().out


def test_importing_makes_the_compressed_classes_known() -> None:
    code = (
        "import sys, ppcl; assert not {'torch', 'diffusers'} & set(sys.modules)\n"
        "import diffusers; name = 'PPCLFluxTransformer2DModel'; assert not hasattr(diffusers, name)\n"
        "import ppcl.pipelines; assert issubclass(getattr(diffusers, name), diffusers.FluxTransformer2DModel)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=EXAMPLES.parents[1])
    assert done.returncode == 0, done.stderr
