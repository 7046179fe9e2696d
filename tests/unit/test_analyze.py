"""The analyze stage on transformers of a few blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    DUAL,
    SINGLE,
    describe_alone,
    flux_call,
    noise,
    qwen_call,
    tiny_flux,
    tiny_qwen,
    write_states,
)
from torch import Tensor, nn

import ppcl.analysis.analyze
from ppcl.analysis.analyze import SWEEP, analyze
from ppcl.analysis.artifacts import Analysis
from ppcl.analysis.cka import DRAWS, chained_cka, drawn_ckas
from ppcl.analysis.findings import Findings
from ppcl.analysis.intervals import detect_intervals
from ppcl.analysis.kept_tokens import Kept, KeptTokens
from ppcl.analysis.moments import Moments
from ppcl.analysis.sums import BlockSums, Totals, sampled_tokens
from ppcl.analysis.sweep import Course, Seen, batches_of, forward_sweep
from ppcl.capture.states import States
from ppcl.capture.store import StateStore
from ppcl.common.artifacts import load_artifact
from ppcl.common.tensor_files import read_tensors
from ppcl.config import AnalyzeConfig, PlanConfig
from ppcl.errors import UserError
from ppcl.teacher.blocks import Place, ResidentBlocks
from ppcl.teacher.families import StackSpec, adapter_for
from ppcl.teacher.trace import record_boundaries

Calls = dict[str, list[dict[str, Any]]]
RIDGES = (1e-4, 1e-1)


def qwen_calls(batch: int = 4) -> Calls:
    return {
        "train": [qwen_call(batch, text=n, seed=seed, padded=True) for n, seed in ((5, 0), (5, 10), (7, 20))],
        "held-out": [qwen_call(batch, text=5, seed=seed, padded=True) for seed in (30, 40)],
    }


def in_float64(call: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in call.items()}


def run(
    transformer: nn.Module,
    calls: Calls,
    folder: Path,
    plan: PlanConfig | None = None,
    fingerprint: str | None = None,
    **settings: Any,
) -> Analysis:
    for split, recorded in calls.items():
        write_states(folder / "calibration", split, recorded)
    config = AnalyzeConfig(**{"cka_tokens": 64, "batch_size": 3, "ridges": RIDGES, **settings})
    source, model = ResidentBlocks(transformer), describe_alone(transformer)
    return analyze(source, model, folder / "calibration", folder, config, 0, plan, fingerprint)


def numbers(analysis: Analysis) -> list[float]:
    """All numbers of the stacks, in order; None becomes -1."""
    found: list[float] = []

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value):
                visit(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif not isinstance(value, str):
            found.append(-1.0 if value is None else float(value))

    visit([dataclasses.asdict(stack) for stack in analysis.stacks])
    return found


@pytest.mark.parametrize(("batch", "rows"), [(4, 0), (10, 0), (10, 1)])
def test_batch_size_does_not_matter(batch: int, rows: int, tmp_path: Path) -> None:
    """Two tokens of each of 8 held-out states are kept, or one of every second of 20; sums over all or a fifth."""
    transformer = tiny_qwen(4).double()
    calls = {split: [in_float64(call) for call in recorded] for split, recorded in qwen_calls(batch).items()}
    small, large = (
        run(transformer, calls, tmp_path / str(size), batch_size=size, cka_tokens=16, rows_per_feature=rows)
        for size in (1, 5)
    )
    assert small.stacks[0].intervals == large.stacks[0].intervals
    assert numbers(small) == pytest.approx(numbers(large), abs=1e-9)
    assert small.num_tokens == large.num_tokens
    a, b = (read_tensors(tmp_path / name / "analysis.safetensors")[0] for name in ("1", "5"))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)


def swept(transformer: nn.Module, calls: Calls, folder: Path, consumers: Sequence[Any]) -> None:
    """A forward sweep over some calls, kept in memory."""
    for split, recorded in calls.items():
        write_states(folder / "calibration", split, recorded)
    splits = {split: States(folder / "calibration", split) for split in calls}
    course = Course(ResidentBlocks(transformer), batches_of(splits, 4), StateStore(folder / "sweep", "test"))
    forward_sweep(course, consumers)


def test_the_sums_take_a_share_of_the_tokens_and_every_place_alike(tmp_path: Path) -> None:
    """30 states of 6 tokens, 32 features, one row a feature: every fifth token, one later in each state."""
    found: dict[int, Totals] = {}
    sums = BlockSums({"train": 30}, 1, lambda place, totals: found.update({place[1]: totals}))
    swept(tiny_qwen(2), {"train": [qwen_call(10, seed=seed) for seed in range(3)]}, tmp_path, [sums])
    assert found[0].moments["train", "image"].count == 30 * 6 // 5
    assert found[1].moments["train", "ffn.image"].count == 30 * 6 // 5
    assert found[0].tokens["image"] == 30 * 6
    chosen = sampled_tokens(torch.zeros(30, 6, 32), None, first=0, num_states=30, rows_per_feature=1)
    assert chosen is not None
    assert chosen.sum(0).tolist() == [6] * 6


def test_padding_is_excluded(tmp_path: Path) -> None:
    """What stands in the padding changes nothing, and padding is not counted."""
    clean, noisy = qwen_calls(), qwen_calls()
    for call in noisy["train"] + noisy["held-out"]:
        call["encoder_hidden_states"][~call["encoder_hidden_states_mask"]] = 50.0
    first, second = run(tiny_qwen(3), clean, tmp_path / "a"), run(tiny_qwen(3), noisy, tmp_path / "b")
    valid = sum(int(call["encoder_hidden_states_mask"].sum()) for call in clean["train"])
    assert first.num_tokens == second.num_tokens == {"image": 3 * 4 * 6, "text": valid}
    assert numbers(first) == pytest.approx(numbers(second), abs=1e-4)


def rows_of(transformer: nn.Module, calls: list[dict[str, Any]], index: int, stream: str) -> tuple[Tensor, Tensor]:
    """States before and after a block, valid tokens alone."""
    before, after = [], []
    for call in calls:
        traced, _ = record_boundaries(transformer, adapter_for(transformer), call, {(DUAL, index)})
        block = traced[DUAL, index]
        everything = torch.ones(block.inputs[stream].shape[:2], dtype=torch.bool)
        keep = call["encoder_hidden_states_mask"] if stream == "text" else everything
        before.append(block.inputs[stream][keep])
        after.append(block.outputs[stream][keep])
    return torch.cat(before).double(), torch.cat(after).double()


def test_numbers_are_those_of_the_states(tmp_path: Path) -> None:
    transformer, calls = tiny_qwen(3), qwen_calls()
    analysis = run(transformer, calls, tmp_path)
    found = analysis.stacks[0]
    matrices, _ = read_tensors(tmp_path / "analysis.safetensors")
    assert load_artifact(Analysis, tmp_path / "analysis.json") == analysis
    assert analysis.num_states == 5 * 4
    layers = [name for name in matrices if name.startswith("transformer_blocks/") and "." not in name.split("/", 1)[1]]
    assert len(layers) == 3 * 2 * 2
    for index in range(3):
        cosines = []
        for stream in ("image", "text"):
            x, y = rows_of(transformer, calls["held-out"], index, stream)
            weight, bias = (matrices[f"{DUAL}/{index}/{stream}/{part}"].double() for part in ("weight", "bias"))
            change = y - x
            error = (x @ weight + bias - change).norm() / (change - change.mean(0)).norm()
            assert found.probe_error[stream][index] == pytest.approx(error.item(), rel=1e-4)
            assert found.ridge[stream][index] in RIDGES
            cosines.append(nn.functional.cosine_similarity(x, y))
        assert found.influence[index] == pytest.approx(1 - torch.cat(cosines).mean().item(), abs=1e-5)
    assert found.text_linearity["output"] == found.probe_error["text"]
    assert found.text_linearity["input"][0] is None
    assert all(isinstance(value, float) for value in found.text_linearity["input"][1:])
    assert set(found.ffn_linearity) == {"image", "text"}
    assert list(found.intervals) == detect_intervals(found.cka, 1, 1)  # of three blocks the ends are protected


def test_cka_is_that_of_all_held_out_tokens_when_all_are_kept(tmp_path: Path) -> None:
    transformer, calls = tiny_qwen(3), qwen_calls()
    analysis = run(transformer, calls, tmp_path, cka_tokens=10_000)
    matrices, _ = read_tensors(tmp_path / "analysis.safetensors")
    tables = {}
    for stream in ("image", "text"):
        states = [rows_of(transformer, calls["held-out"], 0, stream)[0]]
        states += [rows_of(transformer, calls["held-out"], index, stream)[1] for index in range(3)]
        names = [f"{DUAL}/{i}/{stream}" for i in range(3)]
        probes = [(matrices[f"{name}/weight"].double(), matrices[f"{name}/bias"].double()) for name in names]
        tables[stream] = chained_cka(torch.stack(states), probes)
    image, text = analysis.num_tokens["image"], analysis.num_tokens["text"]
    for u in range(3):
        for k in range(u, 3):
            for stream, table in tables.items():
                assert analysis.stacks[0].cka_by_stream[stream][u][k] == pytest.approx(table[u][k], abs=1e-5)
            share = (image * tables["image"][u][k] + text * tables["text"][u][k]) / (image + text)
            assert analysis.stacks[0].cka[u][k] == pytest.approx(share, abs=1e-5)


@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 1), (2, 1), (3, 3)])
def test_intervals_are_found_among_blocks_that_may_go(first: int, last: int, tmp_path: Path) -> None:
    """Nothing is clipped afterwards: detection starts at the first unprotected block."""
    calls = {"train": [qwen_call(8, seed=s) for s in (0, 10)], "held-out": [qwen_call(8, seed=30)]}
    plan = PlanConfig(protect_first=first, protect_last=last)
    found = run(tiny_qwen(6), calls, tmp_path, plan, cka_tokens=10_000).stacks[0]
    assert list(found.intervals) == detect_intervals(found.cka, first, 5 - last)
    assert len(found.interval_stability) == len(found.intervals)
    assert found.interval_draws == DRAWS
    for share in found.interval_stability:
        assert 0 <= share.same <= min(share.first, share.last) <= 1
    if found.intervals:
        assert found.interval_stability[0].first == 1  # all draws start where this one does


def test_draws_are_half_of_the_prompts(tmp_path: Path) -> None:
    """A table of a draw is that of its prompts' tokens alone; with tokens of too few there are no draws."""
    states = [noise(40, 6, seed=level) for level in range(3)]
    probes = [(0.2 * noise(6, 6, seed=i), noise(6, seed=10 + i)) for i in range(2)]
    whole, drawn = drawn_ckas({"image": (states, [5] * 8)}, {"image": probes}, torch.Generator().manual_seed(3))
    assert whole["image"][0][1] == pytest.approx(chained_cka(states, probes)[0][1], abs=1e-6)
    halves = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(3))]) < 4
    own = halves[0].repeat_interleave(5)
    assert drawn[0]["image"][0][1] == pytest.approx(chained_cka([s[own] for s in states], probes)[0][1], abs=1e-5)
    assert len(drawn) == DRAWS
    assert drawn_ckas({"text": (states, [40, *[0] * 7])}, {"text": probes}, torch.Generator())[1] == []


def test_ffn_of_a_linear_network_is_linear(tmp_path: Path) -> None:
    """Replace one FFN by a linear layer: its linearity error vanishes, the others' do not."""
    transformer = tiny_qwen(2)
    transformer.transformer_blocks[1].img_mlp = nn.Linear(32, 32)
    found = run(transformer, qwen_calls(batch=12), tmp_path, ridges=(1e-12, 1e-4)).stacks[0]
    assert found.ffn_linearity["image"][1] < 1e-4
    assert found.ffn_linearity["image"][0] > 1e-3


def test_two_stacks(tmp_path: Path) -> None:
    transformer = tiny_flux(dual=2, single=3)
    calls = {"train": [flux_call(7), flux_call(7, seed=5)], "held-out": [flux_call(4, seed=9)]}
    analysis = run(transformer, calls, tmp_path)
    assert [(stack.name, len(stack.influence)) for stack in analysis.stacks] == [(DUAL, 2), (SINGLE, 3)]
    assert analysis.num_tokens == {"image": 14 * 6, "text": 14 * 5}  # once, though they pass two stacks
    assert analysis.stacks[1].text_linearity == {}


def test_too_few_tokens_for_cka(tmp_path: Path) -> None:
    calls = {"train": [qwen_call(4)], "held-out": [qwen_call(1, text=3)]}
    with pytest.raises(UserError, match=r"at least 4 held-out tokens of the text stream, got 3; raise capture"):
        run(tiny_qwen(2), calls, tmp_path)


class Watch:
    """The most numbers that a consumer holds while its block is there."""

    def __init__(self, consumer: Any) -> None:
        self.consumer, self.most = consumer, 0

    def begin(self, stack: StackSpec, index: int, block: nn.Module) -> Sequence[str] | None:
        assert tensors_in(self.consumer) == 0
        return None if self.consumer.begin(stack, index, block) is None else ()

    def see(self, seen: Seen) -> None:
        self.consumer.see(seen)
        self.most = max(self.most, tensors_in(self.consumer))

    def finish(self) -> None:
        self.consumer.finish()
        assert tensors_in(self.consumer) == 0


def tensors_in(value: Any) -> int:
    """Numbers in all tensors of a consumer, its settings aside."""
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, States | nn.Module | type):
        return 0
    if isinstance(value, dict):
        return sum(map(tensors_in, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(tensors_in, value))
    return tensors_in(vars(value)) if isinstance(value, BlockSums | KeptTokens | Kept | Totals | Moments) else 0


@pytest.mark.parametrize("tokens", [16, 20])
def test_memory_grows_neither_with_the_states_nor_with_the_blocks(tokens: int, tmp_path: Path) -> None:
    """A consumer holds what it needs of one block, and nothing between two."""
    call, most = qwen_call(12, padded=True), []
    for number, blocks in ((1, 2), (5, 4)):
        folder, calls = tmp_path / str(number), {"held-out": [call] * number}
        write_states(folder / "calibration", "held-out", calls["held-out"])
        states = States(folder / "calibration", "held-out")
        sums = Watch(BlockSums({"held-out": len(states)}, 0, lambda *_: None))
        kept = Watch(KeptTokens(states, tokens, 0, Findings(folder)))
        swept(tiny_qwen(blocks), calls, folder, [sums, kept])
        assert 0 < kept.most <= tokens * 32 * 2 * 2  # features, before and after, streams
        most.append(sums.most)
    assert most[0] == most[1]


class Killed(Exception):
    pass


@pytest.mark.parametrize("index", [2, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_analysis_goes_on_at_its_block_with_the_same_bits(
    index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppcl.analysis.analyze, "StateStore", partial(StateStore, memory=0))
    whole, again = tmp_path / "whole", tmp_path / "again"
    expected = run(tiny_qwen(4), qwen_calls(), whole)
    solve, solved = ppcl.analysis.analyze.solve_block, []

    def killed(place: Place, *rest: Any, **named: Any) -> None:
        if place[1] == index:
            raise Killed
        solve(place, *rest, **named)

    def counted(place: Place, *rest: Any, **named: Any) -> None:
        solved.append(place[1])
        solve(place, *rest, **named)

    monkeypatch.setattr(ppcl.analysis.analyze, "solve_block", killed)
    with pytest.raises(Killed):
        run(tiny_qwen(4), qwen_calls(), again, fingerprint="same")
    assert (again / SWEEP).is_dir()
    monkeypatch.setattr(ppcl.analysis.analyze, "solve_block", counted)
    found = run(tiny_qwen(4), qwen_calls(), again, fingerprint="same")
    assert solved == list(range(index, 4))
    assert dataclasses.replace(found, seconds=0) == dataclasses.replace(expected, seconds=0)
    first, second = ((folder / "analysis.safetensors").read_bytes() for folder in (whole, again))
    assert first == second
    assert not (again / SWEEP).exists()


def test_hooks_are_removed_even_after_an_error(tmp_path: Path) -> None:
    transformer = tiny_qwen(2)

    def fail(*_: Any) -> None:
        raise Killed

    handle = transformer.transformer_blocks[1].img_mlp.register_forward_pre_hook(fail)
    with pytest.raises(Killed):
        run(transformer, qwen_calls(), tmp_path)
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in transformer.modules())
