"""The one evaluation: models draw the same prompts from the same noise, and get numbers with intervals.

The first model is what the others are compared with: in a run the teacher, in ``ppcl evaluate A B`` the model A. It
stays loaded; the others take turns. Pictures, and features of pictures, are kept: the same again goes on where it was,
and another evaluation of the same models draws nothing anew.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppcl.capture.prompts import cut_note, of_beginnings
from ppcl.capture.spread import choose_rows
from ppcl.capture.trajectories import record_calls
from ppcl.common.files import read_json
from ppcl.common.streams import Stream, step_generator
from ppcl.config import RunConfig
from ppcl.config.names import TRANSFORMER
from ppcl.errors import ModelError
from ppcl.eval.costs import Call, Costs, costs, denoiser_of, transformer_call
from ppcl.eval.drawn import SETTINGS_FILE, set_of
from ppcl.eval.features import FeatureExtractor, cut_texts
from ppcl.eval.fid import FeatureStatistics
from ppcl.eval.fidelity import PairMeasure, pair_measures
from ppcl.eval.generate import accepted_kwargs, generate, read_picture
from ppcl.eval.intervals import Interval, interval
from ppcl.eval.metrics import CAPTION_SCORES
from ppcl.eval.models import blocks_of, call_arguments, latents_of
from ppcl.eval.pictures import compare_pairs, describe
from ppcl.eval.results import (
    Comparison,
    Evaluation,
    ModelResult,
    Speed,
    Spread,
    Step,
    of_interval,
    of_measured,
    spread_of,
)
from ppcl.eval.scoring import Measured, Reference, differences, drop, floor_of, measure, paired, reference_of
from ppcl.eval.texture import TextureExtractor, num_levels, texture_distance
from ppcl.eval.velocity import StateErrors, by_timestep, state_errors
from ppcl.eval.verdict import MIN_PROMPTS, verdict
from ppcl.pruning.sparsity import zeros_of
from ppcl.teacher.call_arguments import batch_size
from ppcl.teacher.flops import count_params
from ppcl.teacher.pipeline_call import PicturedPrompt, check_call

logger = logging.getLogger(__name__)
STATE_PROMPTS = 8  # prompts behind the states of the velocity error, at most
TIMES_OF_STREAMED = "transformers were read block by block as they ran: times and memory hold the reading"
SECOND_SEED = "pictures of {} with another seed"


@dataclass(frozen=True)
class Entrant:
    """A model to judge.

    Attributes:
        label: Names it in tables, and its folder of pictures.
        shown: Where it is from, without the folders of this machine.
        identity: Of its weights: pictures of others are refused.
        load: Returns its pipeline, on the device.
    """

    label: str
    shown: str
    identity: str
    load: Callable[[], Any]


@dataclass
class Side:
    """A model that has drawn.

    Attributes:
        entrant: Which one.
        pipeline: Loaded.
        kwargs: What its call takes beside the prompt.
        paths: Its pictures, a list a seed; the first seed is that of all models.
        features: (N, D) of those, one a seed.
        measures: Numbers, one mapping a seed.
        component: The transformer that is looked at.
        other_seed: How close its pictures of two seeds are, once that was asked for.
    """

    entrant: Entrant
    pipeline: Any
    kwargs: dict[str, Any]
    paths: list[list[Path]]
    features: list[Tensor]
    measures: list[dict[str, Measured]] = field(default_factory=list)
    component: str = TRANSFORMER
    other_seed: dict[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.entrant.label

    @property
    def params(self) -> int:
        """Parameters of its transformer or U-Net."""
        module = denoiser_of(self.pipeline, self.component)
        assert module is not None  # judging refuses pipelines without one
        return count_params(module)

    @property
    def own_steps(self) -> int | None:
        """Steps that it is made to draw in; None where any number will do."""
        return self.kwargs.get("num_inference_steps")

    def spread(self) -> dict[str, Spread]:
        """Its numbers over the seeds; empty for one seed."""
        if len(self.measures) < 2:
            return {}
        names = dict.fromkeys(name for seed in self.measures for name in seed)
        return {name: spread_of([seed[name].value for seed in self.measures if name in seed]) for name in names}


class Judge:
    """Draws, describes, scores and times models in one way.

    Args:
        pictures: Gets ``<label>/seed-<s>``.
        prompts: What all draw, distinct texts.
        config: ``evaluate``, ``capture`` (size, guidance) and ``seed``.
        extractor: Features behind all scores.
        reference: What FID and the like compare with, and its name; None: the first model's second seed, if it draws
            one.
        cache: Folder that keeps features by content; None keeps none.
        statistics: Gets mean and covariance of the reference as ``.npz``; None for nowhere.
        drawn: A store of pictures that were drawn before, see :mod:`ppcl.eval.drawn`.
    """

    def __init__(
        self,
        pictures: Path,
        prompts: Sequence[str],
        config: RunConfig,
        extractor: FeatureExtractor,
        reference: tuple[Reference, str] | None = None,
        cache: Path | None = None,
        statistics: Path | None = None,
        drawn: Path | None = None,
    ) -> None:
        self.drawn = drawn
        self._texture: dict[Path, Tensor | None] = {}  # by the first of the pictures
        self.pictures, self.prompts, self.config, self.settings = pictures, list(prompts), config, config.evaluate
        self.extractor, self.cache, self.statistics = extractor, cache, statistics
        self.notes: list[str] = []
        self.text = extractor.text_features(self.prompts)
        if self.text is None:
            self.note(
                f"features {extractor.name} know no text: CLIP score, retrieval and CMMD are left out; "
                "evaluate once more with evaluate.features=ViT-B-32/openai for them"
            )
        cut, limit = cut_texts(extractor, self.prompts)
        if cut:
            note = of_beginnings(cut, len(self.prompts), limit, extractor.name)
            self.note(f"{note} to CLIP score, retrieval and CMMD")
        if len(self.prompts) < MIN_PROMPTS:
            self.note(f"{len(self.prompts)} prompts are few: intervals of fewer than {MIN_PROMPTS} are too narrow")
        self.reference: Reference | None = None
        self.reference_name: str | None = None
        self.reference_seed: int | None = None  # pictures of it would be compared with what the same noise became
        if reference is not None:
            self._compare_with(*reference)

    def note(self, text: str | None) -> None:
        """Remember what a reader must know, once."""
        if text and text not in self.notes:
            self.notes.append(text)

    def _compare_with(self, reference: Reference, name: str) -> None:
        self.reference, self.reference_name = reference, name
        features = reference.features
        if features is None:
            return
        if len(features) <= features.shape[1]:
            self.note(_biased(f"{len(features)} reference pictures", features.shape[1]))
        if self.statistics is not None:
            moments = FeatureStatistics()
            moments.update(features)
            moments.save(self.statistics)

    def _generate(
        self, entrant: Entrant, pipeline: Any, kwargs: dict[str, Any], seed: int, folder: str, prompts: Sequence[str]
    ) -> list[Path]:
        return generate(
            pipeline,
            prompts,
            self.pictures / entrant.label / f"{folder}-{seed}",
            seed=seed,
            num_inference_steps=self.settings.num_inference_steps,
            batch_size=self.settings.batch_size,
            call_kwargs=kwargs,
            label=f"{entrant.label}, seed {seed}",
            model=entrant.identity,
            drawn=self.drawn,
        )

    def draw(self, entrant: Entrant, pipeline: Any, kwargs: dict[str, Any], seed: int) -> tuple[list[Path], Tensor]:
        """Draw all prompts with a seed; return the pictures' paths and their (N, D) features."""
        paths = self._generate(entrant, pipeline, kwargs, seed, "seed", self.prompts)
        if set_of(self.drawn, read_json(paths[0].parent / SETTINGS_FILE)):
            self.note(
                f"the {entrant.label}'s pictures come with ppcl: drawn once with these weights, prompts and noise"
            )
        cache = self.cache / f"{entrant.label}-{seed}.safetensors" if self.cache else None
        return paths, describe(paths, self.extractor, cache, f"{entrant.label}, seed {seed}: features")

    def side(self, entrant: Entrant, num_seeds: int = 1) -> Side:
        """Load a model, draw with so many seeds, and score each of them.

        Without a reference the second seed of the first model becomes it: no model's pictures of that seed, which share
        its noise, have a distance to it.
        """
        pipeline, component = entrant.load(), self.config.capture.component
        if denoiser_of(pipeline, component) is None:
            raise ModelError(f"{entrant.label} has no transformer {component!r}; mend capture.component")
        check_call(pipeline, isinstance(self.prompts[0], PicturedPrompt))
        self.note(cut_note(pipeline, self.prompts))
        kwargs = accepted_kwargs(pipeline, call_arguments(pipeline, self.config.capture))
        seeds = [self.config.seed + offset for offset in range(num_seeds)]
        paths, features = zip(*(self.draw(entrant, pipeline, kwargs, seed) for seed in seeds), strict=True)
        if self.reference is None and len(features) > 1:
            self.reference_seed = seeds[1]
            self._compare_with(reference_of(features[1]), SECOND_SEED.format(entrant.label))
            self.note(
                "no real pictures (--reference): FID and the like compare with those of the first model's other seed"
            )
        elif self.reference is None:
            self.note("no real pictures and one seed: FID is left out; set evaluate.teacher_seeds=2")
        if len(features[0]) <= features[0].shape[1] and self.reference is not None:
            self.note(_biased(f"{len(features[0])} pictures", features[0].shape[1]) + ", and look at KID")
        measures = [
            measure(of_seed, None if seed == self.reference_seed else self.reference, self.text)
            for seed, of_seed in zip(seeds, features, strict=True)
        ]
        side = Side(entrant, pipeline, kwargs, list(paths), list(features), measures, component)
        if count := min(self.settings.diversity_prompts, len(self.prompts)):
            other = partial(self._generate, entrant, pipeline, kwargs, self.config.seed + 1, "again")
            measures[0] |= self._diversity(side, paths[1][:count] if num_seeds > 1 else other(self.prompts[:count]))
        return side

    def _diversity(self, side: Side, again: Sequence[Path]) -> dict[str, Measured]:
        """How much pictures of a prompt differ, by the likeness of structure (Odena et al. 2017 have it of a class).

        Args:
            side: The model.
            again: Its first prompts from other noise.
        """
        ssim = {name: call for name, call in self._pair_measures(side).items() if name == "ssim"}
        likeness = compare_pairs(side.paths[0][: len(again)], again, ssim).get("ssim")
        return paired({"diversity": [1 - value for value in likeness]}) if likeness else {}

    def _pair_measures(self, side: Side) -> dict[str, PairMeasure]:
        measures, notes = pair_measures(min(read_picture(side.paths[0][0]).shape[:2]))
        for line in notes:
            self.note(line)
        return measures

    def _textures(self, paths: Sequence[Path]) -> Tensor | None:
        """Statistics of fine detail, one row a picture; None where sizes differ or are too small for it."""
        key = paths[0]
        if key not in self._texture:
            shapes = {read_picture(path).shape[:2] for path in paths}
            is_told = len(paths) > 1 and len(shapes) == 1 and num_levels(min(min(shapes))) > 0
            self._texture[key] = describe(paths, TextureExtractor(), label="texture") if is_told else None
        return self._texture[key]

    def _texture_distance(self, paths: Sequence[Path], reference: Sequence[Path]) -> Measured | None:
        ours, theirs = self._textures(paths), self._textures(reference)
        if ours is None or theirs is None:
            return None
        found = texture_distance(ours, theirs)
        return Measured(found.value, found.items.numpy())

    def fidelity(self, first: Side, second: Side) -> dict[str, Measured]:
        """Paired measures: pictures of one prompt, drawn from one noise."""
        found = self._alike(first, second.paths[0], second.features[0])
        if "psnr" not in found:
            self.note(
                f"{second.label} draws pictures of another size than {first.label}: PSNR, SSIM and LPIPS are "
                "left out; set capture.height and capture.width to compare them"
            )
        return found

    def _alike(self, first: Side, paths: Sequence[Path], features: Tensor) -> dict[str, Measured]:
        """How close pictures, with their (N, D) features, are to those of a model's first seed."""
        pairs = compare_pairs(first.paths[0], paths, self._pair_measures(first))
        texture = self._texture_distance(paths, first.paths[0]) if pairs else None
        cosine = torch.nn.functional.cosine_similarity(first.features[0].double(), features.double(), dim=1).tolist()
        return paired(pairs) | ({"texture_distance": texture} if texture else {}) | paired({"feature_cosine": cosine})

    def velocity(self, first: Side, second: Side) -> StateErrors | None:
        """Velocity errors on states of the first model's trajectories, where the second takes them."""
        teacher, student = (getattr(side.pipeline, side.component, None) for side in (first, second))
        if own := first.own_steps or second.own_steps:
            why = f"one of the two is made to draw in {own} steps, and answers for as long ones"
        elif teacher is None or student is None:
            why = "it needs two transformers"
        elif latents_of(first.pipeline) != latents_of(second.pipeline):
            why = "the two have different VAEs"
        else:
            try:
                return state_errors(teacher, student, self._states(first))
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
                why = " ".join(str(error).split())[:160]  # another architecture refuses in its own way
        self.note(f"velocity error of {second.label} is left out: {why}")
        return None

    def _states(self, first: Side) -> list[dict[str, Any]]:
        prompts = self.prompts[:STATE_PROMPTS]
        steps = {"num_inference_steps": self.settings.num_inference_steps}
        settings = self.config.capture.model_copy(update=steps)
        noise = [step_generator(self.config.seed, i, Stream.JUDGED_NOISE) for i in range(len(prompts))]
        calls = record_calls(first.pipeline, prompts, noise, settings)
        size = min(batch_size(call.arguments) for call in calls)
        count = max(1, self.settings.velocity_states // size)
        rows = choose_rows(len(calls), count, size, step_generator(self.config.seed, 0, Stream.JUDGED_STEPS))
        return [calls[index].take(places).arguments for index, places in rows.items()]

    def costs(self, first: Side, second: Side, calls: tuple[Call, Call] | None = None) -> Costs:
        """Time two models alternately.

        Args:
            first: What the other is compared with.
            second: The other.
            calls: Run each transformer once; the first call of drawing one prompt if None.
        """
        seed, steps, component = self.config.seed, self.settings.num_inference_steps, first.component
        if calls is None:
            one, two = (
                transformer_call(side.pipeline, self.prompts[:1], steps, side.kwargs, seed, component)
                for side in (first, second)
            )
            if one is None or two is None:
                raise ModelError(f"{component} is not called in {steps} steps; raise evaluate.num_inference_steps")
            calls = (one, two)
        pipelines, kwargs = (first.pipeline, second.pipeline), (first.kwargs, second.kwargs)
        return costs(pipelines, self.prompts, self.settings, kwargs, calls, seed, component)

    def compare(
        self,
        first: Side,
        second: Side,
        errors: StateErrors | None,
        calls: tuple[Call, Call] | None = None,
        undistilled: float | None = None,
    ) -> tuple[Comparison, Costs]:
        """A model against the first one, and what drawing costs both.

        Args:
            first: What the other is compared with.
            second: The other.
            errors: Velocity errors, if they could be measured.
            calls: See :meth:`costs`.
            undistilled: Velocity error before distillation, for scale.
        """
        measures, others = first.measures[0], second.measures[0]
        fidelity = {name: of_measured(entry) for name, entry in self.fidelity(first, second).items()}
        if errors is not None:
            fidelity["velocity_error"] = of_interval(errors.error, "states")
        cost = self.costs(first, second, calls)
        lost, ratio = drop(measures, others), second.params / first.params
        speeds = {key: _ratio(cost.teacher[key], cost.student[key]) for key in ("latency_ms", "latency_end_to_end_ms")}
        steps = second.own_steps
        shown = "latency_end_to_end_ms" if steps else "latency_ms"
        both = [name for name in CAPTION_SCORES if name in measures and name in others]
        losses = {name: drop({name: measures[name]}, {name: others[name]}) for name in both}
        ratios = {name: _ratio_of(name, measures, others) for name in ("fid", "diversity")}
        comparison = Comparison(
            label=second.label,
            against=first.label,
            average_drop=of_interval(lost) if lost else None,
            average_drop_per_score={name: of_interval(loss) for name, loss in losses.items() if loss},
            differences={name: of_interval(entry) for name, entry in differences(measures, others).items()},
            fid_ratio=of_interval(ratios["fid"]) if ratios["fid"] else None,
            diversity_ratio=of_interval(ratios["diversity"]) if ratios["diversity"] else None,
            fidelity=fidelity,
            scale=self._scale(first, undistilled),
            velocity_error_by_timestep=[Step(**row) for row in by_timestep(errors)] if errors else [],
            param_ratio=ratio,
            speedup=speeds["latency_ms"],
            speedup_end_to_end=speeds["latency_end_to_end_ms"],
            num_inference_steps=steps,
            verdict=verdict(second.label, first.label, lost, ratio, speeds[shown], steps),
        )
        return comparison, cost

    def _scale(self, first: Side, undistilled: float | None) -> dict[str, float]:
        """What fidelity is to be judged by: unrelated noise, and no distillation."""
        scale = {"velocity_error": undistilled} if undistilled is not None else {}
        if len(first.paths) > 1:
            if not first.other_seed:
                found = self._alike(first, first.paths[1], first.features[1])
                first.other_seed = {name: entry.value for name, entry in found.items()}
            scale |= first.other_seed
        return scale

    def result(
        self, models: Sequence[ModelResult], comparisons: Sequence[Comparison], memory_measure: str
    ) -> Evaluation:
        """All of it."""
        return Evaluation(
            features=self.extractor.name,
            prompts=len(self.prompts),
            seed=self.config.seed,
            num_inference_steps=self.settings.num_inference_steps,
            reference=self.reference_name,
            reference_count=self.reference.count if self.reference else None,
            floor=floor_of(self.reference, len(self.prompts), self.text is not None) if self.reference else {},
            memory_measure=memory_measure,
            notes=self.notes,
            models=list(models),
            comparisons=list(comparisons),
        )


def _biased(pictures: str, num_features: int) -> str:
    return (
        f"{pictures} are no more than the {num_features} features: FID is biased upwards; compare it only with FIDs of "
        "equally many pictures"
    )


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _ratio_of(name: str, first: dict[str, Measured], second: dict[str, Measured]) -> Interval | None:
    above, below = (measures[name].items if name in measures else None for measures in (second, first))
    if above is None or below is None or below.mean() == 0:
        return None
    return interval([above, below], lambda a, b, axis: a.mean(axis) / b.mean(axis))


def described(side: Side, costs: dict[str, float | None], speed: Sequence[Speed]) -> ModelResult:
    """A model as the result holds it."""
    return ModelResult(
        label=side.label,
        model=side.entrant.shown,
        params=side.params,
        numbers={name: of_measured(entry) for name, entry in side.measures[0].items()},
        spread=side.spread(),
        costs=costs,
        speed=list(speed),
        blocks=blocks_of(side.pipeline, side.component),
        zeros=zeros_of(transformer) if (transformer := getattr(side.pipeline, side.component, None)) else {},
    )


def judge_all(judge: Judge, entrants: Sequence[Entrant]) -> Evaluation:
    """Judge models, each against the first one; one of the others is loaded at a time."""
    first = judge.side(entrants[0], judge.settings.teacher_seeds)
    if entrants[1:]:
        judge.note(
            f"models are compared by pictures of one seed ({judge.config.seed}): another one moves the drop as well, "
            "by more than some models differ; look at a second evaluation with another seed before small differences "
            "are trusted"
        )
    models, comparisons = [], []
    teacher_costs: Costs | None = None
    for entrant in entrants[1:]:
        second = judge.side(entrant)
        comparison, cost = judge.compare(first, second, judge.velocity(first, second))
        comparisons.append(comparison)
        models.append(described(second, cost.student, cost.speed[1]))
        teacher_costs = teacher_costs or cost
        del second
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    teacher_costs = teacher_costs or judge.costs(first, first)
    models.insert(0, described(first, teacher_costs.teacher, teacher_costs.speed[0]))
    return judge.result(models, comparisons, teacher_costs.memory_measure)
