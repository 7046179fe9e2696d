"""The time that is left of a whole run."""

import pytest

from ppcl.run.outlook import time_left

EXPECTED = {"capture": 10.0, "fit": 20.0, "distill": 70.0}


@pytest.mark.parametrize(
    ("taken", "left"),
    [
        ({}, 100.0),
        ({"capture": 30.0}, 270.0),  # three times as slow as expected
        ({"capture": 0.0}, 90.0),  # was done before, and tells nothing of the pace
        ({"capture": 0.0, "fit": 10.0}, 35.0),
        ({"capture": 10.0, "fit": 20.0, "distill": 70.0, "report": 1.0}, 0.0),
    ],
)
def test_the_stages_ahead_go_on_at_the_pace_of_those_behind(taken: dict[str, float], left: float) -> None:
    assert time_left(EXPECTED, taken) == pytest.approx(left)


def test_nothing_is_said_where_nothing_is_known() -> None:
    assert time_left({}, {"capture": 3.0}) is None
