"""How near are prices by a backward sweep to exact costs? On the embedded teacher, or on a tiny model of every family.

    python benchmarks/prices.py docs/prices.md --run RUN
    python benchmarks/prices.py docs/prices_families.md

RUN has the states and the analysis of `ppcl analyze emoji --out RUN`. The fit stage is run with `fit.exact=none` and
with `all`, without fitting: every smaller module and every run of blocks by its chained probes gets a price and an
exact cost. Without a run the models are the random ones of tests/adapters, whose states are few and small.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import torch
from scipy.stats import spearmanr
from torch import nn

from ppcl.analysis.analyze import analyze
from ppcl.analysis.artifacts import Analysis
from ppcl.common.artifacts import load_artifact
from ppcl.common.files import write_text
from ppcl.common.tables import markdown_table
from ppcl.common.tensor_files import StoredTensors, write_tensors
from ppcl.config import AnalyzeConfig, FitConfig
from ppcl.config.names import Width
from ppcl.distill.fit import fit
from ppcl.teacher.blocks import Blocks, ResidentBlocks
from ppcl.teacher.call_arguments import flatten
from ppcl.teacher.calls import velocity
from ppcl.teacher.description import describe
from ppcl.teacher.loading import load_pipeline

CALLS = 8  # of a tiny model, two samples each; every second one is held out
BOUNDS = (0.003, 0.01, 0.03, 0.1, 0.3)  # of exact costs: rows of the table


Pairs = dict[str, list[tuple[float, float]]]  # (price, exact cost) of options, by kind


def pairs_of(source: Blocks, analysis: Analysis, run: Path, settings: FitConfig) -> Pairs:
    """Prices and exact costs of all options of an analyzed run: the fit stage with the one and with the other."""
    forms = StoredTensors(run / "analysis.safetensors")
    errors: dict[str, dict[str, tuple[str, float]]] = {}
    for exact in ("none", "all"):
        asked = settings.model_copy(update={"exact": exact})
        with tempfile.TemporaryDirectory() as folder:
            candidates = fit(source, analysis, forms, run / "calibration", Path(folder), asked, 0)
        errors[exact] = {option.name: (f"width: {option.family}", option.error) for option in candidates.width}
        runs = candidates.candidates
        errors[exact] |= {c.name: (f"runs of {c.last - c.first + 1}", c.probe_error) for c in runs}
    pairs: Pairs = {}
    for name, (kind, price) in errors["none"].items():
        pairs.setdefault(kind, []).append((price, errors["all"][name][1]))
    return pairs


def family_pairs(make: Callable[[], tuple[nn.Module, dict[str, Any]]], settings: FitConfig) -> Pairs:
    """The same of a tiny random model, which is analyzed first on calls of other random numbers."""
    torch.manual_seed(0)
    transformer = make()[0].eval().requires_grad_(False)
    source = ResidentBlocks(transformer)
    with tempfile.TemporaryDirectory() as folder:
        states = Path(folder) / "calibration"
        for number in range(CALLS):
            torch.manual_seed(number + 1)
            arguments, tensors = make()[1], {}
            node = flatten(arguments, "00", tensors)
            with torch.no_grad():
                tensors["velocity.00"] = velocity(transformer, arguments)
            split = "held-out" if number % 2 else "train"
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # names that share memory
            write_tensors(states / f"{split}-{number:04d}.safetensors", tensors, {"calls": [node], "alias": {}})
        info = describe(SimpleNamespace(transformer=transformer, components={}))
        analysis = analyze(source, info, states, Path(folder), AnalyzeConfig(batch_size=2, cka_tokens=16), 0)
        return pairs_of(source, analysis, Path(folder), settings)


def row(name: str, pairs: list[tuple[float, float]]) -> list[str]:
    """Number, rank correlation, and what share of an exact cost a price is."""
    ratios = torch.tensor([price / cost for price, cost in pairs if cost > 0])
    quantiles = torch.quantile(ratios, torch.tensor([0.05, 0.5, 0.95])).tolist()
    rank = f"{float(spearmanr(*zip(*pairs, strict=True)).statistic):.3f}" if len(pairs) > 2 else ""
    return [name, str(len(pairs)), rank, f"{quantiles[1]:.2f}", f"{quantiles[0]:.2f} to {quantiles[2]:.2f}"]


def of_run(run: Path, settings: FitConfig) -> list[list[str]]:
    """Rows of the embedded teacher: by kind of option, and by exact cost."""
    source = ResidentBlocks(load_pipeline("emoji", torch.device("cpu")).transformer)
    pairs = pairs_of(source, load_artifact(Analysis, run / "analysis.json"), run, settings)
    rows = [row(name, pairs[name]) for name in sorted(pairs, reverse=True)]
    every = [pair for kind in pairs.values() for pair in kind]
    for low, high in zip((0.0, *BOUNDS), (*BOUNDS, float("inf")), strict=True):
        within = [pair for pair in every if low <= pair[1] < high]
        if within:
            rows.append(row(f"exact cost {low:g} to {high:g}", within))
    return rows


def of_families(names: list[str] | None, settings: FitConfig) -> list[list[str]]:
    """A row of every family, or of these, of all its options."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "adapters"))
    tiny = importlib.import_module("tiny").TINY
    rows = []
    for name in names or sorted(tiny):
        every = [pair for kind in family_pairs(tiny[name], settings).values() for pair in kind]
        rows.append(row(name, every))
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="where the table is written")
    parser.add_argument("--run", type=Path, help="an analyzed run of the embedded teacher; tiny models if not given")
    parser.add_argument("--families", nargs="+", help="names of tests/adapters/tiny.py; all if not given")
    parser.add_argument("--states", type=int, default=FitConfig().eval_states, help="held-out states")
    parser.add_argument("--vectors", type=int, default=FitConfig().vectors, help="random vectors a state")
    parser.add_argument("--width", nargs="*", choices=get_args(Width), default=list(FitConfig().width))
    given = parser.parse_args(argv)
    quick = FitConfig(steps=0, max_candidates=1)
    asked = {"width": tuple(given.width), "eval_states": given.states, "vectors": given.vectors}
    settings = quick.model_copy(update=asked)
    rows = of_run(given.run, settings) if given.run else of_families(given.families, settings)
    where, states = "a tiny random model of every family", f"{CALLS} held-out states"
    note = " Of three options a rank correlation says little."
    if given.run:
        where, states, note = "embedded teacher", f"{given.states} held-out states", ""
    header = ["options", "number", "rank correlation", "price / exact: median", "5% to 95%"]
    command = f"python benchmarks/prices.py {given.out}{' --run RUN' if given.run else ''}"
    text = (
        f"# Prices beside exact costs, {where}\n\nWritten by `{command}`: {states}, {given.vectors} random vectors a "
        "state; untrained options, each alone. A price is the norm of an option's products with the gradients of a "
        "backward sweep, an exact cost the relative error of the velocity with the option put "
        f"in.{note}\n\n{markdown_table(header, rows)}\n"
    )
    write_text(given.out, text)
    print(text)


if __name__ == "__main__":
    main()
