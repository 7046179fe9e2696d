"""Settings of distillation that trade time, disk, precision or processes for memory, or memory for time.

See :class:`ppcl.config.DistillConfig`.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator

from ppcl.config.few_steps import FewStepsConfig
from ppcl.config.sections import Section
from ppcl.errors import ConfigError

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=BaseModel)


class MemorySettings(Section):
    """Ways to train a model that would not fit otherwise (docs/memory.md)."""

    one_at_a_time: bool = Field(
        False, description="local stage: one substitute after the other, on the teacher's states kept on disk"
    )
    release_gradients: Literal["auto", True, False] = Field(
        "auto",
        description="local stage: each substitute takes its step right after its own backward pass, so that the "
        "gradients of one are in memory at a time; auto: wherever the other settings allow it",
    )
    offload: Literal["none", "cpu", "disk"] = Field(
        "none", description="local stage: where the teacher's blocks wait while they do not run"
    )
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="adamw8bit: states of 8 bits (torchao): a quarter of their memory"
    )
    checkpointing: bool = Field(
        False,
        description="alternating and output stage: blocks run again in the backward pass: memory of one at a time",
    )

    compile: bool = Field(
        False, description="torch.compile of the blocks, once for alike ones: faster steps after minutes of compiling"
    )
    accumulate: int = Field(
        1, ge=1, description="parts that a process's share of a batch is trained in: less memory, the same result"
    )
    shard: Literal[False, True, "zero2"] = Field(
        False,
        description="true: FSDP2: the output stage of train=all splits the student over the processes: less memory; "
        "zero2: weights stay whole until a step's backward pass is done: less sending",
    )
    shard_teacher: bool = Field(
        False, description="FSDP2: the frozen teacher's blocks are split over the processes, too, in all stages"
    )

    def splits_teacher(self, processes: int) -> bool:
        """Whether the teacher's blocks are split, given how many processes train."""
        return self.shard_teacher and processes > 1

    @model_validator(mode="after")
    def _each_by_itself(self) -> MemorySettings:
        alone = [name for name in ("one_at_a_time", "release_gradients") if getattr(self, name) is True]
        if alone and getattr(self, "sequence", "non-sequential") == "sequential":
            raise ValueError(
                f"distill.{alone[0]} trains each run by itself; leave it out, or distill.sequence=sequential"
            )
        if self.shard_teacher and (self.one_at_a_time or self.offload != "none"):
            other = "one_at_a_time" if self.one_at_a_time else f"offload={self.offload}"
            raise ValueError(
                f"distill.shard_teacher gathers blocks from all processes at once, which distill.{other} does not let "
                "them do; set one of the two"
            )
        return self


STEPS = ("local_steps", "carried_steps", "alternating_steps", "output_steps")  # of the stages, in their order
UNTRAINED: dict[str, Any] = {**dict.fromkeys(STEPS, 0), "correct": False, "carried_kept": False}
# what does not change what is trained, beyond rounding
HOW_NOT_WHAT = {
    *("checkpoint_every", "keep_checkpoints", "accumulate", "shard", "max_bad_steps", "spike_factor"),
    *("sample_every", "sample_prompts"),
    *("offload", "shard_teacher", "checkpointing", "compile", "release_gradients"),
}
# what a run alone can do: rows of a table are many trainings in one process, which holds the teacher all the time
NOT_IN_TABLES: dict[str, dict[str, Any]] = {
    "distill": {
        **{"offload": "none", "shard_teacher": False, "one_at_a_time": False, "fresh": 0, "sample_every": 0},
        "few_steps": FewStepsConfig(),  # type: ignore[call-arg]
    },
    "plan": {"recover": 0, "rounds": 1},
    "export": {"quantize": "none"},
}


def changed(settings: M, **changes: Any) -> M:
    """A copy with other values, checked as those of a config file are (``model_copy`` checks nothing).

    Args:
        settings: Any section.
        changes: Values by name.

    Raises:
        ConfigError: They do not fit together.
    """
    try:
        return type(settings).model_validate({**settings.model_dump(), **changes})
    except ValidationError as error:
        raise ConfigError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def for_tables(config: M) -> M:
    """A run's config for compare, ablate and study; says which of its settings are left out there.

    Args:
        config: A :class:`ppcl.config.RunConfig`.
    """
    sections: dict[str, BaseModel] = {name: getattr(config, name) for name in NOT_IN_TABLES}
    unused = {
        name: {key: value for key, value in NOT_IN_TABLES[name].items() if getattr(section, key) != value}
        for name, section in sections.items()
    }
    if not any(unused.values()):
        return config
    logger.warning(
        "%s: no effect here; rows are plans as they are chosen, trained on recorded states with the whole teacher in "
        "memory",
        ", ".join(f"{name}.{key}" for name, keys in unused.items() for key in keys),
    )
    update = {name: changed(sections[name], **values) for name, values in unused.items() if values}
    return config.model_copy(update=update)
