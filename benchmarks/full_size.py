"""Measured speed-up and peak memory against the predictions, on transformers with random weights.

    python benchmarks/full_size.py --table docs/speed.md
    python benchmarks/full_size.py --local-step --table docs/local_step.md
    python benchmarks/full_size.py --estimate --table docs/full_size.md

With a GPU: Qwen-Image (60 blocks, 20.4B) and FLUX.1-dev (19 + 38, 11.9B) at full size in bfloat16, 1024 pixels. Without
one the same classes scaled down (fewer and narrower blocks, 512 pixels, float32); the table says which. Each student is
timed in turn with its teacher. Speed is predicted from FLOPs; the peak of one call from the teacher's peak less the
weights that the student does not have. ``--local-step`` takes one training step of the local stage instead, for a plan
that keeps half, in each way that the memory model says will fit (:mod:`local_step`). ``--estimate`` measures
nothing: it writes what each stage of a run will take at full size, by arithmetic (:mod:`config_headers`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from common import FULL_SIZE, HALF, alternate, parser, publish, real_arguments
from naive_loop import peak_bytes
from torch import nn

from ppcl.common.tables import markdown_table
from ppcl.config import PlanConfig
from ppcl.distill.memory import weight_bytes
from ppcl.inspection.blueprint import build_on_meta, example_call, flops_on_meta, token_grid
from ppcl.inspection.width import plans, widest_within
from ppcl.modules.replacements import apply_width
from ppcl.pruning.planner import segments, uniform_ladder
from ppcl.student.assembly import with_blocks
from ppcl.student.prediction import predict
from ppcl.teacher.calls import velocity
from ppcl.teacher.description import describe
from ppcl.teacher.families import Adapter, adapter_for
from ppcl.teacher.flops import count_params

FULL: dict[str, dict[str, Any]] = {
    "QwenImageTransformer2DModel": {},
    "FluxTransformer2DModel": {"guidance_embeds": True},
}
SCALED: dict[str, dict[str, Any]] = {
    "QwenImageTransformer2DModel": {"num_layers": 12, "num_attention_heads": 6, "joint_attention_dim": 896},
    "FluxTransformer2DModel": {
        "num_layers": 4, "num_single_layers": 8, "num_attention_heads": 6, "joint_attention_dim": 1024,
        "guidance_embeds": True,
    },
}  # fmt: skip

QUICK: dict[str, dict[str, Any]] = {
    name: {**config, "num_attention_heads": 2, "joint_attention_dim": 64} for name, config in SCALED.items()
}


@dataclass(frozen=True)
class Shape:
    """What is measured on this machine.

    Attributes:
        configs: Overrides of the classes' own defaults, which are those of the published models.
        pixels: Side of the picture.
        dtype: Of weights and activations.
        device: Where.
    """

    configs: dict[str, dict[str, Any]]
    pixels: int
    dtype: torch.dtype
    device: torch.device


def shape_here(quick: bool) -> Shape:
    """Full size on a GPU, scaled down elsewhere."""
    if torch.cuda.is_available() and not quick:
        return Shape(FULL, 1024, torch.bfloat16, torch.device("cuda"))
    configs, pixels = (QUICK, 64) if quick else (SCALED, 512)
    return Shape(configs, pixels, torch.float32, torch.device("cpu"))


@dataclass(frozen=True)
class Student:
    """One student and what is predicted of it."""

    label: str
    model: Any
    speedup: float


def shared_copy(block: nn.Module, parts: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """A block with smaller modules that shares all other weights, so that two models fit where one does."""
    made = copy.deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
    apply_width(made, parts)
    return made


def students(meta: Any, teacher: Any, adapter: Adapter, call: dict[str, Any]) -> Iterator[Student]:
    """Half of the parameters by depth alone, and by smaller modules where these suffice."""
    info = describe(SimpleNamespace(transformer=meta, components={}), flops_on_meta(meta, call))
    settings = PlanConfig(keep=HALF)
    for runs in uniform_ladder(info, settings):
        stacks = {s.name: segments(s, [run for run in runs if run[0] == s.name], {}) for s in info.stacks}
        found = predict(info, stacks)
        if found.param_ratio <= HALF:
            lists = {
                spec.name: [adapter.blocks(teacher, spec)[piece.first] for piece in stacks[spec.name]]
                for spec in adapter.stacks
            }
            left = " + ".join(str(len(blocks)) for blocks in lists.values())
            yield Student(f"depth: {left} blocks", with_blocks(teacher, lists), found.speedup)
            break
    wider = widest_within(meta, adapter, HALF, arguments=call)
    if wider is not None and wider.speedup:
        parts = next(p for _, networks, p in plans(meta, adapter, wider.rank or 1) if networks == wider.networks)
        lists = {}
        for spec in adapter.stacks:
            blocks = adapter.blocks(teacher, spec)
            own = [f"{spec.name}.{index}." for index in range(len(blocks))]
            lists[spec.name] = [
                shared_copy(block, {k.removeprefix(head): v for k, v in parts.items() if k.startswith(head)})
                for head, block in zip(own, blocks, strict=True)
            ]
        yield Student("width: smaller modules", with_blocks(teacher, lists), wider.speedup)


def rows_of(name: str, config: Mapping[str, Any], shape: Shape, repeats: int) -> list[list[str]]:
    """Measure one class."""
    meta = build_on_meta({"_class_name": name, **config})
    adapter = adapter_for(meta)
    call = example_call(meta, token_grid(shape.pixels, shape.pixels, 8))
    if call is None:
        raise SystemExit(f"{name} has no example call")
    default = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device(shape.device):
            teacher = type(meta).from_config({**meta.config}).eval().requires_grad_(False)
        arguments = real_arguments(call, shape)

        def run(model: Any) -> Callable[[], object]:
            def once() -> None:
                with torch.no_grad():
                    velocity(model, arguments)

            return once

        activations = peak_bytes(run(teacher), teacher.parameters())
        before = weight_bytes(teacher) + activations
        size = f"{count_params(teacher) / 1e9:.2f}B"
        lines = [[f"{FULL_SIZE[name]}: teacher", size, "1", "1", "", f"{before / 1e9:.3f}", f"{before / 1e9:.3f}", ""]]
        for student in students(meta, teacher, adapter, call):
            times = alternate({"teacher": run(teacher), "student": run(student.model)}, repeats)
            measured = times["teacher"] / times["student"]
            own = weight_bytes(student.model)
            expected, peak = own + activations, own + peak_bytes(run(student.model), student.model.parameters())
            lines.append(
                [
                    f"{FULL_SIZE[name]}, {student.label}",
                    f"{count_params(student.model) / 1e9:.2f}B",
                    f"{student.speedup:.3f}",
                    f"{measured:.3f}",
                    f"{measured / student.speedup - 1:+.1%}",
                    f"{expected / 1e9:.3f}",
                    f"{peak / 1e9:.3f}",
                    f"{peak / expected - 1:+.1%}",
                ]
            )
    finally:
        torch.set_default_dtype(default)
    return lines


def _described(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """What differs from the published models, as text."""
    parts = (
        f"{FULL_SIZE[name]}: {', '.join(f'{k}={v}' for k, v in config.items())}" for name, config in configs.items()
    )
    return "; ".join(parts)


def scale(shape: Shape) -> str:
    """How large the models are, as text."""
    return "at full size" if shape.configs is FULL else f"SCALED DOWN ({_described(shape.configs)}), as there is no GPU"


def main(argv: list[str] | None = None) -> str:
    """Measure, print, and write the table."""
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--local-step", action="store_true", help="a training step of the local stage instead")
    made.add_argument("--estimate", action="store_true", help="what the stages of a run take, by arithmetic, instead")
    args = made.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.estimate:
        from config_headers import stage_table

        return publish(args, argv, "full_size.py", stage_table(), "none: arithmetic")
    shape = shape_here(args.quick)
    if args.local_step:
        from local_step import local_step_table

        if shape.configs is FULL:
            sizes: tuple[int, ...] = (512, 1024)
        else:  # training takes several times as long as a call
            shape = replace(shape, configs=QUICK)
            sizes = (64,) if args.quick else (256, 512)
        text = local_step_table(shape, sizes, scale(shape), args.repeats)
        return publish(args, argv, "full_size.py", text, device_name(shape))
    lines = []
    for name, config in shape.configs.items():
        lines += rows_of(name, config, shape, args.repeats)
    header = ["", "parameters", "speed-up predicted", "measured", "off by", "peak predicted, GB", "measured", "off by"]
    how = scale(shape)
    text = (
        f"# Speed and memory: predicted and measured\n\n{markdown_table(header, lines)}\n\n"
        f"Random weights, {how}; one picture of {shape.pixels} x {shape.pixels} pixels, {shape.dtype}. Median of "
        f"{args.repeats} calls of teacher and student in turn. Peak: weights, and what one call allocates at most."
    )
    return publish(args, argv, "full_size.py", text, device_name(shape))


def device_name(shape: Shape) -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name() if shape.device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
