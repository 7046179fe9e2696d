"""The wandb mirror."""

from __future__ import annotations

import sys
from types import SimpleNamespace

from ppcl.training.tracking import Tracker


class FakeWandb:
    """Records what it is told; ``fails`` are the modes out of reach, ``lasts`` the rows it takes."""

    Error = RuntimeError

    def __init__(self, fails=(), lasts=100) -> None:
        self.fails, self.lasts, self.started, self.rows, self.finished = fails, lasts, [], [], 0

    def init(self, **arguments):
        self.started.append(arguments)
        if arguments["mode"] in self.fails:
            raise self.Error("api.wandb.ai is unreachable\nand more")
        return SimpleNamespace(log=self._log, finish=self._finish)

    def teardown(self):
        self.started.append({"mode": "teardown"})

    def _log(self, row):
        if len(self.rows) == self.lasts:
            raise ConnectionResetError("the service is gone\nand more")
        self.rows.append(row)

    def Table(self, columns, data):
        return {"columns": columns, "data": data}

    def Image(self, path, caption=None):
        return (path, caption) if caption else f"picture of {path}"

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


def test_a_picture_is_sent_itself(monkeypatch, tmp_path):
    fake = install(monkeypatch)
    Tracker("online", tmp_path, {"identity": "x"}).log({"stage": "samples", "step": 5, "picture": "samples/5.png"})
    assert fake.rows == [{"samples/step": 5, "samples/picture": f"picture of {tmp_path}/samples/5.png"}]


def test_unreachable_goes_on_offline(monkeypatch, tmp_path, caplog):
    fake = install(monkeypatch, fails=("online",))
    tracker = Tracker("online", tmp_path, {"identity": "x"})
    for step in range(3):
        tracker.log({"stage": "fit", "step": step})
    assert fake.rows == [{"fit/step": step} for step in range(3)]
    assert [arguments["mode"] for arguments in fake.started] == ["online", "teardown", "offline"]
    (said,) = caplog.messages
    assert "out of reach (api.wandb.ai is unreachable)" in said and "\n" not in said


def test_neither_online_nor_offline_goes_on_without(monkeypatch, tmp_path, caplog):
    fake = install(monkeypatch, fails=("online", "offline"))
    tracker = Tracker("online", tmp_path, {"identity": "x"})
    for step in range(3):
        tracker.log({"stage": "fit", "step": step})
    tracker.finish()
    assert (len(fake.started), fake.rows, fake.finished) == (3, [], 0)
    assert len(caplog.messages) == 2 and "log.jsonl alone" in caplog.messages[-1]


def test_wandb_that_dies_on_the_way_ends_nothing(monkeypatch, tmp_path, caplog):
    fake = install(monkeypatch, lasts=1)
    tracker = Tracker("online", tmp_path, {"identity": "x"})
    for step in range(4):
        tracker.log({"stage": "fit", "step": step})
    assert fake.rows == [{"fit/step": 0}]
    (said,) = caplog.messages
    assert "stopped taking rows (the service is gone)" in said


def test_wandb_that_is_not_installed(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    Tracker("offline", tmp_path, {"identity": "x"}).log({"stage": "fit"})
    assert "log.jsonl alone" in caplog.text


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
