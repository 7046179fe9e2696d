"""``ppcl evaluate A B ...``: any pipelines, the same prompts, the same noise, numbers with intervals.

The first model is what the others are compared with. It stays loaded; the others take turns.
Pictures, and features of pictures, are kept in the output folder: the same command again goes
on where it was, and another one with the same models draws nothing anew.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppcl.capture.trajectories import choose_calls, record_calls
from ppcl.common.devices import resolve_device
from ppcl.common.files import digest, lock_folder, remove_leftovers, write_json, write_text
from ppcl.common.streams import step_generator
from ppcl.config import RunConfig
from ppcl.errors import UserError
from ppcl.eval.costs import Costs, Timing, costs, transformer_call
from ppcl.eval.evaluate import finite
from ppcl.eval.feature_choice import extractor_with_note, references_for
from ppcl.eval.fid import FeatureStatistics
from ppcl.eval.fidelity import pair_measures
from ppcl.eval.generate import accepted_kwargs, generate, read_picture
from ppcl.eval.models import (
    Contestant,
    blocks_of,
    call_arguments,
    contestants,
    denoiser,
    evaluation_prompts,
    is_embedded,
    latents_of,
    load,
    settings_for,
)
from ppcl.eval.pictures import compare_pairs, describe, load_statistics, picture_files
from ppcl.eval.report_models import write_models_report
from ppcl.eval.results import (
    Comparison,
    Evaluation,
    ModelResult,
    Speed,
    Step,
    cost_rows,
    flat_numbers,
    of_interval,
    of_measured,
    report,
    score_rows,
    write_schema,
)
from ppcl.eval.scoring import SCORES, Measured, Reference, differences, drop, measure, paired, reference_of
from ppcl.eval.velocity import StateErrors, by_timestep, state_errors
from ppcl.eval.verdict import MIN_PROMPTS, verdict
from ppcl.teacher.flops import count_params
from ppcl.training.tracking import Tracker

STATE_PROMPTS = 8  # prompts behind the states of the velocity error, at most


@dataclass
class Side:
    """One model, drawn and described.

    Attributes:
        one: Which model.
        pipeline: Loaded.
        kwargs: What its call takes beside the prompt.
        paths: Its pictures of the first seed.
        features: (N, D) of those.
        params: Of its transformer or U-Net.
        measures: Its numbers.
    """

    one: Contestant
    pipeline: Any
    kwargs: dict[str, Any]
    paths: list[Path]
    features: Tensor
    params: int
    measures: dict[str, Measured]


class Judge:
    """Draws, describes, scores and times models in one way.

    Args:
        out: The output folder.
        config: ``evaluate``, ``capture`` (size, guidance), ``seed``, ``device``, ``threads``.
        prompts: What all draw, distinct texts.
        embedded: Whether the embedded model is judged: its own evaluator and pictures are the default then.
        reference: A folder of pictures or a ``.npz`` of statistics, or None.
    """

    def __init__(
        self, out: Path, config: RunConfig, prompts: Sequence[str], embedded: bool, reference: Path | None
    ) -> None:
        self.out, self.config, self.settings, self.prompts = out, config, config.evaluate, list(prompts)
        self.notes: list[str] = []
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = resolve_device(config.device)
        kind = "emoji" if embedded else "other"
        self.extractor, note = extractor_with_note(kind, self.settings.features, str(self.device))
        self.note(note)
        self.text = self.extractor.text_features(self.prompts)
        if self.text is None:
            self.note(
                f"features {self.extractor.name} know no text: CLIP score, retrieval and CMMD are left out; "
                "evaluate once more with evaluate.features=ViT-B-32/openai for them"
            )
        if len(self.prompts) < MIN_PROMPTS:
            self.note(f"{len(self.prompts)} prompts are few: intervals of fewer than {MIN_PROMPTS} are too narrow")
        self.reference, self.reference_name = self._reference(reference, embedded)

    def note(self, text: str | None) -> None:
        """Remember what a reader must know, once."""
        if text and text not in self.notes:
            self.notes.append(text)

    def _cache(self, name: str) -> Path:
        return self.out / "features" / f"{name}.safetensors"

    def _reference(self, given: Path | None, embedded: bool) -> tuple[Reference | None, str | None]:
        """What FID compares with, if it is known before anything is drawn."""
        if given is not None and given.suffix == ".npz":
            probe = self.extractor.image_features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
            self.note(
                f"{given.name} holds mean and covariance alone: KID, CMMD, precision, recall, density and coverage "
                "need the pictures themselves"
            )
            return load_statistics(given, probe.shape[1]), given.name
        if given is not None:
            files = picture_files(given)
            features = describe(files, self.extractor, self._cache("reference"), "reference pictures")
            name = given.resolve().name
        elif embedded and (pictures := references_for("emoji")) is not None:
            features, name = self.extractor.image_features(pictures), "the embedded pictures"
        else:
            return None, None
        return self._described(features), name

    def _described(self, features: Tensor) -> Reference:
        found = reference_of(features)
        if len(features) <= features.shape[1]:
            self.note(
                f"{len(features)} reference pictures are no more than the {features.shape[1]} features: FID is biased "
                "upwards; compare it only with FIDs of equally many pictures"
            )
        moments = FeatureStatistics()
        moments.update(features)
        moments.save(self.out / "reference.npz")
        return found

    def draw(self, one: Contestant, pipeline: Any, kwargs: dict[str, Any], seed: int) -> tuple[list[Path], Tensor]:
        """Draw all prompts with a seed; return the pictures' paths and their (N, D) features."""
        paths = generate(
            pipeline,
            self.prompts,
            self.out / "pictures" / one.label / f"seed-{seed}",
            seed=seed,
            num_inference_steps=self.settings.num_inference_steps,
            batch_size=self.settings.batch_size,
            call_kwargs=kwargs,
            label=f"{one.label}, seed {seed}",
            model=one.identity,
        )
        return paths, describe(paths, self.extractor, self._cache(f"{one.label}-{seed}"), f"{one.label}: features")

    def side(self, one: Contestant, is_first: bool) -> Side:
        """Load, draw and score a model."""
        pipeline = load(one, self.device)
        kwargs = accepted_kwargs(pipeline, call_arguments(pipeline, self.config.capture))
        paths, features = self.draw(one, pipeline, kwargs, self.config.seed)
        if self.reference is None and is_first and self.settings.teacher_seeds > 1:
            _, again = self.draw(one, pipeline, kwargs, self.config.seed + 1)
            self.reference, self.reference_name = self._described(again), f"{one.label}'s second seed"
            self.note("no real pictures (--reference): FID and the like compare with the first model's second seed")
        if len(features) <= features.shape[1] and self.reference is not None:
            self.note(
                f"{len(features)} pictures are no more than the {features.shape[1]} features: FID is biased upwards; "
                "compare it only with FIDs of equally many pictures, and look at KID"
            )
        measures = measure(features, self.reference, self.text)
        return Side(one, pipeline, kwargs, paths, features, count_params(denoiser(pipeline)), measures)

    def fidelity(self, first: Side, second: Side) -> dict[str, Measured]:
        """Paired measures: pictures of one prompt, drawn from one noise."""
        measures, notes = pair_measures(min(read_picture(first.paths[0]).shape[:2]))
        for line in notes:
            self.note(line)
        found = compare_pairs(first.paths, second.paths, measures)
        if not found:
            self.note(
                f"{second.one.label} draws pictures of another size than {first.one.label}: PSNR, SSIM and LPIPS are "
                "left out; set capture.height and capture.width to compare them"
            )
        cosine = torch.nn.functional.cosine_similarity(first.features.double(), second.features.double(), dim=1)
        return paired({**found, "feature_cosine": cosine.tolist()})

    def velocity(self, first: Side, second: Side) -> StateErrors | None:
        """Velocity errors on states of the first model's trajectories, where the second takes them."""
        teacher, student = (getattr(side.pipeline, "transformer", None) for side in (first, second))
        why = None
        if teacher is None or student is None:
            why = "it needs two transformers"
        elif latents_of(first.pipeline) != latents_of(second.pipeline):
            why = "the two have different VAEs"
        else:
            try:
                return state_errors(teacher, student, self._states(first))
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
                why = " ".join(str(error).split())[:160]  # another architecture refuses in its own way
        self.note(f"velocity error of {second.one.label} is left out: {why}")
        return None

    def _states(self, first: Side) -> list[dict[str, Any]]:
        prompts = self.prompts[:STATE_PROMPTS]
        steps = {"num_inference_steps": self.settings.num_inference_steps}
        settings = self.config.capture.model_copy(update=steps)
        calls = record_calls(first.pipeline, prompts, self.config.seed + 31, settings)
        count = max(1, self.settings.velocity_states // len(prompts))
        picked = choose_calls(len(calls), count, step_generator(self.config.seed, 0, 32))
        return [calls[index].arguments for index in picked]

    def costs(self, first: Side, second: Side) -> Costs:
        """Time two models alternately."""
        kwargs = (first.kwargs, second.kwargs)
        pipelines = (first.pipeline, second.pipeline)
        calls = [
            transformer_call(pipeline, self.prompts[:1], own, self.config.seed)
            for pipeline, own in zip(pipelines, kwargs, strict=True)
        ]
        assert calls[0] is not None and calls[1] is not None  # loading refuses pipelines without a denoiser
        return costs(pipelines, self.prompts, self.settings, kwargs, (calls[0], calls[1]), self.config.seed)

    def compare(self, first: Side, second: Side) -> tuple[Comparison, Costs]:
        """A model against the first one."""
        fidelity = {name: of_measured(one) for name, one in self.fidelity(first, second).items()}
        errors = self.velocity(first, second)
        if errors is not None:
            fidelity["velocity_error"] = of_interval(errors.error, "states")
        cost = self.costs(first, second)
        lost = drop(first.measures, second.measures)
        ratio = second.params / first.params
        speeds = {key: _ratio(cost.teacher[key], cost.student[key]) for key in ("latency_ms", "latency_end_to_end_ms")}
        losses = {
            name: drop({name: first.measures[name]}, {name: second.measures[name]})
            for name in SCORES
            if name in first.measures and name in second.measures
        }
        made = Comparison(
            label=second.one.label,
            against=first.one.label,
            average_drop=of_interval(lost) if lost else None,
            average_drop_per_score={name: of_interval(one) for name, one in losses.items() if one},
            differences={k: of_interval(v) for k, v in differences(first.measures, second.measures).items()},
            fidelity=fidelity,
            velocity_error_by_timestep=[Step(**row) for row in by_timestep(errors)] if errors else [],
            param_ratio=ratio,
            speedup=speeds["latency_ms"],
            speedup_end_to_end=speeds["latency_end_to_end_ms"],
            verdict=verdict(second.one.label, first.one.label, lost, ratio, speeds["latency_ms"]),
        )
        return made, cost


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _result(side: Side, costs: dict[str, float | None], speed: Sequence[Timing]) -> ModelResult:
    return ModelResult(
        label=side.one.label,
        model=side.one.shown,
        params=side.params,
        numbers={name: of_measured(one) for name, one in side.measures.items()},
        costs=costs,
        speed=[Speed(**asdict(row)) for row in speed],
        blocks=blocks_of(side.pipeline),
    )


def judge_models(
    models: Sequence[str],
    out: Path,
    config: RunConfig,
    prompts: Sequence[str],
    reference: Path | None = None,
    embedded: bool = False,
) -> Evaluation:
    """Evaluate models and write ``metrics.json``, its schema, ``report.md`` and ``report.html``.

    Args:
        models: ``emoji``, pipeline folders, hub ids, runs or bundles; the first is what the others are compared
            with. One run alone stands for its teacher and its student.
        out: The output folder; it keeps pictures and features.
        config: See :class:`Judge`.
        prompts: What all draw.
        reference: A folder of real pictures, or a ``.npz`` of their statistics.
        embedded: Whether the embedded model is judged.

    Raises:
        UserError: A model, the reference or the folder cannot be used.
    """
    entries = contestants(models)
    if (out / "stages.json").is_file():
        raise UserError(f"{out} is a run; choose another --out for the evaluation of several models")
    descriptor = lock_folder(out)
    remove_leftovers(out)
    try:
        judge = Judge(out, config, prompts, embedded, reference)
        result = _judge(judge, entries)
    finally:
        if descriptor is not None:
            os.close(descriptor)
    write_json(out / "metrics.json", finite(result.model_dump(mode="json")))
    write_schema(out / "metrics.schema.json")
    write_text(out / "report.md", report(result))
    write_models_report(out)
    _mirror(out, config, prompts, result)
    return result


def _mirror(out: Path, config: RunConfig, prompts: Sequence[str], result: Evaluation) -> None:
    """Send table, pictures and numbers to wandb, if asked."""
    labels = [one.label for one in result.models]
    folders = {label: out / "pictures" / label / f"seed-{config.seed}" for label in labels}
    pictures = {
        label: list(zip(prompts, sorted(folder.glob("[0-9]*.png")), strict=False)) for label, folder in folders.items()
    }
    identity = digest(labels, list(prompts), config.seed)
    tracker = Tracker(config.wandb, out, {"identity": identity, **config.model_dump(mode="json")})
    tracker.evaluation(["", *labels], [*score_rows(result), *cost_rows(result)], flat_numbers(result), pictures)
    tracker.finish()


def _judge(judge: Judge, entries: Sequence[Contestant]) -> Evaluation:
    first = judge.side(entries[0], is_first=True)
    results, comparisons = [], []
    own: tuple[dict[str, float | None], Sequence[Timing]] | None = None
    for entry in entries[1:]:
        second = judge.side(entry, is_first=False)
        made, cost = judge.compare(first, second)
        comparisons.append(made)
        results.append(_result(second, cost.student, cost.speed[1]))
        own = own or (cost.teacher, cost.speed[0])
        del second
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if own is None:
        alone = judge.costs(first, first)
        own = (alone.teacher, alone.speed[0])
    known = judge.reference
    return Evaluation(
        features=judge.extractor.name,
        prompts=len(judge.prompts),
        seed=judge.config.seed,
        num_inference_steps=judge.settings.num_inference_steps,
        reference=judge.reference_name,
        reference_count=known.count if known else None,
        notes=judge.notes,
        models=[_result(first, *own), *results],
        comparisons=comparisons,
    )


def judge_command(
    models: Sequence[str],
    out: Path,
    files: Sequence[Path],
    overrides: Sequence[str],
    prompts: Path | None,
    reference: Path | None,
) -> Evaluation:
    """The command: settings and prompts as :mod:`ppcl.eval.models` finds them, then :func:`judge_models`."""
    config = settings_for(models, files, overrides)
    texts = evaluation_prompts(models, prompts, config.evaluate.num_prompts)
    return judge_models(models, out, config, texts, reference, is_embedded(models))
