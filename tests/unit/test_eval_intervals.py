"""Intervals: coverage where the truth is known, pairing, what has no spread, the verdict."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ppcl.eval.fid import FeatureStatistics, fid
from ppcl.eval.intervals import Interval, drop_interval, interval, share_interval
from ppcl.eval.scoring import caption_measures, differences, drop, limits, measure, reference_of
from ppcl.eval.set_distances import cmmd, frechet_items, kid, kid_items
from ppcl.eval.velocity import StateErrors, by_timestep
from ppcl.eval.verdict import verdict


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny matrices: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_coverage_of_a_mean_of_a_ratio_and_of_a_drop() -> None:
    """95% intervals of 300 experiments with a known truth hold it about 285 times (binomial: 276 to 293)."""
    rng = np.random.default_rng(0)
    held = dict.fromkeys(("skewed mean", "ratio", "drop"), 0)
    for seed in range(300):
        skewed = rng.exponential(2.0, 60)
        base = rng.normal(10, 2, 60)
        other = 0.9 * base + rng.normal(0, 1, 60)  # the same prompts: correlated
        found = {
            "skewed mean": (interval([skewed], resamples=400, seed=seed), 2.0),
            "ratio": (interval([other, base], lambda a, b, axis: a.mean(axis) / b.mean(axis)), 0.9),
            "drop": (drop_interval([base], [other]), 10.0),
        }
        for name, (one, truth) in found.items():
            assert one is not None
            held[name] += one.low <= truth <= one.high
    for name, count in held.items():
        assert 270 <= count <= 294, (name, count)


@pytest.mark.parametrize(("count", "width"), [(80, 8), (60, 96)])  # the second has fewer pictures than features
def test_coverage_of_set_distances(count: int, width: int) -> None:
    """The truth is the mean over many sets of this size: what repeated drawing would give."""
    generator = torch.Generator().manual_seed(1)
    real = torch.randn(400, width, generator=generator, dtype=torch.float64)
    moments = FeatureStatistics()
    moments.update(real)
    found: dict[str, list[Interval]] = {"fid": [], "kid": [], "cmmd": []}
    for _ in range(40):
        drawn = 0.8 * torch.randn(count, width, generator=generator, dtype=torch.float64) + 0.15
        values = (fid(drawn, real), kid(drawn, real))
        items = {
            "fid": frechet_items(drawn, moments.mean, moments.covariance, values[0]),
            "kid": kid_items(drawn, real, values[1]),
            "cmmd": cmmd(drawn, real).items,
        }
        for name, one in items.items():
            found[name].append(interval([one.numpy()], resamples=200))
    for name, ones in found.items():
        truth = np.mean([one.value for one in ones])
        covered = np.mean([one.low <= truth <= one.high for one in ones])
        assert covered >= 0.85, (name, covered)
        width_found = np.mean([one.half_width for one in ones]) / 1.96
        spread = np.std([one.value for one in ones])
        assert 0.75 * spread < width_found < 1.7 * spread, (name, width_found, spread)


def test_items_average_to_the_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn, real = (torch.randn(30, 5, generator=generator) for _ in range(2))
    found = measure(drawn, reference_of(real), None)
    assert found["fid"].value == fid(drawn, real)
    assert found["kid"].value == kid(drawn, real)
    for one in found.values():
        assert one.items is None or float(one.items.mean()) == pytest.approx(one.value)
    assert set(found) == {"fid", "kid", "kid_std", "precision", "density", "recall", "coverage"}
    assert found["recall"].over == "references"
    assert limits(found)["kid_std"] is None


def test_pairing_narrows_what_unpaired_numbers_cannot_tell() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(30, 8, 100)  # prompts differ much, the two models little
    better = base - 0.5 + rng.normal(0, 0.3, 100)
    paired = drop_interval([base], [better])
    assert paired is not None
    assert paired.low > 0.5 and paired.high < 3
    assert interval([base]).half_width / 30 * 100 > 3 * paired.half_width


def test_nothing_to_draw_again() -> None:
    assert interval([[2.0]]) == Interval(2, 2, 2, 1)
    assert interval([[3.0, 3.0, 3.0]]) == Interval(3, 3, 3, 3)
    sure = share_interval([1.0] * 20)
    assert sure.value == sure.high == 1
    assert 0.8 < sure.low < 0.9  # Wilson: 20 hits of 20 do not prove 100%
    assert drop_interval([np.zeros(4)], [np.ones(4)]) is None
    with pytest.raises(ValueError, match="equally long"):
        interval([[1.0, 2.0], [1.0]], lambda a, b, axis: a.mean(axis) - b.mean(axis))
    with pytest.raises(ValueError, match="N > 0"):
        interval([[]])


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert interval([values]) == interval([values])
    assert interval([values], seed=1) != interval([values])
    many = np.random.default_rng(0).normal(size=2500)  # beyond the jackknife's limit
    assert interval([many]).half_width == pytest.approx(1.96 * many.std() / 50, rel=0.1)


def test_drop_and_differences_are_by_prompt() -> None:
    text = torch.eye(6)
    first, second = text + 0.1, (text + 0.1).roll(1, 0)
    sides = [caption_measures(features, text) for features in (first, second)]
    lost = drop(*sides)
    assert lost is not None
    assert lost.value > 50
    assert lost.count == 6
    assert differences(*sides)["clip_score"].value < 0
    none = drop(sides[0], sides[0])
    assert none is not None
    assert (none.value, none.low, none.high) == (0, 0, 0)


def test_velocity_error_by_timestep() -> None:
    steps = np.linspace(1000, 0, 40)
    errors = StateErrors(steps, np.where(steps > 500, 0.04, 0.01) * 9.0, np.full(40, 9.0))
    rows = by_timestep(errors, bins=4)
    assert [round(row["error"], 3) for row in rows] == [0.2, 0.2, 0.1, 0.1]
    assert rows[0]["timestep_high"] == 1000
    assert sum(row["states"] for row in rows) == 40
    found = errors.error
    assert found.value == pytest.approx(0.025**0.5)
    assert found.low < found.value < found.high
    assert by_timestep(StateErrors(np.full(3, np.nan), np.ones(3), np.ones(3))) == []


@pytest.mark.parametrize(
    ("drop_found", "said", "unsaid"),
    [
        (
            Interval(4.0, 3.0, 5.0, 200),
            "B keeps 96.0% of the caption scores of A at 60.0% of the parameters, 1.50x as fast (95%",
            "tell",
        ),
        (Interval(0.1, -0.4, 0.5, 200), "cannot be told apart", "too small"),
        (Interval(3.0, -3.0, 9.0, 100), "too small to tell: about 900 prompts", "apart"),
        (Interval(3.0, 2.9, 3.1, 8), "too small to tell: fewer than 30", "apart"),
        (None, "no caption scores", "keeps"),
    ],
)
def test_verdict_says_when_the_sample_cannot_tell(drop_found: Interval | None, said: str, unsaid: str) -> None:
    line = verdict("B", "A", drop_found, 0.6, 1.5)
    assert said in line
    assert unsaid not in line
