"""Pictures that were drawn before: taken where all that they depend on is the same, drawn anew elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_eval_generate import PROMPTS, SETTINGS, NoisePipeline, contents

from ppcl.capture.prompts import prompts_for
from ppcl.common.files import digest, read_json
from ppcl.config import drawn_seeds, for_model, load_config
from ppcl.emoji.data import DRAWN
from ppcl.eval import drawn
from ppcl.eval.generate import accepted_kwargs, generate, picture_settings, steps_of
from ppcl.eval.models import call_arguments
from ppcl.inspection.estimate import estimate_run
from ppcl.inspection.hardware import parse_hardware
from ppcl.teacher.loading import load_pipeline
from ppcl.teacher.origin import weights_digest


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures of one seed, by the command that keeps them."""
    generate(NoisePipeline(), PROMPTS, tmp_path / "eval" / "seed-3", **SETTINGS)
    monkeypatch.setattr("sys.argv", ["drawn", str(tmp_path / "eval"), str(tmp_path / "store")])
    drawn.main()
    return tmp_path / "store"


def test_the_same_pictures_are_taken_without_drawing(tmp_path: Path, store: Path) -> None:
    pipeline = NoisePipeline()
    paths = generate(pipeline, PROMPTS, tmp_path / "again", drawn=store, **SETTINGS)
    assert pipeline.calls == []
    assert contents(tmp_path / "again") == contents(tmp_path / "eval" / "seed-3")
    paths[2].write_bytes(paths[2].read_bytes()[:40])
    generate(pipeline, PROMPTS, tmp_path / "again", drawn=store, **SETTINGS)
    assert pipeline.calls == []
    assert contents(tmp_path / "again") == contents(tmp_path / "eval" / "seed-3")


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"num_inference_steps": 5}, {"model": "other weights"}, {"call_kwargs": {"height": 16}}]
)
def test_other_settings_are_drawn(tmp_path: Path, store: Path, change: dict[str, object]) -> None:
    pipeline = NoisePipeline()
    generate(pipeline, PROMPTS, tmp_path / "again", drawn=store, **{**SETTINGS, **change})
    assert len(pipeline.calls) == 3


def test_other_prompts_are_drawn(tmp_path: Path, store: Path) -> None:
    pipeline = NoisePipeline()
    generate(pipeline, PROMPTS[:6], tmp_path / "again", drawn=store, **SETTINGS)
    assert len(pipeline.calls) == 2


def test_a_run_without_pictures_is_refused_and_the_store_stays(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(store)
    monkeypatch.setattr("sys.argv", ["drawn", str(tmp_path / "nothing"), str(store)])
    with pytest.raises(SystemExit) as stopped:
        drawn.main()
    assert stopped.value.code == 2
    assert "holds no folders seed-0" in capsys.readouterr().err
    assert contents(store) == before


def test_the_default_evaluation_of_the_embedded_teacher_is_there_and_nothing_else() -> None:
    config = for_model("emoji", load_config([], []))
    pipeline = load_pipeline("emoji", torch.device("cpu"))
    steps, kwargs = steps_of(
        config.evaluate.num_inference_steps, accepted_kwargs(pipeline, call_arguments(pipeline, config.capture))
    )
    prompts = prompts_for("emoji", None, config.evaluate.num_prompts)[1]
    seeds = range(config.seed, config.seed + config.evaluate.teacher_seeds)
    settings = [picture_settings(weights_digest("emoji"), prompts, seed, steps, kwargs) for seed in seeds]
    assert {path.stem for path in DRAWN.iterdir()} == {digest(each) for each in settings}


def test_a_kept_picture_is_what_the_teacher_draws(tmp_path: Path) -> None:
    """Two of them anew, with the batch's neighbours left out: the same but for rounding."""
    config = for_model("emoji", load_config([], []))
    pipeline = load_pipeline("emoji", torch.device("cpu"))
    prompts = prompts_for("emoji", None, config.evaluate.num_prompts)[1]
    paths = [tmp_path / f"{index}.png" for index in range(len(prompts))]
    kwargs = call_arguments(pipeline, config.capture)
    settings = picture_settings(weights_digest("emoji"), prompts, 0, config.evaluate.num_inference_steps, kwargs)
    kept = drawn.set_of(DRAWN, settings)
    assert kept is not None
    drawn.unpack(kept, paths)
    anew = generate(
        pipeline,
        prompts[:2],
        tmp_path / "anew",
        seed=0,
        num_inference_steps=config.evaluate.num_inference_steps,
        batch_size=2,
        call_kwargs=kwargs,
        label="anew",
    )
    assert read_json(tmp_path / "anew" / "prompts.json")["seed"] == 0
    for one, two in zip(paths, anew, strict=False):
        assert (drawn.open_picture(one).size, drawn.open_picture(two).size) == ((48, 48), (48, 48))
        difference = torch.tensor(list(drawn.open_picture(one).tobytes())) - torch.tensor(
            list(drawn.open_picture(two).tobytes())
        )
        assert difference.abs().float().mean() < 1


def test_the_estimate_knows_what_need_not_be_drawn() -> None:
    own = for_model("emoji", load_config([], []))
    assert drawn_seeds("emoji", own) == own.evaluate.teacher_seeds
    assert drawn_seeds("another model", own) == 0
    for other in ("evaluate.num_prompts=64", "evaluate.num_inference_steps=10", "seed=1", "capture.guidance_scale=2"):
        assert drawn_seeds("emoji", for_model("emoji", load_config([], [other]))) == 0
    more = for_model("emoji", load_config([], ["evaluate.teacher_seeds=5"]))
    hardware = parse_hardware("24GB,1TFLOPS")
    seconds = [
        next(stage.seconds for stage in estimate_run("emoji", config, hardware).stages if stage.stage == "evaluate")
        for config in (own, more, for_model("emoji", load_config([], ["seed=1"])))
    ]
    assert seconds[0] < seconds[1] < seconds[2]
