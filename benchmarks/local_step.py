"""One training step of the local stage at full size: seconds, peak memory, predicted memory; see full_size.py.

Weights are random, and the plan is half: evenly spread runs. A step is forward, backward, clip, AdamW and the moving
average. "One at a time" trains the largest substitute on states that were recorded before, as
``distill.one_at_a_time`` with ``distill.offload=cpu`` does.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from common import FULL_SIZE, HALF, real_arguments, synchronize
from naive_loop import peak_bytes
from torch import Tensor, nn

from ppcl.common.devices import autocast
from ppcl.common.tables import markdown_table
from ppcl.config import DistillConfig, PlanConfig
from ppcl.distill.local import last_block, local_backward, run_loss
from ppcl.distill.memory import MemoryEstimate, estimate_distill, free_bytes, weight_bytes
from ppcl.inspection.blueprint import build_on_meta, example_call, token_grid
from ppcl.pruning.planner import segments, uniform_ladder
from ppcl.student.assembly import RunKey, start_block
from ppcl.student.plan import CompressionPlan, Prediction
from ppcl.student.prediction import predict
from ppcl.teacher.description import describe
from ppcl.teacher.families import Adapter, adapter_for
from ppcl.teacher.trace import record_boundaries

WAYS: dict[str, dict[str, Any]] = {
    "all at once": {"release_gradients": False},
    "gradients released": {},
    "one at a time": {"one_at_a_time": True, "offload": "cpu"},
}


def half_plan(meta: nn.Module, keep: float) -> CompressionPlan:
    """Evenly spread runs that leave at most this share of the parameters."""
    info = describe(SimpleNamespace(transformer=meta, components={}))
    for runs in uniform_ladder(info, PlanConfig(keep=keep)):
        stacks = {s.name: tuple(segments(s, [run for run in runs if run[0] == s.name], {})) for s in info.stacks}
        if predict(info, stacks).param_ratio <= keep:
            return CompressionPlan(info, "uniform", {"keep": keep}, stacks, Prediction(1, keep, 1.0, 1, None))
    raise SystemExit(f"no plan keeps {keep:.0%}")


class Step:
    """A step of the local stage of some substitutes.

    Args:
        teacher: On the device.
        adapter: Its family.
        arguments: A batch.
        runs: Those that are trained together.
        settings: How.
        precision: Autocast.
    """

    def __init__(
        self,
        teacher: nn.Module,
        adapter: Adapter,
        arguments: dict[str, Any],
        runs: list[RunKey],
        settings: DistillConfig,
        precision: str,
    ) -> None:
        self.teacher, self.adapter, self.arguments, self.settings = teacher, adapter, arguments, settings
        self.device, self.precision = next(teacher.parameters()).device, precision
        self.blocks = {run: start_block(getattr(teacher, run[0]), run[1], run[2], "middle").float() for run in runs}
        self.parameters = [p for block in self.blocks.values() for p in block.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)
        self.average = [p.detach().clone() for p in self.parameters]
        if settings.one_at_a_time:
            (run,) = runs
            ends = {(run[0], run[1]), (run[0], run[2])}
            with autocast(self.device, precision):
                calls, _ = record_boundaries(teacher, adapter, arguments, ends, last_block(adapter, self.blocks))
            self.start, self.end = calls[run[0], run[1]], calls[run[0], run[2]]

    @property
    def lasting(self) -> list[Tensor]:
        """What is there whether or not a step is taken, optimizer states included."""
        states = [v for slots in self.optimizer.state.values() for v in slots.values() if isinstance(v, Tensor)]
        return [*self.teacher.parameters(), *self.parameters, *self.average, *states]

    def _update(self, run: RunKey | None = None) -> None:
        parameters = self.parameters if run is None else list(self.blocks[run].parameters())
        nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        """Take the step."""
        with autocast(self.device, self.precision):
            if self.settings.one_at_a_time:
                (block,) = self.blocks.values()
                run_loss(self.adapter, self.start, self.end, block, self.settings.loss).backward()
            else:
                done = self._update if self.settings.releases_gradients else None
                local_backward(self.teacher, self.adapter, self.arguments, self.blocks, self.settings.loss, done=done)
        if not self.settings.releases_gradients:
            self._update()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 0.02)


def take(step: Callable[[], None], repeats: int) -> float:
    """Median seconds of a step, after one uncounted."""
    times = []
    for _ in range(repeats + 1):
        synchronize()
        began = time.perf_counter()
        step()
        synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[len(times[1:]) // 2]


def rows_of(name: str, config: Mapping[str, Any], shape: Any, pixels: int, repeats: int) -> list[list[str]]:
    """Measure one class at one size of picture."""
    meta = build_on_meta({"_class_name": name, **config}).to(shape.dtype)
    adapter, plan = adapter_for(meta), half_plan(meta, HALF)
    call = example_call(meta, token_grid(pixels, pixels, 8))
    if call is None:
        raise SystemExit(f"{name} has no example call")
    precision = "bf16" if shape.dtype is torch.bfloat16 else "fp32"
    arguments = real_arguments(call, shape)
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device(shape.device):
            teacher: Any = type(meta).from_config({**meta.config}).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    runs = [(s, seg.first, seg.last) for s, found in plan.stacks.items() for seg in found if seg.is_run]
    rows = []
    for way, changes in WAYS.items():
        settings = DistillConfig(output_steps=0, **changes)
        estimate = estimate_distill(meta, adapter, plan, call, settings, precision)["local"]
        label = f"{FULL_SIZE[name]}, {pixels} px, {way}"
        if estimate.total - estimate.teacher > free_bytes(shape.device):
            rows.append([label, _gigabytes(estimate.total), "does not fit", "", ""])
            continue
        largest = max(runs, key=lambda run: weight_bytes(getattr(teacher, run[0])[run[1]]))
        chosen = [largest] if settings.one_at_a_time else runs
        step = Step(teacher, adapter, arguments, chosen, settings, precision)
        duration = take(step, repeats)
        peak = peak_bytes(step, step.lasting) + resident(step, estimate, shape)
        rows.append(
            [
                label,
                _gigabytes(estimate.total),
                _gigabytes(peak),
                f"{estimate.total / peak - 1:+.1%}",
                f"{duration:.2f}",
            ]
        )
        del step
        gc.collect()
        if shape.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def resident(step: Step, estimate: MemoryEstimate, shape: Any) -> int:
    """Bytes that are there before a step; of a teacher that waits elsewhere, what is on the device beside it."""
    teacher = estimate.teacher if step.settings.offload != "none" else weight_bytes(step.teacher)
    own = step.lasting[len(list(step.teacher.parameters())) :]
    return teacher + sum(t.numel() * t.element_size() for t in own)


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3f}"


def local_step_table(shape: Any, sizes: Sequence[int], how: str, repeats: int) -> str:
    """The table as Markdown.

    Args:
        shape: See ``full_size.Shape``.
        sizes: Sides of the picture, pixels.
        how: How large the models are.
        repeats: Medians of so many steps.
    """
    lines = [
        line
        for name, config in shape.configs.items()
        for pixels in sizes
        for line in rows_of(name, config, shape, pixels, repeats)
    ]
    header = ["", "peak predicted, GB", "measured", "prediction off by", "seconds a step"]
    return (
        f"# A training step of the local stage: memory and time\n\n{markdown_table(header, lines)}\n\n"
        f"Random weights, {how}; plans of evenly spread runs that keep half of the parameters, one state a step, "
        f"teacher in {shape.dtype}, substitutes in float32 with AdamW and a moving average. Medians of {repeats}. The "
        "peak is that of weights, optimizer states and what the step allocates. One at a time: a step of the largest "
        "substitute on recorded states; a run takes as many steps for each substitute. Its peak counts one block of "
        "the teacher."
    )
