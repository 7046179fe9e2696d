"""A run: the stages one after another in one directory, resumed by the same command.

A stage that is done is skipped while everything it depended on (its config section, the seed, the stages before it)
stays the same and its files are there. A changed config runs the stage and all that follow again; what a user can have
got wrong is found before anything older is removed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl.common.artifacts import load_artifact
from ppcl.common.files import write_text
from ppcl.config import RunConfig
from ppcl.errors import UserError
from ppcl.run.folder import RunFolder
from ppcl.run.record import changed_settings, record_of
from ppcl.run.session import Session
from ppcl.run.stage import ORDER, Stage
from ppcl.run.stages import STAGES


class Run(Session):
    """A run directory and what its stages share; see :class:`Session` for the arguments.

    Raises:
        ModelError: There is no such model.
        ArtifactError: The directory is somebody else's, or lies in the model's.
    """

    def __init__(
        self,
        model: str,
        out: Path,
        config: RunConfig,
        prompts: Path | None = None,
        command: str = "",
        first: Session | None = None,
        beside: Session | None = None,
    ) -> None:
        super().__init__(model, out, config, prompts, command, first, beside)
        from ppcl.teacher.origin import lasting_name

        first_round = os.path.relpath(first.out, out) if first else None
        self.folder = RunFolder(out, lasting_name(model), self.identity, self.made_of, first_round)
        self.group.barrier()  # all have looked at the directory before the first one writes into it

    def is_done(self, name: str) -> bool:
        """Whether a stage ran with what it depends on now, and its files are there."""
        return self.folder.is_done(STAGES[name], self.depends(name))

    def through(self, name: str) -> None:
        """Run all stages up to one and that one, as far as they are not done."""
        for stage in ORDER[: ORDER.index(name) + 1]:
            self.run(stage)

    def hold(self) -> None:
        """Take the directory for what comes after the stages, which takes it only where one must run.

        Raises:
            UserError: Another process works here.
        """
        self.group.on_main(self.folder.lock)

    def run(self, name: str) -> bool:
        """Run a stage unless it is done; returns whether it ran.

        Raises:
            UserError: A stage before it is not done, another process works here, or the stage failed.
        """
        stage, prepared = STAGES[name], None

        def begin() -> bool:
            nonlocal prepared
            must_run, prepared = self._begin(stage)
            return must_run

        if not self.group.on_main(begin):
            return False
        began = time.perf_counter()
        if stage.is_shared:
            stage.work(self, prepared)
        else:
            self.group.on_main(lambda: stage.work(self, prepared))
        wanted, seconds = self.depends(name), time.perf_counter() - began
        self.group.on_main(lambda: self.folder.finish(stage, wanted, seconds, self.command))
        return True

    def _begin(self, stage: Stage) -> tuple[bool, Any]:
        """Make the directory ready for a stage.

        Returns:
            Whether the stage must run, and what it prepared.
        """
        position = ORDER.index(stage.name)
        before = ORDER[position - 1] if position else None
        if before and not self.is_done(before):
            raise UserError(f"ppcl {stage.name} needs the stage before it; run ppcl {before} first, or ppcl compress")
        if self.is_done(stage.name):
            return False, None
        self._check_inputs(stage)
        prepared = stage.prepare(self)
        self.folder.lock()
        if self.is_done(stage.name):  # by a process that has just left
            return False, None
        later = [STAGES[name] for name in ORDER[position + 1 :]]
        changes = changed_settings(self.out / "config.yaml", self.config, stage.name)
        self.folder.begin(stage, self.depends(stage.name), later, changes)
        write_text(self.out / "config.yaml", record_of(self.origin.model, self.command, self.config, str(self.device)))
        return True, prepared

    def _check_inputs(self, stage: Stage) -> None:
        """Read what a stage starts from, as far as that is cheap.

        Raises:
            ArtifactError: A file is missing, damaged, of another schema, or not what the run wrote.
        """
        for name, kind in stage.inputs.items():
            path = self.out / name
            if kind is not None:
                load_artifact(kind, path)
            for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
                if file.suffix == ".safetensors":
                    self.folder.check_tensors(str(file.relative_to(self.out)))


@dataclass(frozen=True)
class Round:
    """A part of what ``ppcl compress`` does: some stages of a run; there are several rounds, or two transformers.

    Attributes:
        run: The run.
        stages: Those of its stages that come now.
        title: Which part it is, for the screen; empty where there is one.
    """

    run: Run
    stages: Sequence[str]
    title: str = ""


def open_run(model: str, out: Path, config: RunConfig, prompts: Path | None = None, command: str = "") -> Run:
    """Open a run directory, new or begun; its ``run(stage)`` runs a stage. For the arguments see :class:`Session`."""
    return Run(model, out, config, prompts, command)
