"""What a run will take, stage by stage, before anything is loaded: device memory, RAM, disk and time.

Arithmetic on shapes alone. What each stage does with them is in :mod:`ppcl.inspection.stage_costs`; here is what they
start from, and how the result is put down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ppcl.common.artifacts import SCHEMA_VERSION
from ppcl.common.tables import markdown_table
from ppcl.config import RunConfig, drawn_seeds
from ppcl.inspection.costs import Costs, StageCost
from ppcl.inspection.hardware import CACHED, CONTEXT, FREE, PROGRAM, SHARE, Hardware
from ppcl.inspection.shapes import Blueprint, blueprint_of, dtype_for
from ppcl.inspection.stage_costs import stage_costs
from ppcl.teacher.streaming import RESIDENT, STREAMED


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        source: The model.
        hardware: The machine, in words.
        memory: Bytes of one of its devices.
        blocks: ``resident`` or ``streamed``.
        weights: Bytes of the transformer's weights.
        stages: In their order.
        assumptions: What the figures rest on, a sentence each.
    """

    source: str
    hardware: str
    memory: float
    blocks: str
    weights: int
    stages: tuple[StageCost, ...]
    assumptions: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION

    @property
    def device(self) -> float:
        """The largest peak of device memory, bytes."""
        return max(stage.device for stage in self.stages)

    @property
    def ram(self) -> float:
        """The largest peak of RAM, bytes."""
        return max(stage.ram for stage in self.stages)

    @property
    def disk(self) -> float:
        """The most that the run directory holds at once, bytes."""
        return max(stage.disk for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def too_large(self) -> list[str]:
        """The stages that do not fit the device."""
        return [stage.stage for stage in self.stages if stage.device > self.memory]


def estimate_run(model: str, config: RunConfig, hardware: Hardware, text_tokens: int | None = None) -> Estimate:
    """Estimate what a run takes.

    Args:
        model: See :func:`ppcl.inspection.model.inspect_model`.
        config: Settings.
        hardware: Where it would run.
        text_tokens: Of a prompt; what is usual for the family if None.

    Raises:
        ModelError: There is no usable config, or none of a family whose calls are known.
    """

    def counted(streamed: bool) -> Blueprint:
        capture = config.capture
        dtype = dtype_for(model, hardware.kind, streamed, config.precision, capture.component)
        size = (capture.height, capture.width, capture.num_frames)
        return blueprint_of(model, *size, text_tokens, dtype, capture.component)

    blueprint = counted(config.blocks == STREAMED)
    weights = blueprint.shapes.itemsize * blueprint.shapes.info.params
    blocks: str = config.blocks
    if blocks == "auto":
        blocks = RESIDENT if weights < hardware.memory else STREAMED
        if blocks == STREAMED:
            blueprint = counted(True)  # on a CPU in another dtype
    return estimate_of(model, blueprint, config, hardware, blocks)


def estimate_of(model: str, blueprint: Blueprint, config: RunConfig, hardware: Hardware, blocks: str) -> Estimate:
    """Estimate what a run takes, of a model that is counted already.

    Args:
        model: Its name.
        blueprint: What was counted, with pictures of the size that the config captures.
        config: Settings.
        hardware: Where it would run.
        blocks: ``resident`` or ``streamed``.
    """
    costs = Costs(blueprint, config, hardware, blocks == STREAMED, drawn_seeds(model, config))
    weights = blueprint.shapes.itemsize * blueprint.shapes.info.params
    stages = tuple(stage_costs(costs))
    return Estimate(model, str(hardware), hardware.memory, blocks, weights, stages, assumptions(costs))


def assumptions(costs: Costs) -> tuple[str, ...]:
    """What the figures rest on."""
    shapes, hardware, config = costs.shapes, costs.hardware, costs.config
    found = [
        f"{SHARE:.0%} of the device's peak in products of half precision; backward passes count twice a forward one",
        f"weights and states pass the disk at {hardware.disk / 1e9:g} GB/s, weights while blocks compute; "
        + (
            f"what {FREE:.0%} of the RAM holds is read again at {CACHED / 1e9:g} GB/s"
            if hardware.ram
            else "how much the RAM keeps of them is not known"
        ),
        f"{costs.num_states:,} recorded states ({config.capture.num_prompts} prompts), {costs.num_substitutes} "
        f"substitutes in evenly spread runs{costs.plan_note}",
    ]
    if hardware.kind == "cpu":
        found.append(f"{PROGRAM / 1e9:g} GB for the program itself; RAM is the device's memory")
    else:
        found.append(
            f"{CONTEXT / 1e9:g} GB of the device for driver and libraries, {PROGRAM / 1e9:g} GB of RAM for the program"
        )
    if not shapes.files_here:
        found.append(
            f"text encoders of {shapes.text / 1e9:.1f} GB and a VAE of {shapes.vae / 1e9:.1f} GB, as published; their "
            "files are not here"
        )
    left_out = {
        f"rounds after the first (plan.rounds={config.plan.rounds})": config.plan.rounds > 1,
        f"short recoveries of plans (plan.recover={config.plan.recover})": bool(config.plan.recover),
        f"recovery of quantised weights (export.quantize={config.export.quantize})": config.export.quantize != "none",
    }
    if any(left_out.values()):
        found.append(f"not counted: {', '.join(text for text, is_asked in left_out.items() if is_asked)}")
    if hardware.count > 1:
        found.append("analyze, fit and distill are shared by all devices; the other stages run on one")
    return tuple(found)


def estimate_report(estimate: Estimate) -> str:
    """Lay an estimate out as text for a terminal."""
    blocks = f"blocks {estimate.blocks} ({estimate.weights / 1e9:.1f} GB of weights)"
    rows = [("stage", "device", "RAM", "disk", "time", ""), *map(_cells, estimate.stages)]
    total = f"{time_text(estimate.seconds)}"
    rows.append(("all", _size(estimate.device), _size(estimate.ram), _size(estimate.disk), total, ""))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [f"estimate for {estimate.source} on {estimate.hardware}; {blocks}"]
    for row in rows:
        cells = [
            f"{row[0]:<{widths[0]}}",
            *(f"{cell:>{size}}" for cell, size in zip(row[1:5], widths[1:], strict=True)),
        ]
        lines.append(f"  {'  '.join(cells)}  {row[5]}".rstrip())
    lines += [f"  assumed: {text}" for text in estimate.assumptions]
    return "\n".join([*lines, *_verdict(estimate)])


def estimate_reports(estimates: Sequence[Estimate]) -> str:
    """Those of one transformer, or of two that are compressed one after the other."""
    texts = [estimate_report(estimate) for estimate in estimates]
    if len(texts) > 1:
        seconds, disk = (sum(getattr(each, name) for each in estimates) for name in ("seconds", "disk"))
        texts.append(f"both transformers, at most: {time_text(seconds)}, {_size(disk)} of disk; memory of the larger")
    return "\n\n".join(texts)


def estimate_lines(estimate: Estimate) -> list[str]:
    """The same in short: a line for each stage, as ``ppcl compress`` begins with."""
    lines = [f"estimate on {estimate.hardware} (ppcl inspect --estimate says what is assumed):"]
    for stage in estimate.stages:
        name, device, ram, disk, time, note = _cells(stage)
        memory = f"{device} of memory" if device == ram else f"{device} of device memory, {ram} of RAM"
        lines.append(f"  {name}: {memory}, {disk} of disk, {time}" + (note and f"; {note}"))
    return [*lines, *(f"  {text}" for text in _verdict(estimate))]


def estimate_table(estimates: dict[str, Estimate]) -> str:
    """Several estimates as a table for a document, a row for each stage and columns for each machine."""
    names = [stage.stage for stage in next(iter(estimates.values())).stages]
    header = ["", *(f"{name}: {what}" for name in estimates for what in ("device, GB", "RAM, GB", "disk, GB", "hours"))]
    rows = []
    for number, name in enumerate(names):
        cells = [e.stages[number] for e in estimates.values()]
        rows.append([name, *(text for c in cells for text in _numbers(c.device, c.ram, c.disk, c.seconds))])
    every = [text for e in estimates.values() for text in _numbers(e.device, e.ram, e.disk, e.seconds)]
    return markdown_table(header, [*rows, ["all", *every]])


def _numbers(device: float, ram: float, disk: float, seconds: float) -> list[str]:
    return [f"{size / 1e9:.1f}" for size in (device, ram, disk)] + [f"{seconds / 3600:.2f}"]


def _cells(stage: StageCost) -> tuple[str, str, str, str, str, str]:
    return (
        *(stage.stage, _size(stage.device), _size(stage.ram), _size(stage.disk), time_text(stage.seconds)),
        "; ".join(stage.notes),
    )


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def time_text(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _verdict(estimate: Estimate) -> list[str]:
    if not estimate.too_large:
        return []
    stages = " and ".join(estimate.too_large)
    remedy = "smaller batches (capture, analyze, fit, distill, evaluate)"
    if estimate.blocks == RESIDENT:
        remedy = f"blocks=streamed, distill.one_at_a_time, distill.output_steps=0, or {remedy}"
    return [f"does not fit {estimate.memory / 1e9:.0f} GB: {stages}; try {remedy}"]
