"""What somebody else, or a bad disk, made of a run's files: one line and exit code 2, or success; nothing else.

Damage of all kinds by a seed, and the single cases that once passed for a run.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from bounds import bounded
from conftest import tree
from hostile import damaged, damaged_tensors, damaged_text, rounds

from ppcl.common.files import file_digest, read_json, read_mapping, write_json
from ppcl.common.tensor_files import read_tensors, write_tensors
from ppcl.errors import ArtifactError, ModelError, UserError

# each: the file, the stage that reads it, an option that makes it run again, rounds
FUZZED = [
    ("plan.json", "distill", "distill.local_steps=2", 8),
    ("analysis.json", "plan", "plan.keep=0.9", 8),
    ("analysis.json", "fit", "fit.steps=2", 3),
    ("candidates.json", "plan", "plan.keep=0.9", 8),
    ("stages.json", "plan", "plan.keep=0.9", 8),
    ("bundle/bundle.json", "export", "export.dtype=bfloat16", 3),
    ("bundle/plan.json", "export", "export.dtype=bfloat16", 5),
    ("bundle/substitutes.safetensors", "export", "export.dtype=bfloat16", 4),
    ("bundle/tuned.safetensors", "export", "export.dtype=bfloat16", 4),
    ("analysis.safetensors", "fit", "fit.steps=2", 4),
    ("prices.safetensors", "plan", "plan.keep=0.9", 5),
    ("candidates.safetensors", "distill", "distill.local_steps=2", 3),
    ("calibration/train-0000.safetensors", "analyze", "analyze.cka_tokens=32", 6),
    ("calibration/held-out-0000.safetensors", "fit", "fit.steps=2", 4),
]


@pytest.mark.parametrize(("name", "stage", "option", "count"), FUZZED, ids=lambda value: str(value))
def test_any_damage_is_one_line_or_nothing(run_cli, common, finished_run, tmp_path, name, stage, option, count):
    teacher = tree(common[0])
    content = (finished_run / name).read_bytes()
    for number, chance in enumerate(rounds(f"{name} {stage}", count)):
        run = shutil.copytree(finished_run, tmp_path / str(number))
        is_tensors = name.endswith(".safetensors")
        bad = damaged_tensors(content, chance) if is_tensors else damaged(content.decode(), chance).encode()
        (run / name).write_bytes(bad)
        if name.startswith("bundle/") and "bundle.json" not in name:
            seal(run / "bundle")
        with bounded():
            code, err = run_cli(stage, *common, "--set", option, "--out", run)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (code, len(lines)) in ((0, 0), (2, 1)), (number, err)
        assert "Traceback" not in err
        assert all(len(line) < 2000 for line in lines)
        shutil.rmtree(run)
    assert tree(common[0]) == teacher
    assert not list(tmp_path.iterdir())


REPORTED = ("analysis.json", "candidates.json", "plan.json", "eval/metrics.json", "stages.json", "config.yaml")


def test_any_damage_of_what_a_report_shows(run_cli, finished_run, tmp_path):
    for name, chance in zip(REPORTED, rounds("report", len(REPORTED)), strict=True):
        run = shutil.copytree(finished_run, tmp_path / "run")
        content = (run / name).read_text()
        bad = damaged_text(content, chance) if name.endswith("yaml") else damaged(content, chance)
        (run / name).write_text(bad)
        with bounded():
            code, err = run_cli("report", run)
        assert code in (0, 2), (name, err)
        assert "Traceback" not in err
        shutil.rmtree(run)


def seal(bundle):
    """Give a bundle the hashes of what is in it now, as who damages it on purpose does."""
    about = read_json(bundle / "bundle.json")
    about["files"] = {path.name: file_digest(path) for path in sorted(bundle.iterdir()) if path.name != "bundle.json"}
    write_json(bundle / "bundle.json", about)


@pytest.fixture(scope="session")
def narrow_pipeline(finished_run, tmp_path_factory):
    """An exported pipeline with smaller modules; do not write into it."""
    from diffusers import QwenImageTransformer2DModel

    from ppcl.modules.compressed import compress_class
    from ppcl.modules.replacements import apply_width
    from ppcl.modules.slicing import neurons_of

    folder = shutil.copytree(finished_run / "pipeline", tmp_path_factory.mktemp("narrow") / "pipeline")
    transformer = QwenImageTransformer2DModel.from_pretrained(folder / "transformer")
    parts = {
        "transformer_blocks.0.img_mod.1": {"kind": "low_rank", "size": 2},
        "transformer_blocks.1.img_mlp": neurons_of(transformer.transformer_blocks[1].img_mlp).part(range(64)),
        "transformer_blocks.2.txt_mlp": {"kind": "linear", "size": 0},
    }
    apply_width(transformer, parts)
    compress_class(transformer, parts)
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer")
    index = read_mapping(folder / "model_index.json")
    write_json(folder / "model_index.json", {**index, "transformer": ["diffusers", type(transformer).__name__]})
    return folder


def looked_at(folder):
    """Load a pipeline and read what ppcl reads off it."""
    from ppcl.eval.models import blocks_of
    from ppcl.pipelines import kept_blocks
    from ppcl.pruning.sparsity import zeros_of
    from ppcl.teacher.loading import load_pipeline

    pipeline = load_pipeline(str(folder), torch.device("cpu"))
    kept_blocks(pipeline)
    blocks_of(pipeline)
    zeros_of(pipeline.transformer)
    return pipeline


@pytest.mark.parametrize("name", ["transformer/config.json", "model_index.json"])
def test_any_damage_of_an_exported_config(narrow_pipeline, tmp_path, name):
    content = (narrow_pipeline / name).read_text()
    looked_at(narrow_pipeline)
    for chance in rounds(name, 8):
        folder = shutil.copytree(narrow_pipeline, tmp_path / "pipeline")
        (folder / name).write_text(damaged(content, chance))
        with bounded():
            try:
                looked_at(folder)
            except UserError as error:
                assert len(str(error)) < 2000
        shutil.rmtree(folder)


PARTS = {
    "low_rank": {"kind": "low_rank", "size": 2},
    "narrow": {"kind": "narrow", "size": 1, "of": 128, "kept": "1", "rows": ["net.0.proj"], "columns": ["net.2"]},
    "heads": {"kind": "heads", "size": 1, "of": 2, "kept": "1", "rows": ["to_q"], "columns": ["to_out.0"]},
}


@pytest.mark.parametrize(
    "pruning",
    [
        [1, 2],
        "x",
        {"transformer_blocks.0.img_mod.1": None},
        {"transformer_blocks.0.img_mod.1": {"size": 2}},
        {"transformer_blocks.0.img_mod.1": {"kind": "low_rank", "size": 10**12}},
        {"transformer_blocks.0.img_mod.1": {"kind": "low_rank", "size": -1}},
        {"transformer_blocks.0.img_mod.1": {"kind": "low_rank", "size": 64}},
        {"transformer_blocks.0.img_mlp": PARTS["low_rank"]},
        {"transformer_blocks.9.img_mlp": {"kind": "linear", "size": 0}},
        {"": {"kind": "linear", "size": 0}},
        {"transformer_blocks.0.img_mlp": {**PARTS["narrow"], "size": 10**12, "of": 10**12}},
        {"transformer_blocks.0.img_mlp": {**PARTS["narrow"], "of": 10**12}},
        {"transformer_blocks.0.img_mlp": {**PARTS["narrow"], "of": 64}},
        {"transformer_blocks.0.img_mlp": {**PARTS["narrow"], "rows": ["net.9"]}},
        {"transformer_blocks.0.img_mlp": {**PARTS["narrow"], "kept": "1" * 10_000}},
        {"transformer_blocks.0.attn": {**PARTS["heads"], "of": 4}},
        {"transformer_blocks.0.img_norm1": {"kind": "text_output", "size": 0}},
    ],
    ids=lambda value: str(value)[:70],
)
def test_smaller_modules_that_do_not_fit(narrow_pipeline, tmp_path, pruning):
    from ppcl.teacher.loading import load_pipeline

    folder = shutil.copytree(narrow_pipeline, tmp_path / "pipeline")
    path = folder / "transformer" / "config.json"
    write_json(path, {**read_mapping(path), "pruning": pruning})
    with pytest.raises(ModelError):
        load_pipeline(str(folder), torch.device("cpu"))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 10**9},
        {"num_layers": -1},
        {"num_layers": "six"},
        {"num_attention_heads": 10**12},
        {"axes_dims_rope": []},
        {"use_additional_t_cond": True},  # diffusers draws its weights at random
        {"_class_name": 5},
        {"_ppcl": {"kept_blocks": 3}},
        {"_ppcl": [1]},
        {"_ppcl": {"kept_blocks": {"transformer_blocks": [0, 2, 1]}}},
    ],
    ids=str,
)
def test_a_config_that_is_of_no_model(refuses, narrow_pipeline, tmp_path, changes):
    folder = shutil.copytree(narrow_pipeline, tmp_path / "pipeline")
    path = folder / "transformer" / "config.json"
    write_json(path, {**read_mapping(path), **changes})
    with pytest.raises(UserError):
        looked_at(folder)


def test_weights_that_are_pickles_are_not_opened(refuses, tiny_model, prompts_file, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    weights = next((model / "text_encoder").glob("*.safetensors"))
    weights.unlink()
    (model / "text_encoder" / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    says = ("pytorch_model.bin is a pickle", "safetensors")
    options = ("--out", tmp_path / "run", "--prompts", prompts_file)
    refuses("compress", model, *options, says=says, watch=tmp_path)


# A plan that is another one


def change(path, **changes):
    write_json(path, {**read_json(path), **changes})


@pytest.mark.parametrize("how", ["dropped", "reversed", "doubled", "beyond"])
def test_a_plan_of_other_blocks_is_refused_before_the_bundle_goes(refuses, common, run_copy, how):
    plan = read_json(run_copy / "plan.json")
    segments = plan["stacks"]["transformer_blocks"]
    plan["stacks"]["transformer_blocks"] = {
        "dropped": segments[:-2],
        "reversed": segments[::-1],
        "doubled": [*segments, segments[-1]],
        "beyond": [*segments[:-1], {**segments[-1], "last": 900}],
    }[how]
    write_json(run_copy / "plan.json", plan)
    says = ("plan.json is not a valid CompressionPlan", "delete it and run again")
    option = ("--set", "distill.local_steps=2")
    refuses("distill", *common, *option, "--out", run_copy, says=says, watch=run_copy)


def test_a_plan_that_promises_what_it_does_not_save(refuses, common, run_copy):
    plan = read_json(run_copy / "plan.json")
    plan["predicted"]["params"] -= 1000
    write_json(run_copy / "plan.json", plan)
    option = ("--set", "distill.local_steps=2")
    refuses("distill", *common, *option, "--out", run_copy, says=("does not fit the model", "1"), watch=run_copy)
    plan["predicted"]["params"] += 1000
    segment = next(s for s in plan["stacks"]["transformer_blocks"] if s["first"] == s["last"])
    segment["width"] = {"img_mod.1": {"kind": "low_rank", "size": 500}}
    write_json(run_copy / "plan.json", plan)
    refuses("distill", *common, *option, "--out", run_copy, says=("does not fit the model",), watch=run_copy)
    segment["width"], plan["model"]["weights_digest"] = {}, "0" * 16
    write_json(run_copy / "plan.json", plan)
    refuses("distill", *common, *option, "--out", run_copy, says=("was made for another model",), watch=run_copy)


# Numbers that are none


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["velocity.00", "hidden_states"])
def test_states_that_are_no_numbers(refuses, common, run_copy, value, which):
    path = run_copy / "calibration" / "train-0000.safetensors"
    tensors, meta = read_tensors(path)
    name = next(name for name in tensors if which in name)
    tensors[name].view(-1)[3] = value
    write_tensors(path, tensors, meta)
    if which == "hidden_states" and value == float("-inf"):  # what hides in an attention mask
        return
    says = (str(path), "values that are no numbers")
    refuses("analyze", *common, "--set", "analyze.cka_tokens=32", "--out", run_copy, says=says)


def test_states_that_overflow_on_their_way_are_named(refuses, common, run_copy):
    for path in (run_copy / "calibration").glob("*.safetensors"):
        tensors, meta = read_tensors(path)
        for name, tensor in tensors.items():
            if "hidden_states" in name:
                tensor.fill_(3e38)
        write_tensors(path, tensors, meta)
    says = ("transformer_blocks/0", "NaN or infinite", "precision=fp32")
    refuses("analyze", *common, "--set", "analyze.cka_tokens=32", "--out", run_copy, says=says)


# A bundle and its teacher

NEW = ("teacher_from_here", "made_of")


def test_a_bundle_is_tied_to_its_teachers_weights(finished_run, tiny_model, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    from ppcl.experiments.ladder import export_size
    from ppcl.pipelines import load_bundle

    run, model = shutil.copytree(finished_run, tmp_path / "run"), shutil.copytree(tiny_model, tmp_path / "model")
    (run / "bundle" / "tuned.safetensors").unlink()  # or no substitute can be taken out
    seal(run / "bundle")
    # a relative name, this folder here and another one elsewhere, and a ledger of before, which knows no more
    ledger = {key: value for key, value in read_json(run / "stages.json").items() if key not in NEW}
    write_json(run / "stages.json", {**ledger, "model": "model"})
    monkeypatch.chdir(tmp_path)
    load_bundle(run)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"the teacher of .* is not at model"):
        load_bundle(run)
    monkeypatch.chdir(tmp_path)
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.5 * tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    for use in (lambda: load_bundle(run), lambda: export_size(run, tmp_path / "out", "keep", 0.9)):
        with pytest.raises(ArtifactError, match=r"was made of other weights than model has here .*/model"):
            use()
    assert not (tmp_path / "out").exists()


def test_what_is_beside_a_bundles_files_is_not_loaded(refuses, common, run_copy):
    for name in ("lora.safetensors", "masks.safetensors"):
        write_tensors(run_copy / "bundle" / name, {"x": torch.ones(2, 2)})
        line = refuses("export", *common, "--set", "export.dtype=bfloat16", "--out", run_copy)
        assert name in line
        seal(run_copy / "bundle")
        refuses("export", *common, "--set", "export.dtype=bfloat16", "--out", run_copy)
        (run_copy / "bundle" / name).unlink()
        seal(run_copy / "bundle")


@pytest.mark.parametrize("name", ["/dev/zero", "../plan.json", "x.safetensors"])
def test_a_bundle_names_its_own_files_alone(refuses, common, run_copy, name):
    about = read_json(run_copy / "bundle" / "bundle.json")
    about["files"][name] = "0" * 64
    write_json(run_copy / "bundle" / "bundle.json", about)
    refuses("export", *common, "--set", "export.dtype=bfloat16", "--out", run_copy, says=("bundle.json",))


# The command line


@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "brackets", "digits", "bomb", "twice", "large"])
def test_config_files_that_are_none(refuses, common, tmp_path, kind):
    path = tmp_path / "c.yaml"
    levels = "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
    )
    texts = {
        "brackets": "a: " + "[" * 100_000,
        "digits": "seed: " + "1" * 5000,
        "bomb": "a: &a [x, x, x, x, x, x]\n" + levels,
        "twice": "plan: {keep: 0.5}\nplan: {keep: 0.6}\n",
        "large": "a: " + "x" * 1_000_000,
    }
    if kind == "device":
        path = Path("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text(texts[kind])
    says = ("config file", str(path), "cannot be read as YAML")
    refuses("compress", *common, "--config", path, "--out", tmp_path / "run", says=says)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option",
    [
        ("--fit", ""),
        ("--fit", "-24GB"),
        ("--mode", ""),
        ("--set", "capture.height=-16"),
        ("--set", "distill.local_steps=1e9"),
        ("--set", "seed=1e23"),
        ("--set", "seed=99999999999999999999999"),
        ("--set", "analyze.ridges=[]"),
        ("--set", "a=" + "[" * 20_000),
    ],
    ids=lambda value: str(value)[:40],
)
def test_options_that_would_fail_late(refuses, common, tmp_path, option):
    refuses("compress", *common, *option, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "1" * 5000 + "}", '{"a": ' * 50_000], ids=["[", "1", "{"])
def test_files_of_a_model_that_are_none(tiny_model, tmp_path, text):
    """Every JSON file of a pipeline is read by somebody: by us, diffusers, transformers or tokenizers."""
    from ppcl.teacher.loading import load_pipeline

    names = [path.relative_to(tiny_model) for path in sorted(tiny_model.rglob("*.json"))]
    assert len(names) > 5
    refused = set()
    for name in names:
        model = shutil.copytree(tiny_model, tmp_path / "model")
        (model / name).write_text(text)
        with bounded():
            try:
                load_pipeline(str(model), torch.device("cpu"))
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 2000
                refused.add(name.name)
        shutil.rmtree(model)
    assert {"model_index.json", "config.json", "tokenizer.json", "scheduler_config.json"} <= refused


@pytest.mark.parametrize("text", ["[" * 100_000, '{"_class_name": ' + "1" * 5000 + "}", "[1]", "\x00"])
def test_a_config_alone_that_is_none(refuses, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    refuses("inspect", tmp_path / "config.json", says=("config.json is damaged", "fetch it again"))


def test_a_prompts_file_that_is_none(refuses, tiny_model, tmp_path):
    path = tmp_path / "prompts.json"
    for text in ("[" * 100_000, "[" + "1" * 5000 + "]"):
        path.write_text(text)
        refuses(
            "compress", tiny_model, "--prompts", path, "--out", tmp_path / "run", says=("prompts.json", "is not JSON")
        )
    special = Path("/dev/zero")
    refuses("compress", tiny_model, "--prompts", special, "--out", tmp_path / "run", says=("cannot be read",))
