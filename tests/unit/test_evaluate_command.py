"""ppcl evaluate A [B ...] with tiny random pipelines, through the real command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_tracking import install
from typer.testing import CliRunner

from ppcl.cli import app
from ppcl.common.tables import number
from ppcl.config import load_config
from ppcl.errors import ModelError, UserError
from ppcl.eval.command import evaluate_models
from ppcl.eval.markdown import report
from ppcl.eval.models import evaluation_prompts, settings_for, sources
from ppcl.eval.results import Evaluation, load_evaluation

PROMPTS = ["a cat, red", 'a "house"', "old\nboat", "tiny 🐳 dog", " ".join(["long"] * 1000)]
SETTINGS = [
    *("capture.height=16", "capture.width=16", "capture.guidance_scale=1", "evaluate.num_inference_steps=2"),
    *("evaluate.batch_size=3", "evaluate.latency_runs=1", "evaluate.features=emoji", "evaluate.velocity_states=10"),
]


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pipeline of six blocks and the same with five."""
    from ppcl.teacher.loading import load_pipeline

    pipeline = load_pipeline(str(tiny_model), torch.device("cpu"))
    transformer = pipeline.transformer
    transformer.transformer_blocks = transformer.transformer_blocks[:5]
    transformer.register_to_config(num_layers=5)
    shorter = tmp_path_factory.mktemp("shorter") / "model"  # the same last name: labels must differ
    pipeline.save_pretrained(shorter)
    return tiny_model, shorter


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of several sizes and modes."""
    folder = tmp_path_factory.mktemp("real") / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(8):
        picture = Image.fromarray(rng.integers(0, 256, (16 + 3 * index, 20, 3), dtype=np.uint8))
        (picture.convert("L") if index % 2 else picture).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def judged(models: tuple[Path, Path], real: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder of one command, and what it printed."""
    out = tmp_path_factory.mktemp("judged") / "out"
    prompts = out.parent / "prompts.json"
    prompts.write_text(json.dumps(PROMPTS))
    options = [part for setting in SETTINGS for part in ("--set", setting)]
    command = ["evaluate", *map(str, models), "--out", str(out), "--prompts", str(prompts), "--reference", str(real)]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 0, (result.output, result.exception)
    return out, result.output


def test_files_and_numbers(judged: tuple[Path, str]) -> None:
    out, printed = judged
    found = json.loads((out / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    result = Evaluation.model_validate(found)
    first, second = result.models
    assert (first.label, second.label) == ("model", "model-2")
    assert second.params < first.params
    assert (result.prompts, result.reference, result.reference_count) == (5, "photos", 8)
    assert {"fid", "kid", "cmmd", "clip_score", "retrieval_at_1"} <= set(first.numbers)
    (made,) = result.comparisons
    assert {"psnr", "ssim", "feature_cosine", "velocity_error"} <= set(made.fidelity)
    assert made.fidelity["velocity_error"].value > 0
    assert made.fidelity["velocity_error"].over == "states"
    assert made.velocity_error_by_timestep
    for one in (*first.numbers.values(), *made.fidelity.values(), *made.differences.values()):
        if one.low is not None and one.high is not None:
            assert one.low - 1e-9 <= one.high
    assert made.param_ratio == second.params / first.params
    assert made.verdict in printed.replace("\n", "")
    assert "too small to tell: fewer than 30 prompts" in made.verdict
    assert str(out.parent) not in json.dumps(found), "no folder of this machine in the numbers"
    text = (out / "report.md").read_text()
    assert text == report(result)
    assert made.verdict in text
    assert number(first.numbers["fid"].value) in text
    page = (out / "report.html").read_text()
    assert made.verdict.replace("%", "") in page.replace("%", "")
    # Every prompt, the two least and the two most alike, and every prompt once more with the first model's other seed.
    assert page.count("data-who=") == 2 * 5 + 2 * 2 * 2 + 3 * 5


def test_what_is_missing_is_said(judged: tuple[Path, str]) -> None:
    notes = " ".join(json.loads((judged[0] / "metrics.json").read_text())["notes"])
    assert "5 prompts are few" in notes
    assert "models are compared by pictures of one seed (0)" in notes
    assert "FID is biased upwards" in notes
    from ppcl.eval.fidelity import lpips_weights

    assert ("LPIPS is left out" in notes) == (not lpips_weights()[1])


def test_the_schema_describes_the_file(judged: tuple[Path, str]) -> None:
    schema = json.loads((judged[0] / "metrics.schema.json").read_text())
    found = json.loads((judged[0] / "metrics.json").read_text())
    assert set(schema["required"]) <= set(found) == set(schema["properties"])
    assert set(schema["$defs"]) == {"Block", "Comparison", "ModelResult", "Number", "Speed", "Spread", "Step"}


def test_the_file_keeps_to_the_schema_that_ships(judged: tuple[Path, str]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    shipped = Path(__file__).resolve().parents[2] / "eval" / "schemas" / "metrics.schema.json"
    found = json.loads((judged[0] / "metrics.json").read_text())
    jsonschema.validate(found, json.loads(shipped.read_text()))


def test_speed_and_flops(judged: tuple[Path, str], models: tuple[Path, Path]) -> None:
    """Transformer and pictures at two step counts and two batch sizes; FLOPs are those of torch's counter."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from ppcl.eval.costs import picture_call
    from ppcl.teacher.loading import load_pipeline

    found = Evaluation.model_validate_json((judged[0] / "metrics.json").read_text())
    for one, path in zip(found.models, models, strict=True):
        parts = [(row.part, row.batch_size, row.num_inference_steps) for row in one.speed]
        expected = [(p, size, s) for size in (1, 3) for p, s in (("transformer", None), ("picture", 1), ("picture", 2))]
        assert parts == expected  # four at once are more than evaluate.batch_size
        assert all(0 < row.latency_p10_ms <= row.latency_ms <= row.latency_p90_ms for row in one.speed)
        pipeline = load_pipeline(str(path), torch.device("cpu"))
        sizes = {"height": 16, "width": 16, "true_cfg_scale": 1.0}
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            picture_call(pipeline, PROMPTS[:1], 2, sizes, 0)()
        of_transformer = counter.get_flop_counts()[type(pipeline.transformer).__name__]
        assert 2 * one.costs["flops"] == sum(of_transformer.values()) > 0  # two steps
    text = (judged[0] / "report.md").read_text()
    assert "| pictures, 2 steps | 3 |" in text
    assert "FLOPs of a call for one prompt (GFLOPs)" in text


def test_reports_can_be_written_again(judged: tuple[Path, str], finished_run: Path, tmp_path: Path) -> None:
    """ppcl report DIR, for what evaluate wrote and for a run; anything else is one line."""
    copies = [shutil.copytree(folder, tmp_path / name) for folder, name in ((judged[0], "a"), (finished_run, "b"))]
    for copy in copies:
        before = {name: (copy / name).read_text() for name in ("report.html", "report.md")}
        for name in before:
            (copy / name).unlink()
        result = CliRunner().invoke(app, ["report", str(copy)])
        assert result.exit_code == 0, (result.output, result.exception)
        assert (copy / "report.md").read_text() == before["report.md"]
        assert len((copy / "report.html").read_text()) == pytest.approx(
            len(before["report.html"]), abs=600
        )  # names, seconds
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(app, ["report", str(tmp_path / "empty")])
    assert "neither a run nor an evaluation" in str(result.exception)
    (copies[0] / "metrics.json").write_text(json.dumps({"models": []}))
    assert CliRunner().invoke(app, ["report", str(copies[0])]).exit_code != 0


def test_an_interrupted_evaluation_ends_up_the_same(
    judged: tuple[Path, str], models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Pictures lost in one folder are drawn again, the others kept; statistics stand in for the reference folder."""
    out = shutil.copytree(judged[0], tmp_path / "out")
    fake = install(patched := pytest.MonkeyPatch())
    before = json.loads((out / "metrics.json").read_text())
    pictures = sorted((out / "pictures" / "model-2").glob("seed-*/*.png"))
    assert [path.name for path in pictures] == [f"{index:04d}.png" for index in range(5)]
    kept = {path: path.read_bytes() for path in pictures}
    stamps = {path: path.stat().st_mtime_ns for path in pictures}
    pictures[1].unlink()
    config = load_config([], [*SETTINGS, "wandb=offline"])
    again = evaluate_models([str(model) for model in models], out, config, PROMPTS, out / "reference.npz")
    patched.undo()
    (sent,) = fake.rows  # the same table, numbers and pictures in wandb
    assert sent["evaluate/table"]["columns"] == ["", "model", "model-2"]
    assert [caption for _, caption in sent["evaluate/pictures/model-2"]] == PROMPTS
    assert sent["evaluate/model-2/fid"] == again.models[1].numbers["fid"].value
    assert fake.finished == 1
    assert {path: path.read_bytes() for path in pictures} == kept
    assert pictures[4].stat().st_mtime_ns == stamps[pictures[4]]  # of the other batch
    for one, old in zip(again.models, before["models"], strict=True):
        for name in ("clip_score", "retrieval_at_1"):
            assert one.numbers[name].model_dump() == old["numbers"][name]
        assert one.numbers["fid"].value == pytest.approx(old["numbers"]["fid"]["value"], rel=1e-6)
    assert any("mean and covariance alone" in note for note in again.notes)
    assert "kid" not in again.models[0].numbers


def test_other_sizes_leave_paired_measures_out(models: tuple[Path, Path], tmp_path: Path) -> None:
    """A second model whose VAE makes larger pictures of the same latents; one that is alone compares with nothing."""
    from ppcl.eval import command

    class Larger(command.Judge):
        def draw(self, entrant, pipeline, kwargs, seed):
            if entrant.label == "model-2":
                kwargs = {**kwargs, "height": 24}
            return super().draw(entrant, pipeline, kwargs, seed)

    config = load_config([], [*SETTINGS, "evaluate.teacher_seeds=1"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "Judge", Larger)
        found = evaluate_models([str(model) for model in models], tmp_path, config, PROMPTS[:4])
    assert set(found.comparisons[0].fidelity) == {"feature_cosine", "velocity_error"}
    assert any("another size" in note for note in found.notes)
    assert found.reference is None
    assert "fid" not in found.models[0].numbers


def test_arguments_are_found_out(finished_run: Path, models: tuple[Path, Path], tmp_path: Path) -> None:
    run = str(finished_run)
    assert [one.label for one in sources([run])] == ["teacher", "student"]
    assert [one.shown for one in sources([str(models[0]), run])] == ["model", "run/pipeline"]
    bundle = sources([str(finished_run / "bundle")])[0]
    assert bundle.is_bundle
    assert settings_for([run], [], []).evaluate.num_inference_steps == 2  # the run's own settings
    assert settings_for([run], [], ["evaluate.num_inference_steps=3"]).evaluate.num_inference_steps == 3
    held = json.loads((finished_run / "eval" / "student" / "seed-0" / "prompts.json").read_text())["prompts"]
    assert evaluation_prompts([run], None, settings_for([run], [], [])) == held
    with pytest.raises(UserError, match="given twice"):
        sources([str(models[0]), str(models[0])])
    with pytest.raises(ModelError, match=r"model_index\.json is missing"):
        sources([str(tmp_path)])
    with pytest.raises(ModelError, match="neither a pipeline folder"):
        sources(["nothing"])
    with pytest.raises(UserError, match="is a run; choose another --out"):
        evaluate_models([str(models[0])], finished_run, load_config([], SETTINGS), PROMPTS)


def test_a_run_in_its_own_folder_is_the_stage(finished_run: Path) -> None:
    """The command as it was: MODEL --out RUN runs (here: has run) the stage, with intervals beside the numbers."""
    result = load_evaluation(finished_run / "eval" / "metrics.json")
    teacher, student = result.models
    (row,) = result.comparisons
    assert (teacher.label, student.label, row.against) == ("teacher", "student", "teacher")
    assert student.numbers["clip_score"].limits
    assert row.fidelity["velocity_error"].limits
    assert row.velocity_error_by_timestep
    assert row.scale["velocity_error"] > 0
    assert {"fid", "kid", "cmmd"} <= set(student.numbers)
    assert "precision" not in student.numbers, "four pictures have no five neighbours"
    assert len(teacher.spread["clip_score"].values) == 2


def test_bad_references_are_one_line(models: tuple[Path, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for reference, said in ((empty, "holds no pictures"), (tmp_path / "x.npz", "does not exist")):
        with pytest.raises(UserError, match=said) as caught:
            evaluate_models([str(models[0])], tmp_path / "out", load_config([], SETTINGS), PROMPTS, reference)
        assert "\n" not in str(caught.value)
