"""Samples that are samples: every timestep, branch, text length and prompt has its share, in limits and in batches."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CAPTURE, DUAL, padded_batch, qwen_call, random_substitutes, shared_pipeline, tiny_qwen
from tiny_models import write_states as write_plain

from ppcl.capture.spread import Mark, allot, choose_rows, choose_states
from ppcl.capture.states import States
from ppcl.capture.trajectories import capture, write_calls
from ppcl.common.tensor_files import read_tensors, write_tensors
from ppcl.config import CaptureConfig
from ppcl.distill.local import local_backward
from ppcl.experiments.ablation import state_cka
from ppcl.teacher.call_arguments import batch_size, timesteps
from ppcl.teacher.calls import Call
from ppcl.teacher.families import adapter_for
from ppcl.training.distributed import Group, add_up

TEXTS, CALLS, EACH = 64, 24, 4


@pytest.fixture(scope="module")
def lengths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One prompt a file, each of its own text length, 4 of 24 calls of each: 12 timesteps, two branches."""
    folder = tmp_path_factory.mktemp("lengths")
    for number in range(TEXTS):
        generator = torch.Generator().manual_seed(number)
        calls = []
        picked = choose_rows(CALLS, EACH, 1, generator)
        for index in picked:
            arguments = {
                "hidden_states": torch.tensor([[[float(number), float(index % 2)]]]),
                "encoder_hidden_states": torch.zeros(1, 5 + number, 1),
                "encoder_hidden_states_mask": None,
                "timestep": torch.tensor([1 - index // 2 / 12]),
            }
            calls.append(Call(arguments, torch.zeros(1, 1)))
        about = {"prompts": [f"prompt {number}"], "of": CALLS, "branches": [index % 2 for index in picked]}
        write_calls(folder / f"train-{number:04d}.safetensors", calls, **about)
    return folder


Told = Callable[[dict[str, Any]], Sequence[Hashable]]
KINDS: dict[str, Told] = {
    "timestep": timesteps,
    "branch": lambda arguments: arguments["hidden_states"][:, 0, 1].tolist(),
    "length": lambda arguments: [arguments["encoder_hidden_states"].shape[1]] * batch_size(arguments),
    "prompt": lambda arguments: arguments["hidden_states"][:, 0, 0].tolist(),
}


def counted(states: States, limit: int | None = None) -> dict[str, Counter[Hashable]]:
    found: dict[str, Counter[Hashable]] = {name: Counter() for name in KINDS}
    for arguments in states.batches(24, limit):
        for name, told in KINDS.items():
            found[name].update(told(arguments))
    return found


@pytest.mark.parametrize("limit", [4, 8, 48, 64, 100])
def test_a_limit_is_spread_over_timesteps_branches_lengths_and_prompts(lengths: Path, limit: int) -> None:
    states = States(lengths, "train")
    everything, found = counted(states), counted(states, limit)
    assert len(states.groups) == TEXTS and {len(group) for group in states.groups} == {EACH}
    for name, counts in found.items():
        assert counts.total() == limit
        for value, of_all in everything[name].items():
            assert abs(counts[value] - limit * of_all / len(states)) <= 1, (name, value)
        # few states lie apart, and are not the first of each kind
        values: list[Any] = sorted(everything[name])
        places = [values.index(value) / len(values) for value in counts.elements()]
        if name != "branch":
            assert len(counts) == min(limit, len(values))
            assert min(places) < 0.26 and max(places) >= 0.74, name
            assert 0.4 < sum(places) / len(places) < 0.6 or name == "prompt"
    assert counted(States(lengths, "train"), limit) == found


@pytest.mark.parametrize("limit", [4, 8])
def test_a_limit_of_a_real_capture_of_texts_of_two_lengths(
    tmp_path: Path, limit: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Qwen's own pipeline: batches of two prompts, so that the shorter ones are padded, some not, and one is empty."""
    prompts = ["red cat", "a very old blue house by the sea", "boat", "tiny tiny cat", "old boat", "house", "blue cat"]
    settings = CaptureConfig(**{**CAPTURE, "batch_size": 2, "num_inference_steps": 4, "states_per_prompt": 4})
    capture(shared_pipeline(), prompts, tmp_path, settings, seed=0)
    states = States(tmp_path, "train")
    assert len(states.groups) > 2
    rows = states.spread(limit)
    assert rows == States(tmp_path, "train").spread(limit)
    assert len(rows) == limit == sum(map(batch_size, states.batches(limit, limit)))
    for name in ("timestep", "branch", "shape", "prompt"):
        everything = Counter(getattr(mark, name) for mark in states.marks.values())
        counts = Counter(getattr(states.marks[row], name) for row in rows)
        for value, of_all in everything.items():
            assert abs(counts[value] - limit * of_all / len(states)) <= 1, (name, value)
    said = [line for line in capsys.readouterr().err.splitlines() if "wanted" in line]
    assert len(said) == 2  # once for each set
    assert said[0].startswith(f"train: {limit} states wanted, {limit} of {len(states)} taken: ")
    assert f"{min(limit, 4)} timesteps, 2 branches" in said[0]


def test_branches_follow_from_the_order_of_calls_where_they_were_not_recorded(tmp_path: Path) -> None:
    settings = CaptureConfig(**{**CAPTURE, "num_inference_steps": 4, "states_per_prompt": 2, "batch_size": 8})
    capture(shared_pipeline(), ["red cat", "boat", "old boat", "house", "blue cat", "cat"], tmp_path, settings, seed=0)
    recorded = States(tmp_path, "train")
    assert {mark.branch for mark in recorded.marks.values()} == {(0, 0), (1, 0)}
    for path in tmp_path.glob("*.safetensors"):
        tensors, meta = read_tensors(path)
        write_tensors(path, tensors, {name: value for name, value in (meta or {}).items() if name != "branches"})
    assert States(tmp_path, "train").marks == recorded.marks


def test_choosing_is_a_function_of_the_marks() -> None:
    marks = [Mark(float(i % 5), i % 2, i % 3, i % 3, str(i)) for i in range(30)]
    assert choose_states(marks, 30) == choose_states(marks, 99) == list(range(30))
    for count in (1, 7, 29):
        chosen = choose_states(marks, count)
        assert chosen == sorted(set(chosen)) == choose_states(marks, count)
        assert len(chosen) == count


def test_places_are_shared_out_in_proportion() -> None:
    sizes, total = [7, 1, 0, 12], Counter[int]()
    for seed in range(400):
        places = allot(sizes, 5, torch.Generator().manual_seed(seed))
        assert sum(places) == 5
        for number, (size, count) in enumerate(zip(sizes, places, strict=True)):
            assert int(5 * size / 20) <= count <= -(-5 * size // 20)
            total[number] += count
    assert [total[i] / 400 for i in range(4)] == pytest.approx([1.75, 0.25, 0, 3], abs=0.08)


def test_batches_keep_their_size_with_texts_of_many_lengths(lengths: Path) -> None:
    states = States(lengths, "train")
    for step in range(5):
        generators = [torch.Generator().manual_seed(step) for _ in range(3)]
        pieces = list(states.parts(24, generators[0]))
        assert sum(len(call.velocity) for call, _ in pieces) == 24
        assert sum(share.samples for _, share in pieces) == pytest.approx(1)
        ranks = [list(states.parts(24, g, Group(rank, 2), 3)) for rank, g in zip((0, 1), generators[1:], strict=True)]
        assert len(ranks[0]) == len(ranks[1])
        rows = [row for own in ranks for call, share in own for row in call.rows if share.samples]
        assert rows == [row for call, _ in pieces for row in call.rows]
    assert len(states.draw(1000, generators[0])) == len(states)


def test_batches_of_one_shape_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """They drew a shape first, then states of it."""
    write_plain(tmp_path, "train", [qwen_call(7, seed=s) for s in (0, 10)])
    states = States(tmp_path, "train")
    (group,) = states.groups
    for seed in range(20):
        now, then = (torch.Generator().manual_seed(seed) for _ in range(2))
        torch.multinomial(torch.tensor([float(len(group))]), 1, generator=then)
        picks = torch.randint(len(group), (5,), generator=then).tolist()
        assert states.draw(5, now) == [group[i] for i in sorted(picks)]
        assert torch.equal(now.get_state(), then.get_state())


@pytest.mark.parametrize(("size", "processes", "accumulate"), [(12, 1, 1), (12, 1, 4), (11, 2, 1), (11, 2, 2)])
def test_pieces_make_up_the_padded_batch(tmp_path: Path, size: int, processes: int, accumulate: int) -> None:
    """Texts with and without padding, of three lengths: losses and gradients are those of one padded batch."""
    teacher = tiny_qwen(4)
    adapter, runs = adapter_for(teacher), [(DUAL, 0, 1), (DUAL, 2, 3)]
    calls = [qwen_call(4, 5, 0, padded=True), qwen_call(5, 7, 20), qwen_call(3, 9, 40, padded=True)]
    write_plain(tmp_path, "train", calls, teacher)
    states = States(tmp_path, "train")
    generator = torch.Generator().manual_seed(1)
    rows = states.draw(size, generator)
    assert len(rows) == size and len({states.marks[row].shape for row in rows}) == 3

    def substitutes() -> dict[Any, torch.nn.Module]:
        return {run: b.requires_grad_(True) for run, b in random_substitutes(teacher, adapter, runs).items()}

    whole, pieces = substitutes(), substitutes()
    alone = [call.arguments for call, _ in states.weighed(rows, size)]
    expected = local_backward(teacher, adapter, padded_batch(alone), whole)
    parts = [p for rank in range(processes) for p in states.share_out(rows, Group(rank, processes), accumulate)]
    found = add_up(local_backward(teacher, adapter, call.arguments, pieces, share=share) for call, share in parts)
    assert found == pytest.approx(expected, rel=1e-5)
    for run in runs:
        for one, other in zip(whole[run].parameters(), pieces[run].parameters(), strict=True):
            if one.grad is not None and other.grad is not None:
                assert torch.allclose(one.grad, other.grad, 1e-4, 1e-6)


@pytest.mark.parametrize("text_mask", ["", "encoder_hidden_states_mask"])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_the_largest_piece_is_the_largest_that_is_drawn(tmp_path: Path, parts: int, text_mask: str) -> None:
    calls = [qwen_call(13, 5, 0), qwen_call(4, 9, 20, padded=True), qwen_call(1, 40, 40)]
    write_plain(tmp_path, "train", calls)
    states = States(tmp_path, "train", text_mask)
    assert states.pieces(10) == (2 if text_mask else 3)
    room = [
        sum(value.numel() for value in call.arguments.values() if isinstance(value, torch.Tensor))
        for seed in range(60)
        for call, _ in states.parts(10, torch.Generator().manual_seed(seed), accumulate=parts)
    ]
    largest = states.largest(10, parts)
    assert max(room) == sum(value.numel() for value in largest.values() if isinstance(value, torch.Tensor))
    assert batch_size(states.alike(30)) == 30
    assert states.alike(30)["encoder_hidden_states"].shape[1] == 5


def test_plain_cka_leaves_padding_out_and_takes_all_lengths() -> None:
    teacher = tiny_qwen(3)
    adapter = adapter_for(teacher)
    calls = [qwen_call(3, 6, padded=True), qwen_call(4, 4, seed=30)]
    other = copy.deepcopy(calls)
    hidden = ~other[0]["encoder_hidden_states_mask"]
    other[0]["encoder_hidden_states"][hidden] = 5.0
    tables = [state_cka(teacher, adapter, batches)[DUAL] for batches in (calls, other, calls[:1])]
    assert tables[0] != tables[2]
    for row, same in zip(tables[0], tables[1], strict=True):
        assert row == pytest.approx(same, abs=1e-4)
