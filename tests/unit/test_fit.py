"""Candidate runs: which, their probes, their fit and their costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    DUAL,
    SINGLE,
    describe_alone,
    noise,
    padded_batch,
    qwen_call,
    tiny_flux,
    tiny_qwen,
    write_states,
)
from torch import nn

from ppcl.analysis.analyze import analyze
from ppcl.analysis.artifacts import Analysis, StackAnalysis
from ppcl.analysis.probes import chained_probe
from ppcl.analysis.sweep import forward_sweep
from ppcl.capture.states import States
from ppcl.common.artifacts import load_artifact
from ppcl.common.tensor_files import StoredTensors, read_tensors
from ppcl.config import AnalyzeConfig, FitConfig, PlanConfig, load_config
from ppcl.distill.fit import fit
from ppcl.distill.local import best_starts, local_backward
from ppcl.pruning.artifacts import Candidates, WidthOption
from ppcl.pruning.runs import all_runs, shortlist
from ppcl.run import Run
from ppcl.student.assembly import STARTS, start_block
from ppcl.teacher.blocks import ResidentBlocks
from ppcl.teacher.families import adapter_for
from ppcl.teacher.model_info import ModelInfo, Stack

CPU = torch.device("cpu")
NONE = PlanConfig(protect_first=0, protect_last=0)


def analysis_of(transformer: nn.Module, intervals: dict[str, tuple[tuple[int, int], ...]]) -> Analysis:
    model = describe_alone(transformer)
    stacks = tuple(StackAnalysis(s.name, (), {}, intervals.get(s.name, ()), {}, {}, ()) for s in model.stacks)
    return Analysis(model, stacks, 1, {}, 0.0)


def test_all_runs_are_short_ones_and_the_papers_intervals() -> None:
    runs = all_runs(analysis_of(tiny_flux(dual=3, single=5), {SINGLE: ((0, 4),)}), max_run=2, settings=NONE)
    assert runs == [
        (DUAL, 0, 1),
        (DUAL, 1, 2),
        (SINGLE, 0, 1),
        (SINGLE, 0, 4),
        (SINGLE, 1, 2),
        (SINGLE, 2, 3),
        (SINGLE, 3, 4),
    ]
    four = all_runs(analysis_of(tiny_qwen(4), {}), max_run=9, settings=NONE)
    assert [run[1:] for run in four] == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_protected_blocks_are_in_no_run() -> None:
    runs = all_runs(analysis_of(tiny_flux(dual=3, single=5), {}), 3, PlanConfig(protect_first=1, protect_last=2))
    assert runs == [(DUAL, 1, 2), (SINGLE, 0, 1), (SINGLE, 0, 2), (SINGLE, 1, 2)]


@pytest.mark.parametrize(
    ("setting", "again"), [("plan.protect_last=2", ("analyze", "fit", "plan")), ("plan.keep=0.7", ("plan",))]
)
def test_other_protected_blocks_run_the_analysis_again(setting: str, again: tuple[str, ...]) -> None:
    def digests(*settings: str) -> dict[str, str]:
        run = Run.__new__(Run)
        run.identity, run.config = "x", load_config([], list(settings))
        return {stage: run.depends(stage) for stage in ("capture", "analyze", "fit", "plan")}

    before, after = digests(), digests(setting)
    assert tuple(stage for stage in before if before[stage] != after[stage]) == again


def test_chained_probe_of_one_stream_without_probes_is_the_identity() -> None:
    probes = {
        f"{SINGLE}/{i}/image/{part}": noise(*shape, seed=i)
        for i in (1, 2)
        for part, shape in (("weight", (8, 8)), ("bias", (8,)))
    }
    maps = chained_probe(probes, (SINGLE, 1, 2), ["image", "text"], CPU)
    h = noise(5, 8, seed=9)
    by_hand = h
    for i in (1, 2):
        by_hand = by_hand + by_hand @ probes[f"{SINGLE}/{i}/image/weight"] + probes[f"{SINGLE}/{i}/image/bias"]
    assert torch.allclose(h @ maps["image"][0] + maps["image"][1], by_hand, rtol=1e-4, atol=1e-4)
    assert torch.equal(h @ maps["text"][0] + maps["text"][1], h)


LINE = ModelInfo("Tiny", "0", 800, 800, 4, 0, (Stack("a", "blocks", 8, (100,) * 8, (100,) * 8),))
RUNS = {("a", i, i + n): 0.1 * n + 0.001 * i for n in (1, 2, 3) for i in range(8 - n)}


def test_shortlist_begins_with_what_must_be_fitted_and_takes_all_if_there_is_room() -> None:
    must = ("a", 4, 7)  # no plan wants it
    assert shortlist(LINE, RUNS, (), [must], count=1) == [must]
    assert shortlist(LINE, RUNS, (), [], count=100) == sorted(RUNS)
    assert len(shortlist(LINE, RUNS, (), [must], count=5)) == 5


def test_shortlist_prefers_the_runs_of_the_cheapest_plans() -> None:
    # of pairs, 0-1 and 2-3 and so on are cheapest together; 1-2 alone is cheap but leaves less room
    assert shortlist(LINE, RUNS, (), [], count=2)[0] == ("a", 0, 1)
    dear = {**RUNS, ("a", 0, 1): 5.0}
    assert ("a", 0, 1) not in shortlist(LINE, dear, (), [], count=12)


def test_shortlist_leaves_out_runs_where_smaller_modules_save_the_same_for_less() -> None:
    """The planner lays out blocks with smaller modules, too: with them fewer runs are needed."""
    part = {"linear": {"kind": "low_rank", "size": 1}}
    options = [WidthOption("a", i, "ffn.image", part, 90, 90, 1e-3) for i in range(4)]  # of blocks 0 to 3
    assert shortlist(LINE, RUNS, (), [], count=2) == [("a", 0, 1), ("a", 2, 3)]
    assert shortlist(LINE, RUNS, options, [], count=2) == [("a", 0, 1), ("a", 4, 5)]


def test_best_start_is_the_one_of_least_loss_over_all_batches(tmp_path: Path) -> None:
    """Texts of two lengths: what is best for the first batch alone is not what is best for all."""
    transformer = tiny_qwen(6)
    adapter = adapter_for(transformer)
    runs = [(DUAL, first, last) for first in range(5) for last in range(first + 1, 6)]
    calls = [qwen_call(3, padded=True), qwen_call(9, text=7, seed=40, padded=True)]
    write_states(tmp_path, "held-out", calls)
    states = States(tmp_path, "held-out")
    sample = list(states.weighed(states.spread(12), 12))
    assert [len(call.velocity) for call, _ in sample] == [3, 9]
    losses: dict[Any, list[dict[str, float]]] = {run: [] for run in runs}
    for call in [padded_batch(calls), *(call.arguments for call, _ in sample)]:
        for run in runs:
            blocks = {
                start: {run: start_block(transformer.transformer_blocks, run[1], run[2], start)} for start in STARTS
            }
            found = {
                start: local_backward(transformer, adapter, call, b, backward=False) for start, b in blocks.items()
            }
            losses[run].append({start: loss[run] for start, loss in found.items()})
    best = best_starts(transformer, adapter, sample, runs, STARTS)
    assert best == {run: min(together, key=together.__getitem__) for run, (together, *_) in losses.items()}
    assert best != {run: min(first, key=first.__getitem__) for run, (_, first, _) in losses.items()}
    assert best_starts(transformer, adapter, sample, runs, ["last"]) == dict.fromkeys(runs, "last")


SETTINGS = FitConfig(max_run=3, max_candidates=3, steps=8, batch_size=4, eval_states=8, learning_rate=3e-3, width=())


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[Any, Analysis, Path]:
    """A teacher of four blocks with its analysis."""
    transformer = tiny_qwen(4)
    write_states(tmp_path / "calibration", "train", [qwen_call(4, seed=s, padded=True) for s in (0, 10, 20)])
    write_states(tmp_path / "calibration", "held-out", [qwen_call(4, seed=30, padded=True)])
    source, model = ResidentBlocks(transformer), describe_alone(transformer)
    analysis = analyze(source, model, tmp_path / "calibration", tmp_path, AnalyzeConfig(), 0, NONE)
    return transformer, analysis, tmp_path


def run_fit(
    prepared: tuple[Any, Analysis, Path], out: Path, settings: FitConfig = SETTINGS, log: Any = None
) -> Candidates:
    transformer, analysis, folder = prepared
    forms, source = StoredTensors(folder / "analysis.safetensors"), ResidentBlocks(transformer)
    common = (source, analysis, forms, folder / "calibration", out, settings, 0, log)
    return fit(*common, protected=NONE, fingerprint="test")


def test_fit_scores_all_runs_and_fits_the_promising_ones(prepared: tuple[Any, Analysis, Path]) -> None:
    transformer, analysis, folder = prepared
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    rows: list[dict[str, Any]] = []
    found = run_fit(prepared, folder, log=rows.append)
    assert [(c.stack, c.first, c.last) for c in found.candidates] == all_runs(analysis, SETTINGS.max_run, NONE)
    assert all(c.probe_error > 0 for c in found.candidates)
    fitted = [c for c in found.candidates if c.fitted_error is not None]
    wanted = {(found.name, *interval) for found in analysis.stacks for interval in found.intervals}
    assert wanted <= {(c.stack, c.first, c.last) for c in fitted}
    assert len(fitted) == max(3, len(wanted))
    assert all(c.start in STARTS for c in fitted)
    assert len(rows) == SETTINGS.steps * len(fitted)
    for c in fitted:
        losses = [row["loss"] for row in rows if row["run"] == f"{c.stack}/{c.first}-{c.last}"]
        assert losses[-1] < losses[0]
    assert not (folder / "checkpoints" / "fit").exists()
    assert load_artifact(Candidates, folder / "candidates.json") == found
    tensors, _ = read_tensors(folder / "candidates.safetensors")
    assert {name.rsplit("/", 1)[0] for name in tensors} == {f"{c.stack}/{c.first}-{c.last}" for c in fitted}
    assert all(torch.equal(tensor, before[name]) for name, tensor in transformer.state_dict().items())


def test_the_fit_pays(prepared: tuple[Any, Analysis, Path]) -> None:
    folder = prepared[2]
    raw = run_fit(prepared, folder / "raw", SETTINGS.model_copy(update={"steps": 0}))
    fitted = run_fit(prepared, folder / "fitted", SETTINGS.model_copy(update={"steps": 30}))
    both = zip(raw.candidates, fitted.candidates, strict=True)
    pairs = [(a.fitted_error, b.fitted_error) for a, b in both if a.fitted_error]
    assert pairs
    assert sum(b for _, b in pairs) < 0.9 * sum(a for a, _ in pairs)


def test_candidates_do_not_disturb_each_other(prepared: tuple[Any, Analysis, Path]) -> None:
    """Each has its own gradient norm: a run fitted among others is fitted as if alone."""
    folder = prepared[2]
    many = run_fit(prepared, folder / "many")
    few = run_fit(prepared, folder / "few", SETTINGS.model_copy(update={"max_candidates": 1}))
    alone = {(c.first, c.last): c.fitted_error for c in few.candidates if c.fitted_error is not None}
    assert 0 < len(alone) < sum(c.fitted_error is not None for c in many.candidates)
    together = {(c.first, c.last): c.fitted_error for c in many.candidates}
    for run, error in alone.items():
        assert together[run] == pytest.approx(error, rel=1e-4)


def test_only_states_that_are_drawn_are_carried(
    prepared: tuple[Any, Analysis, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    carried: list[int] = []

    def noted(course: Any, *others: Any) -> None:
        if course.batches[0].split == "train":
            carried.append(sum(len(batch.rows) for batch in course.batches))
        forward_sweep(course, *others)

    def all_states(self: States, rows: Any) -> States:
        return self

    monkeypatch.setattr("ppcl.distill.fit.forward_sweep", noted)
    settings = SETTINGS.model_copy(update={"steps": 1, "batch_size": 2})
    few = run_fit(prepared, prepared[2] / "few", settings)
    monkeypatch.setattr(States, "only", all_states)
    every = run_fit(prepared, prepared[2] / "all", settings)
    assert carried == [2, 12]
    for one, other in zip(few.candidates, every.candidates, strict=True):
        assert (one.fitted_error or 0) == pytest.approx(other.fitted_error or 0, rel=1e-5)


@pytest.mark.parametrize(
    "stops", [9, pytest.param(1, marks=pytest.mark.slow), pytest.param(25, marks=pytest.mark.slow)]
)
def test_fit_is_resumed(stops: int, prepared: tuple[Any, Analysis, Path]) -> None:
    folder = prepared[2]
    settings = SETTINGS.model_copy(update={"steps": 14, "width": ("ffn",)})  # a checkpoint every ten steps
    whole = run_fit(prepared, folder / "whole", settings)
    rows: list[dict[str, Any]] = []

    def stop(row: dict[str, Any]) -> None:
        rows.append(row)
        if len(rows) == stops:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_fit(prepared, folder / "cut", settings, log=stop)
    assert not (folder / "cut" / "candidates.json").exists()
    again: list[dict[str, Any]] = []
    resumed = run_fit(prepared, folder / "cut", settings, log=again.append)
    assert resumed.candidates == whole.candidates
    assert [option.error for option in resumed.width] == [option.error for option in whole.width]
    finished, steps = divmod(stops, 14)
    fitted = sum(c.fitted_error is not None for c in whole.candidates)
    assert len(again) == 14 * (fitted - finished) - 10 * (steps // 10)


def test_nothing_to_fit_is_no_error(prepared: tuple[Any, Analysis, Path]) -> None:
    """All blocks are protected: smaller modules are still priced."""
    transformer, analysis, folder = prepared
    bare = replace(analysis, stacks=tuple(replace(stack, intervals=()) for stack in analysis.stacks))
    settings = SETTINGS.model_copy(update={"width": ("ffn",)})
    protected = PlanConfig(protect_first=2, protect_last=2)
    forms, out = StoredTensors(folder / "analysis.safetensors"), folder / "none"
    found = fit(ResidentBlocks(transformer), bare, forms, folder / "calibration", out, settings, 0, protected=protected)
    assert found.candidates == ()
    assert {option.block for option in found.width} == set(range(4))


@pytest.mark.parametrize("exact", ["none", "runs", "all"])
def test_what_is_exact_is_a_setting(exact: str, prepared: tuple[Any, Analysis, Path]) -> None:
    folder = prepared[2]
    changes = {"width": ("ffn",), "steps": 0, "vectors": 16, "exact": exact}
    found = run_fit(prepared, folder / exact, SETTINGS.model_copy(update=changes))
    vectors = StoredTensors(folder / exact / "prices.safetensors")
    assert set(vectors) == {c.name for c in found.candidates} | {o.name for o in found.width}
    assert sum(c.fitted_error is not None for c in found.candidates) < len(found.candidates)
    for c in found.candidates:
        price = float(vectors[c.name].norm())
        if c.fitted_error is None:
            assert (c.probe_error == pytest.approx(price, rel=1e-5)) == (exact == "none")
            assert c.probe_error == pytest.approx(price, rel=0.6)
        else:  # its vector is that of the fitted block
            assert c.fitted_error == pytest.approx(price, rel=0.3)
    for option in found.width:
        price = float(vectors[option.name].norm())
        if price:  # the last block's text goes nowhere
            assert (option.error == pytest.approx(price, rel=1e-5)) == (exact != "all")
            assert option.error == pytest.approx(price, rel=0.6)
