"""States on the fly: everything of a step comes from its generator, and the teacher answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import shared_pipeline

from ppcl.capture.pictures import capture_pictures, picture_sizes
from ppcl.capture.sources import Skipped, choose_samples, open_source
from ppcl.common.streams import step_generator
from ppcl.config import CaptureConfig, DistillConfig, load_config
from ppcl.distill.fresh_states import FreshStates
from ppcl.errors import ConfigError
from ppcl.teacher import call_arguments as trees
from ppcl.teacher.calls import Call, velocity
from ppcl.training.distributed import Group, Share

SETTINGS = {"num_prompts": 6, "batch_size": 4, "num_inference_steps": 4, "states_per_prompt": 2}
SETTINGS |= {"held_out_share": 0.25, "height": 16, "width": 16, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> FreshStates:
    """Drawn from ten pictures of two shapes, with captions of two lengths; six of them are recorded."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(10):
        shape = ((16, 16, 3), (12, 24, 3))[number % 2]
        noise = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"{'a very old' if number % 4 > 1 else 'red'} cat {number}")
    settings = CaptureConfig(**SETTINGS, data=str(folder))
    capture_pictures(shared_pipeline(), folder / "states", settings, 0, [])
    sizes = picture_sizes(shared_pipeline(), settings)
    samples = choose_samples(open_source(settings), 10, sizes, [], Skipped(), 0)
    return FreshStates(folder / "states", shared_pipeline(), samples, settings)


def whole(fresh: FreshStates, step: int, size: int = 3) -> Call:
    ((call, share),) = fresh.parts(size, step_generator(0, step))
    assert share == Share()
    return call


def test_a_step_is_a_function_of_its_generator(fresh: FreshStates) -> None:
    first, other, again = (whole(fresh, step) for step in (1, 2, 1))
    assert torch.equal(first.arguments["hidden_states"], again.arguments["hidden_states"])
    assert torch.equal(first.velocity, again.velocity)
    assert first.arguments["hidden_states"].shape != other.arguments["hidden_states"].shape or not torch.equal(
        first.arguments["hidden_states"], other.arguments["hidden_states"]
    )


def test_the_teacher_answered_and_everything_occurs(fresh: FreshStates) -> None:
    times, tokens, texts = set(), set(), set()
    recorded = len(fresh.calls)
    with torch.no_grad():
        for step in range(40):
            call = whole(fresh, step, 2)
            assert torch.allclose(velocity(shared_pipeline().transformer, call.arguments), call.velocity, atol=1e-5)
            times.add(float(call.arguments["timestep"][0]))
            tokens.add(call.arguments["hidden_states"].shape[1])
            texts.add(call.arguments["encoder_hidden_states"].shape[1])
    assert times == {1.0, 0.75, 0.5, 0.25}
    assert len(tokens) == 2 and len(texts) == 3  # both shapes; short and long captions, and none
    assert len(fresh.calls) == recorded


class Imagined(Group):
    """One of several processes that are not there; all of them fare alike."""

    def any(self, here: bool) -> bool:
        return here


@pytest.mark.parametrize(("size", "accumulate"), [(2, 1), (1, 2), (2, 2)])
def test_parts_make_up_the_batch(fresh: FreshStates, size: int, accumulate: int) -> None:
    padded = 0
    for step in range(6):
        batch = whole(fresh, step)
        count = trees.batch_size(batch.arguments)
        groups = [Imagined(rank, size) for rank in range(size)]
        parts = [part for group in groups for part in fresh.parts(3, step_generator(0, step), group, accumulate)]
        assert len(parts) == size * accumulate
        rows = torch.cat([call.velocity for call, share in parts if share.samples])
        assert torch.equal(rows, batch.velocity) and len(rows) == count
        assert sum(share.samples for _, share in parts) == pytest.approx(1)
        for name in parts[0][1].tokens:
            padded += 1
            assert sum(share.tokens[name] for _, share in parts) == pytest.approx(1)
    assert padded


def test_pictures_that_went_away(fresh: FreshStates, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    from ppcl.capture.sources import BadSample, Sample

    read, lost = Sample.picture, set()

    def picture(sample: Sample) -> Any:
        if sample.caption in lost:
            raise BadSample("missing picture")
        return read(sample)

    monkeypatch.setattr(Sample, "picture", picture)
    lost |= {"red cat 0", "red cat 1", "red cat 4", "red cat 5"}
    counts = {trees.batch_size(whole(fresh, step).arguments) for step in range(8)}
    assert counts < {1, 2, 3} or counts == {1, 2, 3}
    assert min(counts) < 3
    lost |= {sample.caption for samples in fresh.pictures for sample in samples}
    assert trees.batch_size(whole(fresh, 0, 2).arguments) == 2  # a recorded one
    assert "recorded states are used instead" in caplog.text


def test_pictures_that_another_process_cannot_read(fresh: FreshStates) -> None:
    """The teacher may be split over the processes: either all of them run it, or none."""

    class Others(Group):
        def any(self, here: bool) -> bool:
            return True

    states = len(fresh.calls)
    assert fresh.record(4, step_generator(0, 1), Others(0, 2)) is None
    assert len(list(fresh.parts(4, step_generator(0, 1), Others(0, 2)))) == 1
    assert len(fresh.calls) == states


def test_fresh_states_need_pictures_and_change_what_is_trained() -> None:
    with pytest.raises(ConfigError, match=r"distill\.fresh noises pictures anew; set capture\.data") as caught:
        load_config([], ["distill.fresh=100"])
    assert "\n" not in str(caught.value)
    assert load_config([], ["distill.fresh=100", "capture.data=folder"]).distill.fresh == 100
    assert DistillConfig(fresh=5).identity() != DistillConfig().identity()
    assert "fresh" not in DistillConfig().identity()  # runs from before stay as they are


def test_a_distillation_on_fresh_states(fresh: FreshStates, tmp_path: Path) -> None:
    from tiny_models import DUAL, plan_for

    from ppcl.distill.trainer import Distiller
    from ppcl.teacher.families import adapter_for

    transformer = shared_pipeline().transformer
    plan = plan_for(transformer, [(DUAL, 1, 2)])
    settings = DistillConfig(local_steps=2, alternating_steps=1, output_steps=2, batch_size=3, warmup_steps=0)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    rows: list[dict[str, Any]] = []
    calibration = tmp_path / "none"
    common = (transformer, adapter_for(transformer), plan, calibration, tmp_path, settings, 0, "fp32", rows.append)
    Distiller(*common, states=fresh).run()
    assert [row["step"] for row in rows] == [0, 1, 0, 0, 1]
    assert all(row["loss"] > 0 for row in rows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in transformer.state_dict().items())
