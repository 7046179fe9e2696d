"""`ppcl inspect`: published models by their configs alone, tiny ones against real models, bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, WanTransformer3DModel, ZImageTransformer2DModel
from published import FLUX_DEV, QWEN_IMAGE, write_config
from tiny_models import flux_call, qwen_call, tiny_flux, tiny_qwen

from ppcl.config import PlanConfig
from ppcl.errors import BudgetError, ConfigError, ModelError, UserError
from ppcl.inspection import blueprint
from ppcl.inspection.model import inspect_model, largest_within, parts_of, report
from ppcl.inspection.width import plans
from ppcl.modules.compressed import compressed_class
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import adapter_for
from ppcl.teacher.flops import count_flops, count_params

ROOT = Path(__file__).resolve().parents[2]
DUAL, SINGLE = "transformer_blocks", "single_transformer_blocks"


def tiny_config(real, folder):
    return str(write_config(folder, {**real.config, "_class_name": type(real).__name__}))


# Published models


def test_qwen_image(tmp_path):
    found = inspect_model(str(write_config(tmp_path, QWEN_IMAGE)), PlanConfig(keep=0.669))
    (stack,) = found.model.stacks
    assert (stack.name, stack.count_field, stack.num_blocks) == (DUAL, "num_layers", 60)
    assert found.model.params == 20_430_401_088
    assert found.choices[0].blocks == {DUAL: 40}
    assert found.choices[0].params == 13_633_775_168
    assert found.choices[0].bytes_bf16 == 2 * 13_633_775_168
    assert found.choices[0].speedup == pytest.approx(1.5, abs=1e-3)
    assert found.parts["modulation"] == 60 * 2 * (3072 * 6 * 3072 + 6 * 3072)
    assert sum(found.parts.values()) == found.model.params
    assert found.parts["other"] == 0
    assert found.call == {"height": 1024, "width": 1024, "image_tokens": 4096, "text_tokens": 128}


def test_flux_dev(tmp_path):
    found = inspect_model(str(write_config(tmp_path, FLUX_DEV)), PlanConfig(keep=0.686))
    assert [(s.name, s.num_blocks) for s in found.model.stacks] == [(DUAL, 19), (SINGLE, 38)]
    assert found.model.params == 11_901_408_320
    lite = next(rung for rung in found.choices if rung.blocks == {DUAL: 8, SINGLE: 38})
    assert lite.params == 8_163_264_064
    assert sum(found.parts.values()) == found.model.params
    assert found.call == {"height": 1024, "width": 1024, "image_tokens": 4096, "text_tokens": 512}


@pytest.mark.parametrize(
    ("config", "params"),
    [(QWEN_IMAGE, 20_430_401_088), pytest.param(FLUX_DEV, 11_901_408_320, marks=pytest.mark.slow)],
)
def test_the_command_is_quick_and_small(tmp_path, config, params):
    """Under 6 seconds of processor time beside the libraries' imports, and 2 GB of memory with them."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("the peak of the resident set is read from /proc")
    write_config(tmp_path, config)
    code = (
        "import json, re, sys, time\n"
        "from ppcl.cli import main\n"
        "import ppcl.inspection.model\n"
        "from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel\n"
        "began = time.process_time()\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        # not ru_maxrss, which starts from the peak of the process that started this one: the tests' own
        "peak = 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read()).group(1))\n"
        "print(json.dumps({'seconds': time.process_time() - began, 'peak': peak}), file=sys.stderr)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(tmp_path), "--keep", "0.67", "--json"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    used = json.loads(result.stderr.splitlines()[-1])
    assert used["seconds"] < 6
    assert used["peak"] < 2e9
    found = json.loads(result.stdout)
    assert found["model"]["params"] == params
    assert found["choices"][0]["param_ratio"] <= 0.67


def tiny_sd3():
    real = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=5, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=24, pooled_projection_dim=16, pos_embed_max_size=8,
        dual_attention_layers=(0, 1),  # blocks that differ inside one stack
    )  # fmt: skip
    call = {
        "hidden_states": torch.zeros(1, 4, 4, 6),
        "encoder_hidden_states": torch.zeros(1, 5, 24),
        "pooled_projections": torch.zeros(1, 16),
        "timestep": torch.ones(1),
    }
    return real.eval(), call


def tiny_wan():
    real = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=24, freq_dim=16,
        ffn_dim=32, num_layers=3, rope_max_seq_len=32,
    )  # fmt: skip
    call = {
        "hidden_states": torch.zeros(1, 4, 1, 4, 6),
        "encoder_hidden_states": torch.zeros(1, 5, 24),
        "timestep": torch.ones(1),
    }
    return real.eval(), call


def tiny_z_image():
    real = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
        axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
    )  # fmt: skip
    call = {"x": [torch.zeros(4, 1, 4, 6)], "t": torch.ones(1), "cap_feats": [torch.zeros(5, 24)]}
    return real.eval(), call


# Tiny models: what is predicted from shapes is what real models have


@pytest.mark.parametrize(
    ("real", "arguments", "text"),
    [
        (tiny_qwen(3), qwen_call(1), 5),
        (tiny_flux(), flux_call(1), 5),
        (*tiny_sd3(), 5),
        (*tiny_wan(), 5),
        (*tiny_z_image(), 5),
    ],
    ids=["qwen", "flux", "sd3", "wan", "z-image"],
)
def test_parameters_and_flops_are_those_of_the_real_model(real, arguments, text):
    transformer = blueprint.build_on_meta({**real.config, "_class_name": type(real).__name__})
    assert all(parameter.is_meta for parameter in transformer.parameters())
    assert count_params(transformer) == count_params(real)
    call = blueprint.example_call(transformer, (2, 3), text)
    stacks = {spec.name: list(adapter_for(real).blocks(real, spec)) for spec in adapter_for(real).stacks}
    measured = count_flops(real, stacks, lambda: velocity(real, arguments), 1)
    assert blueprint.flops_on_meta(transformer, call) == measured


@pytest.mark.parametrize("keep", [0.9, 0.7])
def test_every_size_can_be_built(tmp_path, keep):
    real = tiny_flux(dual=5, single=6)
    found = inspect_model(tiny_config(real, tmp_path), PlanConfig(keep=keep))
    assert found.ladder[0].params == found.model.params == count_params(real)
    for rung in (*found.ladder, *found.choices):
        smaller = FluxTransformer2DModel.from_config(
            {**real.config, "num_layers": rung.blocks[DUAL], "num_single_layers": rung.blocks[SINGLE]}
        )
        assert count_params(smaller) == rung.params
        assert rung.param_ratio == rung.params / found.model.params
    assert all(rung.param_ratio <= keep for rung in found.choices)


def test_largest_within_respects_protection_and_run_length(tmp_path):
    real = tiny_qwen(10)
    model = inspect_model(tiny_config(real, tmp_path)).model

    def fewest(**settings):
        max_run = settings.pop("max_run", 10)
        with pytest.raises(BudgetError, match="nearest feasible budget is --keep") as caught:
            largest_within(model, PlanConfig(keep=0.01, **settings), max_run)
        share = float(re.search(r"--keep ([\d.]+)", str(caught.value)).group(1))
        return largest_within(model, PlanConfig(keep=share, **settings), max_run)[0].blocks[DUAL]

    assert fewest() == 1 + 1 + 1
    assert fewest(protect_first=3, protect_last=2) == 3 + 1 + 2
    assert fewest(max_run=2) == 1 + 4 + 1
    assert fewest(max_run=3) == 1 + 3 + 1


def test_budget_as_speed(tmp_path):
    folder = tiny_config(tiny_flux(dual=6, single=6), tmp_path)
    found = inspect_model(folder, PlanConfig(speedup=1.5))
    assert found.budget == {"speedup": 1.5}
    assert found.choices[0].speedup >= 1.5
    with pytest.raises(BudgetError, match="nearest feasible budget is --speedup"):
        inspect_model(folder, PlanConfig(speedup=50))
    with pytest.raises(ConfigError, match="give --keep"):
        inspect_model(folder, PlanConfig(fit_gb=20))


@pytest.mark.slow
def test_half_of_qwen_image_by_smaller_modules(tmp_path):
    """The count is that of the compressed class built from the config entry, at full size, without weights."""
    write_config(tmp_path, QWEN_IMAGE)
    found = inspect_model(str(tmp_path), PlanConfig(keep=0.5), rank=64).wider
    assert found.networks == {"text": "one affine map"}
    config = blueprint.read_config(str(tmp_path))[0]
    teacher = blueprint.build_on_meta(config)
    parts = next(p for _, n, p in plans(teacher, adapter_for(teacher), found.rank) if n == found.networks)
    with torch.device("meta"):
        rebuilt = compressed_class(type(teacher)).from_config({**teacher.config, "pruning": parts})
    assert count_params(rebuilt) == found.params == 9_836_424_768
    assert all(parameter.is_meta for parameter in rebuilt.parameters())
    assert found.params <= 0.5 * count_params(teacher)
    less = inspect_model(str(tmp_path), PlanConfig(keep=0.7), rank=16).wider
    assert (less.rank, less.networks) == (16, {})


def test_smaller_modules_alone_may_not_do(tmp_path):
    write_config(tmp_path, FLUX_DEV)
    assert inspect_model(str(tmp_path), PlanConfig(keep=0.5), rank=64).wider is None


def test_without_a_budget_there_is_no_choice(tmp_path):
    found = inspect_model(tiny_config(tiny_qwen(4), tmp_path))
    assert found.choices == ()
    assert found.budget is None
    assert "the largest" not in report(found)


def test_a_family_without_example_inputs_has_sizes_alone(tmp_path, monkeypatch):
    monkeypatch.delitem(blueprint.CALLS, "FluxTransformer2DModel")
    folder = tiny_config(tiny_flux(dual=6, single=6), tmp_path)
    found = inspect_model(folder, PlanConfig(keep=0.7))
    assert (found.call, found.model.flops, found.choices[0].speedup) == (None, 0, None)
    assert "need a captured call" in report(found)
    with pytest.raises(ModelError, match="need a captured call"):
        inspect_model(folder, PlanConfig(speedup=1.5))


def test_parts_of_single_blocks():
    real = tiny_flux(dual=2, single=1)
    parts = parts_of(real, adapter_for(real))
    block = real.single_transformer_blocks[0]
    without = parts_of(tiny_flux(dual=2, single=2), adapter_for(real))
    assert without["ffn"] - parts["ffn"] == count_params(block.proj_mlp) + count_params(block.proj_out)
    assert without["modulation"] - parts["modulation"] == count_params(block.norm)
    assert without["text stream"] == parts["text stream"]
    assert without["other"] == parts["other"] == 0


# Places a model can be


def test_all_ways_to_name_a_model(tmp_path, ppcl):
    folder = write_config(tmp_path, {**tiny_qwen(4).config, "_class_name": "QwenImageTransformer2DModel"})
    printed = set()
    for name in (folder, folder / "transformer", folder / "transformer" / "config.json"):
        code, out, err = ppcl("inspect", name, "--keep", "0.8")
        assert code == 0, err
        printed.add(out.partition(":")[2])
    (text,) = printed
    assert "transformer_blocks (num_layers): 4 blocks" in text
    assert "fit.width=[modulation]: low rank" in text
    assert "the largest with 0.8 of the parameters" in text


def test_vae_beside_it_sets_the_tokens(tiny_model):
    found = inspect_model(str(tiny_model), height=16, width=24)
    assert found.call["image_tokens"] == 2 * 3  # f4 VAE, 2 x 2 latents a token
    with pytest.raises(UserError, match="at least 8 x 8 pixels"):
        inspect_model(str(tiny_model), height=7, width=24)


def test_hub_files_are_fetched_without_weights(tmp_path, monkeypatch, ppcl):
    import huggingface_hub

    folder = write_config(tmp_path, QWEN_IMAGE)
    asked = []

    def fake(repository, name):
        asked.append((repository, name))
        if name != "transformer/config.json":
            raise huggingface_hub.errors.EntryNotFoundError("not there")
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    code, out, err = ppcl("inspect", "Qwen/Qwen-Image", "--json", "--height", "512", "--width", "768")
    assert code == 0, err
    assert json.loads(out)["call"]["image_tokens"] == 32 * 48
    assert asked == [("Qwen/Qwen-Image", f"{n}.json") for n in ("transformer/config", "vae/config", "model_index")]


def test_embedded_model(ppcl):
    if not (ROOT / "ppcl" / "assets" / "teacher" / "transformer" / "config.json").is_file():
        pytest.skip("the embedded teacher is not there")
    code, out, err = ppcl("inspect", "emoji")
    assert code == 0, err
    assert "48 x 48 pixels" in out


# Bad input: one line, exit code 2


def broken(**changes):
    return json.dumps({**QWEN_IMAGE, **changes})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "config.json does not exist; give a pipeline folder"),
        ("{", "config.json is damaged"),
        ("\x00\x01", "config.json is damaged"),
        ("[1]", "is damaged (a list, not a mapping)"),
        ("{}", "names no _class_name"),
        (broken(_class_name=7), "names no _class_name"),
        (broken(_class_name="NotThereTransformer2DModel"), "knows no class 'NotThereTransformer2DModel'; upgrade"),
        (broken(_class_name="DiffusionPipeline"), "is not a model"),
        (broken(_class_name="UNet2DConditionModel"), "UNet2DConditionModel is not supported"),
        (broken(num_layers="many"), "do not fit together"),
        (broken(num_layers=0), "there is no block to remove"),
        (broken(axes_dims_rope=[16, 56, 40]), "do not fit together"),
        (broken(attention_head_dim=None), "do not fit together"),
    ],
)
def test_bad_config(tmp_path, ppcl, content, says):
    folder = tmp_path / "model"
    folder.mkdir()
    if content is not None:
        write_config(folder, {})
        (folder / "transformer" / "config.json").write_text(content)
    code, out, err = ppcl("inspect", folder)
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert err.endswith(f"{line}\n")
    assert says in line


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", "neither a pipeline folder, a hub id"),
        ("./nowhere", "neither a pipeline folder, a hub id"),
        ("nowhere/config.json", "nowhere/config.json does not exist"),
        ("nobody/nothing", "transformer/config.json of 'nobody/nothing' cannot be fetched"),
    ],
)
def test_no_such_model(ppcl, name, says):
    code, out, err = ppcl("inspect", name)
    assert (code, out) == (2, "")
    assert err.count("error: ") == 1
    assert says in err


def test_a_pipeline_without_a_transformer(tmp_path, ppcl):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "X"]}')
    code, _, err = ppcl("inspect", tmp_path)
    assert code == 2
    assert "has no transformer (StableDiffusionPipeline)" in err


def test_inspecting_reads_no_weights(tmp_path):
    """Weight files that are garbage do not matter."""
    folder = write_config(tmp_path, {**tiny_qwen(4).config, "_class_name": "QwenImageTransformer2DModel"})
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"garbage")
    assert inspect_model(str(folder)).model.params == count_params(tiny_qwen(4))
    assert torch.empty(1).device.type == "cpu"  # the meta device was left again
