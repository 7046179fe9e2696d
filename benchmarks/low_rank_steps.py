"""Do low ranks of modulation layers hold at other numbers of steps than the capture's?

    python benchmarks/low_rank_steps.py runs/demo/calibration --table docs/low_rank_steps.md

All modulation layers of the teacher at the least rank within a tolerance, untrained: fitted and judged on the recorded
timesteps, and on a dense range as the analyze stage does it. Errors are of what the layers put out (the largest over
the layers, in tolerances) and of the velocity, on new prompts' trajectories of several lengths.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import load, parser, publish
from torch import Tensor, nn

from ppcl.analysis.modulation import Conditioning, conditioning, modulation_inputs, modulation_layers, sources_of
from ppcl.capture.prompts import prompts_for
from ppcl.capture.states import States
from ppcl.capture.trajectories import SPLITS, capture
from ppcl.common.tables import markdown_table
from ppcl.eval.velocity import state_errors
from ppcl.modules.replacements import InputStatistics, LowRankLinear, fill_low_rank, set_module
from ppcl.teacher.families import Adapter
from ppcl.teacher.flops import count_params

STEPS = (8, 12, 20, 50)
Layers = Mapping[Any, nn.Linear]


def ranks_within(layers: Layers, known: Mapping[Any, Conditioning], tolerance: float) -> dict[Any, int]:
    """The least rank of each layer that the judges find within the tolerance."""
    return {key: max(1, int((known[key].missed(layer.weight) > tolerance).sum())) for key, layer in layers.items()}


def made_smaller(layer: nn.Linear, rank: int, statistics: InputStatistics) -> LowRankLinear:
    """The closed form of a rank."""
    made = LowRankLinear(layer.in_features, layer.out_features, rank)
    fill_low_rank(made, layer.weight, layer.bias, statistics)
    return made


def student_of(transformer: Any, adapter: Adapter, known: Mapping[Any, Conditioning], ranks: Mapping[Any, int]) -> Any:
    """A copy with all modulation layers at these ranks."""
    student = copy.deepcopy(transformer)
    paths = {spec.name: spec.modulation for spec in adapter.stacks}
    for key, layer in modulation_layers(transformer, adapter).items():
        path = f"{key[0]}.{key[1]}.{paths[key[0]][key[2]]}"
        set_module(student, path, made_smaller(layer, ranks[key], known[key].fitted))
    return student


@torch.no_grad()
def output_error(layer: nn.Linear, small: nn.Module, x: Tensor) -> float:
    """Relative error of the varying output."""
    wanted = layer(x)
    return float((small(x) - wanted).norm() / (wanted - wanted.mean(0)).norm())


def inputs_on(transformer: Any, layers: Layers, states: States, batch: int) -> dict[Any, Tensor]:
    """What each layer is given on recorded calls, (rows, d)."""
    sources = sources_of(transformer, layers, next(states.batches(batch, batch)))
    rows = modulation_inputs(transformer, {s: layers[s] for s in set(sources.values())}, states.batches(batch))
    return {layer: rows[source] for layer, source in sources.items()}


def on_recorded(inputs: Mapping[Any, Tensor]) -> dict[Any, Conditioning]:
    """What a fit on these inputs alone, judged on them, would go by."""
    by_input = {id(x): InputStatistics.of(x) for x in inputs.values()}
    return {layer: Conditioning(by_input[id(x)], (by_input[id(x)],)) for layer, x in inputs.items()}


def table_rows(
    transformer: Any, adapter: Adapter, ways: Mapping[str, Mapping[Any, Conditioning]], grids: Mapping[str, States]
) -> list[list[str]]:
    """A row for each way of fitting and tolerance."""
    layers: Layers = modulation_layers(transformer, adapter)
    inputs = {name: inputs_on(transformer, layers, states, 16) for name, states in grids.items()}
    rows = []
    for way, known in ways.items():
        for tolerance in (0.1, 0.03, 0.01):
            ranks = ranks_within(layers, known, tolerance)
            student = student_of(transformer, adapter, known, ranks)
            small = modulation_layers(student, adapter)
            worst = [max(output_error(layers[k], small[k], inputs[name][k]) for k in layers) for name in grids]
            moved = [
                state_errors(transformer, student, states.batches(16), "auto").error.value for states in grids.values()
            ]
            rows.append(
                [way, f"{tolerance}", f"{min(ranks.values())} / {sum(ranks.values()) / len(ranks):.1f} / "
                 f"{max(ranks.values())}", f"{count_params(student) / count_params(transformer):.1%}",
                 *(f"{error / tolerance:.2f}" for error in worst), *(f"{error:.4f}" for error in moved)]
            )  # fmt: skip
            print(" | ".join(rows[-1]), flush=True)
    return rows


def main(argv: list[str] | None = None) -> str:
    given = parser("Low ranks of modulation layers at other numbers of steps.")
    given.add_argument("calibration", type=Path, help="recorded states of the model")
    given.add_argument("--num-prompts", type=int, default=8, help="new prompts")
    args = given.parse_args(argv)
    pipeline, adapter, config = load(args)
    transformer = pipeline.transformer.eval().requires_grad_(False)
    splits, size = {split: States(args.calibration, split) for split in SPLITS}, config.analyze.batch_size
    layers: Layers = modulation_layers(transformer, adapter)
    ways = {
        "recorded": on_recorded(inputs_on(transformer, layers, splits["train"], size)),
        "dense": conditioning(transformer, adapter, splits, size, config.seed),
    }
    grids = {}
    with tempfile.TemporaryDirectory() as folder:
        prompts = prompts_for(args.model, args.prompts, args.num_prompts)[1]
        for steps in STEPS:
            settings = config.capture.model_copy(
                update={"num_inference_steps": steps, "states_per_prompt": 8, "num_prompts": len(prompts),
                        "held_out_share": 0.01}
            )  # fmt: skip
            capture(pipeline, prompts, Path(folder) / str(steps), settings, config.seed + 1)
            grids[str(steps)] = States(Path(folder) / str(steps), "train")
    heads = [*(f"output, {steps}" for steps in STEPS), *(f"velocity, {steps}" for steps in STEPS)]
    text = "\n\n".join(
        [
            "# Low-rank modulation at other numbers of steps, untrained",
            f"All modulation layers at the least rank within a tolerance; new prompts, schedules of "
            f"{', '.join(map(str, STEPS))} steps. Output: relative error of the layers' varying output, the largest "
            "over the layers, in tolerances. Velocity: relative error.",
            markdown_table(["fitted and judged on", "tolerance", "ranks", "kept", *heads],
                           table_rows(transformer, adapter, ways, grids)),
        ]
    )  # fmt: skip
    return publish(args, argv, "low_rank_steps.py", text, str(pipeline.device))


if __name__ == "__main__":
    main()
