"""Every supported class through the stages behind the command: analysis, plan, 20 steps of distillation, export."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tiny import TINY

from ppcl.analysis.analyze import analyze
from ppcl.capture.states import States
from ppcl.common.tensor_files import StoredTensors, write_tensors
from ppcl.config import AnalyzeConfig, DistillConfig, FitConfig, PlanConfig
from ppcl.distill.fit import fit
from ppcl.distill.trainer import Distiller
from ppcl.eval.velocity import state_errors
from ppcl.pruning.planner import plan
from ppcl.student.assembly import assemble_student
from ppcl.student.bundle import build_student, load_bundle
from ppcl.teacher import call_arguments as trees
from ppcl.teacher.blocks import ResidentBlocks
from ppcl.teacher.calls import velocity
from ppcl.teacher.description import describe
from ppcl.teacher.families import adapter_for

STEPS = 10  # of each of the two kinds of distillation
ANALYZE = AnalyzeConfig(batch_size=2, cka_tokens=16)
FIT = FitConfig(max_run=2, max_candidates=2, steps=2, batch_size=2, eval_states=2, starts=("middle",), width=())
DISTILL = DistillConfig(
    local_steps=STEPS, output_steps=STEPS, batch_size=2, warmup_steps=2, ema_decay=0, checkpoint_every=100,
    from_fit=False, local_learning_rate=5e-4, output_learning_rate=1e-4,
)  # fmt: skip


def write_states(name, model, folder):
    """Two calls of two samples as ``ppcl.capture.trajectories`` writes them, to train on; the second one judges, too.

    What is new to random models of this size says nothing: training on four states may lead away from it, and then
    the start would be kept.
    """
    for number in range(2):
        tensors = {}
        call = TINY[name]()[1]
        node = trees.flatten(call, "00", tensors)
        with torch.no_grad():
            tensors["velocity.00"] = velocity(model, call)
        # inputs of several names may share memory, which safetensors refuses
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        for file in (f"train-{number:04d}", *(["held-out-0000"] if number else [])):
            write_tensors(folder / f"{file}.safetensors", tensors, {"calls": [node], "alias": {}})


# each is built as another one here is: FLUX, Wan, SD 3, SANA, Qwen-Image, HunyuanVideo or CogView 4
ALIKE = {
    *("bria", "longcat", "ovis", "chronoedit", "skyreels", "sd35_medium", "sana_video", "qwen21"),
    *("hunyuan_video15", "hunyuan_image", "cogview3"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in sorted(TINY)]
)
def test_analysis_plan_distillation_export(name, tmp_path, caplog):
    torch.manual_seed(0)
    model = TINY[name]()[0].eval().requires_grad_(False)
    adapter, states = adapter_for(model), tmp_path / "calibration"
    write_states(name, model, states)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    info = describe(SimpleNamespace(transformer=model, components={}))
    analysis = analyze(ResidentBlocks(model), info, states, tmp_path, ANALYZE, seed=0)
    forms = StoredTensors(tmp_path / "analysis.safetensors")
    candidates = fit(ResidentBlocks(model), analysis, forms, states, tmp_path, FIT, seed=0)
    chosen = plan(analysis, candidates, PlanConfig(keep=0.999))
    assert chosen.runs

    rows = []
    Distiller(model, adapter, chosen, states, tmp_path, DISTILL, 0, log=rows.append).run()
    assert len(rows) == 2 * STEPS
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"]) for row in rows)

    bundle = load_bundle(tmp_path / "bundle", model, adapter)
    student = build_student(model, adapter, bundle)
    student.save_pretrained(tmp_path / "exported")
    loaded, report = type(model).from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(loaded) is type(model)
    arguments = next(States(states, "held-out").batches(2))
    with torch.no_grad():
        torch.testing.assert_close(velocity(loaded, arguments), velocity(student, arguments), rtol=1e-5, atol=1e-6)
    for key, tensor in model.state_dict().items():  # some classes leave a weight that nobody reads uninitialised
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True, msg=key)

    # it learnt: on what it was trained on it is closer to the teacher than the same plan untrained
    untrained = Distiller(model, adapter, chosen, states, tmp_path / "none", DISTILL, 0).substitutes
    raw = assemble_student(model, adapter, chosen, untrained)
    errors = [state_errors(model, one, States(states, "train").batches(2)).error.value for one in (loaded, raw)]
    assert errors[0] < errors[1] or "the start is kept" in caplog.text
