"""The report is built from a run directory's files alone, whatever is missing or damaged there."""

from __future__ import annotations

import ast
import json
import logging
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from evaluation_file import comparison, model, write_evaluation
from PIL import Image
from report_run import (
    HOSTILE,
    RUNS,
    STACK,
    make_analysis,
    make_candidates,
    make_metrics,
    make_model,
    make_plan,
    write_pictures,
    write_run,
)

from ppcl.analysis.artifacts import Analysis, StackAnalysis
from ppcl.common.artifacts import save_artifact
from ppcl.common.files import write_json
from ppcl.errors import ArtifactError
from ppcl.eval.figures import loss_points, select_candidates, smooth
from ppcl.eval.metrics import SCORES
from ppcl.eval.report import readme_picture, write_report
from ppcl.eval.report_data import differences, pick, read_log, read_run
from ppcl.eval.report_html import count, duration, number
from ppcl.eval.report_numbers import verdict
from ppcl.eval.report_pictures import find_pairs, spread, thumbnails
from ppcl.eval.report_sections import headline_sentence, load_lines
from ppcl.pruning.artifacts import Candidate, Candidates
from ppcl.student.plan import CompressionPlan, Recovered, StudentErrors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A complete run of twelve prompts, the first of them hostile."""
    return write_run(tmp_path / "run", [HOSTILE, *(f"prompt number {i}" for i in range(1, 12))])


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a complete run; drawing it takes a second."""
    prompts = [HOSTILE, *(f"prompt number {i}" for i in range(1, 12))]
    return write_report(write_run(tmp_path_factory.mktemp("complete") / "run", prompts))


class Balanced(HTMLParser):
    """Fails on unbalanced tags, and collects texts and attributes."""

    VOID = ("meta", "img", "br", "input", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parse(path: Path) -> Balanced:
    """Parse a report and check what every report must be."""
    content = path.read_text(encoding="utf-8")
    assert len(content.encode()) < 5_000_000
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?\s*(?:https?:)?//", content)
    assert not re.search(r"url\((?!#)|@import", content)
    parser = Balanced()
    parser.feed(content)
    parser.close()
    assert parser.open == []
    assert all(link.startswith(("#", "data:image/")) for link in parser.links)
    return parser


def body_text(path: Path) -> str:
    """All text of a report, without its style and script."""
    content = re.sub(r"<(style|script)>.*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    parser = Balanced()
    parser.feed(content)
    return " ".join("".join(parser.texts).split())


def test_complete_run(complete: Path) -> None:
    path, run = complete, complete.parent
    assert path == run / "report.html"
    parse(path)
    content, words = path.read_text(encoding="utf-8"), body_text(path)
    assert "67% of the parameters, 1.45 times as fast, average drop 2.1%" in words
    assert "predicted 67.4%" in words
    assert "predicted 1.49\N{MULTIPLICATION SIGN}" in words
    assert f'DiffusionPipeline.from_pretrained("{run.as_posix()}/pipeline")' in words
    assert content.count("<li class=pair>") == 12 + 6 + 8  # gallery, other seed, least and most alike
    assert content.count("<svg") == 2 + 5 + 3  # size, time; map, differences, scores, linearity, candidates; losses
    assert content.count("How to read:") == 10
    assert "Of 24 blocks 16 are left: 4 runs" in words
    assert "Worse, beyond the noise of pictures" in words
    assert "Small sample: 128 prompts" in words
    assert "ppcl compress emoji --out runs/emoji --keep 0.7" in words
    assert "Nothing to show yet" not in words
    assert not list(run.glob(".*"))


def test_same_run_gives_same_bytes(complete: Path) -> None:
    first = complete.read_bytes()
    assert write_report(complete.parent).read_bytes() == first


def test_colours_follow_the_page(complete: Path) -> None:
    assert "#0a0b0" not in complete.read_text(encoding="utf-8")


def test_hostile_prompt_is_text(complete: Path) -> None:
    assert "<script>alert" not in complete.read_text(encoding="utf-8")
    assert HOSTILE in body_text(complete)


def test_only_analysis_and_plan(tmp_path: Path) -> None:
    save_artifact(make_analysis(), tmp_path / "analysis.json")
    save_artifact(make_plan(), tmp_path / "plan.json")
    path = write_report(tmp_path)
    parse(path)
    words = body_text(path)
    assert "Planned, not measured yet: 67% of the parameters, about 1.49 times as fast (predicted)" in words
    assert "eval/metrics.json is written by the evaluate stage" in words
    assert "candidates.json is written by the fit stage" in words
    assert "pipeline is written by the export stage" in words
    assert path.read_text(encoding="utf-8").count("<svg") == 4


def test_plans_that_were_recovered_are_listed(tmp_path: Path) -> None:
    def recovered(run: str, score: float, *after: float) -> Recovered:
        errors = [StudentErrors(0.5, score, score, (score, 0.3)) for score in after]
        return Recovered((f"a {run}",), 2, 0.4, StudentErrors(0.5, score, score), (20, 60)[: len(after)], tuple(errors))

    seen = (recovered("1-2", 0.4, 0.2), replace(recovered("3-5", 0.5, 0.1, 0.0625), chosen=True))
    save_artifact(replace(make_plan(), recovered=seen), tmp_path / "plan.json")
    path = write_report(tmp_path)
    parse(path)
    words = body_text(path)
    assert "plans that were recovered" in words
    assert re.search(r"a 1.2; narrower inside 2 blocks ?0\.4\S* ?0\.4\S* ?0\.2\S* \(20\)", words)
    assert re.search(r"a 3.5; narrower inside 2 blocks \(the plan\)", words)
    assert re.search(r"0\.1\S* \(20\) . 0\.06\S* \(60\)", words)
    assert "1 of 2" in words
    save_artifact(make_plan(), tmp_path / "plan.json")
    assert "plans that were recovered" not in body_text(write_report(tmp_path))


def test_empty_run(tmp_path: Path) -> None:
    path = write_report(tmp_path)
    parse(path)
    assert "Nothing has been measured in this run yet" in body_text(path)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a folder"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.yaml", "analysis.json", "candidates.json", "plan.json", "eval/metrics.json"])
def test_damaged_file_costs_its_part_only(run: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    (run / name).write_text('{"schema_version": 1, "x', encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        path = write_report(run)
    parse(path)
    assert "Left out:" in body_text(path)
    assert name in caplog.text


@pytest.mark.parametrize("null", [None, math.nan], ids=["null", "not a number"])
def test_null_metrics(run: Path, null: float | None) -> None:
    def blank(value: object) -> object:
        return {k: blank(v) for k, v in value.items()} if isinstance(value, dict) else null

    write_json(run / "eval" / "metrics.json", blank(make_metrics()))
    path = write_report(run)
    parse(path)
    words = body_text(path)
    assert "Left out:" in words
    assert "nan" not in words.lower().split()
    assert "None" not in words


def test_empty_stacks_and_logs(run: Path) -> None:
    model = make_model()
    bare = replace(model, stacks=(replace(model.stacks[0], num_blocks=0, block_params=(), block_flops=()),))
    save_artifact(Analysis(bare, (), 0, {}, 0.0), run / "analysis.json")
    save_artifact(Candidates((), 0, 0.0), run / "candidates.json")
    (run / "log.jsonl").write_text('{"stage": "fit", "step": 0, "loss": NaN}\n[]\n{}\n', encoding="utf-8")
    parse(write_report(run))


def test_two_stacks(tmp_path: Path) -> None:
    model, stack = make_model(), make_analysis().stacks[0]
    names = ("double_blocks", "single_$x_blocks$")
    twice = {"params": 2 * model.params, "flops": 2 * model.flops}
    model = replace(model, **twice, stacks=tuple(replace(model.stacks[0], name=name) for name in names))
    stacks = tuple(StackAnalysis(**{**vars(stack), "name": name}) for name in names)
    save_artifact(Analysis(model, stacks, 8, {"img": 8}, 1.0), tmp_path / "analysis.json")
    plan = make_plan()
    segments = plan.stacks[STACK]
    save_artifact(
        CompressionPlan(model, "optimal", {}, dict.fromkeys(names, segments), plan.predicted), tmp_path / "plan.json"
    )
    found = tuple(Candidate(name, a, b, 0.2, "first", 0.1) for name in names for a, b in RUNS)
    save_artifact(Candidates(found, 1, 1.0), tmp_path / "candidates.json")
    path = write_report(tmp_path)
    parse(path)
    assert path.read_text(encoding="utf-8").count("<svg") == 9
    assert "single_$x_blocks$ 8\N{EN DASH}11" in body_text(path)


def test_last_line_of_a_step_wins_and_damage_is_skipped(tmp_path: Path) -> None:
    lines = [{"stage": "fit", "step": 1, "loss": 3.0}, {"stage": "fit", "step": 0, "loss": 2.0}]
    lines += [{"stage": "fit", "step": 1, "loss": 1.0}, {"step": 4}, {"stage": "fit"}]
    path = tmp_path / "log.jsonl"
    path.write_bytes("\n".join(map(json.dumps, lines)).encode() + b'\n{"stage": "fit", "step": 2, "lo\xff')
    rows = read_log(path)["fit"]
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 2.0), (1, 1.0)]


@pytest.mark.slow
def test_size_limit_with_64_large_pairs(run: Path) -> None:
    for name in ("teacher", "student"):
        for file in (run / "eval" / name).rglob("*"):
            if file.is_file():
                file.unlink()
        for folder in (run / "eval" / name).iterdir():
            folder.rmdir()
    write_pictures(run, ["x" * 300] * 70, side=256, noise=True)
    path = write_report(run)
    parse(path)
    assert path.read_text(encoding="utf-8").count("<li class=pair>") == 64 + 6 + 8


def test_small_pictures_keep_every_pixel(run: Path) -> None:
    import base64
    import io

    source = run / "eval" / "teacher" / "seed-0" / "0000.png"
    uri = thumbnails([source])[source]
    stored = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert np.array_equal(np.asarray(stored.convert("RGB")), np.asarray(Image.open(source)))


def test_unreadable_picture_is_left_out_and_said(run: Path) -> None:
    source = run / "eval" / "student" / "seed-0" / "0003.png"
    source.write_bytes(source.read_bytes()[:60])
    path = write_report(run)
    assert path.read_text(encoding="utf-8").count("<li class=pair>") == 11 + 5 + 8
    assert "1 prompt is left out" in body_text(path)


def test_pairs_share_prompt_and_seed(run: Path) -> None:
    (run / "eval" / "student" / "seed-0" / "0002.png").unlink()
    pairs = find_pairs(run)
    assert len(pairs) == 11
    assert all(p.teacher.name == p.student.name for p in pairs)
    assert all(p.teacher.parent.name == p.student.parent.name == "seed-0" for p in pairs)
    assert pairs[2].prompt == "prompt number 3"


def test_spread_is_even_and_in_order() -> None:
    assert spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert spread([], 4) == []


def test_readme_picture(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    readme_picture(run, out, columns=4)
    with Image.open(out) as sheet:
        four = sheet.size
    readme_picture(run, out, columns=99)
    with Image.open(out) as sheet:
        assert sheet.size[0] > four[0]
        assert sheet.size[1] == four[1]
        assert len(np.unique(np.asarray(sheet))) > 2
    with pytest.raises(ArtifactError, match="evaluate"):
        readme_picture(tmp_path, out)


def test_width_plan_needs_the_import(run: Path) -> None:
    assert "ppcl.pipelines" not in load_lines(read_run(run))
    save_artifact(make_plan({"modulation": {"kind": "low_rank", "size": 8}}), run / "plan.json")
    write_json(run / "pipeline" / "model_index.json", {"transformer": ["diffusers", "PPCLQwenImageTransformer2DModel"]})
    assert "import ppcl.pipelines" in load_lines(read_run(run))
    assert "Narrower inside: modulation in 1 blocks" in body_text(write_report(run))


def test_headline_says_what_is_predicted(run: Path) -> None:
    metrics = {**make_metrics(), "speedup": None, "average_drop": None}
    write_json(run / "eval" / "metrics.json", metrics)
    assert headline_sentence(read_run(run)) == "67% of the parameters, about 1.49 times as fast (predicted)"


@pytest.mark.parametrize(
    ("change", "limits", "values", "lower", "expected"),
    [
        (0.5, None, [10.0, 10.6], True, "No more than"),
        (2.0, None, [10.0, 10.6], True, "Worse, beyond the noise"),
        (-2.0, None, [10.0, 10.6], True, "Better, beyond the noise"),
        (-2.0, None, [10.0, 10.6], False, "Worse, beyond the noise"),
        (2.0, None, [10.0], True, "cannot be judged"),
        (-0.08, (-0.36, 0.22), [11.14, 11.16], True, "cannot tell the two apart"),  # small spread, wide interval
        (0.0, (0.0, 0.0), [], True, "cannot tell the two apart"),
        (0.3, (0.2, 0.4), [10.0, 10.6], True, "No more than"),  # narrow interval, wide spread
        (0.3, (0.2, 0.4), [10.0], True, "Worse, beyond the prompts."),
        (0.9, (0.2, 1.4), [10.0, 10.1], False, "Better, beyond the prompts and the noise of pictures."),
    ],
)
def test_verdict(
    change: float, limits: tuple[float, float] | None, values: list[float], lower: bool, expected: str
) -> None:
    assert expected in verdict(change, limits, values, SCORES["fid" if lower else "clip_score"])


def test_the_table_of_scores_asks_the_interval_of_the_difference(tmp_path: Path) -> None:
    """FID moves by ten times the teacher's spread over seeds, but these prompts cannot tell it from 0."""
    spread = {"fid": {"mean": 11.0, "std": 0.02, "values": [10.98, 11.02]}}
    models = [model("teacher", {"fid": {"value": 11.0}}, spread=spread), model("student", {"fid": {"value": 11.3}})]
    difference = comparison("student", "teacher", {}, differences={"fid": {"value": 0.3, "low": -0.2, "high": 0.8}})
    words = body_text(write_report(write_evaluation(tmp_path, models, [difference])))
    assert "+0.30 -0.20 to +0.80".replace("-", "\N{MINUS SIGN}") in words
    assert "these prompts cannot tell the two apart" in words


def test_the_strip_says_how_stable_an_interval_is(complete: Path) -> None:
    page = complete.read_text(encoding="utf-8")
    assert "8\N{EN DASH}10 <small>40%</small>" in page
    assert "in 40% of 20 draws of half of the held-out prompts; starts here in 55%, ends here in 65%" in page


def test_differences_are_equation_4() -> None:
    cka = ((1.0, 0.9, 0.7), (None, 0.95, 0.85), (None, None, 0.99))
    stack = StackAnalysis(STACK, cka, {}, (), {}, {}, (0.0, 0.0, 0.0))
    assert [k for k, _ in differences(stack, 0)] == [1, 2]
    assert [d for _, d in differences(stack, 0)] == pytest.approx([0.1, 0.2])
    assert [d for _, d in differences(stack, 1)] == pytest.approx([0.1])
    assert differences(stack, 2) == []


def test_chosen_candidates_are_always_shown() -> None:
    found = make_candidates().candidates
    chosen = {(STACK, a, b) for a, b in RUNS}
    shown = select_candidates(found, chosen, limit=10)
    assert len(shown) == 10
    assert chosen <= {(c.stack, c.first, c.last) for c in shown}


def test_loss_points_skip_what_a_log_axis_cannot_show() -> None:
    rows = [{"step": i, "loss": v} for i, v in enumerate([1.0, 0.0, -1.0, math.nan, None, 0.5])]
    assert loss_points(rows) == [(0.0, 1.0), (5.0, 0.5)]
    assert len(loss_points([{"step": i, "loss": 1.0} for i in range(10_000)])) <= 500
    assert smooth([1.0, 9.0, 1.0], 3) == [5.0, 1.0, 5.0]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(None), "\N{EN DASH}"),
        (number(0.0), "0.000"),
        (number(0.1234), "0.123"),
        (number(1.449), "1.45"),
        (number(28.31), "28.3"),
        (number(412.3), "412"),
        (number(-0.00312, 2), "\N{MINUS SIGN}0.0031"),
        (number(-0.6), "\N{MINUS SIGN}0.600"),
        (count(14_400_000), "14.4 M"),
        (count(20_300_000_000), "20.3 B"),
        (duration(7523), "2 h 5 min"),
        (duration(3.21), "3.2 s"),
    ],
)
def test_numbers(shown: str, expected: str) -> None:
    assert shown == expected


def test_pick_takes_finite_numbers_only() -> None:
    data = {"a": {"b": 2, "c": None, "d": "3", "e": True, "f": math.inf}}
    assert pick(data, "a", "b") == 2.0
    assert [pick(data, "a", key) for key in "cdefx"] == [None] * 5
    assert pick(data, "a", "b", "c") is None


def test_no_torch_needed() -> None:
    code = "import sys, ppcl.eval.report; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


TAG = re.compile(r"</?(?:a|b|code|details|div|figure|h[1-6]|i|img|li|p|pre|section|small|span|t[drh]|table|ul)[ >]")


def test_markup_stands_in_templates() -> None:
    """Python hands texts to templates, which escape them; what it writes as HTML itself is ``Markup`` with holes."""
    sources = [*(ROOT / "eval").glob("report*.py"), ROOT / "eval" / "markdown.py", ROOT / "ppcl" / "export" / "card.py"]
    assert len(sources) > 9
    for source in sources:
        nodes = list(ast.walk(ast.parse(source.read_text(encoding="utf-8"))))
        marked = [part for node in nodes if ast.unparse(node).startswith("Markup(") for part in ast.walk(node)]
        texts = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        assert [text.value for text in texts if text not in marked and TAG.search(text.value)] == [], source
