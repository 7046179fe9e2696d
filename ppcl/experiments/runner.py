"""Rows of a table: what is trained, drawn and scored in one way, and kept.

An experiment is a list of rows: a plan, how its substitutes are trained, a label. A :class:`RowRunner` makes numbers of
each, one training seed at a time; the same command again goes on where it was.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from ppcl.capture.states import States
from ppcl.common.artifacts import to_jsonable
from ppcl.common.files import append_row, digest, read_mapping, remove, write_json
from ppcl.config import DistillConfig
from ppcl.config.memory import STEPS, for_tables
from ppcl.distill.trainer import Distiller
from ppcl.eval.feature_choice import real_reference
from ppcl.eval.judge import Entrant, Judge, Side
from ppcl.eval.metrics import CAPTION_SCORES
from ppcl.eval.models import with_transformer
from ppcl.eval.scoring import Measured, drop_by_prompt, limits, mean_over_seeds
from ppcl.eval.velocity import state_errors
from ppcl.run import Session
from ppcl.student.bundle import Bundle, build_student, load_bundle, save_bundle
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.flops import count_params

TEACHER_SEEDS = 3  # fewer say nothing about a spread
MEASURES = ("fid", *CAPTION_SCORES, "average_drop")
SCORED = ("fid", "kid", *CAPTION_SCORES)
Scores = dict[str, float | None]


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: Its folder under ``RUN/compare``.
        label: What the table calls it.
        plan: Which blocks stay.
        settings: How the substitutes are trained; zero steps for none.
        note: What a reader must know about it, if anything.
        fitted_by: The session whose fit stage it stands on; the compared one if None.
    """

    name: str
    label: str
    plan: CompressionPlan
    settings: DistillConfig
    note: str | None = None
    fitted_by: Session | None = None

    @property
    def is_trained(self) -> bool:
        """Whether a training seed makes a difference."""
        return any(getattr(self.settings, name) for name in STEPS)


def mean_scores(scores: Sequence[Mapping[str, float | None]]) -> Scores:
    """Mean of each score over the seeds that have it."""
    result: Scores = {}
    for name in scores[0]:
        values = [value for seed in scores if (value := seed[name]) is not None]
        result[name] = statistics.fmean(values) if values else None
    return result


def claim(folder: Path, depends: Mapping[str, str], products: Mapping[str, Sequence[str]]) -> None:
    """Remove what was made from other inputs than now, and record what it is made from.

    Args:
        folder: Where a row lives.
        depends: A digest by kind of product, in the order in which they follow from each other.
        products: Names inside ``folder`` by kind; a changed kind takes all that follow with it.
    """
    path = folder / "depends.json"
    recorded = read_mapping(path) if path.is_file() else {}
    has_changed = False
    for kind, now in depends.items():
        has_changed = has_changed or recorded.get(kind) != now
        for name in products[kind] if has_changed else ():
            remove(folder / name)
    write_json(path, dict(depends))


class RowRunner:
    """Trains, draws and scores rows in the same way.

    Args:
        session: Of a run whose fit stage is done; ``evaluate`` says how many pictures, steps and seeds.

    Attributes:
        session: With the settings that tables can have.
        drawn_by: Digest of what a picture depends on, its model's weights apart.
        scored_by: Digest of what a row's scores depend on, its weights apart.
    """

    def __init__(self, session: Session) -> None:
        session.keep_whole()
        self.session: Session = session.with_config(for_tables(session.config))
        settings = self.session.config.evaluate
        self.num_teacher_seeds = max(TEACHER_SEEDS, settings.teacher_seeds, settings.picture_seeds)
        unread = {"latency_runs", "batch_size", "speed_batch_sizes", "speed_steps", "picture_seeds"}
        section = settings.model_dump(exclude=unread)
        seeds = [self.session.config.seed + offset for offset in range(self.num_teacher_seeds)]
        # the identity holds the weights, the prompts and the seed
        self.drawn_by = digest(session.identity, section, session.config.capture.identity(), seeds)
        self.scored_by = digest(self.drawn_by, settings.picture_seeds)

    @cached_property
    def judge(self) -> Judge:
        """Draws and scores; pictures lie with the rows, features of the teacher's beside them."""
        extractor = self.session.extractor
        reference = real_reference(self.session.model, extractor)
        out, prompts = self.session.out / "compare", self.session.evaluation_prompts
        claim(out / "teacher", {"drawn": self.drawn_by}, {"drawn": ("pictures",)})
        return Judge(out, prompts, self.session.config, extractor, reference)

    @cached_property
    def teacher(self) -> Side:
        """The teacher with all its seeds; drawn once and kept."""
        entrant = Entrant("teacher/pictures", "teacher", self.session.identity, lambda: self.session.teacher)
        return self.judge.side(entrant, self.num_teacher_seeds)

    @cached_property
    def captions(self) -> dict[str, Measured]:
        """The teacher's caption scores prompt by prompt, mean over its seeds."""
        mean = mean_over_seeds(self.teacher.measures)
        return {name: mean[name] for name in CAPTION_SCORES if name in mean}

    @cached_property
    def teacher_scores(self) -> list[Scores]:
        """Scores of each of the teacher's seeds; drops are against their mean."""
        return _with_drops([_scores(measures) for measures in self.teacher.measures], self.captions)

    def summary(self) -> dict[str, Any]:
        """The teacher as the file of a table holds it."""
        names = {"features": self.judge.extractor.name, "fid_reference": self.judge.reference_name}
        return {**names, "seeds": self.teacher_scores}

    def scored(self, student: Any, name: str, weights: str) -> dict[str, Any]:
        """Scores of a student, mean over picture seeds; each seed's own, values by prompt, intervals over prompts.

        Args:
            student: Its transformer.
            name: Its folder under ``RUN/compare``.
            weights: Digest of its weights.
        """
        _ = self.teacher  # what is compared with, FID's reference above all
        teacher, component = self.session.teacher, self.session.component
        entrant = Entrant(f"{name}/pictures", name, weights, lambda: with_transformer(teacher, student, component))
        side = self.judge.side(entrant, self.session.config.evaluate.picture_seeds)
        seeds = _with_drops([_scores(measures) for measures in side.measures], self.captions)
        by_prompt = mean_over_seeds([{n: m[n] for n in SCORED if n in m} for m in side.measures])
        if lost := drop_by_prompt(self.captions, by_prompt):
            by_prompt["average_drop"] = lost
        items = {n: np.round(entry.items, 9).tolist() for n, entry in by_prompt.items() if entry.items is not None}
        return {**mean_scores(seeds), "picture_seeds": seeds, "items": items, "intervals": limits(by_prompt)}

    def measured(
        self, name: str, made_of: Mapping[str, str], products: Mapping[str, Sequence[str]], make: Callable[[], Any]
    ) -> dict[str, Any]:
        """Numbers of one student; what is done is kept in ``RUN/compare/<name>/metrics.json``.

        Args:
            name: Its folder under ``RUN/compare``.
            made_of: Digests of its weights, by kind of product, in the order in which they follow from each other.
            products: Names inside the folder by kind.
            make: Makes the student's transformer and what is known of it: ``(transformer, numbers)``.

        Returns:
            ``params``, ``velocity_error`` (relative, held-out states), ``fid``, ``kid``, ``clip_score``,
            ``retrieval_at_1``, ``retrieval_at_5``, ``average_drop`` (percent), means over picture seeds;
            ``picture_seeds``: these of each, ``items``: their values by prompt, ``intervals``: their limits by name.
        """
        folder = self.session.out / "compare" / name
        weights = list(made_of.values())[-1]
        scored = digest(weights, self.scored_by)
        path = folder / "metrics.json"
        if path.is_file() and (kept := read_mapping(path)).get("digest") == scored:
            return dict(kept)
        drawn = {"drawn": digest(weights, self.drawn_by)}
        claim(folder, {**made_of, **drawn}, {**products, "drawn": ("pictures", "metrics.json")})
        student, numbers = make()
        error = self.errors_of(student)
        metrics = {"digest": scored, "params": count_params(student), "velocity_error": error.value, **numbers}
        metrics |= self.scored(student, name, weights)
        metrics["intervals"]["velocity_error"] = [error.low, error.high]
        write_json(path, metrics)
        return metrics

    def errors_of(self, student: Any) -> Any:
        """Relative velocity error of a transformer on held-out states, with its interval."""
        session, count = self.session, self.session.config.evaluate.velocity_states
        states = States(session.calibration, "held-out").batches(count, count)
        return state_errors(session.transformer, student, states, session.config.precision).error

    def run(self, row: Row, seed: int) -> dict[str, Any]:
        """Train, draw and score one row with one training seed.

        Returns:
            What :meth:`measured` does, ``zeros`` (share of the parameters) and ``velocity_error_before``.
        """
        base, name = row.fitted_by or self.session, f"{row.name}/seed-{seed}"
        trained = digest(base.depends("fit"), to_jsonable(row.plan.stacks), row.settings.identity(), seed)

        def make() -> tuple[Any, dict[str, Any]]:
            folder = self.session.out / "compare" / name
            distiller = self._distiller(row, seed, folder)
            before = self.errors_of(distiller.student).value
            bundle = self._trained(row, folder, distiller)
            student = build_student(self.session.transformer, self.session.adapter, bundle)
            return student, {"velocity_error_before": before, "zeros": bundle.plan.sparsity.get("zeros", 0.0)}

        return self.measured(name, {"trained": trained}, {"trained": ("checkpoints", "bundle", "log.jsonl")}, make)

    def run_all(self, rows: Sequence[Row], seeds: Sequence[int]) -> Results:
        """All rows with all training seeds; one that is not trained has but the first."""
        return [(row, [self.run(row, seed) for seed in (seeds if row.is_trained else seeds[:1])]) for row in rows]

    def _distiller(self, row: Row, seed: int, folder: Path) -> Distiller:
        """What trains a row, with its student untrained."""
        base, session = row.fitted_by or self.session, self.session

        return Distiller(
            session.transformer,
            session.adapter,
            row.plan,
            session.calibration,
            folder,
            row.settings,
            seed,
            session.config.precision,
            partial(append_row, folder / "log.jsonl"),
            fitted=base.out / "candidates.safetensors",
            closed_forms=base.out / "analysis.safetensors",
        )

    def _trained(self, row: Row, folder: Path, distiller: Distiller) -> Bundle:
        """Train the substitutes of a row into ``folder/bundle``, or read what was trained before."""
        if (folder / "bundle").is_dir():
            return load_bundle(folder / "bundle", self.session.transformer, self.session.adapter)
        if not row.is_trained:
            bundle = Bundle(distiller.plan, distiller.substitutes, masks=distiller.masks.masks)
            how = {"distill": to_jsonable(row.settings.model_dump())}
            save_bundle(bundle, folder / "bundle", how, self.session.transformer)
            return bundle
        bundle = distiller.run()
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the optimizer's state of every row adds up
        return bundle


Results = list[tuple[Row, list[dict[str, Any]]]]


def _scores(measures: Mapping[str, Measured]) -> Scores:
    return {name: measures[name].value if name in measures else None for name in SCORED}


def _with_drops(seeds: Sequence[Scores], captions: Mapping[str, Measured]) -> list[Scores]:
    """Scores of each seed with their average drop against a teacher's mean scores."""
    with_drops = []
    for scores in seeds:
        pairs = [(captions[name].value, scores[name]) for name in CAPTION_SCORES if name in captions]
        losses = [100 * (1 - value / of_teacher) for of_teacher, value in pairs if of_teacher and value is not None]
        with_drops.append({**scores, "average_drop": statistics.fmean(losses) if losses else None})
    return with_drops
