"""What a training loop needs to know."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs to know.

    Attributes:
        steps: Number of optimizer steps.
        learning_rate: Peak of the schedule (linear warm-up, cosine to ``final_fraction`` of it).
        warmup_steps: Of the warm-up; of a short stage fewer (:attr:`warmup`).
        clip_norm: Largest global gradient norm.
        clip_each: Clip the gradients of each module by themselves: those of modules that learn independently.
        ema_decay: Final decay of the moving average; it warms up as (1 + n) / (10 + n). 0 turns it off.
        checkpoint_every: Steps between resumable checkpoints.
        keep_checkpoints: How many of them stay.
        batch_size: Samples a step of all processes, for the throughput in the log; 0 where there are no samples.
        max_bad_steps: Steps that may be left out (NaN or a spike) before training stops.
        optimizer: ``adamw``, or ``adamw8bit`` with states of 8 bits (torchao).
        spike_factor: A loss of so many times its running average is a spike; 0 turns the check off.
        muon_learning_rate: Peak for the weights of linear layers, which Muon then trains instead of AdamW
            (Jordan et al. 2024; twice as far per sample on the embedded teacher). 0 is AdamW for everything.
    """

    steps: int
    learning_rate: float
    warmup_steps: int = 0
    final_fraction: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    clip_each: bool = False
    ema_decay: float = 0.0
    checkpoint_every: int = 100
    keep_checkpoints: int = 1
    batch_size: int = 0
    max_bad_steps: int = 0
    spike_factor: float = 0.0
    seed: int = 0
    muon_learning_rate: float = 0.0
    optimizer: str = "adamw"

    @property
    def warmup(self) -> int:
        """Steps of warm-up: ``warmup_steps``, at most a tenth of all; a stage that is all warm-up never settles."""
        return min(self.warmup_steps, max(1, self.steps // 10))
