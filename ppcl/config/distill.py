"""The config section on distillation, by subject; what trades memory is in :mod:`ppcl.config.memory`. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ppcl.config.few_steps import FewStepsConfig
from ppcl.config.memory import HOW_NOT_WHAT, MemorySettings
from ppcl.config.sections import Section
from ppcl.config.sparsity import SparsityConfig


class WhatIsTrained(Section):
    """What is trained, on which states."""

    local_steps: int = Field(300, ge=0, description="stage 1: substitutes on the teacher's own states")
    carried_steps: int = Field(
        0,
        ge=0,
        description="after stage 1, of each substitute in turn: on the student's own states with the teacher's as "
        "targets, one block in memory (docs/training.md)",
    )
    carried_kept: bool = Field(
        False,
        description="of train=lora: carried steps train the blocks that stay, too, those behind the first substitute, "
        "each in its turn and through LoRA (docs/training.md)",
    )
    correct: bool = Field(
        False,
        description="before carried steps, of each substitute in turn: its last linear layers in closed form, on the "
        "student's own states with the teacher's as targets, one block in memory (docs/training.md)",
    )
    alternating_steps: int = Field(
        0, ge=0, description="stage 2: hybrids of teacher and substitutes, a coin for each, on states and velocity"
    )
    output_steps: int = Field(200, ge=0, description="stage 3: the whole student on the teacher's velocity")
    train: Literal["substitutes", "all", "lora"] = Field(
        "all", description="what the output stage trains; lora: substitutes, and the kept blocks through LoRA"
    )
    lora_rank: int = Field(16, ge=1, description="of train=lora")
    from_fit: bool = Field(True, description="start from the fitted candidates where there are any")
    keep_start: bool = Field(
        True, description="keep the start where training ends further from the teacher on held-out states"
    )
    sequence: Literal["non-sequential", "sequential"] = Field(
        "non-sequential", description="sequential: substitutes see the student's states, as an ablation"
    )
    fresh: int = Field(
        0,
        ge=0,
        description="pictures of capture.data that are noised anew for every step (docs/data.md); 0: recorded states",
    )


class OptimizerSettings(Section):
    """Batches, rates and losses of a step."""

    batch_size: int = Field(24, ge=1)
    local_learning_rate: float = Field(1e-3, gt=0)
    output_learning_rate: float = Field(3e-4, gt=0)
    warmup_steps: int = Field(20, ge=0, description="of each stage, a tenth of its steps at most")
    weight_decay: float = Field(0.02, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.98, ge=0, lt=1, description="0 turns the moving average off")
    loss: Literal["normalized", "direction"] = Field(
        "normalized",
        description="normalized: direction + magnitude by the teacher's norm; direction: the paper's eq. 6",
    )


class ProgressSettings(Section):
    """What is kept, shown and put up with on the way."""

    checkpoint_every: int = Field(50, ge=1)
    keep_checkpoints: int = Field(1, ge=1, description="the newest so many stay")
    sample_every: int = Field(
        0, ge=0, description="output stage: steps between sheets of pictures in RUN/samples (and wandb); 0: none"
    )
    sample_prompts: int = Field(4, ge=1, description="of the evaluation, that sheets show")
    max_bad_steps: int = Field(
        10, ge=0, description="steps with NaN or a spike that a stage may leave out, a tenth of it at most"
    )
    spike_factor: float = Field(
        0, ge=0, description="a loss of so many times its running average is a spike; 0: gradients are clipped, no more"
    )


class DistillConfig(MemorySettings, ProgressSettings, OptimizerSettings, WhatIsTrained):
    """Training the substitutes against the teacher."""

    sparsity: SparsityConfig = SparsityConfig()  # type: ignore[call-arg]
    few_steps: FewStepsConfig = FewStepsConfig()  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _settings_that_fit(self) -> DistillConfig:
        if self.sparsity.zeros and self.train == "lora":
            raise ValueError("sparsity does not fit distill.train=lora, which adds no zeros; use all or substitutes")
        if self.shard and self.train != "all":
            raise ValueError("distill.shard splits what distill.train=all trains; set that, or leave shard out")
        if self.shard_teacher and self.train == "lora":
            raise ValueError(
                "distill.shard_teacher splits blocks that distill.train=lora writes to; set one of the two"
            )
        released = self.release_gradients is True
        alone = "one_at_a_time" if self.one_at_a_time else "release_gradients" if released else ""
        if alone and self.sparsity.zeros:
            raise ValueError(f"sparsity holds all gradients together; leave out distill.{alone}")
        if self.walks:
            asked = {"shard_teacher": self.shard_teacher, "fresh": self.fresh, "sparsity": self.sparsity.zeros}
            if names := [name for name, there in asked.items() if there]:
                raise ValueError(
                    f"distill.{'carried_steps' if self.carried_steps else 'correct'} takes one substitute after the "
                    f"other on recorded states, with whole blocks and no zeros to hold; leave it out, or {names[0]}"
                )
        if self.carried_kept and (not self.carried_steps or self.train != "lora" or self.offload != "none"):
            raise ValueError(
                "distill.carried_kept trains the blocks that stay in carried steps, through LoRA: it needs "
                "distill.carried_steps, distill.train=lora and distill.offload=none; set these, or leave it out"
            )
        if self.fresh and self.one_at_a_time:
            raise ValueError("distill.one_at_a_time keeps states on disk, which distill.fresh has none of; set one")
        if released and self.spike_factor:
            raise ValueError("distill.release_gradients steps before a spike is seen; leave distill.spike_factor out")
        return self

    @model_validator(mode="after")
    def _few_steps_of_a_whole_student(self) -> DistillConfig:
        if self.shard and self.few_steps.num_inference_steps:
            raise ValueError("distill.few_steps trains a student that is whole; leave it out, or distill.shard")
        return self

    @property
    def walks(self) -> bool:
        """Whether substitutes are corrected or trained on the student's own states."""
        return bool(self.carried_steps or self.correct)

    @property
    def releases_gradients(self) -> bool:
        """Whether the local stage holds the gradients of one substitute at a time."""
        together = self.sequence == "sequential" or self.sparsity.zeros or self.spike_factor or self.one_at_a_time
        return self.release_gradients is True or (self.release_gradients == "auto" and not together)

    @property
    def not_streamed(self) -> list[str]:
        """Settings that ask for what a teacher whose blocks are streamed cannot give."""
        asked = {
            "sparsity": bool(self.sparsity.zeros),
            "distill.fresh": bool(self.fresh),
            "distill.sequence=sequential": self.sequence == "sequential",
            "distill.few_steps": bool(self.few_steps.num_inference_steps),
        }
        return [name for name, there in asked.items() if there]

    def identity(self) -> dict[str, Any]:
        """Without what says how to train, not what: that may change while a run goes on."""
        parts = {"sparsity": self.sparsity.identity(), "few_steps": self.few_steps.identity()}
        off = {name for name in ("fresh", "carried_steps", "carried_kept", "correct") if not getattr(self, name)}
        unread = {*HOW_NOT_WHAT, *parts, *off}
        return {**self.model_dump(exclude=unread), **{name: part for name, part in parts.items() if part}}
