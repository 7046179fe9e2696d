"""A run on captioned pictures of which some cannot be used: it goes on, or stops with one line."""

from __future__ import annotations

import json
import logging
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ppcl.config import load_config
from ppcl.run import Run


def write_data(folder: Path, broken: bool) -> Path:
    """Ten samples of five captions, and beside them one of everything that can be wrong."""
    folder.mkdir()
    rows = []
    for number in range(0 if broken else 10):
        shape = ((24, 24), (16, 30))[number % 2]
        noise = torch.randint(0, 256, (*shape, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"{('red', 'blue', 'old', 'tiny', 'a')[number % 5]} ship"})
    (folder / "junk.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    rows += [{"file_name": "junk.png", "text": "a boat"}, {"file_name": "0.png", "text": " "}]
    rows += [{"file_name": "gone.png", "text": "a house"}]
    (folder / "metadata.jsonl").write_text("\n".join([*map(json.dumps, rows), '{"file_name": "0.p']))
    return folder


def test_a_run_goes_on_past_bad_samples_and_wandb(
    tiny_model: Path,
    prompts_file: Path,
    small_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(**_: object) -> None:
        raise ConnectionError("api.wandb.ai is unreachable\nfor a long reason")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fail, teardown=lambda: None))
    data = write_data(tmp_path / "data", broken=False)
    changes = [f"capture.data={data}", "capture.num_prompts=20", "distill.output_steps=4", "distill.fresh=20"]
    changes += ["wandb=online"]
    config = load_config([small_config], [*changes, "distill.sample_every=2", "distill.sample_prompts=2"])
    out = tmp_path / "run"
    run = Run(str(tiny_model), out, config, prompts_file, "test")
    for stage in ("capture", "analyze", "fit", "plan", "distill", "export"):
        assert run.run(stage)
    reasons = [json.loads(line)["reason"] for line in (out / "calibration" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(reasons) == ["bad caption line", "corrupt picture", "empty caption", "missing picture"]
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["stage"] == "distill.output"] == [0, 1, 2, 3]
    drawn = [row for row in rows if row["stage"] == "samples"]
    assert [row["picture"] for row in drawn] == ["samples/step-000002.png", "samples/step-000004.png"]
    for row in drawn:
        with Image.open(out / row["picture"]) as sheet:
            assert sheet.size == (32, 16)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert sum("wandb" in text for text in said) == 2 and not any("\n" in text for text in said)
    assert any("10 samples are used; left out: 1 bad caption line, 1 corrupt picture" in text for text in said)
    # the same command again: nothing is done again, and another number of sheets changes no result
    other = load_config([small_config], changes)
    del run
    again = Run(str(tiny_model), out, other, prompts_file, "test")
    assert not any(again.run(stage) for stage in ("capture", "analyze", "fit", "plan", "distill", "export"))


def test_nothing_usable_is_one_line_and_keeps_what_was_there(
    refuses, tiny_model: Path, prompts_file: Path, small_config: Path, tmp_path: Path
) -> None:
    data = write_data(tmp_path / "data", broken=True)
    common = ("capture", tiny_model, "--out", tmp_path / "run", "--config", small_config, "--prompts", prompts_file)
    refuses(*common, "--set", f"capture.data={data}", says=("0 usable samples", "1 corrupt picture", "skipped.jsonl"))
    for name, says in (
        (tmp_path / "none", "is not there"),
        (tmp_path / "none-{000..002}.tar", "no such shard"),
        ("hub:owner/none", "pip install 'ppcl[data]'" if find_spec("datasets") is None else "cannot be read"),
    ):
        refuses(*common, "--set", f"capture.data={name}", says=(says,))
