"""Few steps: trajectories are recorded as jumps, and a student is trained on its own way along them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from pydantic import ValidationError
from test_distributed import assert_close
from tiny_models import DUAL, plan_for, shared_pipeline, tiny_qwen
from tiny_pipeline import PROMPTS
from train_worker import write_trajectories

from ppcl.capture import jumps as jumps_module
from ppcl.capture.jumps import capture_jumps, check_few_steps, record_jumps
from ppcl.capture.states import States
from ppcl.common.tensor_files import read_tensors
from ppcl.config import CaptureConfig, DistillConfig, RunConfig
from ppcl.config.few_steps import FewStepsConfig
from ppcl.distill.few_steps import Trajectories, share_of_own
from ppcl.distill.trainer import Distiller
from ppcl.errors import ArtifactError, ModelError
from ppcl.teacher.block_map import RECORD
from ppcl.teacher.calls import Call, velocity
from ppcl.teacher.families import adapter_for
from ppcl.teacher.pipeline_call import call_pipeline, guidance_arguments, own_call, without_guidance

SIZE = {"height": 16, "width": 16, "batch_size": 3}
CAPTURE = CaptureConfig(**SIZE, num_inference_steps=5, guidance_scale=3.0)
FEW = FewStepsConfig(num_inference_steps=2, num_trajectories=8)
SHIFTED = {"use_dynamic_shifting": True, "shift_terminal": 0.02, "time_shift_type": "exponential"}
CPU = torch.device("cpu")


@pytest.fixture(params=[{}, {"shift": 3.0}, SHIFTED])
def pipeline(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A pipeline with other noise levels than its few steps have, or with some of them in common."""
    pipeline = shared_pipeline()
    before = pipeline.scheduler
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(**request.param)
    yield pipeline
    pipeline.scheduler = before


def walked(calls: list[Any], jumps: list[float]) -> torch.Tensor:
    """Where one gets from the noise by the recorded answers alone."""
    latents = calls[0].arguments["hidden_states"].float()
    for call, jump in zip(calls, jumps, strict=True):
        assert torch.allclose(call.arguments["hidden_states"], latents, atol=1e-5)
        latents = latents + jump * call.velocity.reshape(latents.shape)
    return latents


def test_the_jumps_lead_from_noise_to_the_guided_teachers_picture(pipeline: Any) -> None:
    calls, jumps = record_jumps(pipeline, PROMPTS[:3], 0, 0, CAPTURE, FEW)
    assert len(calls) == 2
    assert sum(jumps) == pytest.approx(-1)
    noise = [torch.Generator().manual_seed(0) for _ in range(3)]
    with jumps_module._moves(pipeline) as path:
        again = guidance_arguments(pipeline, CAPTURE)
        latents = calls[0].arguments["hidden_states"]
        call_pipeline(
            pipeline,
            PROMPTS[:3],
            generator=noise,
            latents=latents,
            num_inference_steps=5,
            output_type="latent",
            **again,
        )
    assert torch.allclose(walked(calls, jumps), path[-1].at(path[-1].after), atol=1e-5)
    assert all("encoder_hidden_states" in call.arguments and len(call.velocity) == 3 for call in calls)


def test_a_student_that_answers_so_draws_the_teachers_picture_in_few_steps(pipeline: Any) -> None:
    """By the pipeline's own call, with the sampler that is exported: its noise levels are those of training."""
    calls, jumps = record_jumps(pipeline, PROMPTS[:1], 0, 7, CAPTURE, FEW)
    answers, seen = iter(calls), []

    def answer(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> tuple[torch.Tensor]:
        call = next(answers)
        seen.append((kwargs["timestep"], call.arguments["timestep"]))
        return (call.velocity,)

    with jumps_module._few_step_sampler(pipeline), pipeline.transformer.register_forward_hook(answer, with_kwargs=True):
        quiet = guidance_arguments(pipeline, without_guidance(pipeline, CAPTURE))
        latents = calls[0].arguments["hidden_states"]
        drawn = pipeline(PROMPTS[0], latents=latents, num_inference_steps=2, output_type="latent", **quiet).images
    assert torch.allclose(drawn, walked(calls, jumps), atol=1e-5)
    assert all(torch.equal(told, recorded) for told, recorded in seen)
    assert next(answers, None) is None


def test_recorded_trajectories_are_resumed_and_go_on_the_same_bits(tmp_path: Path) -> None:
    pipeline = shared_pipeline()
    capture_jumps(pipeline, PROMPTS[:5], tmp_path, CAPTURE, FEW, 0)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert json.loads(files["call.json"]) == {"num_inference_steps": 2, "true_cfg_scale": 1.0}
    states = States(tmp_path, "train")
    assert len({mark.prompt for mark in states.marks.values()}) <= 5
    assert len(states) + len(States(tmp_path, "held-out")) == 2 * 8  # prompts in turn, each with other noise
    noise = {
        tuple(call.arguments["hidden_states"][place].flatten().tolist()) for call in states.calls[::2] for place in (0,)
    }
    assert len(noise) == len(states.calls[::2])
    next(tmp_path.glob("train-0000*")).unlink()
    capture_jumps(pipeline, PROMPTS[:5], tmp_path, CAPTURE, FEW, 0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def refusal(pipeline: Any, few: FewStepsConfig = FEW) -> str:
    with pytest.raises(ModelError) as refused:
        check_few_steps(pipeline, PROMPTS, CAPTURE, few)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    "scheduler",
    [UniPCMultistepScheduler(use_flow_sigmas=True), FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)],
)
def test_another_sampler_is_refused(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = shared_pipeline()
    monkeypatch.setattr(pipeline, "scheduler", scheduler)
    said = refusal(pipeline)
    assert said.startswith(f"distill.few_steps: QwenImagePipeline samples by {type(scheduler).__name__}")
    assert "expected FlowMatchEulerDiscreteScheduler" in said


def test_the_samplers_velocity_must_be_the_answer_or_its_opposite() -> None:
    latents, answer = torch.randn(2, 3, 4), torch.randn(2, 12)
    move = jumps_module._Move(1.0, 0.5, latents, answer.reshape(2, 3, 4))

    def sign(velocity: torch.Tensor, given: torch.Tensor = latents, count: int = 1) -> int:
        call = Call({"x": given}, velocity, per_sample=frozenset({"x"}), whole_rows=(0, 1))
        return jumps_module._sign(shared_pipeline(), [call] * count, [given] * count, [move])

    assert (sign(answer), sign(-answer)) == (1, -1)
    assert sign(answer.bfloat16(), latents.bfloat16()) == 1  # but for rounding
    with pytest.raises(ModelError, match="samples by something else than its transformer's answer"):
        sign(2 * answer)
    with pytest.raises(ModelError, match="something else than the sampler's latents alone"):
        sign(answer, torch.cat([latents, latents], 1))
    with pytest.raises(ModelError, match="asks its transformer 2 times in 1 steps"):
        sign(answer, count=2)


def test_a_walk_is_held_to_the_teachers_next_point_wherever_it_is(tmp_path: Path) -> None:
    pipeline = shared_pipeline()
    capture_jumps(pipeline, PROMPTS[:5], tmp_path, CAPTURE, FEW, 0)
    routes = Trajectories(tmp_path, "train", 2, "")
    (rows, *_), student = routes.starts.by_shape(routes.starts.spread(), 4), pipeline.transformer
    states = States(tmp_path, "train")
    taught = [states.batch([(number + i, place) for number, place in rows]) for i in range(2)]
    with torch.no_grad():
        forced = list(routes.walk(student, rows, 0.0, CPU))
        own = list(routes.walk(student, rows, 1.0, CPU))
        half = list(routes.walk(student, rows, 0.5, CPU))
    for step, call in zip(forced, taught, strict=True):  # the teacher's points, and its answers
        assert torch.equal(step.start, call.arguments["hidden_states"])
        assert torch.equal(step.target, call.velocity)
        assert torch.equal(step.output, velocity(student, call.arguments))
    assert torch.equal(own[1].start, own[0].end(own[0].output))
    assert torch.allclose(half[1].start, (forced[1].start + half[0].end(half[0].output)) / 2, atol=1e-5)
    for step in (*own, *half):
        ends = [forced[0].end(forced[0].target), forced[1].end(forced[1].target)]
        assert any(torch.allclose(step.end(step.target), end, atol=1e-4) for end in ends)
    assert [share_of_own(step, 8) for step in (0, 2, 4, 7)] == [0, 0.5, 1, 1]
    assert routes.error(student, 4, 4, CPU, "fp32") > 0


def train(folder: Path, name: str, die_after: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
    """Train a student, output stage and few steps; killed in the latter, if that is asked for, and run again."""
    write_trajectories(folder)
    few = {"num_inference_steps": 2, "training_steps": 4, "learning_rate": 1e-3}
    settings = DistillConfig(
        **{"local_steps": 0, "output_steps": 2, "batch_size": 3, "checkpoint_every": 1, "few_steps": few, **changes}
    )
    teacher = tiny_qwen(4)

    def run(log: Any = None) -> None:
        Distiller(
            *(teacher, adapter_for(teacher), plan_for(teacher, [(DUAL, 1, 2)]), folder / "states", folder / name),
            *(settings, 0, "fp32", log),
            trajectories=folder / "trajectories",
        ).run()

    rows: list[dict[str, Any]] = []

    def die(row: dict[str, Any]) -> None:
        rows.append(row)
        if sum(row["stage"] == "distill.few_steps" for row in rows) == die_after:
            raise KeyboardInterrupt

    if die_after:
        with pytest.raises(KeyboardInterrupt):
            run(die)
        again: list[dict[str, Any]] = []
        run(again.append)
        assert [row["step"] for row in again] == list(range(die_after - 1, 4))
    else:
        run(rows.append)
        losses = [row["loss"] for row in rows if row["stage"] == "distill.few_steps"]
        assert len(losses) == 4
    found: dict[str, torch.Tensor] = {}
    for path in sorted((folder / name / "bundle").glob("*.safetensors")):
        found |= {f"{path.stem}/{key}": value for key, value in read_tensors(path)[0].items()}
    return found


@pytest.mark.parametrize("trained", ["all", "lora", "substitutes"])
def test_a_killed_training_ends_in_the_same_bits(trained: str, tmp_path: Path) -> None:
    whole = train(tmp_path, "whole", train=trained)
    plan = json.loads((tmp_path / "whole" / "bundle" / "plan.json").read_text())
    assert plan["call"] == {"num_inference_steps": 2, "true_cfg_scale": 1.0}
    assert "few_steps" in json.loads((tmp_path / "whole" / "bundle" / "bundle.json").read_text())
    before = json.loads((tmp_path / "whole" / "recovered" / "plan.json").read_text())
    assert not before.get("call")
    killed = train(tmp_path, "killed", die_after=2, train=trained)
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    assert killed.keys() == whole.keys()
    recovered = read_tensors(tmp_path / "whole" / "recovered" / "substitutes.safetensors")[0]
    moved = [not torch.equal(tensor, whole[f"substitutes/{name}"]) for name, tensor in recovered.items()]
    assert sum(moved) > 5


def test_parts_of_a_batch_train_what_the_whole_does(tmp_path: Path) -> None:
    assert_close(train(tmp_path, "parts", accumulate=2), train(tmp_path, "whole"), 1e-5)


def test_a_start_that_is_kept_is_what_few_steps_go_on_from(tmp_path: Path) -> None:
    found = train(tmp_path, "kept", output_learning_rate=1.0, warmup_steps=0)
    recovered = tmp_path / "kept" / "recovered"
    assert (recovered / "substitutes.safetensors").exists()
    assert not (recovered / "tuned.safetensors").exists()  # training led away: the untrained start
    assert any(name.startswith("tuned/") for name in found)  # and few steps trained all of it


def test_what_cannot_go_together_is_refused() -> None:
    few = {"num_inference_steps": 4}
    with pytest.raises(ValidationError, match=r"distill.few_steps trains a student that is whole"):
        DistillConfig(few_steps=few, shard=True)
    with pytest.raises(ValidationError, match=r"blocks=streamed leaves no whole model for distill.few_steps"):
        RunConfig(blocks="streamed", distill={"few_steps": few})
    with pytest.raises(ValidationError, match=r"plan.rounds changes"):
        RunConfig(plan={"rounds": 2}, distill={"few_steps": few})
    assert DistillConfig().identity() == DistillConfig(few_steps={"training_steps": 7}).identity()
    assert DistillConfig().identity() != DistillConfig(few_steps=few).identity()


@pytest.mark.parametrize(
    "call", [{"num_inference_steps": 0}, {"num_inference_steps": 4.5}, {"num_inference_steps": 4, "x": 1}, [4], "four"]
)
def test_a_damaged_record_of_the_call_is_refused(call: Any) -> None:
    transformer = SimpleNamespace(config={RECORD: {"call": call}})
    with pytest.raises(ModelError, match="expected num_inference_steps"):
        own_call(SimpleNamespace(transformer=transformer))


def test_trajectories_of_another_number_of_steps_are_refused(tmp_path: Path) -> None:
    write_trajectories(tmp_path)
    path = next((tmp_path / "trajectories").glob("train-*"))
    tensors, meta = read_tensors(path)
    from ppcl.common.tensor_files import write_tensors

    write_tensors(path, tensors, {**meta, "jumps": meta["jumps"][:1]})
    with pytest.raises(ArtifactError, match="was not written by ppcl capture"):
        States(tmp_path / "trajectories", "train")


def test_the_embedded_teacher_is_learned_from(tmp_path: Path) -> None:
    from ppcl.teacher.loading import load_pipeline

    pipeline, few = load_pipeline("emoji", CPU, torch.float32), FEW.model_copy(update={"num_trajectories": 4})
    capture = CaptureConfig(height=48, width=48, num_inference_steps=3, guidance_scale=3.0, batch_size=4)
    capture_jumps(pipeline, ["red heart", "green frog", "blue car"], tmp_path / "trajectories", capture, few, 0)
    settings = DistillConfig(
        local_steps=0, output_steps=0, batch_size=2, few_steps={"num_inference_steps": 2, "training_steps": 1}
    )
    teacher = pipeline.transformer
    plan = plan_for(teacher, [(DUAL, 3, 4)])
    calibration = tmp_path / "trajectories"  # nothing is asked of states here
    Distiller(
        *(teacher, adapter_for(teacher), plan, calibration, tmp_path, settings, 0, "fp32"),
        trajectories=tmp_path / "trajectories",
    ).run()
    errors = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["few_steps"]
    assert 0 < errors["error"] < 2
