"""How far the velocity moves when weights become zero, untrained, by criterion and allocation.

    python benchmarks/sparsity.py --threads 1

About five minutes on one core. Every row is the embedded teacher with zeros in all blocks and nothing else changed;
the error is on states of prompts that no score comes from.
"""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import capture_states, load, parser, publish
from torch import nn

from ppcl.capture.states import States
from ppcl.capture.trajectories import velocity_error
from ppcl.common.tables import markdown_table
from ppcl.config.sparsity import WEIGHT_CRITERION_NAMES, SparsityConfig
from ppcl.pruning.sparsity import block_shares, make_masks, sparse_layers, sparse_plan, sparsity_cost
from ppcl.student.assembly import RunKey, with_blocks
from ppcl.student.masks import Masks
from ppcl.student.plan import CompressionPlan, Prediction, identity_segments
from ppcl.teacher.description import describe
from ppcl.teacher.families import Adapter

KINDS: dict[str, dict[str, Any]] = {
    "50%, uniform": {"share": 0.5},
    "50%, ECoFLaP": {"share": 0.5, "allocation": "ecoflap"},
    "2:4": {"pattern": "2:4"},
}


def sparse_student(teacher: Any, adapter: Adapter) -> tuple[Any, dict[RunKey, nn.Module]]:
    """A student with copies of all blocks, by their place."""
    lists = {spec.name: [copy.deepcopy(b) for b in adapter.blocks(teacher, spec)] for spec in adapter.stacks}
    blocks = {(name, i, i): block for name, made in lists.items() for i, block in enumerate(made)}
    return with_blocks(teacher, lists), blocks


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--states", type=int, default=16, help="training states behind the scores")
    args = made.parse_args()
    pipeline, adapter, config = load(args)
    teacher = pipeline.transformer
    model = describe(pipeline, None)
    stacks = {stack.name: identity_segments(stack.num_blocks) for stack in model.stacks}
    whole = CompressionPlan(model, "optimal", {"keep": 1.0}, stacks, Prediction(model.params, 1.0, 1.0, 0, None))
    count = sum(stack.num_blocks for stack in model.stacks)
    rows, shares = [], {}
    with tempfile.TemporaryDirectory() as folder:
        states = capture_states(args, pipeline, config, 4 if args.quick else 16, Path(folder) / "states")
        batches = list(States(states, "train").batches(8, args.states))
        for name in WEIGHT_CRITERION_NAMES[:1] if args.quick else WEIGHT_CRITERION_NAMES:
            row = [f"`{name}`"]
            for kind, changes in KINDS.items():
                settings = SparsityConfig(criterion=name, states=args.states, blocks_at_once=count, **changes)
                student, blocks = sparse_student(teacher, adapter)
                layers = sparse_layers(sparse_plan(whole, settings), adapter, blocks, settings)
                began = time.perf_counter()
                if kind not in shares:  # they do not depend on the criterion
                    shares[kind] = block_shares(student, layers, batches, settings, 0)
                Masks(make_masks(student, layers, batches, settings, 0, shares[kind]), blocks).hold_weights()
                took = time.perf_counter() - began
                error = velocity_error(teacher, student, States(states, "held-out").batches(16, 32))
                print(name, kind, f"{error:.4f}, {took:.0f} s", flush=True)
                row.append(f"{error:.3f}")
            rows.append([*row, f"{sparsity_cost(settings, args.states, count):,.0f}"])
    head = ["criterion", *KINDS, "forwards"]
    text = (
        "# Zeros in the weights of the embedded teacher, untrained\n\n"
        f"{markdown_table(head, rows)}\n\n"
        "Relative velocity error on 32 held-out states with half of the weights of the linear layers in all blocks "
        f"zero (modulation layers left out), before any training; {args.states} training states behind the scores, "
        "all blocks at once, one seed. Forwards: runs of the transformer on one state that the criterion said it would "
        f"take; ECoFLaP takes {2 * count * args.states:,} more.\n\nSettings: `{KINDS}`."
    )
    publish(args, None, "sparsity.py", text, str(next(teacher.parameters()).device))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
