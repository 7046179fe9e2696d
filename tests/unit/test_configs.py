"""Every file in configs/ loads, and promises the size that its budget gives."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from published import PUBLISHED, write_config

from ppcl.config import load_config
from ppcl.inspection.model import inspect_model

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
SIZED = [path for path in CONFIGS if path.name != "emoji.yaml"]  # the embedded model's figures are measured ones


def header(path: Path) -> str:
    """The comment on top, as one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return " ".join(
        line.lstrip("# ") for line in lines[: next(i for i, t in enumerate(lines) if not t.startswith("#"))]
    )


def test_there_are_configs():
    assert {
        *("emoji", "qwen_image_14b", "qwen_image_12b", "qwen_image_10b", "flux_dev_8b", "flux_dev_6b5"),
        *("sd35_large", "z_image", "wan"),
    } <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_loads_and_says_what_it_is_for(path):
    config = load_config([path], [])
    kind, value = config.plan.budget
    assert kind == "keep"
    assert 0 < value < 1
    for word in ("Command:", "Hardware:", "Expected:"):
        assert word in header(path)
    if path in SIZED:
        assert f"--config configs/devices/24gb.yaml --config configs/{path.name}" in header(path)
        assert "Not run by this project" in header(path)


@pytest.mark.parametrize("path", SIZED, ids=lambda path: path.stem)
def test_header_has_the_size_and_speed_of_the_depth_only_plan(path, tmp_path):
    text = header(path)
    model = re.search(r"ppcl compress (\S+)", text).group(1)
    config = load_config([path], [])
    folder = write_config(tmp_path, PUBLISHED[model])
    found = inspect_model(
        str(folder), config.plan, config.fit.max_run, height=config.capture.height, width=config.capture.width
    )
    best = found.choices[0]
    blocks = " + ".join(str(count) for count in best.blocks.values())
    assert f"Expected:  {best.params:,} parameters" in text
    assert f", {blocks} blocks, predicted {best.speedup:.2f}x as fast" in text
    assert best.param_ratio <= config.plan.keep < best.param_ratio + 0.002  # the budget is not looser than it need be
    assert f"-> {best.params / 1e9:.1f}B" in text or f"-> {best.params / 1e9:.2f}B" in text
    for dual, single, speed in re.findall(r"(\d+) \+ (\d+)(?: blocks are as large| too)? \((\d\.\d\d)x\)", text):
        split = next(rung for rung in found.choices if list(rung.blocks.values()) == [int(dual), int(single)])
        assert split.params == pytest.approx(best.params, rel=1e-4)
        assert f"{split.speedup:.2f}" == speed


@pytest.fixture
def headers(monkeypatch):
    """The command that writes the estimates in the headers."""
    monkeypatch.syspath_prepend(str(CONFIGS[0].parents[1] / "benchmarks"))
    return importlib.import_module("config_headers")


@pytest.mark.parametrize("path", SIZED, ids=lambda path: path.stem)
def test_headers_are_what_their_command_writes_and_every_run_fits(path, headers):
    assert headers.with_header(path) == path.read_text(encoding="utf-8")
    estimates = dict(headers.estimates_of(path))
    assert [device.stem for device in estimates] == ["12gb", "24gb", "80gb", "8x80gb"]
    assert all(not found.too_large for found in estimates.values())


def test_device_files_say_what_they_are_for(headers):
    for device in headers.device_files().values():
        for word in ("Command:", "Hardware:", "Expected:", f"--config configs/devices/{device.name}"):
            assert word in header(device)


@pytest.mark.parametrize("path", sorted((CONFIGS[0].parent / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_launcher_configs_are_read_by_accelerate(path):
    from accelerate.commands.config.config_args import load_config_from_file

    for word in ("Command:", "Hardware:", "Expected:", f"--config_file configs/accelerate/{path.name}", "--processes"):
        assert word in header(path)
    assert load_config_from_file(str(path)).distributed_type.value == "MULTI_GPU"
