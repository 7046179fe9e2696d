"""One frozen pydantic model a stage; unknown keys are errors that name the nearest valid one."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from ppcl.common.plugins import source_of
from ppcl.config.distill import DistillConfig
from ppcl.config.extensions import CRITERIA
from ppcl.config.memory import NOT_IN_TABLES, UNTRAINED, changed
from ppcl.config.names import BOTH, BUDGETS, TRANSFORMER, Quantize, Start, Width
from ppcl.config.search import SearchConfig
from ppcl.config.sections import PROMPTS, PicturesConfig, Section
from ppcl.errors import nearest


class CaptureConfig(PicturesConfig):
    """Recording the teacher's denoising states."""

    component: str = Field(
        TRANSFORMER,
        pattern=r"^[A-Za-z]\w*$",
        description="which transformer is recorded and compressed, of a pipeline with two (Wan 2.2: transformer_2); "
        "both: of ppcl compress, one budget for the two (docs/compress.md)",
    )
    sources: str = Field(
        "",
        description="of what starts from a picture, without capture.data: what draws pictures to start from, a "
        "text-to-image pipeline (a folder or a hub id), or teacher, if that draws from a prompt alone (docs/data.md)",
    )
    num_prompts: int = Field(256, ge=2, description="prompts to sample from, at most")
    batch_size: int = Field(16, ge=1, description="prompts denoised together")
    num_inference_steps: int = Field(20, ge=1)
    states_per_prompt: int = Field(8, ge=1, description="transformer calls kept of each trajectory")
    held_out_share: float = Field(0.125, gt=0, lt=1, description="share of the prompts kept for selection")
    height: int | None = Field(None, ge=8, le=16384, description="pixels; the pipeline's default if empty")
    width: int | None = Field(None, ge=8, le=16384)
    num_frames: int | None = Field(None, ge=1, description="of a video; the pipeline's default if empty")
    guidance_scale: float | None = Field(
        None, ge=0, description="as the pipeline counts it, 1 or less for none; the pipeline's default if empty"
    )
    negative_prompt: str = " "

    def identity(self) -> dict[str, Any]:
        """Without the transformer's name where it is the usual one, and sources where there are none."""
        usual = {"component": TRANSFORMER, "sources": ""}
        return {name: value for name, value in super().identity().items() if usual.get(name) != value}

    @model_validator(mode="after")
    def _one_place_of_pictures(self) -> CaptureConfig:
        if self.sources and self.data != PROMPTS:
            raise ValueError("capture.sources draws what capture.data has already; leave one of them out")
        return self


class AnalyzeConfig(Section):
    """Probes, CKA trend, linearity."""

    batch_size: int = Field(64, ge=1, description="states a teacher pass")
    ridges: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (1e-6, 1e-4, 1e-2), min_length=1, description="relative to the mean diagonal of the Gram"
    )
    cka_tokens: int = Field(
        16384, ge=16, description="held-out tokens a stream kept for CKA, at most; of more a sample over all states"
    )
    rows_per_feature: int = Field(128, ge=0, description="about so many tokens per feature enter the sums; 0: all")


class FitConfig(Section):
    """What runs and smaller modules cost, and a short fit of the runs that plans are likely to use."""

    max_run: int = Field(5, ge=2, description="longest run that one block may replace")
    max_candidates: int = Field(24, ge=1, description="runs that are fitted; the others keep their probe score")
    steps: int = Field(50, ge=0)
    batch_size: int = Field(16, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    eval_states: int = Field(48, ge=1, description="held-out states behind each cost")
    vectors: int = Field(4, ge=1, description="random vectors behind each price")
    exact: Literal["none", "runs", "all"] = Field(
        "runs",
        description="what is also carried to the velocity, which costs a part of a teacher pass each: runs by their "
        "probes, or smaller modules, too; fitted runs always are",
    )
    starts: tuple[Start, ...] = Field(get_args(Start), min_length=1)
    width: tuple[Width, ...] = Field(
        ("modulation", "ffn"),
        description="smaller modules that are measured, too, so that the plan may use them beside depth; with any in "
        "the plan, loading the result needs `import ppcl.pipelines`",
    )
    modulation_tolerances: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.1, 0.03, 0.01), description="shares of a modulation layer's varying output that a rank may miss"
    )
    criterion: str = Field(
        "activation",
        description=f"what neurons and heads are kept by: {', '.join(CRITERIA)}, or your file.py:ClassName",
    )
    criterion_draws: int = Field(
        1, ge=1, description="draws of states to score with; kept: that of least velocity error on held-out states"
    )
    width_shares: tuple[float, ...] = Field(
        (0.25, 0.5, 0.75), description="shares of a network's neurons and of an attention's heads that may stay"
    )
    width_multiple: int = Field(
        64,
        ge=1,
        description="neurons that stay are a multiple of it, a smaller one where there are few of them unless it is "
        "above 64; 256 for the K-quants of GGUF",
    )
    width_states: int = Field(256, ge=1, description="training states behind the criterion and the closed forms")
    width_ridge: float = Field(1e-4, gt=0, description="of the least squares that make up for what is cut")

    @field_validator("criterion")
    @classmethod
    def _known_criterion(cls, name: str) -> str:
        """Name the nearest criterion; of one from outside the class is looked for when it is loaded."""
        return CRITERIA.valid(name)

    @field_validator("width_shares")
    @classmethod
    def _real_shares(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        """Nothing is saved by keeping all, and nothing is left of nothing."""
        if not all(0 < share < 1 for share in shares):
            raise ValueError("expected shares between 0 and 1, e.g. [0.25, 0.5]")
        return shares

    def identity(self) -> dict[str, Any]:
        """With the content of a criterion's file: another criterion under the same name is another result."""
        source, known = source_of(self.criterion), self.model_dump()
        if self.width_multiple == type(self).model_fields["width_multiple"].default:
            del known["width_multiple"]  # what was fitted before there was a choice stays as it is
        return {**known, **({"criterion_source": source} if source is not None else {})}


class PlanConfig(SearchConfig):
    """Choosing the runs under a budget; exactly one budget is used."""

    keep: float | None = Field(
        None, gt=0, le=1, description="share of the transformer's parameters; 0.6 if no budget is given"
    )
    speedup: float | None = Field(None, ge=1, description="predicted speed-up of the transformer")
    fit_gb: float | None = Field(None, gt=0, description="GB (1e9 bytes) that all weights may take")
    rounds: int = Field(
        1,
        ge=1,
        le=8,
        description="of ppcl compress: times that it prunes and recovers, on the way to one budget (docs/compress.md)",
    )
    recover: int = Field(
        0,
        ge=0,
        description="the best so many plans recover for some steps, the best two of them for longer; the plan is the "
        "one that is then nearest to the teacher on held-out states (docs/compress.md); 0: off",
    )
    recover_steps: int = Field(20, ge=1, description="of each of them; the best two: three times as many")
    recover_stage: Literal["local", "carried", "output"] = Field(
        "output", description="of distillation, that they recover by; output needs the whole student with gradients"
    )
    recover_states: int = Field(64, ge=1, description="held-out states behind their errors, with and without guidance")
    width: tuple[Width, ...] | None = Field(
        None, description="smaller modules that the optimal mode may use, of those that were measured; all if empty"
    )
    uniform_width: bool = Field(
        False,
        description="of the optimal mode: all feed-forward networks keep one share of their neurons, and beside them "
        "only blocks go, so that the result is of diffusers' own class (docs/smaller_modules.md)",
    )
    protect_first: int = Field(
        1, ge=0, description="first blocks of the first stack that stay; read from the analyze stage on"
    )
    protect_last: int = Field(
        1, ge=0, description="last blocks of the last stack that stay; read from the analyze stage on"
    )

    @model_validator(mode="after")
    def _one_budget(self) -> PlanConfig:
        given = [n for n in BUDGETS if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"plan: {' and '.join(given)} are both set; give one budget")
        if self.rounds > 1 and self.fit_gb is not None:
            raise ValueError(
                "plan.rounds divides plan.keep or plan.speedup among the rounds; leave it out, or plan.fit_gb"
            )
        if self.uniform_width and self.mode != "optimal":
            raise ValueError(f"plan.uniform_width is kept by plan.mode=optimal, got {self.mode}; leave one of them out")
        if self.uniform_width and self.width is not None and "ffn" not in self.width:
            raise ValueError("plan.uniform_width makes networks narrower, and plan.width leaves out ffn; add it")
        if self.recover == 1:
            raise ValueError("plan.recover=1 leaves nothing to choose from; give 2 or more, or 0 to choose by costs")
        return self

    def identity(self) -> dict[str, Any]:
        """Without the number of rounds, each of which is a run with a budget of its own, and what is off."""
        off = {"rounds", *(() if self.uniform_width else ("uniform_width",))}
        if not self.recover:
            off |= {"recover", "recover_steps", "recover_stage", "recover_states"}
        return {name: value for name, value in super().identity().items() if name not in off}

    @property
    def budget(self) -> tuple[str, float]:
        """Kind and value of the budget in force (``keep`` 0.6 if none was given)."""
        for name in BUDGETS:
            if (value := getattr(self, name)) is not None:
                return name, value
        return "keep", 0.6


class ExportConfig(Section):
    """Writing the pipeline."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="of the transformer's weights; auto: as the teacher's are stored"
    )
    variant: str | None = Field(
        None, pattern=r"^[A-Za-z0-9_]+$", description="in the weights' file names, e.g. bf16; loading then names it too"
    )
    max_shard_size: str = Field("10GB", description="of one file of weights, e.g. 5GB or 800MB")
    shards: int | None = Field(
        None, ge=1, description="so many files of weights, whatever their size; kohya's sd-scripts want 3 of FLUX"
    )
    components: Literal["copy", "link"] = Field(
        "copy", description="link: the other components' weights are the teacher's files (on one file system)"
    )
    remote_code: bool = Field(
        False, description="smaller modules: their code goes along, for trust_remote_code=True without ppcl"
    )
    quantize: Quantize = Field(
        "none",
        description="of the linear layers in the transformer's blocks: int8, fp8 and nvfp4 (4.5 bits) by torchao on "
        "any device; int4 by torchao and nf4 by bitsandbytes on CUDA alone; short: quantize (docs/quantize.md)",
    )
    recover_steps: int = Field(
        100,
        ge=0,
        description="with quantize: training of what stays in bfloat16, on the teacher's velocity",
    )
    recover_learning_rate: float = Field(1e-3, gt=0)

    @model_validator(mode="after")
    def _one_dtype(self) -> ExportConfig:
        if self.quantize != "none" and self.shards is not None:
            raise ValueError("export.shards counts plain weights; leave it or export.quantize out")
        if self.quantize != "none" and self.dtype not in ("auto", "bfloat16"):
            raise ValueError(
                f"export.quantize={self.quantize} stores the rest in bfloat16; leave export.dtype={self.dtype} out"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """Without what is off."""
        off = {"quantize", "recover_steps", "recover_learning_rate"} if self.quantize == "none" else set[str]()
        return self.model_dump(exclude=off if self.shards else {*off, "shards"})

    @field_validator("max_shard_size")
    @classmethod
    def _is_size(cls, text: str) -> str:
        """Catch a typo before hours of distillation."""
        if not re.fullmatch(r"[1-9]\d*(KB|MB|GB|TB)", text):
            raise ValueError("expected a whole number and KB, MB, GB or TB, e.g. 5GB")
        return text


class EvaluateConfig(Section):
    """Pictures and numbers."""

    num_prompts: int = Field(
        128,
        ge=2,
        description="of a run, a third of its prompts at most; ppcl evaluate --prompts FILE draws all of the file",
    )
    num_inference_steps: int = Field(20, ge=1)
    batch_size: int = Field(32, ge=1)
    teacher_seeds: int = Field(2, ge=1, description="times the teacher draws every prompt, for its own spread")
    picture_seeds: int = Field(
        3, ge=1, description="times that what compare, ablate and ladder tell apart draws every prompt; a run: once"
    )
    diversity_prompts: int = Field(
        32, ge=0, description="prompts drawn once more from other noise, to see how much pictures of a prompt differ"
    )
    velocity_states: int = Field(64, ge=1)
    features: str = Field("auto", description="emoji, inception, or an open_clip name, e.g. ViT-B-32/openai")
    latency_runs: int = Field(10, ge=1, description="timed calls; another number draws all pictures again, too")
    speed_batch_sizes: list[Annotated[int, Field(ge=1)]] = Field([1, 4], min_length=1, description="prompts at once")
    speed_steps: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="step counts of whole pictures; all steps and half of them if empty"
    )

    def identity(self) -> dict[str, Any]:
        """Without what a run does not read."""
        return self.model_dump(exclude={"picture_seeds"})

    @field_validator("features")
    @classmethod
    def _known_features(cls, name: str) -> str:
        """Catch a typo before hours of distillation; open_clip's own names are checked when they are loaded."""
        valid = ("auto", "emoji", "inception")
        if name not in valid and not name.startswith("local-dir:") and "/" not in name:
            names = ", ".join((*valid, "local-dir:FOLDER", "ViT-B-32/openai and others of open_clip"))
            raise ValueError(f"unknown features{nearest(name, valid)}; valid: {names}")
        return name


class RunConfig(Section):
    """Everything a run depends on."""

    seed: int = Field(0, ge=0, lt=4_000_000_000)
    device: str = Field("auto", description="cpu, cuda, cuda:1, mps, or auto")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="autocast of forward passes (auto: bf16 on a GPU); fp32 loads the teacher in float32, too"
    )
    blocks: Literal["auto", "resident", "streamed"] = Field(
        "auto",
        description="whether the transformer is loaded whole (resident) or read from its files block by block as it "
        "runs (streamed; on a CPU in the dtype of the files, and distill is its local stage then); auto: whole if it "
        "fits the device's free memory",
    )
    processes: int | None = Field(
        None, ge=1, description="that must train, or the run stops; a launcher starts them (docs/training.md)"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; all cores if empty")
    wandb: Literal["off", "online", "offline"] = "off"
    capture: CaptureConfig = CaptureConfig()  # type: ignore[call-arg]
    analyze: AnalyzeConfig = AnalyzeConfig()  # type: ignore[call-arg]
    fit: FitConfig = FitConfig()  # type: ignore[call-arg]
    plan: PlanConfig = PlanConfig()  # type: ignore[call-arg]
    distill: DistillConfig = DistillConfig()  # type: ignore[call-arg]
    export: ExportConfig = ExportConfig()  # type: ignore[call-arg]
    evaluate: EvaluateConfig = EvaluateConfig()  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _whole_model_for_what_needs_it(self) -> RunConfig:
        if self.blocks == "streamed" and (asked := self.distill.not_streamed):
            raise ValueError(f"blocks=streamed leaves no whole model for {', '.join(asked)}; leave one of them out")
        return self

    def recovery(self, steps: int) -> DistillConfig:
        """How plans recover before one is chosen: as they will be distilled, in one stage, substitutes alone.

        Raises:
            ConfigError: That stage does not fit the settings of distillation.
        """
        alone = {"train": "substitutes", "shard": False, "keep_start": False, "sparsity": {}}
        stage = {f"{self.plan.recover_stage}_steps": steps}
        return changed(self.distill, **{**UNTRAINED, **NOT_IN_TABLES["distill"], **alone, **stage})

    @model_validator(mode="after")
    def _one_width_of_what_is_measured(self) -> RunConfig:
        if self.plan.uniform_width and "ffn" not in self.fit.width:
            raise ValueError("plan.uniform_width makes networks narrower, and fit.width leaves out ffn; add it")
        return self

    @model_validator(mode="after")
    def _quantized_whole(self) -> RunConfig:
        if self.export.quantize == "none":
            return self
        if self.distill.sparsity.zeros:
            raise ValueError("export.quantize does not keep the zeros of sparsity; leave one of them out")
        if self.blocks == "streamed":
            raise ValueError("export.quantize has the student in memory whole; leave it or blocks=streamed out")
        return self

    @property
    def planned_format(self) -> Quantize:
        """The format whose bytes a plan is chosen by: with a budget in bytes alone."""
        return self.export.quantize if self.plan.budget[0] == "fit_gb" else "none"

    @model_validator(mode="after")
    def _fresh_needs_pictures(self) -> RunConfig:
        if self.distill.fresh and self.capture.data == PROMPTS:
            raise ValueError("distill.fresh noises pictures anew; set capture.data to some, or distill.fresh=0")
        return self

    @model_validator(mode="after")
    def _one_kind_of_several_runs(self) -> RunConfig:
        if self.capture.component == BOTH and self.plan.rounds > 1:
            raise ValueError("capture.component=both and plan.rounds do not go together; leave one of them out")
        return self

    @model_validator(mode="after")
    def _first_transformer_for_what_knows_no_other(self) -> RunConfig:
        asked = {
            "plan.recover": self.plan.recover,
            "distill.few_steps": self.distill.few_steps.num_inference_steps,
            "export.quantize": self.export.quantize != "none",
        }
        if self.capture.component != TRANSFORMER and (names := [name for name, on in asked.items() if on]):
            raise ValueError(
                f"{', '.join(names)} with capture.component={self.capture.component}: known of {TRANSFORMER!r} alone; "
                "leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _rounds_on_recorded_states(self) -> RunConfig:
        if self.distill.fresh and self.plan.rounds > 1:
            raise ValueError(
                "plan.rounds trains later rounds on what the first teacher answered when it was recorded, which "
                "distill.fresh has none of; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _few_steps_come_last(self) -> RunConfig:
        if self.distill.few_steps.num_inference_steps and self.plan.rounds > 1:
            raise ValueError(
                "distill.few_steps follows the trajectories of the model that is compressed, which plan.rounds changes "
                "from round to round; leave one of them out"
            )
        return self
