"""What a user can get wrong before a run: exit code 2, one line that says what to do, nothing overwritten."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

# Models


def test_unknown_model(refuses, tmp_path, prompts_file):
    out = tmp_path / "run"
    for name in (tmp_path / "nowhere", "./nowhere", "nowhere"):
        says = ("nowhere", "neither a pipeline folder, a hub id", "check the name")
        refuses("compress", name, "--out", out, "--prompts", prompts_file, says=says)
    assert not out.exists()


@pytest.mark.parametrize("blocks", ["auto", "resident"])
def test_hub_id_out_of_reach(blocks, refuses, tmp_path, prompts_file, monkeypatch):
    from diffusers import DiffusionPipeline

    def fail(*_, **__):
        raise OSError("Cannot load model owner/nothing: no connection\nsecond line")

    monkeypatch.setattr(DiffusionPipeline, "download", fail)
    says = ("'owner/nothing' cannot be fetched", "no connection", "check the name", "the network")
    options = ("--prompts", prompts_file, "--set", f"blocks={blocks}")
    refuses("compress", "owner/nothing", "--out", tmp_path / "run", *options, says=says)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (None, ("model_index.json is missing", "give the pipeline's top folder")),
        ('{"_class_name": "StableDiff', ("model_index.json is damaged", "fetch the pipeline again")),
        ("[1, 2]", ("model_index.json is damaged", "fetch the pipeline again")),
        (
            '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}',
            ("has no transformer (StableDiffusionPipeline)", "not U-Nets"),
        ),
        (
            '{"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}',
            ("DiTTransformer2DModel is not supported yet", "class labels", "ppcl families"),
        ),
    ],
)
def test_folder_that_cannot_be_compressed(refuses, tmp_path, prompts_file, index, says):
    model = tmp_path / "model"
    model.mkdir()
    if index is not None:
        (model / "model_index.json").write_text(index)
    refuses("compress", model, "--out", tmp_path / "run", "--prompts", prompts_file, says=says, watch=tmp_path)
    assert not (tmp_path / "run").exists()


def test_pipeline_of_an_unsupported_family(refuses, tmp_path, prompts_file):
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=4,
        num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=4)
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(tmp_path / "dit")
    says = ("DiTTransformer2DModel is not supported yet",)
    refuses("compress", tmp_path / "dit", "--out", tmp_path / "run", "--prompts", prompts_file, says=says)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_weights(refuses, tmp_path, tiny_model, prompts_file, small_config, damage):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes({"truncated": content[:-500], "garbage": b"\xff" * 600, "empty": b""}[damage])
    says = (str(weights), "truncated" if damage == "truncated" else "damaged", "fetch or write it again")
    arguments = ("compress", model, "--out", tmp_path / "run", "--prompts", prompts_file, "--config", small_config)
    refuses(*arguments, says=says, watch=tmp_path)


def test_config_that_does_not_fit_the_weights(refuses, tmp_path, tiny_model, prompts_file, small_config):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    path = model / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 9}))
    arguments = ("compress", model, "--out", tmp_path / "run", "--prompts", prompts_file, "--config", small_config)
    refuses(*arguments, says=(str(model), "fetch it again"), watch=tmp_path)
    path.write_text("{")
    refuses(*arguments, says=(str(model), "is damaged"), watch=tmp_path)


# Options and config


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--set", "distill.local_stepz=3"), ("unknown key", "did you mean 'local_steps'?")),
        (("--set", "distill"), ("--set 'distill' is not of the form section.key=value",)),
        (("--set", "capture.held_out_share=2"), ("capture.held_out_share = 2", "less than 1")),
        (("--mode", "best"), ("plan.mode = 'best'", "valid: optimal, paper, uniform, influence, allocation")),
        (("--keep", "0.5", "--speedup", "2"), ("give one budget",)),
        (("--fit", "24TB"), ("--fit '24TB' is not a size", "24GB")),
        (("--set", "evaluate.features=emojis"), ("unknown features (did you mean 'emoji'?)", "valid: ")),
        (("--set", "device=gpu"), ("device 'gpu' cannot be used", "use --set device=cpu")),
        (("--set", "device=cuda:99"), ("device 'cuda:99' cannot be used", "use --set device=cpu")),
        (("--config", "nowhere.yaml"), ("nowhere.yaml does not exist",)),
        (("--prompts", "nowhere.txt"), ("nowhere.txt does not exist", "one prompt a line")),
    ],
)
def test_bad_option(refuses, common, tmp_path, options, says):
    refuses("compress", *common, "--out", tmp_path / "run", *options, says=says)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("plan: {kep: 0.5}\n", ("unknown key 'plan.kep'", "did you mean 'keep'?")),
        ("- 1\n", ("must hold a mapping",)),
        ("a: [\n", ("cannot be read as YAML",)),
    ],
)
def test_bad_config_file(refuses, common, tmp_path, content, says):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    refuses("compress", *common, "--config", path, "--out", tmp_path / "run", says=says)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", ("holds 0 different prompts, at least 4",)),
        (b"\n  \n", ("holds 0 different prompts",)),
        (b"cat\ncat\ncat\ncat\ndog\n", ("holds 2 different prompts",)),
        (b"\xff\xfe\x00c\x00", ("cannot be read", "truncated")),
        (b"a cat\n\xff\xfe\x00c\x00a", ("cannot be read as UTF-8",)),
    ],
)
def test_bad_prompts_file(refuses, tiny_model, tmp_path, content, says):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    refuses("compress", tiny_model, "--prompts", path, "--out", tmp_path / "run", says=(str(path), *says))
    assert not (tmp_path / "run").exists()


# The run directory


def test_a_later_stage_first(refuses, common, tmp_path):
    refuses("distill", *common, "--out", tmp_path / "run", says=("ppcl distill needs", "run ppcl plan first"))
    assert not (tmp_path / "run").exists()


def test_directory_of_something_else(refuses, common, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    says = ("is not empty and not a run of ppcl", "choose another --out")
    refuses("compress", *common, "--out", tmp_path, says=says, watch=tmp_path)


def test_run_of_another(refuses, common, run_copy, tiny_model, small_config, prompts_file, tmp_path):
    other_prompts = tmp_path / "prompts.txt"
    other_prompts.write_text("\n".join(f"prompt {i}" for i in range(12)))
    other_model = shutil.copytree(tiny_model, tmp_path / "other")
    index = other_model / "model_index.json"
    index.write_text(index.read_text() + "\n")
    for differs, options in {
        "with other seed;": (*common, "--set", "seed=1"),
        "with other prompts;": (*common, "--prompts", other_prompts),
        "with other evaluate.num_prompts;": (*common, "--set", "evaluate.num_prompts=3"),
        "with other weights (model_index.json is another one);": (other_model, *common[1:]),
    }.items():
        says = (str(run_copy), differs, "choose another --out")
        refuses("compress", *options, "--out", run_copy, says=says, watch=run_copy)


def test_out_below_a_file(refuses, common, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "run", tmp_path / "file"):
        refuses("compress", *common, "--out", out, says=("cannot write", "choose another --out"), watch=tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_out(refuses, common, tmp_path):
    tmp_path.chmod(0o500)
    try:
        refuses("compress", *common, "--out", tmp_path / "run", says=("cannot write", "choose another --out"))
    finally:
        tmp_path.chmod(0o700)


def test_run_in_use(refuses, common, run_copy):
    import subprocess

    code = (
        "import sys; from pathlib import Path; from ppcl.common.folders import lock_folder\n"
        "lock_folder(Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", code, str(run_copy)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as other:
        assert other.stdout.readline() == "locked\n"
        says = (f"is in use by process {other.pid}", "choose another --out")
        refuses("plan", *common, "--keep", "0.9", "--out", run_copy, says=says, watch=run_copy)
        for table in ("compare", "ablate", "ladder", "study"):  # no stage must run for them
            refuses(table, *common, "--out", run_copy, says=says, watch=run_copy)
        other.stdin.close()


@pytest.mark.parametrize("option", [("--keep", "0.01"), ("--speedup", "40"), ("--fit", "0.1MB")])
def test_impossible_budget_keeps_the_finished_run(refuses, run_cli, common, run_copy, option):
    says = ("no optimal plan gives", "the nearest feasible budget is --")
    refuses("compress", *common, *option, "--out", run_copy, says=says, watch=run_copy)
    code, err = run_cli("compress", *common, "--out", run_copy)
    assert code == 0
    assert err.count(": done before") == 8


def test_unknown_open_clip_model_keeps_the_evaluation(refuses, common, run_copy):
    option = ("--set", "evaluate.features=ViT-B-33/openai")
    says = ("features 'ViT-B-33/openai' are unknown", "did you mean 'ViT-B-32'?")
    refuses("evaluate", *common, *option, "--out", run_copy, says=says, watch=run_copy)
