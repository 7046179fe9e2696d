"""The run directory: whose it is, what is done in it, and who works there now. No torch.

``stages.json`` is the ledger. A stage that is done is recorded with a digest of everything it depended on and with the
files it wrote; while the digest stays the same and the files are there it is skipped. A stage that began is recorded as
``<stage>.started``, so that the next attempt knows whether what lies there is its own.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ppcl.common.artifacts import Error
from ppcl.common.files import read_json, remove, write_json
from ppcl.common.folders import LEDGER, check_claim, lock_folder, remove_leftovers
from ppcl.common.tensor_files import header_digest
from ppcl.errors import ArtifactError
from ppcl.run.stage import ORDER, Stage
from ppcl.teacher.stored import differences

logger = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"


class _Record(BaseModel):
    """What the ledger says of a stage that is done."""

    digest: str
    seconds: Error
    files: list[str] = []
    command: str = ""
    tensors: dict[str, str] = {}


class RunFolder:
    """A run directory, claimed for one model with its prompts and seed.

    Args:
        path: The directory; it need not exist.
        model: What the run compresses, for people who read the ledger.
        identity: Digest of the weights, prompts and seed.
        made_of: The same part by part, to say what differs: ``files`` of the model, ``prompts``, ``seed``.
        first_round: Of a later round, where the first one lies, as seen from this directory.

    Raises:
        ArtifactError: The directory is another run's, holds something else, or cannot be read.
    """

    def __init__(
        self,
        path: Path,
        model: str,
        identity: str,
        made_of: Mapping[str, Any] | None = None,
        first_round: str | None = None,
    ) -> None:
        self.path, self.model, self.identity, self.made_of = path, model, identity, dict(made_of or {})
        self.first_round = first_round
        self._is_locked = False
        self.ledger: dict[str, Any] = self._read_ledger()

    def _read_ledger(self) -> dict[str, Any]:
        """Read what is done, or refuse a directory that is another's; nothing is written yet."""
        if (self.path / LEDGER).is_file():
            return self._own_ledger()
        check_claim(self.path, LEDGER, "a run")
        return self._new_ledger()

    def _new_ledger(self) -> dict[str, Any]:
        return {"schema_version": 1, "identity": self.identity, "made_of": self.made_of, **self._where()}

    def _where(self) -> dict[str, str]:
        """The teacher's place: by itself, and as seen from the run, should both be moved together."""
        here = os.path.relpath(self.model, self.path) if Path(self.model).is_absolute() else None
        places = {"model": self.model, "teacher_from_here": here, "first_round": self.first_round}
        return {name: place for name, place in places.items() if place is not None}

    def _own_ledger(self) -> dict[str, Any]:
        try:
            ledger = read_json(self.path / LEDGER)
        except ArtifactError as error:
            reason = str(error).partition("; ")[0]
            raise ArtifactError(f"{reason}; choose another --out or delete {self.path}") from None
        if isinstance(ledger, dict) and ledger.get("identity") == self.identity:
            try:
                for name in ORDER:
                    if isinstance(ledger.get(name), dict):
                        _Record.model_validate(ledger[name], strict=True)
            except ValidationError:
                reason = f"{self.path / LEDGER} is damaged (a stage's record is none)"
                raise ArtifactError(f"{reason}; choose another --out or delete {self.path}") from None
            return {**ledger, **self._where()}  # it may have been moved since
        if isinstance(ledger, dict) and self.first_round is not None and ledger.get("first_round") == self.first_round:
            return self._new_ledger()  # the round before was made again
        held = ledger if isinstance(ledger, dict) else {}
        raise ArtifactError(
            f"{self.path} holds a run of {held.get('model', 'another model')} with other "
            f"{self._what_differs(held.get('made_of'))}; give the run's own, choose another --out or delete it"
        )

    def _what_differs(self, held: Any) -> str:
        """In words, which part of the identity is another one."""
        if not isinstance(held, dict) or not isinstance(held.get("files"), dict):
            return "weights, prompts, evaluate.num_prompts or seed"
        files = differences(held["files"], self.made_of.get("files", {}))
        words = [f"weights ({files})"] if files else []
        words += [name for name in ("prompts", "seed") if held.get(name) != self.made_of.get(name)]
        return " and ".join(words) or "evaluate.num_prompts"

    def lock(self) -> None:
        """Take the directory for as long as this object lives, and clear up after attempts that were killed.

        Raises:
            UserError: Another process works here.
        """
        if self._is_locked:
            return
        weakref.finalize(self, lock_folder(self.path).release)
        self._is_locked = True
        remove_leftovers(self.path)
        self.ledger = self._read_ledger()
        self._clear()  # of a process that was killed between recording its stage and this

    def record_of(self, stage: Stage) -> dict[str, Any] | None:
        """What the ledger says of a stage that was done: ``digest``, ``seconds``, ``files``, ``command``."""
        record = self.ledger.get(stage.name)
        return record if isinstance(record, dict) else None

    def is_done(self, stage: Stage, digest: str) -> bool:
        """Whether a stage ran with what it depends on now, and its files are there."""
        record = self.record_of(stage)
        if record is None or record.get("digest") != digest:
            return False
        return all((self.path / name).exists() for name in (*stage.products, *record.get("files", ())))

    def begin(self, stage: Stage, digest: str, later: Sequence[Stage], changes: Sequence[str] = ()) -> None:
        """Remove what an attempt with other settings left, and note that the stage began.

        Args:
            stage: The stage.
            digest: Of everything it depends on now.
            later: The stages after it, whose products go with its own when it changes.
            changes: Settings of the stage that differ from when it was done, for the warning.
        """
        record = self.record_of(stage)
        has_changed = record is not None and record.get("digest") != digest
        if has_changed:
            logger.warning(
                "%s was made with other settings (%s): %s and what follows are removed and made again",
                self.path,
                "; ".join(changes) or "or by another version",
                stage.name,
            )
            self._forget([stage, *later])
        is_new = record is None or has_changed  # else some of its files went missing, and the rest is kept
        if is_new and self.ledger.get(f"{stage.name}.started") != digest:
            for name in (*stage.products, *stage.on_the_way):
                remove(self.path / name)
        self._write({**self.ledger, f"{stage.name}.started": digest})

    def finish(self, stage: Stage, digest: str, seconds: float, command: str) -> None:
        """Note that a stage is done, with the files that it wrote."""
        ledger = {name: entry for name, entry in self.ledger.items() if name != f"{stage.name}.started"}
        files = self._files_of(stage)
        record = {"digest": digest, "seconds": round(seconds, 2), "files": files, "command": command}
        tensors = [name for name in (*stage.products, *files) if name.endswith(".safetensors")]
        record["tensors"] = {name: header_digest(self.path / name) for name in tensors}
        self._write({**ledger, stage.name: record})
        self._clear()

    def check_tensors(self, name: str) -> None:
        """Refuse a file of tensors with other names, shapes or dtypes than were written.

        Args:
            name: Relative to the run directory.

        Raises:
            ArtifactError: It is damaged, or another's.
        """
        header = header_digest(self.path / name)
        known = [record.get("tensors", {}) for record in self.ledger.values() if isinstance(record, dict)]
        if any(tensors.get(name, header) != header for tensors in known):
            raise ArtifactError(f"{self.path / name} is not what this run wrote; delete it and run again")

    def _clear(self) -> None:
        """Remove training states that no interrupted stage can go on from."""
        if not any(name.endswith(".started") for name in self.ledger):
            remove(self.path / CHECKPOINTS)

    def _files_of(self, stage: Stage) -> list[str]:
        """Files that a stage wrote into its folders, relative to the run directory."""
        files = (p for name in stage.products for p in (self.path / name).rglob("*") if p.is_file())
        return sorted(str(p.relative_to(self.path)) for p in files)

    def _forget(self, stages: Sequence[Stage]) -> None:
        """Remove the products of stages and their records."""
        names = {stage.name for stage in stages}
        self._write({name: entry for name, entry in self.ledger.items() if name not in names})
        for stage in stages:
            for name in stage.products:
                remove(self.path / name)

    def _write(self, ledger: dict[str, Any]) -> None:
        self.ledger = ledger
        write_json(self.path / LEDGER, ledger)
