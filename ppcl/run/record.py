"""What a run was made with: model, command, resolved config, versions, machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import yaml

from ppcl import __version__
from ppcl.common.files import read_yaml
from ppcl.common.tables import PACKAGES
from ppcl.config import RunConfig
from ppcl.errors import UserError


def record_of(model: str, command: str, config: RunConfig, device: str) -> str:
    """Return the text of ``RUN/config.yaml``."""
    record = {
        "model": model,
        "command": command,
        "seed": config.seed,
        "device": f"{device} ({platform.processor() or platform.machine()}, {os.cpu_count()} cores)",
        "python": sys.version.split()[0],
        "versions": {"ppcl": __version__, **{name: _version(name) for name in (*PACKAGES, "torchmetrics")}},
        "git_commit": _commit(),
        "config": config.model_dump(mode="json"),
    }
    return str(yaml.safe_dump(record, sort_keys=False, allow_unicode=True))


def changed_settings(record: Path, config: RunConfig, section: str) -> list[str]:
    """What differs between ``RUN/config.yaml`` and a config in the settings that a stage reads.

    Args:
        record: The file; one that is missing or damaged says nothing.
        config: Of now.
        section: The stage's section.

    Returns:
        Lines like ``capture.height 48 -> 512``.
    """
    try:
        old = read_yaml(record)["config"]
        settings = getattr(config, section)
        now = settings.model_dump(mode="json")
        read = [key for key in settings.identity() if key in now]  # the content of a user's file is not in the record
        keys = {f"{section}.{key}": (old[section].get(key), key) for key in read}
    except (UserError, KeyError, TypeError, AttributeError):
        return []
    changes = [f"{name} {was} -> {now[key]}" for name, (was, key) in keys.items() if was != now[key]]
    if old.get("precision") != config.precision:
        changes.append(f"precision {old.get('precision')} -> {config.precision}")
    return changes


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that runs, if it is one."""
    try:
        here = Path(__file__).resolve().parent
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None
