"""Few steps from end to end: other families' pipelines, the command, the exported pipeline and its numbers."""

import json

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, UniPCMultistepScheduler
from tiny_pipeline import PROMPTS, SMALL
from tiny_pipelines import flux, flux_control, pixart, sd3_without_t5, wan, z_image

from ppcl.capture import jumps
from ppcl.capture.jumps import capture_jumps, check_few_steps, in_place_of, latents_name, record_jumps, stacked
from ppcl.capture.states import States
from ppcl.common.streams import Stream, step_generator
from ppcl.config import CaptureConfig
from ppcl.config.few_steps import FewStepsConfig
from ppcl.errors import ModelError
from ppcl.eval.results import load_evaluation
from ppcl.teacher.calls import velocity
from ppcl.teacher.pipeline_call import call_pipeline, guidance_arguments, own_call

CAPTURE = CaptureConfig(height=32, width=32, num_frames=5, num_inference_steps=4, guidance_scale=3.0, batch_size=2)
FEW = FewStepsConfig(num_inference_steps=2, num_trajectories=4, training_steps=3)
CALLS = {  # of each family: what turns guidance off; where it is an input it stays
    sd3_without_t5: {"guidance_scale": 1.0},
    flux: {"guidance_scale": 3.0},
    z_image: {"guidance_scale": 0.0},
    wan: {"guidance_scale": 1.0},
}


@pytest.mark.parametrize("new", CALLS, ids=lambda new: new.__name__)
def test_families_are_learned_from(new, tmp_path):
    pipeline = new()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # as they are loaded: T5 has dropout
    calls, lengths = record_jumps(pipeline, PROMPTS[:2], 0, 0, CAPTURE, FEW)
    with jumps._moves(pipeline) as seen:
        noise = [step_generator(0, row, Stream.FEW_STEPS_NOISE) for row in range(2)]
        guided = guidance_arguments(pipeline, CAPTURE)
        call_pipeline(pipeline, PROMPTS[:2], generator=noise, num_inference_steps=4, output_type="latent", **guided)
    name = latents_name(pipeline.transformer)
    latents = stacked(calls[0].arguments[name]).float()
    for call, length in zip(calls, lengths, strict=True):
        assert torch.allclose(stacked(call.arguments[name]).float(), latents, atol=1e-4)
        assert velocity(pipeline.transformer, call.arguments).shape == call.velocity.shape
        latents = latents + length * call.velocity.float().reshape(latents.shape)
    assert len(calls) == 2
    assert torch.allclose(latents, seen[-1].at(seen[-1].after).reshape(latents.shape), atol=1e-4)
    assert (lengths[0] > 0) == (new is z_image)  # which turns the sign round
    again = in_place_of(calls[0].arguments[name], latents)
    assert type(again) is type(calls[0].arguments[name])
    capture_jumps(pipeline, PROMPTS[:2], tmp_path, CAPTURE, FEW, 0)
    assert json.loads((tmp_path / "call.json").read_text()) == {"num_inference_steps": 2, **CALLS[new]}
    assert len(States(tmp_path, "train").calls) == 2


@pytest.mark.parametrize(
    ("new", "says"),
    [(pixart, "samples by DPMSolverMultistepScheduler"), (flux_control, "takes a picture beside each prompt")],
)
def test_families_that_cannot_be_are_refused(new, says):
    with pytest.raises(ModelError, match=says):
        check_few_steps(new(), PROMPTS, CAPTURE, FEW)


@pytest.fixture(scope="module")
def few_config(tmp_path_factory):
    path = tmp_path_factory.mktemp("few") / "few.yaml"
    few = {"num_inference_steps": 2, "teacher_steps": 4, "num_trajectories": 8, "training_steps": 3}
    path.write_text(yaml.safe_dump({**SMALL, "distill": {**SMALL["distill"], "few_steps": few}}))
    return path


def test_a_teacher_with_another_sampler_is_refused_before_anything(
    tiny_model, few_config, prompts_file, refuses, tmp_path
):
    pipeline = DiffusionPipeline.from_pretrained(tiny_model)
    pipeline.scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    pipeline.save_pretrained(tmp_path / "model")
    arguments = ("compress", tmp_path / "model", "--out", tmp_path / "run", "--config", few_config)
    refuses(*arguments, "--prompts", prompts_file, says=("distill.few_steps", "UniPCMultistepScheduler"))
    assert not (tmp_path / "run" / "calibration").exists()


@pytest.mark.slow
def test_one_command_makes_a_pipeline_of_few_steps(tiny_model, few_config, prompts_file, run_cli, tmp_path):
    out = tmp_path / "run"
    arguments = ("compress", tiny_model, "--out", out, "--config", few_config, "--prompts", prompts_file)
    code, err = run_cli(*arguments, "--set", "device=cpu")
    assert code == 0, err
    call = {"num_inference_steps": 2, "true_cfg_scale": 1.0}
    pipeline = DiffusionPipeline.from_pretrained(out / "pipeline")
    assert own_call(pipeline) == call
    assert json.loads((out / "pipeline" / "scheduler" / "scheduler_config.json").read_text())["shift_terminal"] is None
    assert "pipe(prompt, num_inference_steps=2, true_cfg_scale=1)" in (out / "pipeline" / "README.md").read_text()
    assert not (out / "checkpoints").exists()

    result = load_evaluation(out / "eval" / "metrics.json")
    assert [model.label for model in result.models] == ["teacher", "student", "recovered", "recovered-few"]
    student, recovered, untrained = result.comparisons
    assert [row.num_inference_steps for row in result.comparisons] == [2, None, 2]
    assert untrained.param_ratio == student.param_ratio
    assert "velocity_error" not in student.fidelity  # it answers for longer steps
    assert "velocity_error" in recovered.fidelity
    assert f"{student.speedup_end_to_end:.2f}x as fast in 2 steps" in student.verdict
    drawn = json.loads((out / "eval" / "student" / "seed-0" / "prompts.json").read_text())
    assert drawn["num_inference_steps"] == 2
    assert drawn["kwargs"]["true_cfg_scale"] == 1.0
    assert "negative_prompt" not in drawn["kwargs"]
    full = json.loads((out / "eval" / "recovered" / "seed-0" / "prompts.json").read_text())
    assert (full["num_inference_steps"], full["kwargs"]["true_cfg_scale"]) == (2, 2.0)  # the evaluation's own
    times = {row.num_inference_steps for row in result.models[1].speed if row.part == "picture"}
    assert times == {2}
    assert "in 2 steps without guidance" in (out / "report.html").read_text()

    code, err = run_cli(*arguments, "--set", "device=cpu")
    assert code == 0, err
    assert err.count("done before") == 8
    # finished models are judged so, too
    code, err = run_cli("evaluate", tiny_model, out / "pipeline", "--out", tmp_path / "judged", "--config", few_config)
    assert code == 0, err
    judged = load_evaluation(tmp_path / "judged" / "metrics.json")
    assert judged.comparisons[0].num_inference_steps == 2
    assert any("is made to draw in 2 steps" in note for note in judged.notes)
