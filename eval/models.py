"""What ``ppcl evaluate`` is given: pipelines, runs and bundles, found, checked and loaded."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ppcl.capture.prompts import drawn_data, pictured_prompts, prompts_for, read_prompts
from ppcl.common.files import digest, read_mapping, read_yaml
from ppcl.common.tensor_files import weights_variant
from ppcl.config import CaptureConfig, RunConfig, for_model, load_config
from ppcl.config.names import PREFIX, TRANSFORMER
from ppcl.config.sections import PROMPTS
from ppcl.errors import ArtifactError, ConfigError, ModelError, UserError
from ppcl.eval.costs import denoiser_of
from ppcl.eval.features import LOCAL_PREFIX
from ppcl.eval.results import Block
from ppcl.teacher.blocks import loaded_bytes
from ppcl.teacher.families import ADAPTERS
from ppcl.teacher.loading import (
    EMBEDDED,
    check_model,
    fetch_files,
    model_of_run,
    model_path,
    on_device,
    open_pipeline,
    pipeline_class,
    read_index,
    source_name,
)
from ppcl.teacher.origin import first_round, teacher_of, weights_digest
from ppcl.teacher.pipeline_call import guidance_arguments, own_call, picture_arguments, without_guidance
from ppcl.teacher.stored import check_stored, not_a_pipeline
from ppcl.teacher.streaming import RESIDENT, STREAMED, choose_blocks, load_streamed, streamed_dtype

logger = logging.getLogger(__name__)
OF_PICTURES = ("component", "height", "width", "num_frames", "guidance_scale", "negative_prompt")  # of ``capture``
FOLDERS = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class ModelSource:
    """A model to evaluate.

    Attributes:
        label: Names it in tables, and its folder of pictures.
        model: ``emoji``, a pipeline folder, a hub id, or a run whose bundle is to be plugged in.
        shown: The same without the folders of this machine.
        is_bundle: Whether it is a run's bundle, plugged into its teacher.
        teacher: Of a bundle: where its teacher is, if not where the run was made with it.
    """

    label: str
    model: str
    shown: str
    is_bundle: bool = False
    teacher: str | None = None

    @property
    def identity(self) -> str:
        """Identifies the weights; texts beside them (a model card) do not count."""
        if self.is_bundle:
            return digest("bundle", weights_digest(str(Path(self.model) / "bundle")))
        return weights_digest(self.model)


def is_run(argument: str) -> bool:
    """Whether an argument is a run directory."""
    return argument not in EMBEDDED and (Path(argument) / "stages.json").is_file()


def sources(arguments: Sequence[str], teacher: str | None = None) -> list[ModelSource]:
    """Find out what the arguments are.

    A run stands for its compressed pipeline; alone, for its teacher and its compressed pipeline. A folder
    with ``bundle.json`` stands for that bundle with all its substitutes.

    Args:
        arguments: What the user gave.
        teacher: Where the teacher of a run or bundle among them is, if it or they were moved.

    Raises:
        UserError: An argument is none of these, or the same model is given twice.
    """
    found: list[ModelSource] = []
    for argument in arguments:
        path = Path(argument)
        if is_run(argument):
            if len(arguments) == 1:
                model = teacher_of(first_round(path), teacher)
                found.append(ModelSource("teacher", model, source_name(model)))
            if not (path / "pipeline" / "model_index.json").is_file():
                raise UserError(f"{path} is a run without a pipeline; run ppcl export (or compress) first")
            name = path.resolve().name
            label = "student" if len(arguments) == 1 else name
            found.append(ModelSource(label, str(path / "pipeline"), f"{name}/pipeline"))
        elif (path / "bundle.json").is_file():
            run = path.resolve().parent
            found.append(
                ModelSource(f"{run.name}-bundle", str(run), f"{run.name}/bundle", is_bundle=True, teacher=teacher)
            )
        else:
            name = source_name(argument)
            found.append(ModelSource(name.rpartition("/")[2], argument, name))
    if len({one.model for one in found}) < len(found):
        raise UserError(f"the same model is given twice among {', '.join(one.shown for one in found)}; give others")
    for one in found:
        _check(one)
    return _with_own_labels(found)


def _with_own_labels(found: list[ModelSource]) -> list[ModelSource]:
    """Labels that work as folder names and differ, whatever the case."""
    labels: list[str] = []
    for one in found:
        stem = label = FOLDERS.sub("-", one.label).strip(".-") or "model"
        while label.lower() in (known.lower() for known in labels):
            label = f"{stem}-{sum(known.lower().startswith(stem.lower()) for known in labels) + 1}"
        labels.append(label)
    return [replace(one, label=label) for label, one in zip(labels, found, strict=True)]


def _check(one: ModelSource) -> None:
    """Find what is wrong with a folder before hours go into drawing; any diffusers pipeline will do."""
    folder = Path(model_path(one.model))
    if one.is_bundle:
        return
    if not folder.is_dir():
        check_model(one.model)
        return
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(not_a_pipeline(folder))
    read_index(folder)
    check_stored(folder)


def keeping(sources: Sequence[ModelSource], setting: str, device: torch.device) -> str:
    """Decide how the blocks of models are kept that are judged, the first one beside each of the others.

    Args:
        sources: The models.
        setting: See ``RunConfig.blocks``.
        device: Where they run.

    Returns:
        ``resident`` or ``streamed``.
    """
    models = [source.model for source in sources if _can_stream(source)] if setting != RESIDENT else []
    if not models:
        return RESIDENT
    first, *others = sorted(models, key=lambda model: -sum(loaded_bytes(model, torch.float32).values()))
    return choose_blocks(setting, [first, *others[:1]], device)


def load(source: ModelSource, device: torch.device, blocks: str = RESIDENT) -> Any:
    """Load its pipeline onto a device.

    Args:
        source: Which model.
        device: Where it runs.
        blocks: As :func:`keeping` decided; a bundle, which changes its blocks as it goes, and a U-Net are loaded whole.

    Raises:
        ModelError: It cannot be loaded, or draws without a transformer or U-Net.
    """
    if source.is_bundle:
        from ppcl.pipelines.bundle import load_bundle

        return load_bundle(source.model, device=str(device), teacher=source.teacher)
    variant = weights_variant(fetch_files(source.model))
    if blocks == STREAMED and _can_stream(source):
        return load_streamed(source.model, device, streamed_dtype(source.model, device, variant=variant), variant)
    pipeline = open_pipeline(source.model, device, None, variant)
    if denoiser_of(pipeline) is None:
        name = type(pipeline).__name__
        raise ModelError(f"{name} has neither a transformer nor a U-Net; evaluate a diffusion pipeline")
    return on_device(source.model, pipeline, device)


def _can_stream(source: ModelSource) -> bool:
    """Whether a model draws with a transformer of a known family, whose blocks can be read one by one."""
    if source.is_bundle:
        return False
    entry = read_index(fetch_files(source.model)).get("transformer")
    return isinstance(entry, list) and str(entry[-1]).removeprefix(PREFIX) in ADAPTERS


def blocks_of(pipeline: Any, component: str = TRANSFORMER) -> dict[str, list[Block]]:
    """The blocks of a model that ppcl made, by stack, as its config records them; empty for any other."""
    from ppcl.teacher.block_map import block_maps, pipeline_record, smaller_modules

    config = getattr(getattr(pipeline, component, None), "config", None) or {}
    if not config.get("_ppcl"):
        return {}
    record = pipeline_record(pipeline, component)
    smaller: dict[tuple[str, str], list[str]] = {}
    for path in smaller_modules(config):
        stack, position, module = [*str(path).split(".", 2), "", ""][:3]
        smaller.setdefault((stack, position), []).append(module)
    return {
        stack: [
            Block(first=first, last=last, width=sorted(smaller.get((stack, str(position)), [])))
            for position, (first, last) in enumerate(found.spans)
        ]
        for stack, found in block_maps(record["kept_blocks"]).items()
    }


def call_arguments(pipeline: Any, settings: CaptureConfig) -> dict[str, Any]:
    """Size and guidance as this pipeline wants them, and its steps if it is made for few of them.

    U-Net pipelines take the plain names.
    """
    if call := own_call(pipeline):
        return {**guidance_arguments(pipeline, without_guidance(pipeline, settings)), **call}
    if getattr(pipeline, "transformer", None) is not None:
        return guidance_arguments(pipeline, settings)
    accepted = inspect.signature(pipeline.__call__).parameters
    wanted = {name: getattr(settings, name) for name in ("height", "width", "guidance_scale", "negative_prompt")}
    return {name: value for name, value in wanted.items() if value is not None and name in accepted}


def with_transformer(pipeline: Any, transformer: Any, component: str = TRANSFORMER) -> Any:
    """Return a pipeline that shares all components but a transformer."""
    copied = type(pipeline)(**{**pipeline.components, component: transformer})
    copied.set_progress_bar_config(disable=True)
    return copied


def latents_of(pipeline: Any) -> dict[str, Any]:
    """What must agree for two models' latents to mean the same."""
    config = dict(getattr(getattr(pipeline, "vae", None), "config", {}))
    return {name: value for name, value in config.items() if not name.startswith("_")}


def settings_for(arguments: Sequence[str], files: Sequence[Path], overrides: Sequence[str]) -> RunConfig:
    """The settings of an evaluation: how the first run among the arguments was evaluated, then files, then overrides.

    A run may be from elsewhere. It says how its pictures are drawn and scored; what is done here, and whom it is sent
    to (``wandb``, ``device``, folders), is for who types the command to say.

    Raises:
        ConfigError: A key or value cannot be used.
    """
    record = next((Path(a) / "config.yaml" for a in arguments if is_run(a)), None)
    held = read_yaml(record, ConfigError, "run the run again") if record is not None and record.is_file() else {}
    config = held.get("config")
    defaults = _of_pictures(config) if isinstance(config, dict) else {}
    return for_model("emoji" if is_embedded(arguments) else "", load_config(list(files), list(overrides), defaults))


def _of_pictures(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's settings says how pictures are drawn and scored."""
    capture, evaluate = (config.get(name) for name in ("capture", "evaluate"))
    settings: dict[str, Any] = {"seed": config["seed"]} if "seed" in config else {}
    if isinstance(capture, dict):
        settings["capture"] = {name: capture[name] for name in OF_PICTURES if name in capture}
    if isinstance(evaluate, dict):
        is_here = str(evaluate.get("features", "")).startswith(LOCAL_PREFIX)
        settings["evaluate"] = {key: value for key, value in evaluate.items() if not (is_here and key == "features")}
        if is_here:
            logger.warning("the run was scored by a model in a folder; set evaluate.features to have such a one here")
    return settings


def is_embedded(arguments: Sequence[str]) -> bool:
    """Whether the embedded model, or a run of it, is among the arguments."""
    return any(a == "emoji" or (is_run(a) and model_of_run(first_round(Path(a))) == "emoji") for a in arguments)


def evaluation_prompts(arguments: Sequence[str], file: Path | None, config: RunConfig) -> Sequence[str]:
    """What to draw: all of a file, or what the first run among the arguments was evaluated with, or the built-in set.

    A model that starts from pictures draws those of ``capture.data``, where there are any, by their captions.

    Raises:
        UserError: The file or the pictures cannot be read, or are too few.
    """
    count, kind = config.evaluate.num_prompts, pipeline_class(sources(arguments)[0].model)
    runs = [first_round(Path(argument)) / "calibration" for argument in arguments if is_run(argument)]
    settings = drawn_data(config.capture, runs[0]) if runs else config.capture
    if settings.data != PROMPTS and kind is not None and picture_arguments(kind):
        return pictured_prompts(settings, count, config.seed)[1]
    if file is not None:
        return read_prompts(file)
    for argument in filter(is_run, arguments):
        for shown in sorted((Path(argument) / "eval" / "student").glob("seed-*/prompts.json")):
            held = read_mapping(shown).get("prompts")
            if not isinstance(held, list) or not all(isinstance(text, str) for text in held):
                raise ArtifactError(f"{shown} names no prompts; run ppcl evaluate again")
            return held
    return prompts_for("emoji" if is_embedded(arguments) else "", None, count)[1]
