"""What a model is known by wherever it is, and where the teacher of a run is now."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ppcl.common.files import digest, read_mapping
from ppcl.errors import ArtifactError, ModelError
from ppcl.teacher.loading import EMBEDDED, check_model, fetch_files, is_hub_id, model_path
from ppcl.teacher.stored import counted_files, differences


def model_files(model: str) -> dict[str, str]:
    """What identifies a model, wherever it is: the files that are loaded, see :func:`counted_files`.

    A hub model's files are fetched first: other weights under the same name are another model.

    Raises:
        ModelError: They cannot be fetched or read.
    """
    folder = Path(model_path(model))
    return counted_files(folder if folder.is_dir() else fetch_files(model))


def weights_digest(model: str) -> str:
    """A digest of :func:`model_files`."""
    return digest(model_files(model))


def lasting_name(model: str) -> str:
    """A model's name that holds in any working directory."""
    return str(Path(model).resolve()) if model not in EMBEDDED and Path(model).is_dir() else model


def first_round(run: Path) -> Path:
    """Of a run of several rounds the run of the first one, whose teacher the last one is held to; else the run."""
    place = read_mapping(run / "stages.json").get("first_round")
    return Path(os.path.normpath(run / place)) if isinstance(place, str) else run


def teacher_of(run: Path, given: str | None = None) -> str:
    """Find the teacher of a run, which may have been moved, and make sure that it is that one.

    Args:
        run: The run directory.
        given: Where the user says it is; where it was when the run was made if None, or as far from the run as then.

    Raises:
        ArtifactError: The folder is no run.
        ModelError: The teacher is not there, or another one is.
    """
    ledger = read_mapping(run / "stages.json")
    if not isinstance(ledger.get("model"), str):
        raise ArtifactError(f"{run / 'stages.json'} is damaged (it names no model); copy the run again")
    named = str(ledger["model"])
    beside = ledger.get("teacher_from_here")
    places = [given] if given else [named, *([os.path.normpath(run / beside)] if isinstance(beside, str) else [])]
    model = next((p for p in places if p in EMBEDDED or Path(p).is_dir() or is_hub_id(p)), None)
    if model is None:
        raise ModelError(f"the teacher of {run} is not at {given or named}; say where it is now with --teacher")
    check_model(model)
    made_of: Any = ledger.get("made_of")
    recorded = made_of.get("files") if isinstance(made_of, dict) else None  # older runs have none
    if isinstance(recorded, dict) and (changed := differences(recorded, model_files(model))):
        raise ModelError(f"{model} is not the teacher of {run}: {changed}; say where that is with --teacher")
    return model
