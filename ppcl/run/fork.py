"""A run beside another one: the same capture and analysis, and a fit stage of its own."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ppcl.common.artifacts import save_artifact
from ppcl.common.files import digest, link_file, read_mapping, remove, write_json
from ppcl.common.folders import LEDGER
from ppcl.common.outside import inside
from ppcl.config import FitConfig
from ppcl.pruning.artifacts import WidthOption
from ppcl.run.run import Run
from ppcl.run.session import Session
from ppcl.run.stages import STAGES

SHARED = ("capture", "analyze")


def fork(session: Session, criterion: str, settings: Mapping[str, Any]) -> Session:
    """A session of a run in ``RUN/fits/<criterion>`` whose fit stage is done with other settings.

    Args:
        session: Of a run whose fit stage is done; the loaded teacher is shared.
        criterion: What scores neurons and heads.
        settings: Of the fit stage, beside the criterion.

    Raises:
        UserError: The criterion does not fit the family.
    """
    folder = session.out / "fits" / re.sub(r"[^A-Za-z0-9]+", "-", criterion)
    ledger = read_mapping(session.out / LEDGER)
    shared = {stage: ledger[stage] for stage in SHARED}
    files = shared_files(session.out, shared)
    path = folder / LEDGER
    if path.is_file() and {name: read_mapping(path).get(name) for name in SHARED} != shared:
        remove(folder)
    if not path.is_file():
        remove(folder)
        for source in files:
            place = folder / source.relative_to(session.out)
            place.parent.mkdir(parents=True, exist_ok=True)
            if source.is_file() and not link_file(source, place):
                shutil.copyfile(source, place)
        rest = {name: value for name, value in ledger.items() if not isinstance(value, dict) and "." not in name}
        write_json(path, {**rest, **shared})
    fit = FitConfig.model_validate({**session.config.fit.model_dump(), **settings, "criterion": criterion})
    config = session.config.model_copy(update={"fit": fit})
    run = Run(session.model, folder, config, session.prompts, session.command)
    run.keep_whole()
    run.teacher = session.teacher  # one teacher in memory is enough
    run.run("fit")
    _share_times(session, run)
    return run


def shared_files(folder: Path, records: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """What stages wrote, by their records in a run's ledger.

    Raises:
        ArtifactError: The ledger names something outside of the run.
    """
    names = (name for stage, record in records.items() for name in (*STAGES[stage].products, *record["files"]))
    return [inside(folder, name, str(folder / LEDGER)) for name in names]


def _share_times(session: Session, run: Session) -> None:
    """Let all criteria plan with the times that were measured first: units of one number take one time."""
    path, candidates = session.out / "fits" / "times.json", run.candidates
    fitted = session.depends("fit")

    def key(option: WidthOption) -> str:
        parts = sorted((name, part["kind"], part["size"]) for name, part in option.parts.items())
        return digest(fitted, option.stack, option.block, parts)

    first = {key(option): option.saved_time for option in session.candidates.width}
    times = first | (read_mapping(path) if path.is_file() else {})
    width = tuple(replace(o, saved_time=times.setdefault(key(o), o.saved_time)) for o in candidates.width)
    if width != candidates.width:
        save_artifact(replace(candidates, width=width), run.out / "candidates.json")
    write_json(path, times)
