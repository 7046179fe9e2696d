"""What the folder of a run or of an evaluation holds, read without torch; a missing file is noted, never fatal."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ppcl.analysis.artifacts import Analysis, StackAnalysis
from ppcl.common.artifacts import load_artifact
from ppcl.common.files import read_mapping, read_yaml
from ppcl.common.reading import parse_json, read_bytes
from ppcl.errors import ArtifactError
from ppcl.eval.results import Comparison, Evaluation, load_evaluation
from ppcl.pruning.artifacts import Candidates
from ppcl.student.plan import CompressionPlan

logger = logging.getLogger(__name__)
T = TypeVar("T")
MOST_LOG = 128 << 20  # half a million steps

STAGE_OF = {
    "config.yaml": "every command that starts a run",
    "analysis.json": "the analyze stage",
    "candidates.json": "the fit stage",
    "plan.json": "the plan stage",
    "log.jsonl": "the distill stage",
    "stages.json": "every stage",
    "pipeline": "the export stage",
    "eval/metrics.json": "the evaluate stage",
    "eval": "the evaluate stage",
}


@dataclass(frozen=True)
class RunData:
    """Everything the report shows except the pictures; of an evaluation of finished models that is the numbers.

    Attributes:
        folder: The folder, as the user named it.
        evaluation: Content of ``eval/metrics.json``, of an evaluation ``metrics.json``; None if absent.
        config: Content of ``config.yaml``; empty if absent.
        log: Rows of ``log.jsonl`` by stage, sorted by step, one row a step.
        seconds: Seconds by stage.
        ladder: Content of ``compare/ladder.json``; empty if absent.
        problems: One line for each file that exists but cannot be read, by its relative name.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    analysis: Analysis | None = None
    candidates: Candidates | None = None
    plan: CompressionPlan | None = None
    evaluation: Evaluation | None = None
    log: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    ladder: dict[str, Any] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def is_run(self) -> bool:
        """Whether it is of a run, and not of finished models."""
        return self.seconds != {} or self.plan is not None or not (self.folder / "metrics.json").is_file()

    @property
    def pictures(self) -> Path:
        """Where the models' pictures are, as ``<label>/seed-<s>``."""
        return self.folder / ("eval" if self.is_run else "pictures")

    @property
    def comparison(self) -> Comparison | None:
        """The student against the teacher, in a run that is evaluated."""
        return self.evaluation.comparisons[0] if self.evaluation and self.evaluation.comparisons else None

    @property
    def is_against_first(self) -> bool:
        """Whether the student of a later round is compared with the first teacher, and not with its own, as planned."""
        first = self.evaluation.models[0].params if self.evaluation and self.comparison else None
        return bool(self.plan and first and first == self.plan.model.first_params)

    def runs_of(self, stack: str) -> list[tuple[int, int]]:
        """The plan's runs (first, last) in one stack; empty without a plan."""
        return [(s.first, s.last) for name, s in self.plan.runs if name == stack] if self.plan else []

    def missing(self, name: str) -> str:
        """One sentence that says which stage writes ``name``, or why it could not be read."""
        if name in self.problems:
            return f"Left out: {self.problems[name]}."
        return f"Nothing to show yet: {name} is written by {STAGE_OF[name]}."


def read_run(folder: Path) -> RunData:
    """Read what a folder holds.

    Raises:
        ArtifactError: ``folder`` is not a directory.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder; give what ppcl compress or ppcl evaluate got as --out")
    problems: dict[str, str] = {}

    def attempt(name: str, read: Callable[[Path], T]) -> T | None:
        path = folder / name
        if not path.exists():
            return None
        try:
            return read(path)
        except ArtifactError as error:
            problems[name] = str(error)
            logger.warning("the report leaves out a part: %s", error)
            return None

    seconds = attempt("stages.json", read_mapping) or {}
    return RunData(
        folder=folder,
        config=attempt("config.yaml", read_yaml) or {},
        analysis=attempt("analysis.json", lambda p: load_artifact(Analysis, p)),
        candidates=attempt("candidates.json", lambda p: load_artifact(Candidates, p)),
        plan=attempt("plan.json", lambda p: load_artifact(CompressionPlan, p)),
        evaluation=attempt("eval/metrics.json", load_evaluation) or attempt("metrics.json", load_evaluation),
        log=attempt("log.jsonl", read_log) or {},
        seconds={k: s for k, v in seconds.items() if (s := pick(v, "seconds")) is not None},
        ladder=attempt("compare/ladder.json", read_mapping) or {},
        problems=problems,
    )


def read_log(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read ``log.jsonl`` by stage.

    A resumed run repeats steps: the last line of a (stage, step) wins. Lines that are not
    JSON (a run that was killed while writing) and lines without a stage and step are skipped.

    Raises:
        ArtifactError: The file cannot be opened.
    """
    try:
        text = read_bytes(path, MOST_LOG).decode(errors="replace")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for line in text.splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("stage"), str) and isinstance(row.get("step"), int):
            rows.setdefault(row["stage"], {})[row["step"]] = row
    return {stage: [steps[step] for step in sorted(steps)] for stage, steps in rows.items()}


def pick(data: object, *keys: str) -> float | None:
    """Follow ``keys`` into nested mappings; None where anything is absent, null, or not a finite number."""
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    if isinstance(data, bool) or not isinstance(data, int | float) or not math.isfinite(data):
        return None
    return float(data)


def differences(stack: StackAnalysis, first: int) -> list[tuple[int, float]]:
    """D(u,k) = -(cka(u,k) - cka(u,k-1)) for u = ``first`` (eq. 4).

    Returns:
        (k, D) for every k > u where both CKA values exist.
    """
    row = stack.cka[first]
    pairs = zip(range(first + 1, len(row)), row[first:], row[first + 1 :], strict=False)
    return [(k, before - now) for k, before, now in pairs if before is not None and now is not None]
