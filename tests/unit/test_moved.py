"""Old import paths that users were promised."""

from __future__ import annotations

import importlib

import pytest

from ppcl.common.moved import MOVED


@pytest.mark.parametrize(
    ("old", "name", "new"),
    [
        ("ppcl.artifacts", "Segment", "ppcl.student.plan"),
        ("ppcl.artifacts", "Analysis", "ppcl.analysis.artifacts"),
        ("ppcl.searches", "choose", "ppcl.pruning.searches"),
        ("ppcl.criteria", "CRITERIA", "ppcl.pruning.criteria"),
        ("ppcl.capture", "velocity", "ppcl.teacher.calls"),
        ("ppcl.student", "start_block", "ppcl.student.assembly"),
    ],
)
def test_an_old_path_gives_the_same_thing_and_warns(old: str, name: str, new: str) -> None:
    with pytest.warns(UserWarning, match=f"{new}.{name} now"):
        thing = getattr(importlib.import_module(old), name)
    assert thing is getattr(importlib.import_module(new), name)


def test_all_old_modules_are_there_and_know_no_other_names() -> None:
    for old, places in MOVED.items():
        module = importlib.import_module(old)
        assert all(importlib.import_module(place) for place in places)
        with pytest.raises(AttributeError, match="nothing_of_this_name"):
            _ = module.nothing_of_this_name
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("ppcl.nowhere")
