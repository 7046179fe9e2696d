"""The config section on drawing in few steps; no torch here."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ppcl.config.sections import Section


class FewStepsConfig(Section):
    """Step distillation of the recovered student: few steps, and no second call of the transformer for guidance."""

    num_inference_steps: int = Field(
        0, ge=0, le=100, description="that the student learns to draw in, guidance included; 0: off"
    )
    teacher_steps: int | None = Field(
        None, ge=1, description="of the teacher's trajectories; capture.num_inference_steps if empty"
    )
    num_trajectories: int = Field(
        512, ge=2, description="of the teacher that are learned from: prompts in turn, each with noise of its own"
    )
    training_steps: int = Field(400, ge=1, description="each with distill.batch_size trajectories, walked to their end")
    learning_rate: float = Field(3e-4, gt=0)

    def identity(self) -> dict[str, Any]:
        """Nothing while it is off."""
        return self.model_dump() if self.num_inference_steps else {}
