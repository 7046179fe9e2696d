"""How far does the teacher's final velocity move when one part of it is replaced?"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from ppcl.common.devices import autocast
from ppcl.common.progress import Progress
from ppcl.student.assembly import RunKey, patched
from ppcl.teacher.call_arguments import to_device
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import Adapter
from ppcl.teacher.trace import record_boundaries

Job = tuple[RunKey, Callable[[], nn.Module]]
K = TypeVar("K", bound=Hashable)


@torch.no_grad()
def output_errors(
    transformer: nn.Module,
    adapter: Adapter,
    batches: Sequence[dict[str, Any]],
    jobs: Mapping[K, Job],
    label: str,
    precision: str = "auto",
) -> dict[K, float]:
    """Relative velocity error of each replacement alone; only the blocks after it are executed.

    Args:
        transformer: The teacher's transformer.
        adapter: Its family.
        batches: States.
        jobs: By any key, the run of blocks that is replaced (one block: first = last) and what makes its
            replacement.
        label: Name shown beside the progress bar.
        precision: Autocast of the passes; a replacement may be float32 where the teacher is not.

    Returns:
        sqrt(sum ||v - v_teacher||^2 / sum ||v_teacher||^2) of each job.
    """
    device = next(transformer.parameters()).device
    squares = dict.fromkeys(jobs, 0.0)
    total = 0.0
    with Progress(label, total=len(jobs) * len(batches)) as progress:
        for arguments in batches:
            with autocast(device, precision):
                firsts = {run[:2] for run, _ in jobs.values()}
                calls, target = record_boundaries(transformer, adapter, arguments, firsts)
            if target is None:
                raise AssertionError("a full pass returns the velocity")
            total += float(target.double().pow(2).sum())
            moved = to_device(arguments, device)
            for key, (run, make) in jobs.items():
                hybrid = patched(transformer, adapter, run, make(), calls[run[:2]].inputs)
                with autocast(device, precision):
                    found = velocity(hybrid, moved)
                squares[key] += float((found.double() - target.double()).pow(2).sum())
                progress.advance()
    return {key: (square / total) ** 0.5 for key, square in squares.items()}
