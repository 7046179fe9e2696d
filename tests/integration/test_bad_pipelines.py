"""Pipelines and LoRAs that contradict themselves: exit code 2 and one line, never a silent guess."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file
from tiny_pipelines import flux

from ppcl import cli


@pytest.fixture
def one_line(monkeypatch, capsys):
    """Call something with a command line; it must stop with code 2 and one line, which is returned."""

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert stop.value.code == 2, err
        assert len(lines) == 1 and err.rstrip().endswith(lines[0]), err
        return lines[0]

    return call


@pytest.fixture
def refused(one_line, prompts_file, tmp_path):
    """Give a model to the command line; it must refuse it and write nothing."""

    def call(model):
        out = tmp_path / "run"
        line = one_line(cli.main, "ppcl", "compress", model, "--out", out, "--prompts", prompts_file)
        assert not (out / "calibration").exists()
        return line

    return call


@pytest.fixture
def copy(tiny_model, tmp_path):
    """A pipeline folder that a test may damage."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def change_config(model, **changes):
    path = model / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def in_shards(model, part):
    """Write a component again in shards; returns them."""
    from diffusers import QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    kind = {"transformer": QwenImageTransformer2DModel, "text_encoder": Qwen2_5_VLForConditionalGeneration}[part]
    component = kind.from_pretrained(model / part)
    shutil.rmtree(model / part)
    component.save_pretrained(model / part, max_shard_size="150KB" if part == "transformer" else "2MB")
    shards = sorted((model / part).glob("*-of-*.safetensors"))
    assert len(shards) > 1
    return shards


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_missing_shard(refused, copy, part):
    shards = in_shards(copy, part)
    shards[1].unlink()
    line = refused(copy)
    assert f"{shards[1]} is missing (1 of the {len(shards)} files" in line
    assert "fetch the pipeline again" in line


def test_whole_shards_are_accepted_and_a_damaged_index_is_not(refused, copy):
    from ppcl.teacher.loading import load_pipeline

    in_shards(copy, "transformer")
    assert len(load_pipeline(str(copy), torch.device("cpu")).transformer.transformer_blocks) == 6
    index = copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    for content in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(content)
        assert f"{index} is damaged" in refused(copy)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("count", "says"), [(4, "num_layers is 4, but the files hold 6 of 'transformer_blocks'"), (7, "the files have no")]
)
def test_config_of_another_depth(refused, copy, count, says, sharded):
    if sharded:
        in_shards(copy, "transformer")
    change_config(copy, num_layers=count)
    line = refused(copy)
    assert "the transformer's config.json and its weights disagree" in line
    assert says in line


def test_config_of_another_width(refused, copy):
    change_config(copy, num_attention_heads=4, axes_dims_rope=[4, 6, 6])
    assert "cannot be loaded" in refused(copy)


def test_second_block_list_of_another_depth(refused, tmp_path):
    flux().save_pretrained(tmp_path / "flux")
    change_config(tmp_path / "flux", num_single_layers=3)
    assert "num_single_layers is 3, but the files hold 4 of 'single_transformer_blocks'" in refused(tmp_path / "flux")


# LoRA: the example script is its command line


def lora_file(path, names, width=32, metadata=None):
    tensors = {f"{name}.lora_A.weight": torch.zeros(2, width) for name in names}
    tensors |= {f"{name}.lora_B.weight": torch.zeros(32, 2) for name in names}
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    "names",
    [
        ("transformer.single_transformer_blocks.0.attn.to_q",),  # FLUX
        ("transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.ff.net.2"),  # SD3
        ("diffusion_model.blocks.0.self_attn.q",),  # Wan
        ("unet.down_blocks.0.attentions.0.to_q",),
    ],
)
def test_lora_of_another_family(one_line, finished_run, tmp_path, names):
    from ppcl.pipelines.examples import common, lora

    file = lora_file(tmp_path / "other.safetensors", names)
    given = ("lora.py", finished_run / "pipeline", "red cat", "--lora", file, "--out", tmp_path / "picture.png")
    assert "another family" in one_line(lambda: common.exits_cleanly(lora.main), *given)
    assert not (tmp_path / "picture.png").exists()


def test_lora_says_what_sets_its_strength(finished_run, tmp_path):
    from diffusers import DiffusionPipeline

    from ppcl.pipelines import convert_lora, load_lora

    pipe = DiffusionPipeline.from_pretrained(finished_run / "pipeline")
    name = "transformer.transformer_blocks.0.attn.to_q"  # the first block is never replaced
    plain = lora_file(tmp_path / "plain.safetensors", [name])
    report = load_lora(pipe, plain, adapter_name="plain")
    assert "neither metadata nor alphas" in str(report).splitlines()[-1]
    assert pipe.transformer.transformer_blocks[0].attn.to_q.scaling["plain"] == 1.0
    told = lora_file(tmp_path / "told.safetensors", [name], metadata={"lora_adapter_metadata": '{"transformer.r": 2}'})
    assert convert_lora(told, tmp_path / "out.safetensors", pipe).strength.endswith("from the file's metadata")
    alphas = {f"{name}.lora_A.weight": torch.zeros(2, 32), f"{name}.lora_B.weight": torch.zeros(32, 2)}
    report = load_lora(pipe, {**alphas, f"{name}.alpha": torch.tensor(1.0)}, adapter_name="alphas")
    assert report.strength.startswith("strength: the alphas")
