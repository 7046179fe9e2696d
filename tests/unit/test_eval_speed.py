"""Latency, memory and sizes."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from ppcl.config import EvaluateConfig
from ppcl.eval.costs import costs
from ppcl.eval.speed import measure_memory, measure_pair, summarize, weight_bytes
from ppcl.inspection.stage_costs import timed_work


def test_summary_of_times() -> None:
    found = summarize([float(value) for value in range(1, 12)])  # 1 .. 11
    assert (found.p10_ms, found.median_ms, found.p90_ms) == (2, 6, 10)
    assert summarize([4.0]).p90_ms == 4.0


def test_pair_alternates_and_keeps_the_times_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = [0.0]
    monkeypatch.setattr("ppcl.eval.speed.time.perf_counter", lambda: clock[0])

    def a() -> None:
        order.append("a")
        clock[0] += 0.002

    def b() -> None:
        order.append("b")
        clock[0] += 0.001

    first, second = measure_pair(a, b, runs=4, warmup=1)
    assert "".join(order) == "ab" + "abba" * 2
    assert [first.median_ms, second.median_ms] == pytest.approx([2, 1])
    with pytest.raises(ValueError, match="runs"):
        measure_pair(a, b, runs=0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the resident set is read from /proc")
def test_memory_of_a_call_does_not_depend_on_the_one_before() -> None:
    def fill(megabytes: int) -> None:
        torch.ones(megabytes, 1024, 1024, dtype=torch.uint8)

    fill(1)
    found = [measure_memory(lambda size=size: fill(size)) for size in (96, 48)]  # type: ignore[misc]
    assert {memory.measure for memory in found} == {"resident"}
    if any(memory.growth_bytes is None for memory in found):
        pytest.skip("this kernel does not reset the high-water mark")
    megabytes = [(memory.growth_bytes or 0) / 2**20 for memory in found]
    assert megabytes == [pytest.approx(96, abs=6), pytest.approx(48, abs=6)]


def test_memory_without_proc_is_unknown_but_the_call_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path, *_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "write_text", missing)
    calls: list[int] = []
    assert measure_memory(lambda: calls.append(1)).growth_bytes is None
    assert calls == [1]


def test_counts() -> None:
    norm = nn.BatchNorm1d(2)  # 4 parameters, buffers of 2 + 2 floats and one int64
    assert weight_bytes(norm) == 4 * 8 + 8
    assert weight_bytes(norm, "cpu") == weight_bytes(norm)
    assert weight_bytes(norm.to("meta"), "cpu") == 0


class StepPipeline:
    """Calls its network once a step for all prompts, and draws nothing."""

    def __init__(self) -> None:
        self.unet, self.device = nn.Linear(3, 1), torch.device("cpu")
        self.batches: list[int] = []
        self.unet.register_forward_hook(lambda _, args, __: self.batches.append(len(args[0])))

    def __call__(self, prompt: list[str], generator: Any, num_inference_steps: int, output_type: str = "pil") -> Any:
        for _ in range(num_inference_steps):
            self.unet(torch.zeros(len(prompt), 3))
        return SimpleNamespace(images=[Image.new("RGB", (4, 4))] * len(prompt))


@pytest.mark.parametrize("asked", [{}, {"speed_steps": [6], "speed_batch_sizes": [1]}, {"speed_batch_sizes": [2, 3]}])
def test_what_is_timed_is_what_the_estimate_counts_and_no_picture_twice(asked: dict[str, list[int]]) -> None:
    settings = EvaluateConfig(num_prompts=4, num_inference_steps=6, batch_size=4, latency_runs=5, **asked)
    pipelines = StepPipeline(), StepPipeline()
    calls = tuple(partial(pipeline.unet, torch.zeros(settings.batch_size, 3)) for pipeline in pipelines)
    found = costs(pipelines, ["a"] * 4, settings, ({}, {}), calls, 0)
    for pipeline in pipelines:
        assert (sum(pipeline.batches), len(pipeline.batches)) == timed_work(settings, 1, True)
    same = [row for row in found.speed[0] if (row.part, row.batch_size, row.num_inference_steps) == ("picture", 1, 6)]
    assert [row.latency_ms for row in same] in ([], [found.teacher["latency_end_to_end_ms"]])
