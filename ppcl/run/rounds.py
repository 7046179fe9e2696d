"""Several rounds: prune, recover, prune what came out. A round is a run, the last one that of the folder itself.

``RUN/round-1`` is a run of the teacher, its pipeline is the model of the second round, and so on; the last round's
products lie in ``RUN``, as those of one round do. Later rounds are measured and trained on the states that the first
one recorded, whose answers are the first teacher's: the output stage learns from it, and the evaluation compares with
it. What a hidden state should be, the local and the carried stage ask the model of the round before. Budgets between
lie on a geometric line from the whole model to what was asked for, by what earlier plans really left.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ppcl.common.artifacts import load_artifact
from ppcl.common.files import read_mapping, remove
from ppcl.common.folders import LEDGER, check_claim
from ppcl.config import RunConfig, for_model
from ppcl.config.memory import changed
from ppcl.config.names import BOTH
from ppcl.config.sparsity import SparsityConfig
from ppcl.errors import ArtifactError
from ppcl.run.experts import open_experts
from ppcl.run.run import Round, Run
from ppcl.run.stage import ORDER
from ppcl.run.stages import PIPELINE, STAGES
from ppcl.student.plan import CompressionPlan

logger = logging.getLogger(__name__)
PRUNING = ORDER[: ORDER.index("export") + 1]  # the stages of a round that another one follows


def open_rounds(
    model: str, out: Path, config: RunConfig, prompts: Path | None = None, command: str = ""
) -> Iterator[Round]:
    """Open one round, or run of a transformer, after the other; each is asked for when the one before is done.

    Args:
        model: ``emoji``, a folder, or a hub id.
        out: The run directory, of the last round.
        config: ``plan.rounds`` says how many, ``capture.component`` whether of both transformers.
        prompts: The user's prompts file, if any.
        command: The command line, for the record.

    Raises:
        UserError: See :class:`Run`.
    """
    config = for_model(model, config)
    if config.capture.component == BOTH:
        yield from open_experts(model, out, config, prompts, command)
        return
    total, first, plans = config.plan.rounds, None, list[CompressionPlan]()
    if total > 1:
        _check_place(out, _folder(out, total - 1, total))
    for number in range(1, total + 1):
        is_last = number == total
        place, source = _folder(out, number, total), str(_folder(out, number - 1, total) / PIPELINE) if first else model
        if first:
            first.group.on_main(partial(make_way, place, source))
        run = Run(source, place, _settings(config, number, plans), prompts, command, first)
        kind, value = run.config.plan.budget
        title = f"round {number} of {total}: {source}, {kind} {value:.4g}" if total > 1 else ""
        yield Round(run, tuple(STAGES) if is_last else PRUNING, title)
        if not is_last:
            plans.append(load_artifact(CompressionPlan, place / "plan.json"))
            run.release_teacher()
            first = first or run


def _folder(out: Path, number: int, total: int) -> Path:
    return out if number == total else out / f"round-{number}"


def _settings(config: RunConfig, number: int, plans: Sequence[CompressionPlan]) -> RunConfig:
    """The settings of one round, a plain run's, by the plans of the rounds before."""
    (kind, value), total = config.plan.budget, config.plan.rounds
    if total == 1:
        return config
    due = value if number == total else value ** (number / total)  # of the first teacher
    done = 1.0
    for plan in plans:
        done *= plan.predicted.param_ratio if kind == "keep" else plan.predicted.speedup
    share = min(1.0, due / done) if kind == "keep" else max(1.0, due / done)
    changes: dict[str, Any] = {"plan": changed(config.plan, rounds=1, **{kind: share})}
    if number < total:  # zeros come last: what is pruned further would fill them
        changes |= {"distill": changed(config.distill, sparsity=SparsityConfig()), "wandb": "off"}  # type: ignore[call-arg]
        changes["export"] = changed(config.export, quantize="none")  # likewise
    return config.model_copy(update=changes)


def _check_place(out: Path, before: Path) -> None:
    """Refuse a folder that is none of these rounds, before the first of them takes hours."""
    if not (out / LEDGER).is_file():
        check_claim(out, LEDGER, "a run")
        return
    ledger = read_mapping(out / LEDGER)
    if ledger.get("teacher_from_here") != os.path.relpath(before / PIPELINE, out):
        raise ArtifactError(
            f"{out} holds a run of {ledger.get('model', 'another model')}, not one after {before.name}; choose another "
            "--out, delete it, or give as many rounds as it was made in"
        )


def make_way(out: Path, model: str) -> None:
    """Remove what a later round made of another model: the round before was made again with other settings.

    The ledger stays, so that the folder is known for ours; :class:`ppcl.run.folder.RunFolder` begins a new one.
    """
    from ppcl.teacher.origin import model_files

    held = (read_mapping(out / LEDGER) if (out / LEDGER).is_file() else {}).get("made_of")
    if not isinstance(held, dict) or held.get("files") == model_files(model):
        return
    logger.warning("%s: the round before was made again, so all of this one is removed and made again", out)
    for stage in STAGES.values():
        for name in (*stage.products, *stage.on_the_way):
            remove(out / name)
