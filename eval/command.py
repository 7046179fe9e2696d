"""``ppcl evaluate A B ...``: any pipelines, runs and bundles, judged in one folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ppcl.common.devices import resolve_device
from ppcl.common.files import digest, write_json
from ppcl.common.folders import check_apart, check_claim, lock_folder, remove_leftovers
from ppcl.config import RunConfig
from ppcl.errors import UserError
from ppcl.eval.feature_choice import extractor_with_note, real_reference
from ppcl.eval.features import FeatureExtractor
from ppcl.eval.judge import TIMES_OF_STREAMED, Entrant, Judge, judge_all
from ppcl.eval.markdown import cost_rows, score_rows
from ppcl.eval.models import ModelSource, evaluation_prompts, is_embedded, keeping, load, settings_for, sources
from ppcl.eval.pictures import describe, load_statistics, reference_files
from ppcl.eval.report import write_report
from ppcl.eval.results import MARKER, Evaluation, flat_numbers, is_evaluation, save_evaluation
from ppcl.eval.scoring import Reference, reference_of
from ppcl.teacher.loading import model_path
from ppcl.teacher.streaming import STREAMED
from ppcl.training.tracking import Tracker


def evaluate_models(
    models: Sequence[str],
    out: Path,
    config: RunConfig,
    prompts: Sequence[str],
    reference: Path | None = None,
    embedded: bool = False,
    teacher: str | None = None,
) -> Evaluation:
    """Evaluate models and write ``metrics.json``, its schema, ``report.md`` and ``report.html``.

    Args:
        models: ``emoji``, pipeline folders, hub ids, runs or bundles; the first is what the others are compared
            with. One run alone stands for its teacher and its student.
        out: The output folder; it keeps pictures and features.
        config: ``evaluate``, ``capture`` (size, guidance), ``seed``, ``device``, ``threads``.
        prompts: What all draw.
        reference: A folder of real pictures, or a ``.npz`` of their statistics.
        embedded: Whether the embedded model is judged: its own evaluator and pictures are the default then.
        teacher: Where the teacher of a moved run is.

    Raises:
        UserError: A model, the reference or the folder cannot be used.
    """
    to_judge = sources(models, teacher)
    check_out(out)
    given = [Path(model_path(source.model)) for source in to_judge if not source.is_bundle]
    check_apart(out, filter(Path.is_dir, [*given, *([reference] if reference else [])]))
    lock = lock_folder(out)
    try:
        remove_leftovers(out)
        write_json(out / MARKER, {"schema_version": 1, "models": [source.shown for source in to_judge]})
        result = _evaluate(to_judge, out, config, prompts, reference, embedded)
    finally:
        lock.release()
    save_evaluation(result, out)
    write_report(out)
    _mirror(out, config, prompts, result)
    return result


def check_out(out: Path) -> None:
    """Refuse to write an evaluation into a folder that is somebody else's.

    Raises:
        UserError: It is a run, or holds something else.
    """
    if (out / "stages.json").is_file():
        raise UserError(f"{out} is a run; choose another --out for the evaluation of several models")
    if not is_evaluation(out):
        check_claim(out, MARKER, "an evaluation")


def _evaluate(
    to_judge: Sequence[ModelSource],
    out: Path,
    config: RunConfig,
    prompts: Sequence[str],
    reference: Path | None,
    embedded: bool,
) -> Evaluation:
    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    extractor, note = extractor_with_note("emoji" if embedded else "other", config.evaluate.features, str(device))
    cache = out / "features"
    pictures, notes = _reference(reference, embedded, extractor, cache)
    judge = Judge(out / "pictures", prompts, config, extractor, pictures, cache, out / "reference.npz")
    for line in (note, *notes):
        judge.note(line)

    blocks = keeping(to_judge, config.blocks, device)
    judge.note(TIMES_OF_STREAMED if blocks == STREAMED else None)

    def entrant(source: ModelSource) -> Entrant:
        return Entrant(source.label, source.shown, source.identity, lambda: load(source, device, blocks))

    return judge_all(judge, [entrant(source) for source in to_judge])


def _reference(
    given: Path | None, embedded: bool, extractor: FeatureExtractor, cache: Path
) -> tuple[tuple[Reference, str] | None, list[str]]:
    """What FID compares with and its name, if it is known before anything is drawn; and notes."""
    if given is not None and given.suffix == ".npz":
        probe = extractor.image_features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        note = (
            f"{given.name} holds mean and covariance alone: KID, CMMD, precision, recall, density and coverage "
            "need the pictures themselves"
        )
        return (load_statistics(given, probe.shape[1]), given.name), [note]
    if given is not None:
        features = describe(reference_files(given), extractor, cache / "reference.safetensors", "reference pictures")
        return (reference_of(features), given.resolve().name), []
    return real_reference("emoji" if embedded else "other", extractor), []


def _mirror(out: Path, config: RunConfig, prompts: Sequence[str], result: Evaluation) -> None:
    """Send table, pictures and numbers to wandb, if asked."""
    labels = [model.label for model in result.models]
    identity = digest(labels, list(prompts), config.seed)
    tracker = Tracker(config.wandb, out, {"identity": identity, **config.model_dump(mode="json")})
    track(tracker, result, out / "pictures", prompts)
    tracker.finish()


def track(tracker: Tracker, result: Evaluation, pictures: Path, prompts: Sequence[str]) -> None:
    """Show an evaluation in wandb: table, numbers, and the pictures of the first seed.

    Args:
        tracker: Where to.
        result: What was measured.
        pictures: Holds ``<label>/seed-<s>``.
        prompts: What was drawn.
    """
    labels = [model.label for model in result.models]
    folders = {label: pictures / label / f"seed-{result.seed}" for label in labels}
    drawn = {
        label: list(zip(prompts, sorted(folder.glob("[0-9]*.png")), strict=False)) for label, folder in folders.items()
    }
    tracker.evaluation(["", *labels], [*score_rows(result), *cost_rows(result)], flat_numbers(result), drawn)


def evaluate_command(
    models: Sequence[str],
    out: Path,
    files: Sequence[Path],
    overrides: Sequence[str],
    prompts: Path | None,
    reference: Path | None,
    teacher: str | None = None,
) -> Evaluation:
    """The command: settings and prompts as :mod:`ppcl.eval.models` finds them, then :func:`evaluate_models`."""
    config = settings_for(models, files, overrides)
    texts = evaluation_prompts(models, prompts, config)
    return evaluate_models(models, out, config, texts, reference, is_embedded(models), teacher)
