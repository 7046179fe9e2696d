"""What a plan costs: parameters exactly, FLOPs exactly, bytes; before anything is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ppcl.student.plan import Prediction, Segment, start_index
from ppcl.teacher.model_info import ModelInfo

if TYPE_CHECKING:
    pass


def predict(model: ModelInfo, stacks: Mapping[str, Sequence[Segment]], error: float | None = None) -> Prediction:
    """Predict size and speed of a plan.

    A substitute block has the parameters and FLOPs of the block it starts from, less what its width saves; of smaller
    modules the time counts that was measured, since they seldom save as much as their FLOPs.

    Args:
        model: The teacher.
        stacks: Segments of each stack.
        error: Estimated velocity error, passed through.
    """
    params, flops = model.params, model.flops
    for stack in model.stacks:
        for segment in stacks[stack.name]:
            start = start_index(segment.first, segment.last, segment.start)
            gone = [i for i in range(segment.first, segment.last + 1) if i != start]
            params -= sum(stack.block_params[i] for i in gone) + segment.saved_params
            if stack.block_flops:
                flops -= sum(stack.block_flops[i] for i in gone) + segment.saved_speed
    return Prediction(
        params=params,
        param_ratio=params / model.params,
        speedup=model.flops / flops if flops else 1.0,
        bytes=params * model.bytes_per_param + model.other_bytes,
        error=error,
    )
