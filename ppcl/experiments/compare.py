"""Several plans under one budget and the same training, in one table.

Every row of depth alone removes as many blocks as the optimal plan of depth alone (where its
criterion offers that number) and chooses the starts of its substitutes by the same rule. Where
smaller modules were measured, the first row is what ``ppcl compress`` makes of them: the optimal
plan over depth and width that is predicted to be as fast. All are trained with the same steps,
batches and seeds. The teacher stands in the same table with the spread of its own seeds; scores
that differ by less than twice that spread are not ranked.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ppcl.analysis.artifacts import Analysis
from ppcl.capture.states import States
from ppcl.capture.trajectories import guidance_arguments, velocity_error
from ppcl.common.artifacts import to_jsonable
from ppcl.common.files import digest, read_json, write_json, write_text
from ppcl.config import DistillConfig
from ppcl.config.memory import for_tables
from ppcl.distill.trainer import Distiller
from ppcl.eval.evaluate import average_drop, score
from ppcl.eval.feature_choice import choose_extractor, references_for
from ppcl.eval.features import FeatureExtractor
from ppcl.eval.generate import generate
from ppcl.eval.pictures import describe
from ppcl.eval.scoring import Measured, caption_measures, mean_over_seeds, reference_of, score_limits
from ppcl.eval.velocity import state_errors
from ppcl.experiments.baselines import (
    BASELINES,
    OURS,
    plans_of_equal_size,
    removed_outright,
    with_starts,
    with_width,
)
from ppcl.experiments.compare_text import Row, mean_scores, write_up
from ppcl.pruning.artifacts import Candidates
from ppcl.run import Run
from ppcl.student.bundle import Bundle, build_student, load_bundle, save_bundle
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.flops import count_params

TEACHER_SEEDS = 3  # fewer say nothing about a spread


def plan_rows(run: Run) -> tuple[list[Row], list[str]]:
    """The rows of the comparison, and notes about criteria that could not keep to its rules."""
    analysis, candidates = run.read(Analysis, "analysis.json"), run.read(Candidates, "candidates.json")
    plans, notes = plans_of_equal_size(analysis, candidates, run.config.plan)
    plans = {mode: with_starts(run, chosen) for mode, chosen in plans.items()}
    same = run.config.distill.model_copy(update={"from_fit": False})
    rows = [*_rows_of_ours(run, analysis, candidates, plans[OURS], same)]
    rows += [Row(mode, BASELINES[mode], plans[mode], same, notes.get(mode)) for mode in BASELINES if mode in plans]
    left_out = [note for mode, note in notes.items() if mode not in plans]
    return [*rows, *_removal_rows(plans, same)], left_out


def _rows_of_ours(
    run: Run, analysis: Analysis, candidates: Candidates, depth: CompressionPlan, settings: DistillConfig
) -> list[Row]:
    """What the method offers: with smaller modules, where any were measured, and of depth alone."""
    none = settings.model_copy(update={"local_steps": 0, "alternating_steps": 0, "output_steps": 0})
    fast = with_width(analysis, candidates, run.config.plan, "speedup", depth)
    small = with_width(analysis, candidates, run.config.plan, "keep", depth)
    if fast is None or small is None:
        return [Row("ours", "ours", depth, settings), Row("ours-undistilled", "ours, undistilled", depth, none)]
    fast, small = with_starts(run, fast), with_starts(run, small)
    note = (
        "ours may use smaller modules, as `ppcl compress` does, and is predicted to be as fast as the rows of depth "
        "alone; ours, of equal size is allowed their parameters instead"
    )
    return [
        Row("ours", "ours", fast, settings, note),
        Row("ours-undistilled", "ours, undistilled", fast, none),
        Row("ours-size", "ours, of equal size", small, settings),
        Row("ours-depth", "ours, depth alone", depth, settings),
        Row("ours-depth-undistilled", "ours, depth alone, undistilled", depth, none),
    ]


def _removal_rows(plans: Mapping[str, CompressionPlan], settings: DistillConfig) -> list[Row]:
    """Blocks removed as most of the literature does it: nothing stands for them, and all steps tune what is left."""
    steps = settings.local_steps + settings.alternating_steps + settings.output_steps
    tuned = settings.model_copy(update={"local_steps": 0, "alternating_steps": 0, "output_steps": steps})
    note = f"the rows without substitutes have all their {steps} steps in the output stage"
    return [
        Row(f"{mode}-removed", f"{BASELINES[mode]}, no substitutes", removed_outright(plans[mode]), tuned, note)
        for mode in ("uniform", "influence")
        if mode in plans
    ]


class Judge:
    """Draws and scores the pictures of every row in the same way.

    Args:
        run: The run; its ``evaluate`` section says how many pictures, steps and seeds.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.settings = run, run.config.evaluate
        self.folder = run.out / "compare" / "teacher"
        count = max(TEACHER_SEEDS, self.settings.teacher_seeds)
        self.seeds = [run.config.seed + offset for offset in range(count)]
        section = self.settings.model_dump(exclude={"latency_runs", "batch_size", "speed_batch_sizes", "speed_steps"})
        # the identity holds the weights, the prompts and the seed
        self.depends = digest(run.identity, section, run.config.capture.identity(), self.seeds)

    @cached_property
    def extractor(self) -> FeatureExtractor:
        """Features behind all scores."""
        return choose_extractor(self.run.model, self.settings.features, str(self.run.device))

    @cached_property
    def text(self) -> Tensor | None:
        """(N, D) features of the captions."""
        return self.extractor.text_features(self.run.evaluation_prompts)

    @cached_property
    def real(self) -> Tensor | None:
        """(M, D) features of real pictures, if there are any."""
        references = references_for(self.run.model)
        return self.extractor.image_features(references) if references is not None else None

    def draw(self, pipeline: Any, folder: Path, seed: int, model: str) -> Tensor:
        """Draw all prompts with one seed; return the (N, D) features of the pictures."""
        row = folder.parent.parent
        label = f"{row.parent.name}, {row.name}" if row.name.startswith("seed-") else row.name
        paths = generate(
            pipeline,
            self.run.evaluation_prompts,
            folder,
            seed=seed,
            num_inference_steps=self.settings.num_inference_steps,
            batch_size=self.settings.batch_size,
            call_kwargs=guidance_arguments(pipeline, self.run.config.capture),
            label=f"{label}: pictures",
            model=model,
        )
        return describe(paths, self.extractor, label=f"{label}: features")

    def teacher_features(self, seed: int) -> Tensor:
        """(N, D) features of the teacher's pictures of one seed."""
        return self.draw(self.run.teacher, self.folder / "pictures" / f"seed-{seed}", seed, self.run.identity)

    @cached_property
    def reference(self) -> Tensor:
        """What FID compares with: real pictures, or the teacher's second seed."""
        return self.real if self.real is not None else self.teacher_features(self.seeds[1])

    @cached_property
    def captions(self) -> dict[str, Measured]:
        """The teacher's caption scores prompt by prompt, mean over its seeds."""
        if self.text is None:
            return {}
        return mean_over_seeds([caption_measures(self.teacher_features(seed), self.text) for seed in self.seeds])

    def teacher(self) -> dict[str, Any]:
        """Scores of each of the teacher's seeds, drawn once and kept."""
        path = self.folder / "metrics.json"
        if path.is_file() and (known := read_json(path)).get("digest") == self.depends:
            return dict(known)
        claim(self.folder, {"evaluated": self.depends}, {"evaluated": ("pictures", "metrics.json")})
        scores = []
        for seed in self.seeds:
            own = self.real is None and seed == self.seeds[1]  # a set of pictures is not compared with itself
            scores.append(score(self.teacher_features(seed), None if own else self.reference, self.text))
        mean = mean_scores(scores)
        scores = [{**each, "average_drop": average_drop(mean, each)[0]} for each in scores]
        against = "real pictures" if self.real is not None else "the teacher's second seed"
        metrics = {"digest": self.depends, "features": self.extractor.name, "fid_reference": against, "seeds": scores}
        write_json(path, metrics)
        return metrics

    def student(self, student: Any, folder: Path, model: str, teacher: Mapping[str, Any]) -> dict[str, Any]:
        """Scores of a student, drawn with the teacher's first seed, and their intervals; drop: against its mean."""
        pipeline = with_transformer(self.run.teacher, student)
        features = self.draw(pipeline, folder / "pictures" / f"seed-{self.seeds[0]}", self.seeds[0], model)
        scores = score(features, self.reference, self.text)
        lost = average_drop(mean_scores(teacher["seeds"]), scores)[0]
        intervals = score_limits(features, reference_of(self.reference), self.text, self.captions)
        return {**scores, "average_drop": lost, "intervals": intervals}


def with_transformer(pipeline: Any, transformer: Any) -> Any:
    """Return a pipeline that shares all components but the transformer."""
    copied = type(pipeline)(**{**pipeline.components, "transformer": transformer})
    copied.set_progress_bar_config(disable=True)
    return copied


def claim(folder: Path, depends: Mapping[str, str], products: Mapping[str, Sequence[str]]) -> None:
    """Remove what was made from other inputs than now, and record what it is made from.

    Args:
        folder: Where a row lives.
        depends: A digest by kind of product, in the order in which they follow from each other.
        products: Names inside ``folder`` by kind; a changed kind takes all that follow with it.
    """
    path = folder / "depends.json"
    known = read_json(path) if path.is_file() else {}
    changed = False
    for kind, now in depends.items():
        changed = changed or known.get(kind) != now
        for name in products[kind] if changed else ():
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
    write_json(path, dict(depends))


def run_row(run: Run, judge: Judge, row: Row, seed: int, teacher: Mapping[str, Any]) -> dict[str, Any]:
    """Train, draw and score one row with one training seed; what is done is kept.

    Returns:
        ``params``, ``zeros`` (share of them), ``velocity_error_before`` and ``velocity_error`` (relative, held-out
        states), ``fid``, ``kid``, ``clip_score``, ``retrieval_at_1``, ``retrieval_at_5``, ``average_drop`` (percent),
        and ``intervals``: the limits of these by name.
    """
    folder = run.out / "compare" / row.name / f"seed-{seed}"
    base = row.fitted_by or run
    trained = digest(base.depends("fit"), to_jsonable(row.plan.stacks), row.settings.identity(), seed)
    evaluated = digest(trained, judge.depends)
    path = folder / "metrics.json"
    if path.is_file() and (known := read_json(path)).get("digest") == evaluated:
        return dict(known)
    products = {"trained": ("checkpoints", "bundle", "log.jsonl"), "evaluated": ("pictures", "metrics.json")}
    claim(folder, {"trained": trained, "evaluated": evaluated}, products)
    transformer, adapter, count = run.teacher.transformer, run.adapter, judge.settings.velocity_states
    held_out = States(run.out / "calibration", "held-out")
    distiller = _distiller(run, row, seed, folder)
    before = velocity_error(transformer, distiller.student, held_out.batches(count, count), run.config.precision)
    bundle = _trained(run, row, folder, distiller)
    student = build_student(transformer, adapter, bundle)
    after = state_errors(transformer, student, held_out.batches(count, count), run.config.precision).error
    metrics = {
        "digest": evaluated,
        "params": count_params(student),
        "zeros": bundle.plan.sparsity.get("zeros", 0.0),
        "velocity_error_before": before,
        "velocity_error": after.value,
        **judge.student(student, folder, trained, teacher),
    }
    metrics["intervals"]["velocity_error"] = [after.low, after.high]
    write_json(path, metrics)
    return metrics


def _distiller(run: Run, row: Row, seed: int, folder: Path) -> Distiller:
    """What trains a row, with its student untrained."""
    base = row.fitted_by or run

    def log(entry: dict[str, Any]) -> None:
        with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    return Distiller(
        run.teacher.transformer,
        run.adapter,
        row.plan,
        run.out / "calibration",
        folder,
        row.settings,
        seed,
        run.config.precision,
        log,
        fitted=base.out / "candidates.safetensors",
        closed_forms=base.out / "analysis.safetensors",
    )


def _trained(run: Run, row: Row, folder: Path, distiller: Distiller) -> Bundle:
    """Train the substitutes of a row into ``folder/bundle``, or read what was trained before."""
    if (folder / "bundle").is_dir():
        return load_bundle(folder / "bundle", run.teacher.transformer, run.adapter)
    if not row.is_trained:
        bundle = Bundle(distiller.plan, distiller.substitutes, masks=distiller.masks.masks)
        save_bundle(bundle, folder / "bundle", {"distill": to_jsonable(row.settings.model_dump())})
        return bundle
    bundle = distiller.run()
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the optimizer's state of every row adds up
    return bundle


def compare_plans(run: Run, table: Path | None = None, seeds: Sequence[int] | None = None) -> str:
    """Compare the optimal plan with the paper's, uniform and block influence; resumable.

    Writes ``RUN/compare/<row>/seed-<s>`` (bundle, pictures, metrics.json) and ``RUN/compare/table.md|json``.

    Args:
        run: The run; capture, analyze and fit are done first if they are not.
        table: A further place for the Markdown table.
        seeds: Training seeds; the run's own if None.

    Returns:
        The Markdown text.

    Raises:
        UserError: The budget cannot be met, or an artifact is damaged.
    """
    for stage in ("capture", "analyze", "fit"):
        run.run(stage)
    run.config = for_tables(run.config)
    chosen = tuple(seeds or (run.config.seed,))
    rows, left_out = plan_rows(run)
    judge = Judge(run)
    teacher = judge.teacher()
    results = []
    for row in rows:
        own = chosen if row.is_trained else chosen[:1]
        results.append((row, [run_row(run, judge, row, seed, teacher) for seed in own]))
    text = write_up(run, teacher, results, left_out, chosen)
    data = {
        "training_seeds": chosen,
        "teacher": teacher,
        "rows": {row.name: {"plan": to_jsonable(row.plan.stacks), "note": row.note, "seeds": m} for row, m in results},
    }
    write_json(run.out / "compare" / "table.json", data)
    for path in filter(None, (run.out / "compare" / "table.md", table)):
        write_text(path, text)
    return text
