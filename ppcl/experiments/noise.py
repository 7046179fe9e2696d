"""How sure the rows of a table are, and when two of them are told apart; one rule for every experiment.

Three things vary when an experiment is repeated: the training seeds, the noise that pictures are drawn from, and the
prompts. A row is one training per seed, each of which drew every prompt with the same picture seeds. Two rows are told
apart where 0 lies outside both 95% intervals of their difference: over prompts (a bootstrap, paired by prompt) and
over seeds (of training, and of pictures, which both rows drew).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppcl.common.tables import measured, number, with_limits
from ppcl.eval.intervals import Array, Interval, interval, seeds_interval
from ppcl.eval.metrics import SHARES
from ppcl.eval.scoring import Measured

Rows = Sequence[Mapping[str, Any]]  # for each training seed the numbers of a row, see compare.run_row
READING = (
    "Each number is a mean; ± its standard deviation over training seeds (t) and over picture seeds (p), where there "
    "are several; in brackets: its 95% bootstrap interval over prompts (velocity errors: over states, of one training "
    "seed). Two rows are told apart where 0 lies outside both 95% intervals of their difference: over prompts (paired) "
    "and over seeds (t interval; of one training seed, picture seeds alone)."
)


@dataclass(frozen=True)
class Difference:
    """What a second row has more than a first one.

    Attributes:
        value: The difference of the means.
        prompts: Its interval over prompts; None for a number that is no mean over prompts.
        seeds: Its interval over training and picture seeds; None where there is one of each.
    """

    value: float
    prompts: Interval | None
    seeds: Interval | None

    @property
    def is_told_apart(self) -> bool:
        """Whether no known interval holds 0; never where seeds say nothing."""
        intervals = [limits for limits in (self.prompts, self.seeds) if limits is not None]
        return self.seeds is not None and not any(limits.low <= 0 <= limits.high for limits in intervals)

    def __str__(self) -> str:
        """The intervals, as in ``prompts 0.1 to 0.9, seeds -0.2 to 1.2``."""
        named = (("prompts", self.prompts), ("seeds", self.seeds))
        return ", ".join(f"{name} {number(i.low, 2)} to {number(i.high, 2)}" for name, i in named if i) or "of one seed"


def without_items(rows: Rows) -> list[dict[str, Any]]:
    """Rows as a table's file holds them; the values by prompt stay beside the pictures."""
    return [{name: value for name, value in row.items() if name != "items"} for row in rows]


def by_seed(rows: Rows, name: str) -> Array:
    """(training seeds, picture seeds) values of a number; one column where pictures have no part in it."""
    columns = [[each.get(name) for each in row.get("picture_seeds", [])] for row in rows]
    kept = [[value for value in values if value is not None] for values in columns]  # FID's reference has no FID
    if not all(kept):
        kept = [[row[name]] for row in rows if row.get(name) is not None]
    return np.asarray(kept, dtype=np.float64)


def by_prompt(rows: Rows, name: str) -> Array | None:
    """(prompts,) values of a number, mean over the training seeds; None where it is no mean over prompts."""
    items = [row.get("items", {}).get(name) for row in rows]
    return np.mean(items, axis=0) if items and None not in items else None


def difference(first: Rows, second: Rows, name: str) -> Difference | None:
    """What the second row has more of a number than the first; None where either does not have it."""
    seeds = by_seed(first, name), by_seed(second, name)
    if not all(values.size for values in seeds):
        return None
    items = by_prompt(first, name), by_prompt(second, name)
    paired = interval([items[1] - items[0]]) if items[0] is not None and items[1] is not None else None
    return Difference(float(seeds[1].mean() - seeds[0].mean()), paired, seeds_interval(*seeds))


def is_alike(first: Rows, second: Rows, name: str) -> bool:
    """Whether two rows have a number and cannot be told apart by it."""
    gap = difference(first, second, name)
    return gap is not None and not gap.is_told_apart


def cell(rows: Rows, name: str) -> str:
    """A number of a row for a table: mean, spread over training and picture seeds, interval over prompts."""
    values, items = by_seed(rows, name), by_prompt(rows, name)
    if items is None or not values.size:
        return measured(rows, name) + (" t" if len(rows) > 1 else "")
    training, pictures = values.mean(1), values.mean(0)
    spreads = [(training, "t"), (pictures, "p")]
    around = [f" ± {number(float(v.std(ddof=1)), 2)} {kind}" for v, kind in spreads if len(v) > 1]
    value = float(values.mean())
    limits = Measured(value, items, is_share=name in SHARES).interval
    text = with_limits(value, (limits.low, limits.high) if limits else None)
    mean, bracket, rest = text.partition(" (")
    return mean + "".join(around) + bracket + rest
