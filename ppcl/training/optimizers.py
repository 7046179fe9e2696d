"""Which optimizer trains what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ppcl.errors import TrainingError
from ppcl.training.eight_bit import new_adamw8bit

if TYPE_CHECKING:
    from ppcl.training.settings import LoopSettings

MOMENTUM = 0.9


def new_optimizers(
    parameters: Mapping[str, nn.Parameter], matrices: set[int], settings: LoopSettings
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices (given by ``id``) and AdamW for the rest."""
    if settings.muon_learning_rate and not hasattr(torch.optim, "Muon"):
        raise TrainingError(f"torch {torch.__version__} has no Muon optimizer; install torch 2.9 or newer")
    by_muon = [p for p in parameters.values() if settings.muon_learning_rate and id(p) in matrices]
    rest = [p for p in parameters.values() if not settings.muon_learning_rate or id(p) not in matrices]
    optimizers: list[torch.optim.Optimizer] = []
    if rest and settings.optimizer == "adamw8bit":
        optimizers.append(new_adamw8bit(rest, settings.learning_rate, settings.betas, settings.weight_decay))
    elif rest:
        optimizers.append(
            torch.optim.AdamW(
                rest,
                lr=settings.learning_rate,
                betas=settings.betas,
                weight_decay=settings.weight_decay,
                fused=True,
            )
        )
    if by_muon:
        # the update is scaled to AdamW's typical size, so that weight decay and rates keep their meaning
        optimizers.append(
            torch.optim.Muon(
                by_muon,
                lr=settings.muon_learning_rate,
                weight_decay=settings.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = float(group["lr"])
    return optimizers


class ScaledSGD(torch.optim.SGD):
    """SGD with momentum for scores, whose order is the result: steps are in proportion to the gradients.

    Adam's are not: it divides each score's gradient by that gradient's own size, so all scores move about as far, and
    their order is that of noise. A rate is then in units of the scores over those of the gradient, which differ by
    module and model. Here it follows from how far scores may go: were all gradients as large as the first one and
    alike, a group would move by its distance in all steps together. Larger ones are clipped to the first one's norm,
    so it never moves further.

    Args:
        groups: Sets of scores that are compared with each other alone.
        distances: Of each group, root mean square over its scores, in their own unit.
        steps: Steps that will be taken.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], distances: Sequence[float], steps: int) -> None:
        named = [{"params": list(group), "distance": d} for group, d in zip(groups, distances, strict=True)]
        super().__init__(named, lr=0.0, momentum=MOMENTUM)
        self.reach = sum((1 - MOMENTUM**step) / (1 - MOMENTUM) for step in range(1, steps + 1))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step; a group's rate is set at the first one that moves it."""
        for group in self.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if not gradients:
                continue
            size = float(torch.cat([g.flatten() for g in gradients]).pow(2).mean().sqrt())
            if size and not group["lr"]:
                group["largest"], group["lr"] = size, group["distance"] / (self.reach * size)
            elif size > group.get("largest", size):
                for gradient in gradients:
                    gradient.mul_(group["largest"] / size)
        super().step(closure)
