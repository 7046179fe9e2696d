"""Write what a run takes into the headers of configs/: each model's file with each file of configs/devices.

    python benchmarks/config_headers.py

By arithmetic on the configs of the published models (:mod:`ppcl.inspection.estimate`), without weights. ``--check``
writes nothing and fails where a header says something else.
``python benchmarks/full_size.py --estimate --table docs/full_size.md`` writes all stages of some of them to a document.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ppcl.config import load_config
from ppcl.inspection.estimate import Estimate, estimate_of, estimate_table
from ppcl.inspection.hardware import PEAKS, SHARE, parse_hardware
from ppcl.inspection.shapes import Blueprint, blueprint_of

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "unit"))  # where the configs of the published models are

from published import PUBLISHED, write_config  # noqa: E402

CONFIGS = ROOT / "configs"
BEGINS, ENDS = "# Hardware:", "# Expected:"
MODEL = r"ppcl compress (\S+)"


def device_files() -> dict[str, Path]:
    """The files of configs/devices by their machine, as ``--device`` takes it."""
    files = sorted((CONFIGS / "devices").glob("*.yaml"), key=lambda path: (len(path.stem), path.stem))
    return {_field(path, r"Hardware:\s+(\S+)"): path for path in files}


def model_files() -> list[Path]:
    """The files of published models."""
    return [path for path in sorted(CONFIGS.glob("*.yaml")) if path.stem != "emoji"]


def _field(path: Path, pattern: str) -> str:
    match = re.search(pattern, path.read_text(encoding="utf-8"))
    if match is None:
        raise SystemExit(f"the header of {path} lacks {pattern}")
    return match[1]


@cache
def counted(name: str, height: int | None, width: int | None, frames: int | None) -> Blueprint:
    """What the cost of a published model depends on; several files are of one model."""
    with tempfile.TemporaryDirectory() as folder:
        return blueprint_of(str(write_config(Path(folder), PUBLISHED[name])), height, width, frames)


def estimates_of(path: Path) -> Iterator[tuple[Path, Estimate]]:
    """What the model of a file takes with each file of devices."""
    name, capture = _field(path, MODEL), load_config([path], []).capture
    blueprint = counted(name, capture.height, capture.width, capture.num_frames)
    for hardware, device in device_files().items():
        config = load_config([device, path], [])
        yield device, estimate_of(name, blueprint, config, parse_hardware(hardware), config.blocks)


def lines_of(path: Path) -> list[str]:
    """The generated lines of a file's header."""
    lines = [
        f"{BEGINS}  Not run by this project: quality is not known. Estimates: peaks of all stages, hours in all, by",
        "#            arithmetic (python benchmarks/config_headers.py; each stage: ppcl inspect --estimate):",
    ]
    for device, found in estimates_of(path):
        rest = f"{found.ram / 1e9:.0f} GB of RAM, {found.disk / 1e9:.0f} GB of disk, {found.seconds / 3600:.1f} hours"
        lines.append(
            f"#            devices/{device.name}: {found.device / 1e9:.1f} GB of {found.memory / 1e9:.0f}; {rest}"
        )
    return lines


def with_header(path: Path) -> str:
    """A file's text with a header that is up to date."""
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGINS)
    _, _, after = rest.partition(ENDS)
    return before + "\n".join([*lines_of(path), ENDS + after])


def stage_table(names: tuple[str, ...] = ("qwen_image_10b", "flux_dev_6b5")) -> str:
    """All stages of some files on one card of each size, as a document; and what they come to on one H100."""
    text = [
        "# A run at full size, stage by stage, by arithmetic",
        "Not measured: FLOPs counted on meta tensors, activations on fake ones, all else from shapes "
        "(`ppcl/inspection/stage_costs.py`); `ppcl inspect MODEL --estimate` prints the same of any model and machine. "
        "1024 pixels, bfloat16, blocks streamed. Device, RAM and disk are the stage's peaks; the disk is the run "
        "directory, beside the teacher's own files. What takes most of it: in fit the fitted candidates "
        "and the states at the ends of open runs, of those that are drawn; in distill the finished substitutes, the "
        "bundle, and three levels of states beside the checkpoints of one substitute (four without them in the carried "
        "stage).",
    ]
    for name in names:
        path = CONFIGS / f"{name}.yaml"
        found = {d.stem: e for d, e in estimates_of(path) if "x" not in d.stem}
        text += [f"## {_field(path, MODEL)}, `configs/{name}.yaml`", estimate_table(found)]
        text += [_in_words(device, estimate) for device, estimate in found.items()]
    return "\n\n".join(text)


def _in_words(device: str, found: Estimate) -> str:
    flops = sum(stage.flops for stage in found.stages)
    hours = flops / (SHARE * PEAKS["H100"]) / 3600
    place = next(stage.stage for stage in found.stages if stage.disk == found.disk)
    before = max(stage.disk for stage in found.stages[:2])
    return (
        f"`configs/devices/{device}.yaml` on {found.hardware}: {flops:.2g} FLOPs, which are {hours:.1f} hours of one "
        f"H100 at {SHARE * PEAKS['H100'] / 1e12:.0f} TFLOPS ({SHARE:.0%} of its peak) if nothing waits for files; "
        f"{found.seconds / 3600:.1f} hours on this machine with what does. Disk beside the teacher: at most "
        f"{found.disk / found.weights:.1f} times its weights (in {place}), {before / found.weights:.1f} times up to "
        f"analyze. Assumed: {'; '.join(found.assumptions)}."
    )


def main(argv: list[str] | None = None) -> list[str]:
    """Write the headers; returns the names of the files that changed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a header is old")
    args = parser.parse_args(argv)
    changed = []
    for path in model_files():
        text = with_header(path)
        if text != path.read_text(encoding="utf-8"):
            changed.append(path.name)
            if not args.check:
                path.write_text(text, encoding="utf-8")
    print(f"changed: {', '.join(changed) or 'nothing'}")
    if args.check and changed:
        raise SystemExit(1)
    return changed


if __name__ == "__main__":
    main()
