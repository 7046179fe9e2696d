"""Damaged files, full disks and trainings that explode: exit code 2, one line, nothing lost."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from ppcl.errors import UserError

# Damaged artifacts. Each: the file, the stage that reads it, and an option that makes it run again.

READERS = [
    ("plan.json", "distill", "distill.local_steps=2"),
    ("analysis.json", "fit", "fit.steps=2"),
    ("analysis.safetensors", "fit", "fit.steps=2"),
    ("candidates.json", "plan", "plan.keep=0.9"),
    ("candidates.safetensors", "distill", "distill.local_steps=2"),
    ("calibration/train-0000.safetensors", "analyze", "analyze.cka_tokens=32"),
    ("calibration/held-out-0000.safetensors", "fit", "fit.steps=2"),
    ("bundle/substitutes.safetensors", "export", "export.dtype=bfloat16"),
    ("bundle/tuned.safetensors", "export", "export.dtype=bfloat16"),
    ("pipeline/transformer/diffusion_pytorch_model.safetensors", "evaluate", "evaluate.batch_size=3"),
]


@pytest.mark.parametrize("damage", ["truncated", "garbage"])
@pytest.mark.parametrize(("name", "stage", "option"), READERS)
def test_damaged_artifact(refuses, common, run_copy, name, stage, option, damage):
    path = run_copy / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"\x93garbage" * 100)
    says = (str(path), "delete it")
    refuses(stage, *common, "--set", option, "--out", run_copy, says=says, watch=run_copy)


@pytest.mark.parametrize("name", ["bundle/bundle.json", "bundle/plan.json", "bundle/substitutes.safetensors"])
def test_changed_bundle(refuses, common, run_copy, name):
    path = run_copy / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    options = ("--set", "export.dtype=bfloat16", "--out", run_copy)
    line = refuses("export", *common, *options, watch=run_copy)
    assert str(run_copy / "bundle") in line
    assert "delete" in line


def with_part(path, part):
    def change(plan):
        (segments,) = plan["stacks"].values()
        segments[-1]["width"] = {path: part}

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.update(stacks={"other": next(iter(plan["stacks"].values()))}),
        lambda plan: plan.update(stacks={}),
        lambda plan: plan["stacks"].update({"../../x": next(iter(plan["stacks"].values()))}),
        with_part("img_mlp.nothing", {"kind": "low_rank", "size": 2}),
        with_part("img_mod.1", {"kind": "magic", "size": 2}),
        with_part("img_mod.1", {"kind": "low_rank"}),
        with_part("img_mod.1", {"kind": "low_rank", "size": "many"}),
        with_part("attn", {"kind": "heads", "size": 10**6}),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_the_bundle_goes(refuses, common, run_copy, change):
    path = run_copy / "plan.json"
    plan = json.loads(path.read_text())
    change(plan)
    path.write_text(json.dumps(plan))
    options = ("--set", "distill.local_steps=2", "--out", run_copy)
    refuses("distill", *common, *options, says=("plan.json",), watch=run_copy)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pipeline/transformer/config.json", "{"),
        ("pipeline/transformer/config.json", '{"num_layers": 3}'),
        ("pipeline/model_index.json", "[]"),
        ("pipeline/vae/config.json", None),
    ],
)
def test_a_pipeline_that_cannot_be_loaded_is_refused_before_the_evaluation_goes(
    refuses, common, run_copy, name, content
):
    if content is None:
        (run_copy / name).unlink()
    else:
        (run_copy / name).write_text(content)
    options = ("--set", "evaluate.batch_size=3", "--out", run_copy)
    refuses("evaluate", *common, *options, watch=run_copy)


def test_json_of_another_shape(refuses, common, run_copy):
    for text in ("[]", "3", '{"schema_version": 7}', '{"schema_version": 1, "model": 5}'):
        (run_copy / "candidates.json").write_text(text)
        refuses("plan", *common, "--keep", "0.9", "--out", run_copy, says=("candidates.json", "delete it"))
    for text in ("[]", '{"files": 3}'):
        (run_copy / "bundle" / "bundle.json").write_text(text)
        refuses("export", *common, "--set", "export.dtype=bfloat16", "--out", run_copy, says=("delete", "run again"))


def test_damaged_record_of_stages(refuses, common, run_copy):
    (run_copy / "stages.json").write_text('{"identity": ')
    says = ("stages.json is damaged", "choose another --out or delete")
    refuses("compress", *common, "--out", run_copy, says=says, watch=run_copy)


def test_damaged_checkpoint(refuses, run_cli, common, run_copy, monkeypatch):
    from ppcl.training.loop import TrainingLoop

    shutil.rmtree(run_copy / "bundle")
    save = TrainingLoop.save

    def interrupted(self, step):
        save(self, step)
        raise UserError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "save", interrupted)
        refuses("distill", *common, "--out", run_copy, says=("interrupted",))
    path = next((run_copy / "checkpoints" / "distill-local").glob("*/state.safetensors"))
    path.write_bytes(path.read_bytes()[:1000])
    refuses("distill", *common, "--out", run_copy, says=(str(path), "delete it and run again"))
    path.unlink()
    assert run_cli("distill", *common, "--out", run_copy)[0] == 0


@pytest.mark.parametrize(
    ("name", "remade"),
    [("plan.json", "plan.json"), ("candidates.safetensors", "candidates.safetensors"),
     ("calibration/train-0000.safetensors", "calibration/train-0000.safetensors"),
     ("bundle/substitutes.safetensors", "bundle")],
)  # fmt: skip
def test_deleting_as_told_mends_it(refuses, run_cli, common, finished_run, run_copy, name, remade):
    path = run_copy / remade
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, err = run_cli("compress", *common, "--out", run_copy)
    assert code == 0, err
    assert err.count(": done before") == 7
    assert (run_copy / name).read_bytes() == (finished_run / name).read_bytes()


# The disk


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_while_writing_json(refuses, common, run_copy, monkeypatch):
    write = Path.write_text

    def fail(self, *arguments, **options):
        return full_disk() if "plan.json" in self.name else write(self, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", fail)
    says = ("cannot write", "plan.json", "No space left", "free some space")
    refuses("plan", *common, "--keep", "0.9", "--out", run_copy, says=says)
    assert not list(run_copy.rglob(".*.tmp-*"))


@pytest.mark.parametrize(
    ("keep_start", "name"), [("false", "substitutes.safetensors"), ("true", "distill-start.safetensors")]
)
def test_full_disk_while_writing_tensors(refuses, run_cli, common, run_copy, monkeypatch, keep_start, name):
    import safetensors.torch

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    says = ("cannot write", name, "No space left", "free some space")
    steps = ("distill.local_steps=0", "distill.output_steps=0", f"distill.keep_start={keep_start}")
    options = tuple(word for setting in steps for word in ("--set", setting))
    refuses("distill", *common, *options, "--out", run_copy, says=says)
    assert not list(run_copy.rglob(".*.tmp-*"))
    monkeypatch.undo()
    assert run_cli("distill", *common, *options, "--out", run_copy)[0] == 0


def test_full_disk_while_logging(refuses, common, run_copy, monkeypatch):
    opened = Path.open

    def fail(self, *arguments, **options):
        return full_disk() if self.name == "log.jsonl" else opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", fail)
    says = ("cannot write", "log.jsonl", "No space left")
    refuses("distill", *common, "--set", "distill.local_steps=2", "--out", run_copy, says=says)


# Training


def test_training_that_explodes(refuses, run_cli, common, run_copy):
    wild = ("distill.local_learning_rate=1e30", "distill.clip_norm=1e30", "distill.warmup_steps=0")
    options = [part for text in wild for part in ("--set", text)]
    says = ("NaN or infinite at step", "distill-local", "lower the learning rate")
    line = refuses("distill", *common, *options, "--out", run_copy, says=says)
    step = line.partition("at step ")[2].partition(";")[0]
    kept = run_copy / "checkpoints" / "distill-local" / f"step-{step}" / "state.safetensors"
    assert str(kept.parent) in line
    assert kept.is_file()
    code, err = run_cli("compress", *common, "--set", "distill.local_learning_rate=1e-3", "--out", run_copy)
    assert code == 0, err
    metrics = json.loads((run_copy / "eval" / "metrics.json").read_text())
    assert metrics["comparisons"][0]["fidelity"]["velocity_error"]["value"] < 1


def test_not_a_number_in_the_fit(refuses, common, run_copy, monkeypatch):
    from ppcl.distill.in_sweep import Ends

    loss = Ends.loss

    def poisoned(self, block, *arguments, **options):
        return loss(self, block, *arguments, **options) * float("nan")

    monkeypatch.setattr(Ends, "loss", poisoned)
    says = ("fit: transformer_blocks/", "loss became NaN", "at step 0", "learning rate")
    refuses("fit", *common, "--set", "fit.steps=2", "--out", run_copy, says=says)
