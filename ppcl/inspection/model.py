"""What the tool sees of a model before anything is fetched or run: blocks, parts, a ladder of budgets."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from ppcl.common.artifacts import SCHEMA_VERSION
from ppcl.config import PlanConfig
from ppcl.config.names import TRANSFORMER
from ppcl.errors import BudgetError, ConfigError, ModelError
from ppcl.inspection.blueprint import (
    build_on_meta,
    example_call,
    flops_on_meta,
    read_config,
    token_grid,
    usual_text_tokens,
)
from ppcl.inspection.width import Wider, widest_within
from ppcl.pruning.planner import UNITS, even_runs, meets, segments, uniform_ladder
from ppcl.student.plan import Prediction, Segment, free_blocks
from ppcl.student.prediction import predict
from ppcl.teacher.description import describe
from ppcl.teacher.families import Adapter, StackSpec, adapter_for
from ppcl.teacher.flops import count_params
from ppcl.teacher.loading import pipeline_class
from ppcl.teacher.model_info import ModelInfo, Stack
from ppcl.teacher.pipeline_call import needs_of

STEPS = tuple(round(0.05 * step, 2) for step in range(11))  # shares of the blocks removed
DEFAULT_PIXELS = 1024
NEAR = 0.005  # shares of the teacher's parameters
# The first pattern that a parameter's name inside a block matches is its part. Modulation
# projections are named like norms in some families and like the streams in others.
PARTS = {
    "modulation": r"_mod\.|modulation|norm\w*\.linear|scale_shift|ada_?ln",
    "text stream": r"(^|\.)txt_|(^|\.)add_[qkv]_proj|to_add_out|norm_added|_context",
    "ffn": r"mlp|(^|\.)ff|feed_forward|ffn|^proj_out",
    "attention": r"attn|(^|\.)to_[qkv]|(^|\.)attention",
}


@dataclass(frozen=True)
class Rung:
    """One size that removing blocks gives.

    Attributes:
        removed: Blocks fewer.
        blocks: Blocks left in each stack.
        params: Parameters of the transformer (exact where a stack's blocks are alike, as in most families).
        param_ratio: Share of the teacher's.
        flops: Forward FLOPs of one call for one picture; None where they were not counted.
        speedup: Teacher FLOPs / these (an estimate of the speed-up); None likewise.
        bytes_bf16: Bytes of the transformer's weights in bfloat16.
    """

    removed: int
    blocks: dict[str, int]
    params: int
    param_ratio: float
    flops: int | None
    speedup: float | None
    bytes_bf16: int


@dataclass(frozen=True)
class Inspection:
    """What :func:`inspect_model` found.

    Attributes:
        source: What was inspected.
        model: The planner's view, at two bytes a parameter and without the other components.
        streams: Streams of each stack.
        parts: Parameters by part, see ``PARTS``.
        means: By which means each part can shrink.
        call: Pixels and tokens of the call whose FLOPs were counted; None if they were not.
        ladder: 0 to 50% of the blocks removed, in proportion over the stacks.
        budget: The budget asked for, by kind.
        choices: The largest depth-only size within it, then other splits of about that size.
        wider: An example of a size within it by smaller modules alone, of an assumed rank.
        needs: What the pipeline wants beside prompts, and where it can be had; empty if nothing, or if it is not known.
    """

    source: str
    model: ModelInfo
    streams: dict[str, tuple[str, ...]]
    parts: dict[str, int]
    means: dict[str, str]
    call: dict[str, int] | None
    ladder: tuple[Rung, ...]
    budget: dict[str, float] | None = None
    choices: tuple[Rung, ...] = ()
    wider: Wider | None = None
    needs: str = ""
    schema_version: int = SCHEMA_VERSION


def inspect_model(
    model: str,
    settings: PlanConfig | None = None,
    max_run: int = 5,
    height: int | None = None,
    width: int | None = None,
    text_tokens: int | None = None,
    rank: int | None = None,
    component: str = TRANSFORMER,
) -> Inspection:
    """Look at a model through its config files alone.

    Args:
        model: ``emoji``, a pipeline folder, a transformer folder or its config.json, or a hub id.
        settings: Protected blocks, and the budget to meet if there is one.
        max_run: Longest run that one block may replace.
        height: Of the picture whose FLOPs are counted, pixels; 1024 if None.
        width: Likewise.
        text_tokens: Tokens of its prompt; what is usual for the family if None.
        rank: What modulation layers are assumed to need, for an example with smaller modules; none without it.
        component: Which transformer of a pipeline.

    Raises:
        ModelError: There is no usable config of a supported transformer.
        BudgetError: No depth-only plan meets the budget.
        ConfigError: The budget needs what configs do not tell.
    """
    config, vae_scale = read_config(model, component)
    transformer = build_on_meta(config)
    height, width = height or DEFAULT_PIXELS, width or DEFAULT_PIXELS
    grid = token_grid(height, width, vae_scale)
    arguments = example_call(transformer, grid, text_tokens)
    flops = flops_on_meta(transformer, arguments) if arguments else None
    alone = SimpleNamespace(**{component: transformer}, components={})
    info = replace(describe(alone, flops, component), bytes_per_param=2)
    call = None
    if arguments:
        text = text_tokens or usual_text_tokens(transformer)
        call = {"height": height, "width": width, "image_tokens": grid[0] * grid[1], "text_tokens": text}
    adapter = adapter_for(transformer)
    settings = settings or PlanConfig()  # type: ignore[call-arg]
    asked = any(getattr(settings, kind) is not None for kind in UNITS)
    return Inspection(
        source=model,
        model=info,
        streams={spec.name: tuple(spec.inputs) for spec in adapter.stacks},
        parts=parts_of(transformer, adapter),
        means=means_of(adapter),
        call=call,
        ladder=ladder_of(info, settings),
        budget=dict([settings.budget]) if asked else None,
        choices=largest_within(info, settings, max_run) if asked else (),
        wider=widest_within(transformer, adapter, settings.keep, rank, arguments) if settings.keep and rank else None,
        needs=needs_of(kind) if (kind := pipeline_class(model)) is not None else "",
    )


def means_of(adapter: Adapter) -> dict[str, str]:
    """By which means each part of a family's blocks can shrink."""
    depth = "depth: whole blocks"
    ffn = {stream for spec in adapter.stacks for stream in spec.ffn}
    affine = f" or one affine map ({' and '.join(sorted(ffn))} stream)" if ffn else ""
    words = {"ffn": f"fewer neurons{affine}", "attention": "fewer heads, where they can be cut"}
    words |= {"text": "two linear maps"} if any(spec.text_parts for spec in adapter.stacks) else {}
    words |= {"modulation": "low rank"} if any(spec.modulation for spec in adapter.stacks) else {}
    words = {group: f"; fit.width=[{group}]: {means}" for group, means in words.items()}
    words |= {
        group: f"; no fit.width=[{group}]: {reason}" for group, reason in adapter.without.items() if "." not in group
    }
    return {
        "attention": depth + words["attention"],
        "ffn": depth + words["ffn"],
        "text stream": depth + (words["ffn"] if "text" in ffn else "") + words.get("text", ""),
        "modulation": depth + words.get("modulation", ""),
        "other": depth,
        "outside the blocks": "stays",
    }


def parts_of(transformer: Any, adapter: Adapter) -> dict[str, int]:
    """Sum the transformer's parameters by part; the sum of all parts is exact.

    FFNs are found by the adapter, the rest by the names of diffusers' modules.
    """
    parts = dict.fromkeys((*PARTS, "other"), 0)
    for spec in adapter.stacks:
        for block in adapter.blocks(transformer, spec):
            for name, parameter in block.named_parameters():
                parts[_part(name, spec)] += parameter.numel()
    parts["outside the blocks"] = count_params(transformer) - sum(parts.values())
    return parts


def _part(name: str, spec: StackSpec) -> str:
    for stream, path in spec.ffn.items():
        if name.startswith(f"{path}."):
            return "text stream" if stream == "text" and len(spec.ffn) > 1 else "ffn"
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), "other")


def ladder_of(model: ModelInfo, settings: PlanConfig) -> tuple[Rung, ...]:
    """Sizes from nothing removed to half of the blocks, spread over the stacks in proportion."""
    total = sum(stack.num_blocks for stack in model.stacks)
    rungs = uniform_ladder(model, settings)
    counts = dict.fromkeys(round(share * total) for share in STEPS)
    ladder = []
    for count in counts:
        if count < len(rungs):
            by_stack = {s.name: [run for run in rungs[count] if run[0] == s.name] for s in model.stacks}
            ladder.append(_rung(model, {s.name: segments(s, by_stack[s.name], {}) for s in model.stacks}))
    return tuple(ladder)


def _rung(model: ModelInfo, stacks: Mapping[str, tuple[Segment, ...]]) -> Rung:
    prediction: Prediction = predict(model, stacks)
    blocks = {name: len(pieces) for name, pieces in stacks.items()}
    return Rung(
        removed=sum(stack.num_blocks for stack in model.stacks) - sum(blocks.values()),
        blocks=blocks,
        params=prediction.params,
        param_ratio=prediction.param_ratio,
        flops=_flops(model, stacks) if model.flops else None,
        speedup=prediction.speedup if model.flops else None,
        bytes_bf16=prediction.bytes,
    )


def _flops(model: ModelInfo, stacks: Mapping[str, tuple[Segment, ...]]) -> int:
    merged = 0
    for stack in model.stacks:
        for segment in stacks[stack.name]:
            merged += sum(stack.block_flops[segment.first + 1 : segment.last + 1])
    return model.flops - merged


def largest_within(model: ModelInfo, settings: PlanConfig, max_run: int) -> tuple[Rung, ...]:
    """The largest depth-only sizes within a budget, over all splits between the stacks.

    The planner looks for the least error, so a plan for the same budget may split otherwise
    where a model has several stacks. Sizes that differ by less than ``NEAR`` of the teacher are
    all returned: their speeds can lie far apart.

    Returns:
        The largest size first.

    Raises:
        BudgetError: Not even the smallest meets it.
        ConfigError: It is ``fit_gb``, which counts components that are not inspected.
        ModelError: It is a speed-up, and FLOPs were not counted.
    """
    kind, value = settings.budget
    if kind == "fit_gb":
        raise ConfigError(
            "plan.fit_gb counts the weights of all components and inspect sees the transformer; give --keep"
        )
    if kind == "speedup" and not model.flops:
        raise ModelError(
            f"a speed-up needs FLOPs, and those of {model.transformer_class} need a captured call; "
            "give --keep, or run ppcl capture"
        )
    sizes = []
    for choice in itertools.product(*(_removals(model, stack, settings, max_run) for stack in model.stacks)):
        stacks = {stack.name: pieces for stack, pieces in zip(model.stacks, choice, strict=True)}
        sizes.append((predict(model, stacks), stacks))
    sizes.sort(key=lambda pair: -pair[0].params)
    fitting = [(prediction, stacks) for prediction, stacks in sizes if meets(prediction, kind, value)]
    if not fitting:
        nearest = f"--keep {math.ceil(sizes[-1][0].param_ratio * 1000) / 1000}"
        if kind == "speedup":
            nearest = f"--speedup {math.floor(max(prediction.speedup for prediction, _ in sizes) * 100) / 100}"
        raise BudgetError(
            f"no depth-only plan gives {value:g} {UNITS[kind]} with runs of at most {max_run} blocks; "
            f"the nearest feasible budget is {nearest}"
        )
    least = fitting[0][0].params - NEAR * model.params
    return tuple(_rung(model, stacks) for prediction, stacks in fitting if prediction.params >= least)


def _removals(model: ModelInfo, stack: Stack, settings: PlanConfig, max_run: int) -> list[tuple[Segment, ...]]:
    """The stack's segments for every number of blocks that runs of at most ``max_run`` can save."""
    low, high = free_blocks(model, stack, settings)
    options = [segments(stack, [], {})]
    for removed in range(1, max(1, high - low)):
        runs = even_runs(stack.name, low, high, removed)
        if all(last - first < max_run for _, first, last in runs):
            options.append(segments(stack, runs, {}))
    return options


def report(inspection: Inspection) -> str:
    """Lay an inspection out as text for a terminal."""
    model = inspection.model
    size = f"{model.params:,} parameters ({_gigabytes(2 * model.params)} in bf16)"
    name = "" if model.component == TRANSFORMER else f", {model.component}"
    lines = [f"{inspection.source}{name}: {model.transformer_class}, {size}"]
    for stack in model.stacks:
        sizes = sorted(set(stack.block_params))
        each = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
        streams = " and ".join(inspection.streams[stack.name])
        lines.append(f"  {stack.name} ({stack.count_field}): {stack.num_blocks} blocks of {each} parameters; {streams}")
    lines += ["", "parameters by part, and what can shrink them:"]
    width = max(map(len, inspection.parts))
    for part, count in inspection.parts.items():
        if count:
            lines.append(f"  {part:<{width}} {count:>16,} {count / model.params:6.1%}  {inspection.means[part]}")
    lines += ["", inspection.needs] if inspection.needs else []
    return "\n".join([*lines, "", *_sizes(inspection), *_wider(inspection)])


def _wider(inspection: Inspection) -> list[str]:
    """The example with smaller modules, in words."""
    if inspection.wider is None:
        return []
    w = inspection.wider
    modules = [f"modulation of rank {w.rank} (assumed; fit measures it)"] if w.rank else []
    modules += [f"{stream} networks: {what}" for stream, what in w.networks.items()]
    speed = f", {w.speedup:.2f}x as fast" if w.speedup else ""
    return [
        "with smaller modules in all blocks and no block removed, for example:",
        f"  {w.params:,} parameters ({w.param_ratio:.4f}), {_gigabytes(w.bytes_bf16)} in bf16{speed}",
        f"  {'; '.join(modules)}",
    ]


def _sizes(inspection: Inspection) -> list[str]:
    """The ladder and the choices as lines of one table."""
    model, call = inspection.model, inspection.call
    if call:
        first = (
            f"FLOPs of one transformer call for one picture: {call['height']} x {call['width']} pixels, "
            f"{call['image_tokens']:,} image tokens, {call['text_tokens']:,} text tokens"
        )
    else:
        first = f"FLOPs and speed-up of {model.transformer_class} need a captured call (ppcl capture, then plan)"
    exact = "sizes exact"
    if any(len(set(stack.block_params)) > 1 for stack in model.stacks):
        exact = "blocks differ, so sizes hold for runs spread evenly; others give others"
    rows: list[tuple[str, ...]] = [
        ("removed", "blocks left", "parameters", "share", _flops_unit(model)[0], "speed-up", "bf16")
    ]
    rows += [_row(rung, model) for rung in (*inspection.ladder, *inspection.choices)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  " + "  ".join(f"{cell:>{size}}" for cell, size in zip(row, widths, strict=True)) for row in rows]
    if inspection.choices and inspection.budget:
        ((kind, value),) = inspection.budget.items()
        others = ", and other splits of about that size" if len(inspection.choices) > 1 else ""
        table.insert(1 + len(inspection.ladder), f"the largest with {value:g} {UNITS[kind]}{others}:")
    return [first, f"blocks removed in proportion over the stacks ({exact}; speed-up predicted from FLOPs):", *table]


def _row(rung: Rung, model: ModelInfo) -> tuple[str, ...]:
    return (
        str(rung.removed),
        " + ".join(str(rung.blocks[stack.name]) for stack in model.stacks),
        f"{rung.params:,}",
        f"{rung.param_ratio:.4f}",
        "-" if rung.flops is None else f"{rung.flops / _flops_unit(model)[1]:.2f}",
        "-" if rung.speedup is None else f"{rung.speedup:.2f}x",
        _gigabytes(rung.bytes_bf16),
    )


def _flops_unit(model: ModelInfo) -> tuple[str, float]:
    return ("TFLOPs", 1e12) if model.flops >= 1e12 else ("GFLOPs", 1e9)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
