"""When two rows of a table are told apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from ppcl.config import EvaluateConfig
from ppcl.eval.intervals import seeds_interval
from ppcl.eval.scoring import Measured, drop, drop_by_prompt, mean_over_seeds
from ppcl.experiments.noise import cell, difference, is_alike


def row(values: list[float], items: list[float]) -> dict[str, Any]:
    """One training seed: a drop for each picture seed, and values by prompt about their mean."""
    mean = float(np.mean(values))
    centred = np.asarray(items) - np.mean(items)
    return {
        "average_drop": mean,
        "picture_seeds": [{"average_drop": value} for value in values],
        "items": {"average_drop": (mean + centred).tolist()},
    }


PROMPTS = np.random.default_rng(0).normal(size=64)


def test_a_student_that_drops_otherwise_with_another_noise_is_not_told_apart() -> None:
    """The figures of one student with two picture seeds: 5.32 and 3.13."""
    first = [row([5.32, 3.13, 4.2], list(PROMPTS))]
    second = [row([4.0, 5.6, 4.9], list(PROMPTS))]
    assert is_alike(first, second, "average_drop")
    same_noise = [row([6.32, 4.13, 5.21], list(PROMPTS))]  # one point more with every noise, and for every prompt
    found = difference(first, same_noise, "average_drop")
    assert found is not None and found.seeds is not None and found.prompts is not None
    assert found.is_told_apart
    assert found.value == pytest.approx(1.0, abs=0.01)
    assert found.seeds.low < 1.0 < found.seeds.high


def test_few_prompts_keep_two_rows_together() -> None:
    """Seeds agree exactly; the prompts do not."""
    first = [row([1.0, 1.1, 1.0], list(PROMPTS))]
    second = [row([1.2, 1.3, 1.2], list(10 * PROMPTS[::-1]))]
    found = difference(first, second, "average_drop")
    assert found is not None and found.seeds is not None and found.seeds.low > 0
    assert not found.is_told_apart


def test_training_seeds_that_scatter_keep_two_rows_together() -> None:
    first = [row([d, d + 0.1, d], list(PROMPTS)) for d in (1.0, 3.0, 2.0)]
    second = [row([d, d + 0.1, d], list(PROMPTS)) for d in (2.0, 4.0, 3.0)]
    found = difference(first, second, "average_drop")
    assert found is not None and found.prompts is not None and found.prompts.low > 0
    assert not found.is_told_apart


def test_one_seed_of_everything_tells_nothing() -> None:
    first, second = [row([1.0], list(PROMPTS))], [row([9.0], list(PROMPTS))]
    found = difference(first, second, "average_drop")
    assert found is not None and found.seeds is None and not found.is_told_apart
    assert difference(first, [{"average_drop": None}], "average_drop") is None


def test_the_interval_over_seeds() -> None:
    one, other = np.array([[1.0], [2.0], [4.0]]), np.array([[5.0], [5.5], [9.0]])
    found = seeds_interval(one, other)
    welch = stats.ttest_ind(other[:, 0], one[:, 0], equal_var=False).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((welch.low, welch.high))
    pictures = seeds_interval(one.T, other.T)
    paired = stats.ttest_rel(other[:, 0], one[:, 0]).confidence_interval(0.95)
    assert pictures is not None
    assert (pictures.low, pictures.high) == pytest.approx((paired.low, paired.high))
    assert seeds_interval(one[:1], other[:1]) is None
    with pytest.raises(ValueError, match="as many picture seeds"):
        seeds_interval(one, other.T)


def test_a_cell_shows_all_three() -> None:
    rows = [row([d, d + 0.5], list(PROMPTS)) for d in (1.0, 2.0)]
    text = cell(rows, "average_drop")
    assert text.startswith("1.75 ± 0.71 t ± 0.35 p (")
    assert cell(rows[:1], "average_drop").startswith("1.25 ± 0.35 p (")
    assert cell([{"velocity_error": 0.5, "intervals": {"velocity_error": [0.4, 0.6]}}], "velocity_error") == (
        "0.500 (0.400 to 0.600)"
    )


def test_the_drop_by_prompt_has_the_drop_as_its_mean_and_nearly_its_interval() -> None:
    draw = np.random.default_rng(1)
    base = draw.uniform(0.5, 1.0, size=128)

    def scores(loss: float) -> dict[str, Measured]:
        clip = base - loss * draw.uniform(0.5, 1.5, size=128)
        hits = (draw.uniform(size=128) < base - loss).astype(float)
        return {"clip_score": Measured(clip.mean(), clip), "retrieval_at_1": Measured(hits.mean(), hits)}

    teacher, student = scores(0.0), scores(0.1)
    exact, found = drop(teacher, student), drop_by_prompt(teacher, student)
    assert exact is not None and found is not None and found.interval is not None
    assert found.value == pytest.approx(exact.value)
    assert (found.interval.low, found.interval.high) == pytest.approx((exact.low, exact.high), rel=0.08)
    assert drop_by_prompt({}, student) is None


def test_the_mean_over_seeds_takes_those_that_have_a_number() -> None:
    with_fid = {"fid": Measured(2.0, np.array([1.0, 3.0])), "a": Measured(1.0, np.array([1.0, 1.0]), is_share=True)}
    found = mean_over_seeds([{"a": with_fid["a"]}, with_fid, {"fid": Measured(4.0, np.array([4.0, 4.0]))}])
    assert found["fid"].value == 3.0
    assert found["fid"].items is not None and found["fid"].items.tolist() == [2.5, 3.5]
    assert found["a"].interval is not None and found["a"].interval.low < 1.0  # Wilson's: two hits prove little


def test_a_run_does_not_depend_on_picture_seeds() -> None:
    settings = EvaluateConfig.model_validate({"picture_seeds": 5})
    assert settings.identity() == EvaluateConfig.model_validate({}).identity()
