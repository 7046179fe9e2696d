"""The wandb mirror."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from ppcl.errors import UserError
from ppcl.tracking import Tracker


class FakeWandb:
    """Records what it is told."""

    Error = RuntimeError

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.started, self.rows, self.finished = fails, [], [], 0

    def init(self, **arguments):
        if self.fails:
            raise self.Error("api.wandb.ai is unreachable\nand more")
        self.started.append(arguments)
        return SimpleNamespace(log=self.rows.append, finish=self._finish)

    def Table(self, columns, data):
        return {"columns": columns, "data": data}

    def Image(self, path, caption):
        return (path, caption)

    def _finish(self):
        self.finished += 1


def install(monkeypatch, **options):
    fake = FakeWandb(**options)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_off_never_starts(monkeypatch, tmp_path):
    fake = install(monkeypatch)
    Tracker("off", tmp_path, {"identity": "x"}).log({"stage": "fit", "loss": 1.0})
    assert fake.started == []


def test_rows_keep_their_keys_under_the_stage(monkeypatch, tmp_path):
    fake = install(monkeypatch)
    tracker = Tracker("offline", tmp_path, {"identity": "x"})
    tracker.log({"stage": "distill.local", "step": 3, "loss": 0.5})
    tracker.log({"stage": "fit", "loss": 0.25})
    tracker.finish()
    assert fake.rows == [{"distill.local/step": 3, "distill.local/loss": 0.5}, {"fit/loss": 0.25}]
    assert [s["mode"] for s in fake.started] == ["offline"]
    assert (fake.started[0]["id"], fake.started[0]["resume"]) == ("x", "allow")
    assert fake.finished == 1


def test_unreachable_is_one_line_with_a_remedy(monkeypatch, tmp_path):
    install(monkeypatch, fails=True)
    with pytest.raises(UserError, match=r"unreachable\); use --set wandb=offline") as caught:
        Tracker("online", tmp_path, {"identity": "x"}).log({"stage": "fit"})
    assert "\n" not in str(caught.value)


def test_an_evaluation_is_a_table_numbers_and_pictures(monkeypatch, tmp_path):
    fake = install(monkeypatch)
    pairs = [(f"prompt {i}", tmp_path / f"{i}.png") for i in range(70)]
    for mode in ("off", "offline"):
        tracker = Tracker(mode, tmp_path, {"identity": "x"})
        tracker.evaluation(["", "B"], [["FID", "3 (2 to 4)"]], {"B/fid": 3.0, "B/kid": None}, {"B": pairs})
    (row,) = fake.rows
    assert row["evaluate/table"] == {"columns": ["", "B"], "data": [["FID", "3 (2 to 4)"]]}
    assert row["evaluate/B/fid"] == 3.0
    assert "evaluate/B/kid" not in row
    assert row["evaluate/pictures/B"][0] == (str(tmp_path / "0.png"), "prompt 0")
    assert len(row["evaluate/pictures/B"]) == 64
