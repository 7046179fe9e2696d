"""What smaller modules save and cost, untrained, and which criterion chooses units best: docs/width.md.

    python benchmarks/width_options.py RUN docs/width.md

RUN is a run directory of the embedded teacher with capture, analyze and fit done. About ten minutes on one core with
``--criteria magnitude taylor``; the default is every criterion there is.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from ppcl.analysis.artifacts import Analysis
from ppcl.common.artifacts import load_artifact
from ppcl.common.files import write_text
from ppcl.common.tables import markdown_table
from ppcl.common.tensor_files import StoredTensors
from ppcl.config import FitConfig, PlanConfig
from ppcl.config.names import Width
from ppcl.distill.fit import fit
from ppcl.pruning.artifacts import Candidates, WidthOption
from ppcl.pruning.criteria import CRITERIA
from ppcl.pruning.planner import plan
from ppcl.run.summary import describe_plan
from ppcl.teacher.blocks import ResidentBlocks
from ppcl.teacher.loading import load_pipeline

GROUPS: tuple[Width, ...] = get_args(Width)


def name_of(option: WidthOption) -> str:
    """Group, kind and size of an option."""
    parts = [p for p in option.parts.values() if p["kind"] not in ("unit_gate", "no_output", "identity")]
    if option.family == "text":
        return "text: two linear maps"
    if option.family == "modulation":
        return f"{option.group}: low rank"
    size = f" {parts[0]['size']} of {parts[0]['of']}" if "of" in parts[0] else ""
    return f"{option.group}: {parts[0]['kind']}{size}"


def rows_of(options: tuple[WidthOption, ...], total: int) -> list[list[str]]:
    """One row for each kind of option; of several ranks the one of least error stands for a block."""
    found: dict[str, dict[tuple[str, int], WidthOption]] = defaultdict(dict)
    for option in options:
        known = found[name_of(option)].get((option.stack, option.block))
        if known is None or option.error < known.error:
            found[name_of(option)][option.stack, option.block] = option
    rows = []
    for name in sorted(found):
        members = list(found[name].values())
        errors = sorted(o.error for o in members)
        rows.append(
            [
                name,
                str(len(members)),
                f"{sum(o.saved_params for o in members) / total:.1%}",
                f"{errors[0]:.4f} / {errors[len(errors) // 2]:.4f} / {errors[-1]:.4f}",
                f"{math.sqrt(sum(e**2 for e in errors)):.3f}",
            ]
        )
    return rows


def plans_of(analysis: Analysis, candidates: Candidates, options: tuple[WidthOption, ...]) -> list[list[str]]:
    """What the planner makes of depth and the options, without and with each kind."""
    linear = tuple(o for o in options if o.family == "modulation" or "'linear'" in str(o.parts))
    sets = {"low rank and linear": linear}
    for name, group in (("neurons", "ffn"), ("heads", "attention"), ("text", "text")):
        sets[f"... and {name}"] = (*linear, *(o for o in options if o.family == group and o not in linear))
    sets["all"] = options
    rows = []
    for name, allowed in sets.items():
        row = [name]
        for keep in (0.7, 0.5, 0.4):
            made = plan(analysis, replace(candidates, width=allowed), PlanConfig(keep=keep))
            row.append(f"{made.predicted.error:.3f} ({made.predicted.speedup:.2f}x)")
            print(name, keep, describe_plan(made), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--states", type=int, default=12)
    parser.add_argument("--criteria", nargs="+", choices=sorted(CRITERIA), default=sorted(CRITERIA))
    given = parser.parse_args()
    source = ResidentBlocks(load_pipeline("emoji", torch.device("cpu")).transformer)
    analysis = load_artifact(Analysis, given.run / "analysis.json")
    forms = StoredTensors(given.run / "analysis.safetensors")
    quick: dict[str, Any] = {"eval_states": given.states, "steps": 0, "max_candidates": 1, "max_run": 2, "exact": "all"}
    tables = {}
    for criterion in sorted({FitConfig().criterion, *given.criteria}):
        began = time.perf_counter()
        settings = FitConfig(width=GROUPS, criterion=criterion, **quick)
        if criterion != FitConfig().criterion:
            settings = FitConfig(width=GROUPS[1:3], criterion=criterion, width_shares=(0.5,), **quick)
        with tempfile.TemporaryDirectory() as folder:
            found = fit(source, analysis, forms, given.run / "calibration", Path(folder), settings, 0)
        if len(settings.width) == len(GROUPS):
            candidates = load_artifact(Candidates, given.run / "candidates.json")
            plans = plans_of(analysis, candidates, found.width)
        tables[criterion] = rows_of(found.width, analysis.model.params)
        print(criterion, f"{time.perf_counter() - began:.0f} s", *tables[criterion], sep="\n", flush=True)
    head = ["option", "blocks", "saved in all", "error alone: least / median / most", "root of summed squares"]
    kept = FitConfig().criterion
    names = [row[0] for row in next((t for c, t in tables.items() if c != kept), []) if " of " in row[0]]
    by = {c: {row[0]: row for row in table} for c, table in tables.items()}
    text = [
        "# Smaller modules on the embedded teacher, untrained",
        "",
        f"Written by `python benchmarks/width_options.py RUN docs/width.md`: {given.states} held-out states, "
        f"{FitConfig().width_states} training states behind the closed forms, criterion `{kept}`. Error: how far the "
        "final velocity moves, relatively, with one option in one block. Saved: by the option in all of its blocks, "
        "as a share of the transformer.",
        "",
        markdown_table(head, tables[kept]),
        "",
        "## Criteria",
        "",
        "Root of the summed squared errors over all blocks, after the closed-form correction.",
        "",
        markdown_table(["option", *by], [[n, *(by[c][n][4] for c in by)] for n in names]),
        "",
        "## Plans",
        "",
        "Predicted velocity error before distillation (and speed-up from FLOPs) of depth with some of the options, for "
        "a share of the parameters that may stay.",
        "",
        markdown_table(["options", "0.7", "0.5", "0.4"], plans),
    ]
    write_text(given.out, "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
