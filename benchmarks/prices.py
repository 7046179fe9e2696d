"""How near are prices by a backward sweep to exact costs? On the embedded teacher, for all options of a run.

    python benchmarks/prices.py RUN docs/prices.md

RUN has the states and the analysis of `ppcl analyze emoji --out RUN`. The fit stage is run once with `fit.exact=all`
and without fitting: every smaller module and every run of blocks by its chained probes gets a price and an exact cost.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import get_args

import torch
from scipy.stats import spearmanr

from ppcl.analysis.artifacts import Analysis
from ppcl.common.artifacts import load_artifact
from ppcl.common.files import StoredTensors, write_text
from ppcl.common.tables import markdown_table
from ppcl.config import FitConfig
from ppcl.config.names import Width
from ppcl.distill.fit import fit
from ppcl.student.assembly import run_name
from ppcl.teacher.blocks import ResidentBlocks
from ppcl.teacher.loading import load_pipeline

BOUNDS = (0.003, 0.01, 0.03, 0.1, 0.3)  # of exact costs: rows of the table


def pairs_of(run: Path, settings: FitConfig) -> dict[str, list[tuple[float, float]]]:
    """(price, exact cost) of all options, by kind."""
    source = ResidentBlocks(load_pipeline("emoji", torch.device("cpu")).transformer)
    analysis = load_artifact(Analysis, run / "analysis.json")
    forms = StoredTensors(run / "analysis.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        candidates = fit(source, analysis, forms, run / "calibration", Path(folder), settings, 0)
        vectors = StoredTensors(Path(folder) / "prices.safetensors")
        pairs: dict[str, list[tuple[float, float]]] = {}
        for option in candidates.width:
            kind = f"width: {option.family}"
            pairs.setdefault(kind, []).append((float(vectors[option.name].norm()), option.error))
        for c in candidates.candidates:
            price = float(vectors[run_name((c.stack, c.first, c.last))].norm())
            pairs.setdefault(f"runs of {c.last - c.first + 1}", []).append((price, c.probe_error))
    return pairs


def row(name: str, pairs: list[tuple[float, float]]) -> list[str]:
    """Number, rank correlation, and what share of an exact cost a price is."""
    ratios = torch.tensor([price / cost for price, cost in pairs if cost > 0])
    quantiles = torch.quantile(ratios, torch.tensor([0.05, 0.5, 0.95])).tolist()
    rank = f"{float(spearmanr(*zip(*pairs, strict=True)).statistic):.3f}" if len(pairs) > 2 else ""
    return [name, str(len(pairs)), rank, f"{quantiles[1]:.2f}", f"{quantiles[0]:.2f} to {quantiles[2]:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--states", type=int, default=FitConfig().eval_states, help="held-out states")
    parser.add_argument("--vectors", type=int, default=FitConfig().vectors, help="random vectors a state")
    parser.add_argument("--width", nargs="*", choices=get_args(Width), default=list(FitConfig().width))
    given = parser.parse_args()
    quick = FitConfig(steps=0, max_candidates=1, exact="all")
    asked = {"width": tuple(given.width), "eval_states": given.states, "vectors": given.vectors}
    settings = quick.model_copy(update=asked)
    pairs = pairs_of(given.run, settings)
    rows = [row(name, pairs[name]) for name in sorted(pairs, reverse=True)]
    every = [pair for kind in pairs.values() for pair in kind]
    for low, high in zip((0.0, *BOUNDS), (*BOUNDS, float("inf")), strict=True):
        within = [pair for pair in every if low <= pair[1] < high]
        if within:
            rows.append(row(f"exact cost {low:g} to {high:g}", within))
    header = ["options", "number", "rank correlation", "price / exact: median", "5% to 95%"]
    text = (
        "# Prices beside exact costs, embedded teacher\n\nWritten by `python benchmarks/prices.py RUN docs/prices.md`: "
        f"{given.states} held-out states, {given.vectors} random vectors a state; untrained options, each alone. A "
        "price is the norm of an option's products with the gradients of a backward sweep, an exact cost the relative "
        f"error of the velocity with the option put in.\n\n{markdown_table(header, rows)}\n"
    )
    write_text(given.out, text)
    print(text)


if __name__ == "__main__":
    main()
