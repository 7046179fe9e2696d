"""Sweeps: equal sums, whatever the batches, the processes, the place of the states, and how often it was killed."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import flux_call, qwen_call, tiny_flux, tiny_qwen, write_states
from torch import Tensor, nn

from ppcl.analysis.backward import backward_sweep, random_signs
from ppcl.analysis.moments import Moments
from ppcl.analysis.sums import BlockSums, Totals, sampled_tokens
from ppcl.analysis.sweep import Batch, Course, Seen, batches_of, forward_sweep, velocities
from ppcl.capture.states import States
from ppcl.capture.store import StateStore
from ppcl.teacher.blocks import Place, ResidentBlocks
from ppcl.teacher.calls import Call, velocity
from ppcl.teacher.families import ADAPTERS, Adapter, StackSpec, adapter_for
from ppcl.teacher.families.masks import valid_rows, valid_tokens
from ppcl.teacher.trace import BlockCall, run_traced
from ppcl.training.distributed import SINGLE, Group

ALL_MEMORY, ALL_DISK = 1e12, 0
Recorded = dict[str, States]
Found = dict[tuple[Place, str, str], Moments]


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    """Qwen-Image states of two text lengths, padded."""
    calls = {
        "train": [qwen_call(4, text=n, seed=seed, padded=True) for n, seed in ((5, 0), (5, 10), (7, 20))],
        "held-out": [qwen_call(4, text=5, seed=seed, padded=True) for seed in (30, 40)],
    }
    return {split: _states(tmp_path / "calibration", split, found) for split, found in calls.items()}


def _states(folder: Path, split: str, calls: list[dict[str, Any]]) -> States:
    write_states(folder, split, calls)
    return States(folder, split)


def probe_sums(
    transformer: nn.Module,
    recorded: Recorded,
    folder: Path,
    size: int = 3,
    rows: int = 0,
    memory: float = ALL_MEMORY,
    group: Group = SINGLE,
    extra: Sequence[Any] = (),
    found: Found | None = None,
) -> tuple[Found, dict[int, Tensor]]:
    """The sums of every block, and the velocity of every batch."""
    found = {} if found is None else found

    def solve(place: Place, totals: Totals) -> None:
        found.update({(place, *key): moments for key, moments in totals.moments.items()})

    store = StateStore(folder, "sums", memory, group)
    course = Course(ResidentBlocks(transformer), batches_of(recorded, size), store, group)
    forward_sweep(course, [BlockSums({k: len(s) for k, s in recorded.items()}, rows, solve, group), *extra])
    answers = {batch.number: answer for batch, answer in velocities(course)}
    store.close()
    assert not folder.exists()
    return found, answers


def distance(one: Found, other: Found) -> float:
    """The largest difference, relative to the largest number; 0 is bitwise."""
    assert one.keys() == other.keys()
    worst = 0.0
    for key, a in one.items():
        b = other[key]
        assert a.count == b.count
        for x, y in ((a.sum_x, b.sum_x), (a.sum_y, b.sum_y), (a.xx, b.xx), (a.xy, b.xy), (a.yy, b.yy)):
            first, second = torch.as_tensor(x), torch.as_tensor(y)
            worst = max(worst, float((first - second).abs().max() / second.abs().max().clamp_min(1e-30)))
    return worst


@pytest.mark.parametrize("rows", [0, 1])
def test_the_sums_are_those_of_one_pass_with_all_blocks_at_once(rows: int, recorded: Recorded, tmp_path: Path) -> None:
    transformer = tiny_qwen(3)
    found, _ = probe_sums(transformer, recorded, tmp_path / "sweep", rows=rows)
    expected: Found = {}
    for split, states in recorded.items():
        first = 0
        for arguments in states.batches(3):
            run_traced(transformer, adapter_for(transformer), arguments, partial(add, expected, split, first, rows))
            first += len(arguments["timestep"])
    probes = {key: moments for key, moments in found.items() if key[2] in ("image", "text")}
    assert len(probes) == 3 * 2 * 2
    assert distance(probes, expected) == 0
    assert len(found) == 3 * 2 * 4 + 2 * 2  # networks, and the text inputs of neighbouring blocks


def add(expected: Found, split: str, first: int, rows: int, call: BlockCall) -> None:
    """Add a block's call to the sums of all blocks at once."""
    masks = valid_tokens(call.stack, call.arguments)
    for stream, before in call.inputs.items():
        chosen = sampled_tokens(before, masks.get(stream), first, {"train": 12, "held-out": 8}[split], rows)
        x, y = valid_rows(before, chosen), valid_rows(call.outputs[stream], chosen)
        key = ((call.stack.name, call.index), split, stream)
        expected.setdefault(key, Moments(x.shape[-1], y.shape[-1], x.device)).update(x, y - x)


class Layers:
    """Wants a layer of the second block."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def begin(self, stack: StackSpec, index: int, block: nn.Module) -> Sequence[str] | None:
        return ["img_mlp"] if index == 1 else None

    def see(self, seen: Seen) -> None:
        self.seen.append(seen)

    def finish(self) -> None:
        pass


def test_consumers_see_the_layers_that_they_ask_for(recorded: Recorded, tmp_path: Path) -> None:
    transformer, layers = tiny_qwen(3), Layers()
    batches = batches_of(recorded, 4)
    forward_sweep(Course(ResidentBlocks(transformer), batches, StateStore(tmp_path / "sweep", "test")), [layers])
    assert [seen.batch.number for seen in layers.seen] == [batch.number for batch in batches]
    network = transformer.transformer_blocks[1].img_mlp
    assert not network._forward_hooks
    for seen in layers.seen:
        assert seen.call.index == 1
        (call,) = seen.layers["img_mlp"]
        with torch.no_grad():
            assert torch.equal(network(call.input), call.output)


def test_two_stacks_on_disk(tmp_path: Path) -> None:
    transformer = tiny_flux(2, 3)
    recorded = {"train": _states(tmp_path / "calibration", "train", [flux_call(4), flux_call(3, seed=5)])}
    found, answers = probe_sums(transformer, recorded, tmp_path / "sweep", memory=ALL_DISK)
    assert {place for place, _, _ in found} == {("transformer_blocks", i) for i in range(2)} | {
        ("single_transformer_blocks", i) for i in range(3)
    }
    for batch in batches_of(recorded, 3):
        with torch.no_grad():
            assert torch.equal(answers[batch.number], velocity(transformer, batch.load().arguments))


def test_neither_batches_nor_the_place_of_the_states_matter(recorded: Recorded, tmp_path: Path) -> None:
    transformer = tiny_qwen(3)
    by_one, _ = probe_sums(transformer, recorded, tmp_path / "sweep", size=1, rows=1)
    by_four, answers = probe_sums(transformer, recorded, tmp_path / "sweep", size=4, rows=1)
    assert distance(by_one, by_four) < 1e-5
    some = 3 * 4 * 11 * 32 * 4  # bytes: the store is full in the middle of a level
    for memory in (ALL_DISK, some):
        again, same_answers = probe_sums(transformer, recorded, tmp_path / "sweep", 4, 1, memory)
        assert distance(again, by_four) == 0
        assert all(torch.equal(answers[n], same_answers[n]) for n in answers)


class Threads(Group):
    """Processes that are threads."""

    def __init__(self, rank: int, shared: dict[str, Any]) -> None:
        super().__init__(rank, 2)
        self.shared = shared

    def barrier(self) -> None:
        self.shared["barrier"].wait(60)

    def gather(self, value: Any) -> list[Any]:
        self.shared[f"slot {self.rank}"] = value
        self.barrier()
        values = [self.shared[f"slot {rank}"] for rank in range(2)]
        self.barrier()
        return values

    def any(self, here: bool) -> bool:
        return any(self.gather(here))

    def sum_scalars(self, row: Mapping[str, float]) -> dict[str, float]:
        first, second = self.gather(dict(row))
        return {name: first[name] + second[name] for name in row}

    def sum_tensors(self, tensors: Any) -> None:
        tensors = list(tensors)
        first, second = self.gather([tensor.clone() for tensor in tensors])
        for tensor, a, b in zip(tensors, first, second, strict=True):
            tensor.copy_(a + b)


@pytest.mark.parametrize("memory", [ALL_MEMORY, ALL_DISK])
def test_processes_share_the_states(memory: float, recorded: Recorded, tmp_path: Path) -> None:
    alone, answers = probe_sums(tiny_qwen(3), recorded, tmp_path / "alone", rows=1)
    shared: dict[str, Any] = {"barrier": threading.Barrier(2)}
    results: dict[int, Any] = {}
    transformers = [tiny_qwen(3), tiny_qwen(3)]

    def work(rank: int) -> None:
        group = Threads(rank, shared)
        results[rank] = probe_sums(transformers[rank], recorded, tmp_path / "shared", 3, 1, memory, group)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(2):
        assert distance(results[rank][0], alone) < 1e-10
    both = results[0][1] | results[1][1]
    assert both.keys() == answers.keys()
    assert all(torch.equal(both[number], answers[number]) for number in answers)


class Killed(Exception):
    pass


class Killer:
    """Ends a sweep at a block, at its second batch or when it is finished; counts the blocks that come."""

    def __init__(self, index: int, when: str) -> None:
        self.index, self.when = index, when
        self.blocks: list[int] = []
        self.batches = 0

    def begin(self, stack: StackSpec, index: int, block: nn.Module) -> Sequence[str] | None:
        self.blocks.append(index)
        self.batches = 0
        return None if index != self.index else ()

    def see(self, seen: Seen) -> None:
        self.batches += 1
        if self.when == "see" and self.batches == 2:
            raise Killed

    def finish(self) -> None:
        if self.when == "finish":
            raise Killed


@pytest.mark.parametrize(("index", "when"), [(0, "see"), (2, "see"), (2, "finish"), (3, "see")])
def test_a_killed_sweep_goes_on_at_its_block(index: int, when: str, recorded: Recorded, tmp_path: Path) -> None:
    transformer = tiny_qwen(4)
    expected, answers = probe_sums(transformer, recorded, tmp_path / "whole")
    found: Found = {}
    with pytest.raises(Killed):
        probe_sums(transformer, recorded, tmp_path / "sweep", memory=ALL_DISK, extra=[Killer(index, when)], found=found)
    again = Killer(-1, "")
    _, resumed = probe_sums(transformer, recorded, tmp_path / "sweep", memory=ALL_DISK, extra=[again], found=found)
    assert again.blocks == list(range(index, 4))
    assert distance(found, expected) == 0
    assert all(torch.equal(resumed[number], answers[number]) for number in answers)


def test_another_sweep_begins_anew(recorded: Recorded, tmp_path: Path) -> None:
    transformer, folder = tiny_qwen(3), tmp_path / "sweep"
    with pytest.raises(Killed):
        probe_sums(transformer, recorded, folder, memory=ALL_DISK, extra=[Killer(2, "see")])
    other = StateStore(folder, "something else", ALL_DISK)
    assert other.resume(range(3)) is None
    assert not folder.exists()


def test_levels_stay_as_long_as_somebody_holds_them(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "store", "test", ALL_DISK)
    store.hold(1)
    store.hold(1)
    for level in range(5):
        if level == 4:
            store.release(1)
        store.write(level, 0, {"image": torch.full((2,), float(level))})
        folders = {path.name for path in (tmp_path / "store").iterdir() if path.is_dir()}
        assert folders == {f"level-{n}" for n in {level, max(0, level - 1), *([1] if level else [])}}
        store.commit(level)
    store.release(1)
    store.write(5, 0, {"image": torch.zeros(2)})
    store.commit(5)
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"level-5", "level.json"}


def test_a_level_that_was_not_held_in_time_is_made_again(tmp_path: Path) -> None:
    for held, expected in (((), 2), ((1,), None)):
        store = StateStore(tmp_path / "store", "test", ALL_DISK)
        for level in range(3):
            store.write(level, 0, {"image": torch.zeros(2)})
            store.commit(level)
        again = StateStore(tmp_path / "store", "test", ALL_DISK)
        for level in held:
            again.hold(level)
        assert again.resume([0]) == expected
        assert again.resume([0, 1]) is None  # a batch that nobody wrote
        assert not (tmp_path / "store").exists()


def backward(transformer: nn.Module, calls: list[Batch], folder: Path, consumers: Sequence[Any] = ()) -> dict[int, Any]:
    """The gradients at what enters the first block, by batch."""
    course = Course(ResidentBlocks(transformer), calls, StateStore(folder / "states", "test", ALL_DISK))
    for level in range(len(course.source.order)):
        course.store.hold(level)
    forward_sweep(course, [])
    store = StateStore(folder / "gradients", "test", ALL_DISK)
    backward_sweep(course, store, consumers, vectors=2, seed=1)
    return {batch.number: store.read(-1, batch.number, torch.device("cpu")) for batch in calls}


def test_gradients_of_a_killed_sweep_and_of_other_batches_are_the_same(tmp_path: Path) -> None:
    transformer = tiny_flux(2, 2)
    recorded = {"held-out": _states(tmp_path / "calibration", "held-out", [flux_call(4)])}
    whole = backward(transformer, batches_of(recorded, 4), tmp_path / "whole")
    with pytest.raises(Killed):
        backward(transformer, batches_of(recorded, 2), tmp_path / "parts", [Killer(1, "see")])
    again = Killer(-1, "")
    parts = backward(transformer, batches_of(recorded, 2), tmp_path / "parts", [again])
    assert again.blocks == [1, 0, 1, 0]  # it was killed at the very first, the last block of the second stack
    for stream in ("image", "text"):
        joined = torch.cat([parts[number][stream] for number in parts], 1)
        torch.testing.assert_close(joined, whole[0][stream], rtol=1e-5, atol=1e-6)


def test_signs_belong_to_states() -> None:
    answer = torch.zeros(4, 6, 4)
    whole = random_signs(Batch(0, "train", 10, lambda: Call({}, answer)), answer, 3, seed=2)
    part = random_signs(Batch(1, "train", 12, lambda: Call({}, answer)), answer[2:], 3, seed=2)
    assert torch.equal(whole[:, 2:], part)
    assert set(whole.unique().tolist()) == {-1, 1}
    assert not torch.equal(whole[0], whole[1])


def test_a_block_with_arguments_of_its_own_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chroma gives every block other rows of its modulation."""
    from diffusers import ChromaTransformer2DModel

    streams = {"image": "hidden_states", "text": "encoder_hidden_states"}
    stacks = (
        StackSpec("transformer_blocks", "num_layers", streams, ("text", "image")),
        StackSpec("single_transformer_blocks", "num_single_layers", {"image": "hidden_states"}, ("image",)),
    )
    monkeypatch.setitem(ADAPTERS, "ChromaTransformer2DModel", Adapter(("ChromaTransformer2DModel",), stacks))
    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6), approximator_num_channels=16, approximator_hidden_dim=16,
        approximator_layers=1,
    ).eval().requires_grad_(False)  # fmt: skip
    call = flux_call(2)
    del call["pooled_projections"]
    with torch.no_grad():
        answer = velocity(transformer, call)
    for arguments in (1e9, 0):  # kept, or asked for again at every block
        batch = Batch(0, "train", 0, lambda: Call(call, answer))
        course = Course(ResidentBlocks(transformer), [batch], StateStore(tmp_path, "test"), arguments=arguments)
        forward_sweep(course, [])
        assert torch.equal(next(velocities(course))[1], answer)


@pytest.mark.parametrize("memory", [ALL_MEMORY, ALL_DISK])
def test_states_of_several_batches_are_read_together(memory: float, recorded: Recorded, tmp_path: Path) -> None:
    course = Course(ResidentBlocks(tiny_qwen(2)), batches_of(recorded, 3), StateStore(tmp_path / "s", "x", memory))
    forward_sweep(course, [])
    places = [(0, 2), (0, 0), (1, 1)]
    rows = course.rows(1, places)
    whole = {number: course.read(1, course.batches[number]) for number in (0, 1)}
    for stream, states in rows.items():
        assert len(states) == len(places)
        for (number, row), state in zip(places, states, strict=True):
            expected = whole[number][stream][row]
            assert torch.equal(state[: len(expected)], expected)
            assert not state[len(expected) :].any()
