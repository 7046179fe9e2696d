"""Recording states and replaying the transformer from them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import CAPTURE, flux_call, noise, qwen_call, shared_pipeline, tiny_flux, tiny_qwen, write_states
from torch import Tensor, nn

from ppcl.capture.spread import choose_rows
from ppcl.capture.states import States
from ppcl.capture.trajectories import (
    capture,
    record_calls,
    split_prompts,
    write_calls,
)
from ppcl.common.streams import seeds
from ppcl.common.tensor_files import read_tensors, write_tensors
from ppcl.config import CaptureConfig
from ppcl.errors import ArtifactError, ModelError, UserError
from ppcl.eval.velocity import state_errors
from ppcl.teacher import call_arguments as trees
from ppcl.teacher.calls import Call, velocity
from ppcl.teacher.pipeline_call import guidance_arguments

SETTINGS = CaptureConfig(**CAPTURE)
LONG = "a very old blue house by the sea"
PROMPTS = ["red cat", LONG, "boat", "tiny tiny cat", "old boat", "house", "blue cat", "red house"]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    capture(shared_pipeline(), PROMPTS, folder, SETTINGS, seed=0)
    return folder


def test_replaying_recorded_calls_gives_the_pipelines_outputs() -> None:
    pipeline = shared_pipeline()
    outputs: list[Tensor] = []
    handle = pipeline.transformer.register_forward_hook(lambda *args: outputs.append(args[-1][0].clone()))
    calls = record_calls(pipeline, PROMPTS[:2], list(seeds(5, 2)), SETTINGS)
    handle.remove()
    assert len(calls) == len(outputs) == 2 * SETTINGS.num_inference_steps  # with and without the prompt
    assert not pipeline.transformer._forward_hooks
    masked = 0
    with torch.no_grad():
        for call, output in zip(calls, outputs, strict=True):
            tensors: dict[str, Tensor] = {}
            node = trees.flatten(call.arguments, "00", tensors)
            assert torch.equal(velocity(pipeline.transformer, trees.unflatten(node, tensors)), output)
            assert torch.equal(call.velocity, output)
            one = trees.take(call.arguments, [1], call.per_sample)
            assert torch.allclose(velocity(pipeline.transformer, one), output[1:], atol=1e-5)
            masked += call.arguments["encoder_hidden_states_mask"] is not None
    assert masked == SETTINGS.num_inference_steps  # prompts of two lengths: padding was seen, and kept


def test_record_calls_cleans_up_after_an_error() -> None:
    pipeline = shared_pipeline()

    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    handle = pipeline.transformer.proj_out.register_forward_hook(fail)
    with pytest.raises(ModelError, match="RuntimeError: broken"):
        record_calls(pipeline, PROMPTS[:2], list(seeds(0, 2)), SETTINGS)
    handle.remove()
    assert not pipeline.transformer._forward_hooks


def test_noise_of_a_prompt_does_not_depend_on_the_batch() -> None:
    alone, together = (
        record_calls(shared_pipeline(), PROMPTS[:n], list(seeds(5, n)), SETTINGS)[0].arguments for n in (1, 3)
    )
    assert torch.equal(alone["hidden_states"][0], together["hidden_states"][0])
    assert not torch.equal(together["hidden_states"][0], together["hidden_states"][1])


@pytest.mark.parametrize(
    ("total", "count", "size"), [(24, 6, 32), (24, 6, 30), (10, 3, 7), (7, 7, 3), (3, 8, 5), (24, 2, 1)]
)
def test_every_call_gets_its_share_of_the_samples(total: int, count: int, size: int) -> None:
    rows = choose_rows(total, count, size, torch.Generator().manual_seed(3))
    count = min(total, count)
    of_sample = [[call for call, chosen in rows.items() if row in chosen] for row in range(size)]
    for calls in of_sample:  # one call of each stretch for every sample
        assert len(calls) == count
        assert all(i * total // count <= call < (i + 1) * total // count for i, call in enumerate(calls))
    for i in range(count):
        stretch = range(i * total // count, (i + 1) * total // count)
        sizes = [len(rows.get(call, [])) for call in stretch]
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == size


def test_both_branches_of_guidance_are_recorded_at_every_step(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"num_inference_steps": 4, "states_per_prompt": 2, "batch_size": 8})
    capture(shared_pipeline(), PROMPTS, tmp_path, settings, seed=0)
    calls = [call.arguments for call in States(tmp_path, "train").calls]
    found = Counter(round(arguments["timestep"][0].item(), 4) for arguments in calls)
    assert list(found.values()) == [2] * 4


def test_split_is_by_prompt_and_repeatable() -> None:
    prompts = [str(i) for i in range(40)]
    split = split_prompts(prompts, 0.25, seed=1)
    assert len(split["held-out"]) == 10
    assert not set(split["held-out"]) & set(split["train"])
    assert sorted(split["held-out"] + split["train"]) == sorted(prompts)
    assert split == split_prompts(prompts, 0.25, seed=1)
    assert split != split_prompts(prompts, 0.25, seed=2)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.8, 0.99])
def test_neither_side_of_a_split_is_empty(share: float) -> None:
    split = split_prompts(["a", "b"], share, seed=0)
    assert [len(split[name]) for name in ("held-out", "train")] == [1, 1]


def test_captured_files(calibration: Path) -> None:
    names = [path.name for path in sorted(calibration.iterdir())]
    assert names == ["held-out-0000.safetensors", "train-0000.safetensors", "train-0001.safetensors"]
    assert len(States(calibration, "held-out")) == 2 * SETTINGS.states_per_prompt
    assert len(States(calibration, "train")) == 6 * SETTINGS.states_per_prompt


def test_capture_is_resumed_with_identical_bytes(calibration: Path, tmp_path: Path) -> None:
    original = {path.name: path.read_bytes() for path in calibration.iterdir()}
    for name, content in original.items():
        if name != "train-0000.safetensors":
            (tmp_path / name).write_bytes(content)
    kept = (tmp_path / "train-0001.safetensors").stat().st_mtime_ns
    capture(shared_pipeline(), PROMPTS, tmp_path, SETTINGS, seed=0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == original
    assert (tmp_path / "train-0001.safetensors").stat().st_mtime_ns == kept


def test_another_seed_draws_other_states(calibration: Path, tmp_path: Path) -> None:
    capture(shared_pipeline(), PROMPTS, tmp_path, SETTINGS, seed=1)
    first, second = States(calibration, "train"), States(tmp_path, "train")
    assert not torch.equal(first.calls[0].arguments["hidden_states"], second.calls[0].arguments["hidden_states"])


@pytest.mark.parametrize(("total", "count", "size"), [(40, 6, 16), (40, 4, 8)])
def test_halves_of_states_share_no_prompt(total: int, count: int, size: int, tmp_path: Path) -> None:
    """Every latent is the number of its prompt; guidance doubles the samples of a call."""
    number = torch.arange(size).repeat(2).float()
    whole = [
        Call({"hidden_states": number[:, None], "timestep": number * 0 + t}, number[:, None]) for t in range(total)
    ]
    rows = choose_rows(total, count, size, torch.Generator().manual_seed(0))
    stored = [whole[i].take([row + size * (i % 2) for row in chosen]) for i, chosen in rows.items()]
    write_calls(tmp_path / "train-0000.safetensors", stored, prompts=[f"prompt {i}" for i in range(size)])
    halves = States(tmp_path, "train").halves()
    own = [{int(h) for batch in half.batches(4) for h in batch["hidden_states"].flatten()} for half in halves]
    assert [len(half) for half in halves] == [size * count // 2] * 2
    assert not own[0] & own[1]
    assert len(own[0]) == len(own[1]) == size // 2


def test_positions_are_whole_in_stored_calls_of_any_size(tmp_path: Path) -> None:
    """A call of as many samples as text tokens is stored in parts of as many samples as picture tokens, and others."""
    call, transformer = flux_call(batch=8, text=8), tiny_flux(1, 1)
    with torch.no_grad():
        whole = Call(call, velocity(transformer, call))
    write_calls(tmp_path / "train-0000.safetensors", [whole.take(rows) for rows in ([1, 3], range(6), [7])])
    states = States(tmp_path, "train")
    assert len(states.groups) == 1
    for size in (1, 3, 6, 9):
        for batch in states.answered(size):
            assert batch.arguments["txt_ids"].shape == (8, 3)
            assert torch.equal(batch.arguments["img_ids"], call["img_ids"])
            with torch.no_grad():
                assert torch.allclose(velocity(transformer, batch.arguments), batch.velocity, atol=1e-5)


def test_files_without_rows_and_layout_are_still_read(calibration: Path, tmp_path: Path) -> None:
    tensors, meta = read_tensors(calibration / "train-0000.safetensors")
    old = {name: value for name, value in meta.items() if name not in ("rows", "per_sample")}
    write_tensors(tmp_path / "train-0000.safetensors", tensors, old)
    assert len(States(tmp_path, "train")) == sum(len(rows) for rows in meta["rows"])


@pytest.mark.parametrize("prompts", [[], ["cat"], ["cat", "cat"]])
def test_fewer_than_two_prompts(prompts: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="calibration needs at least 2 different prompts, got"):
        capture(shared_pipeline(), prompts, tmp_path, SETTINGS, seed=0)
    assert list(tmp_path.iterdir()) == []


def fingerprints(batch: dict[str, Any]) -> list[tuple[float, float]]:
    """What tells one state from another: its latents and its time."""
    return [(h.sum().item(), t.item()) for h, t in zip(batch["hidden_states"], batch["timestep"], strict=True)]


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_batches_yield_every_state_once(calibration: Path, size: int) -> None:
    states = States(calibration, "train")
    expected = [f for call in states.calls for f in fingerprints(call.arguments)]
    found = [f for batch in states.batches(size) for f in fingerprints(batch)]
    assert sorted(found) == sorted(expected)
    assert found == [f for batch in states.batches(3) for f in fingerprints(batch)]
    assert max(trees.batch_size(batch) for batch in states.batches(size)) <= size


@pytest.mark.parametrize("limit", [1, 4, 7, 1000])
def test_a_limit_is_kept(calibration: Path, limit: int) -> None:
    states = States(calibration, "train")
    count = sum(trees.batch_size(batch) for batch in states.batches(3, limit))
    assert count == min(limit, len(states))


def test_draws_depend_on_the_generator_alone(calibration: Path) -> None:
    states = States(calibration, "train")

    def draw(seed: int) -> list[tuple[int, int]]:
        return states.draw(5, torch.Generator().manual_seed(seed))

    expected = draw(0)
    draw(1)
    torch.manual_seed(99)
    assert draw(0) == expected
    assert len({tuple(draw(seed)) for seed in range(8)}) > 4
    assert {row for seed in range(40) for row in draw(seed)} == set(states.marks)


def test_batches_from_several_calls_replay_like_their_samples(calibration: Path) -> None:
    transformer, states = shared_pipeline().transformer, States(calibration, "train")
    with torch.no_grad():
        for batch in states.batches(5):
            size, own = trees.batch_size(batch), trees.per_sample(batch)
            whole = velocity(transformer, batch)
            alone = torch.cat([velocity(transformer, trees.take(batch, [i], own)) for i in range(size)])
            assert torch.allclose(whole, alone, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 3, 6])
def test_shared_tables_survive_batches_of_any_size(rows: int, tmp_path: Path) -> None:
    """FLUX shares a table of positions; here it has as many rows as a batch may have samples."""
    write_states(tmp_path, "train", [flux_call(batch=7, text=rows, seed=seed) for seed in (0, 10)])
    transformer, states = tiny_flux(1, 1), States(tmp_path, "train")
    found = 0
    with torch.no_grad():
        for batch in states.batches(2 * rows):
            assert torch.equal(batch["txt_ids"], torch.zeros(rows, 3))
            found += len(velocity(transformer, batch))
    assert found == 14


def test_states_that_are_missing_or_not_ours(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no train states; run ppcl capture"):
        States(tmp_path, "train")
    write_tensors(tmp_path / "train-0000.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(ArtifactError, match="was not written by ppcl capture"):
        States(tmp_path, "train")


def test_velocity_error_is_relative_over_all_states() -> None:
    teacher, student = tiny_qwen(2, seed=0), tiny_qwen(2, seed=1)
    batches = [qwen_call(2, seed=1), qwen_call(3, seed=2)]
    with torch.no_grad():
        t = torch.cat([velocity(teacher, b) for b in batches])
        s = torch.cat([velocity(student, b) for b in batches])
    expected = ((s - t).norm() / t.norm()).item()
    assert state_errors(teacher, student, iter(batches)).error.value == pytest.approx(expected, rel=1e-5)
    assert state_errors(teacher, teacher, iter(batches)).error.value == 0


def test_velocity_stacks_lists() -> None:
    class Lists(nn.Module):
        def forward(self, x: Tensor, return_dict: bool = True) -> tuple[list[Tensor]]:
            return (list(x),)

    x = noise(3, 2, 2)
    assert torch.equal(velocity(Lists(), {"x": x}), x)


@pytest.mark.parametrize(
    ("distilled", "names", "scale", "expected"),
    [
        (
            False,
            ("true_cfg_scale", "negative_prompt", "guidance_scale"),
            4.0,
            {"true_cfg_scale": 4.0, "negative_prompt": " "},
        ),
        (False, ("true_cfg_scale", "negative_prompt"), 1.0, {"true_cfg_scale": 1.0}),
        (True, ("true_cfg_scale", "negative_prompt", "guidance_scale"), 3.5, {"guidance_scale": 3.5}),
        (False, ("guidance_scale", "negative_prompt"), 5.0, {"guidance_scale": 5.0, "negative_prompt": " "}),
        (False, ("guidance_scale",), 5.0, {"guidance_scale": 5.0}),
    ],
)
def test_guidance_goes_by_the_name_the_pipeline_knows(
    distilled: bool, names: tuple[str, ...], scale: float, expected: dict[str, Any]
) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def call(self, prompt, {', '.join(names)}, height): pass", namespace)
    kind = type("Pipeline", (), {"__call__": namespace["call"]})
    pipeline = kind()
    pipeline.transformer = SimpleNamespace(config={"guidance_embeds": distilled})
    settings = CaptureConfig(guidance_scale=scale, height=64, width=32)  # this pipeline takes no width
    assert guidance_arguments(pipeline, settings) == {**expected, "height": 64}
