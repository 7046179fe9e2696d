"""What the stages of a run share: settings, prompts, processes, device, teacher. Loaded when first needed."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppcl.capture.prompts import drawn_data, pictured_prompts, prompts_for
from ppcl.common.artifacts import load_artifact
from ppcl.common.files import append_row, digest, read_mapping
from ppcl.common.folders import LEDGER, check_apart
from ppcl.common.progress import announce
from ppcl.config import PlanConfig, RunConfig, for_model
from ppcl.config.names import BOTH
from ppcl.config.sections import PROMPTS
from ppcl.errors import ConfigError
from ppcl.run.stage import ORDER
from ppcl.training.launch import world
from ppcl.training.tracking import Tracker

if TYPE_CHECKING:
    from ppcl.pruning.artifacts import Candidates
    from ppcl.training.distributed import Group


class Session:
    """A model, its settings and its prompts, and what of them is loaded.

    Args:
        model: ``emoji``, a folder, or a hub id.
        out: The run directory.
        config: What it does not set is the model's default.
        prompts: The user's prompts file, if any.
        command: The command line, for the record.
        first: Of a later round (:mod:`ppcl.run.rounds`): the first one, whose teacher this one is held to as well.
        beside: Of the second transformer (:mod:`ppcl.run.experts`): the run of the first, whose pipeline is written on.

    Raises:
        ConfigError: Several rounds or transformers are asked for, and this is one run.
        ModelError: There is no such model.
        ArtifactError: The run directory lies in the model's.
        UserError: The prompts cannot be used, or other processes do not answer.
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
        if config.plan.rounds > 1 or config.capture.component == BOTH:
            what = "capture.component=both" if config.plan.rounds == 1 else f"plan.rounds={config.plan.rounds}"
            raise ConfigError(f"{what}: ppcl compress alone makes several runs in one folder; leave it out here")
        self.model, self.out, self.prompts, self.command = model, out, prompts, command
        self.first, self.beside = first, beside
        self.is_half = beside is not None  # the other transformer is compressed, too, by a run of its own
        self.config = for_model(model, config)
        from ppcl.common.devices import resolve_device
        from ppcl.teacher.loading import check_folder, check_model, fetch_files, model_path
        from ppcl.teacher.origin import model_files
        from ppcl.training.distributed import connect

        on_cpu = world() > 1 and resolve_device(config.device).type != "cuda"
        related = first or beside
        self.group: Group = related.group if related else connect(on_cpu, config.processes)
        check_model(model)
        check_apart(out, filter(Path.is_dir, [Path(model_path(model))]))
        self.texts = prompts_for(self.origin.model, prompts, config.evaluate.num_prompts)
        if len(self.texts[1]) < config.evaluate.num_prompts:
            split = "{} prompts calibrate and {} evaluate".format(*map(len, self.texts))
            announce(f"{split}, of {config.evaluate.num_prompts} wanted: a third at most; --prompts FILE brings more")
        check_folder(fetch_files(model), self.component)  # of a hub model, before its files are what the run is made of
        every = sorted(text for texts in self.texts for text in texts)
        self.made_of = {"files": model_files(model), "prompts": digest(every), "seed": config.seed}
        self.identity = digest(self.made_of, *self.texts)

    @property
    def component(self) -> str:
        """Name of the transformer that is compressed."""
        return self.config.capture.component

    @property
    def origin(self) -> Session:
        """The session of the first teacher: that of the first round, or this one."""
        return self.first or self

    def depends(self, stage: str) -> str:
        """Digest of everything a stage depends on: its settings, the seed, the model, the stages before it."""
        section: Any = getattr(self.config, stage, None)  # the report has no settings
        shared = [self.identity, self.config.seed, self.config.precision]
        if stage == "analyze":  # intervals are found among the blocks that may go
            shared += [self.config.plan.protect_first, self.config.plan.protect_last]
        if stage == "plan" and self.config.planned_format != "none":
            shared += [self.config.planned_format]
        if stage == "plan" and self.config.plan.recover:  # plans recover as they will be distilled
            shared.append(self.config.recovery(self.config.plan.recover_steps).identity())
        if stage == "export" and self.beside:
            shared.append(self.beside.depends(stage))
        position = ORDER.index(stage)
        upstream = self.depends(ORDER[position - 1]) if position else ""
        return digest(stage, section.identity() if section else None, shared, upstream)

    @cached_property
    def is_pictured(self) -> bool:
        """Whether the teacher's prompts bring pictures: it starts from some, and ``capture`` says which."""
        from ppcl.teacher.loading import pipeline_class
        from ppcl.teacher.pipeline_call import picture_arguments

        if self.config.capture.data == PROMPTS:
            return bool(self.config.capture.sources)
        return bool(picture_arguments(pipeline_class(self.model) or type(self.teacher)))

    @cached_property
    def _prompts(self) -> Any:
        if self.first:
            return self.first._prompts
        if not self.is_pictured:
            return self.texts
        settings = drawn_data(self.config.capture, self.calibration)
        return pictured_prompts(settings, self.config.evaluate.num_prompts, self.config.seed)

    @property
    def calibration_prompts(self) -> list[str]:
        """What the teacher's states are recorded from."""
        return list(self._prompts[0])

    @property
    def evaluation_prompts(self) -> list[str]:
        """What is drawn to judge by; none of them calibrates."""
        return list(self._prompts[1])

    @property
    def calibration(self) -> Path:
        """Folder of the teacher's recorded states."""
        return self.out / "calibration"

    @cached_property
    def device(self) -> Any:
        """The device of the run."""
        import torch

        from ppcl.common.devices import resolve_device

        if self.config.threads:
            torch.set_num_threads(self.config.threads)
        return self.group.place(resolve_device(self.config.device))

    @cached_property
    def tracker(self) -> Tracker:
        """The mirror of the log in wandb."""
        config = {"identity": self.identity, "model": self.model, **self.config.model_dump(mode="json")}
        return Tracker(self.config.wandb, self.out, config)

    @cached_property
    def blocks(self) -> str:
        """How the teacher's blocks are kept: ``resident`` or ``streamed``; decided, and said, when it is first asked.

        Raises:
            ModelError: A hub model's files cannot be fetched.
        """
        from ppcl.teacher.streaming import choose_blocks

        return choose_blocks(self.config.blocks, [self.model], self.device, self.config.precision)

    @property
    def dtype(self) -> Any:
        """Of the teacher's weights: what streamed ones are stored in, on a CPU, or what recorded states ask for."""
        from ppcl.common.devices import weights_dtype
        from ppcl.teacher.streaming import STREAMED, streamed_dtype

        precision = self.config.precision
        if self.device.type == "cpu" and precision != "fp32":
            recorded = self._recorded_dtype()  # whether all fits memory may change between two stages
            if recorded is not None or self.blocks == STREAMED:
                return recorded or streamed_dtype(self.model, self.device, precision, component=self.component)
        return weights_dtype(self.device, precision)

    @property
    def precision(self) -> str:
        """Autocast of passes with float32 substitutes among the teacher's blocks: bf16 where those are half precision.

        On a GPU ``auto`` says so by itself.
        """
        import torch

        given = self.config.precision
        return "bf16" if given == "auto" and self.device.type == "cpu" and self.dtype != torch.float32 else given

    def _recorded_dtype(self) -> Any | None:
        """The dtype of the states that this run's capture recorded, or began to; None before that."""
        from ppcl.capture.states import stored_dtype

        ledger = read_mapping(self.out / LEDGER) if (self.out / LEDGER).is_file() else {}
        record, wanted = ledger.get("capture") or {}, self.depends("capture")
        is_own = wanted in (record.get("digest"), ledger.get("capture.started"))
        return stored_dtype(self.calibration) if is_own else None

    @cached_property
    def teacher(self) -> Any:
        """The teacher's pipeline, whole or with a transformer that reads its blocks as it runs; see ``blocks``."""
        from ppcl.teacher.loading import load_pipeline
        from ppcl.teacher.streaming import STREAMED, load_streamed

        if self.blocks == STREAMED:
            return load_streamed(self.model, self.device, self.dtype, component=self.component)
        return load_pipeline(self.model, self.device, self.dtype, component=self.component)

    @property
    def transformer(self) -> Any:
        """The transformer of ``teacher`` that is compressed."""
        return getattr(self.teacher, self.component)

    def agree_on_blocks(self) -> None:
        """Have all processes do what the first one decides, by the memory that it sees; they call it together."""
        self.blocks = self.group.on_main(lambda: self.blocks)

    def open_blocks(self) -> Any:
        """The teacher's blocks, whole or read one by one; a teacher whose blocks are read is closed."""
        from ppcl.teacher.blocks import ResidentBlocks, StreamedBlocks
        from ppcl.teacher.streaming import STREAMED

        if self.blocks != STREAMED:
            return ResidentBlocks(self.transformer)
        self.release_teacher()
        return StreamedBlocks(self.model, self.device, self.dtype, component=self.component)

    def release_teacher(self) -> Any | None:
        """Give away the teacher's pipeline, if it is loaded whole; who asks for it later loads it again.

        Returns:
            The pipeline; None if it is not loaded, or is one that reads its blocks: that one is closed.
        """
        pipeline = vars(self).pop("teacher", None)
        source = getattr(pipeline, "streamed_blocks", None)
        if source is None:
            return pipeline
        source.detach()
        return None

    def whole_transformer(self) -> Any:
        """The teacher's transformer with all its weights, whatever ``blocks`` says, for what cannot do without yet."""
        from ppcl.teacher.loading import load_pipeline
        from ppcl.teacher.streaming import STREAMED

        if self.blocks != STREAMED:
            return self.transformer
        self.release_teacher()
        return getattr(load_pipeline(self.model, self.device, self.dtype, component=self.component), self.component)

    def keep_whole(self) -> None:
        """Have the teacher in memory whole from now on, whatever ``blocks`` says: for what trains many students."""
        from ppcl.teacher.streaming import RESIDENT, STREAMED

        if vars(self).get("blocks", self.config.blocks) == STREAMED:
            announce("blocks are resident from here on: what follows needs the whole transformer")
            self.release_teacher()
        self.blocks = RESIDENT

    @cached_property
    def adapter(self) -> Any:
        """The adapter of the teacher's transformer."""
        from ppcl.teacher.blocks import transformer_class
        from ppcl.teacher.families import adapter_class, adapter_for
        from ppcl.teacher.loading import stored_folder
        from ppcl.teacher.streaming import STREAMED

        folder = stored_folder(self.model)
        if self.blocks == STREAMED and folder is not None:
            return adapter_class(transformer_class(folder, self.component))
        return adapter_for(self.transformer)

    @cached_property
    def _features(self) -> Any:
        from ppcl.eval.feature_choice import extractor_with_note

        return extractor_with_note(self.origin.model, self.config.evaluate.features, str(self.device))

    @property
    def extractor(self) -> Any:
        """The features behind the scores."""
        return self._features[0]

    @property
    def feature_note(self) -> str | None:
        """What was used instead of what, if the features asked for are out of reach."""
        note: str | None = self._features[1]
        return note

    def with_config(self, config: RunConfig) -> Any:
        """The same session, all that is loaded included, with other settings."""
        other = copy.copy(self)
        other.config = config
        return other

    def search_context(self, settings: PlanConfig | None = None, seed: int | None = None) -> Any:
        """What a search may look at; the teacher is loaded if the search asks for it.

        Args:
            settings: Budget and search; the run's own if None.
            seed: The run's own if None.
        """
        from ppcl.analysis.artifacts import Analysis
        from ppcl.inspection.blueprint import build_on_meta, read_config
        from ppcl.pruning.searches import Context
        from ppcl.pruning.stock_widths import with_stock_widths

        def open_teacher() -> Any:
            from ppcl.pruning.searches.teacher import Teacher

            return Teacher(self.whole_transformer(), self.adapter, self.out, self.precision)

        analysis, candidates = self.read(Analysis, "analysis.json"), self.candidates
        candidates.check_blocks(analysis.model)
        settings = settings or self.config.plan
        if settings.uniform_width:
            config, _ = read_config(self.model, self.component)
            candidates = with_stock_widths(candidates, analysis.model, build_on_meta(config), self.adapter)
        analysis = self._counted_as_stored(analysis)
        return Context(
            analysis,
            candidates,
            settings,
            self.config.seed if seed is None else seed,
            open_teacher,
        )

    def _counted_as_stored(self, analysis: Any) -> Any:
        """An analysis whose model counts bytes in the format that is exported."""
        if self.config.planned_format == "none":
            return analysis
        import torch

        from ppcl.student.stored_size import StoredSize
        from ppcl.teacher.blocks import without_weights
        from ppcl.teacher.families import adapter_for
        from ppcl.teacher.loading import fetch_files

        bare = without_weights(fetch_files(self.model), torch.bfloat16, self.component)
        stored = StoredSize(bare, adapter_for(bare), self.config.planned_format)
        return replace(analysis, model=replace(analysis.model, stored=stored))

    @property
    def candidates(self) -> Candidates:
        """What the fit stage left."""
        from ppcl.pruning.artifacts import load_candidates

        return load_candidates(self.out)

    def read(self, kind: Any, name: str) -> Any:
        """Read a JSON artifact of this run."""
        return load_artifact(kind, self.out / name)

    def log(self, row: dict[str, Any]) -> None:
        """Append a row to ``log.jsonl`` and mirror it in wandb, if asked."""
        append_row(self.out / "log.jsonl", row)
        self.tracker.log(row)
