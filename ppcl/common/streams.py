"""Random numbers: one generator a purpose, a step and a picture, so that nothing depends on what ran before."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum, unique

import torch


@unique
class Stream(IntEnum):
    """What random numbers are for. A number belongs to one purpose for good: results hang on it."""

    EMOJI_BATCH = 0  # batches that the emoji model's parts are trained on, each part in a run of its own
    EMOJI_SHUFFLE = 3  # captions dealt out to other pictures, for the chance level of the emoji evaluator
    PROMPT_SPLIT = 17  # which prompts are held out
    CAPTURED_STEPS = 18  # which steps of a batch's trajectories are recorded
    CKA_TOKENS = 19  # which tokens of a state enter the CKA
    CKA_HALVES = 21  # halves of the prompts, for the noise of the CKA
    FIT_BATCH = 23  # batches of fitting the candidates
    LOCAL_BATCH = 31  # batches of local distillation
    JUDGED_STEPS = 32  # which steps of trajectories the velocity error of two pipelines is measured on
    JUDGED_NOISE = 33  # noise that those trajectories start from
    OUTPUT_BATCH = 37  # batches of distillation by the output
    CARRIED_BATCH = 38  # batches of carried recovery
    FEW_STEPS_BATCH = 39  # batches of trajectories that a student of few steps learns from
    FEW_STEPS_NOISE = 40  # noise that those trajectories start from
    RECOVERY_BATCH = 42  # batches of recovery after quantising
    ALTERNATING_BATCH = 41  # batches of alternating distillation
    ALTERNATING_ACTIVE = 43  # which substitutes are in place in a step of it
    CARRIED_LORA = 44  # first weights of LoRA on kept blocks in carried recovery
    STUDENT_LORA = 47  # first weights of LoRA on the student
    OUTPUT_SIGNS = 61  # signs in front of the output that first-order criteria differentiate
    SAMPLE_ORDER = 62  # the order in which samples of captioned pictures are looked at
    RANDOM_UNITS = 67  # scores of units by fit.criterion=random
    WEIGHT_SCORES = 68  # what criteria of weights draw
    WEIGHT_DIRECTIONS = 69  # directions in which sparsity.allocation=ecoflap moves a block's weights
    SEARCH_LORA = 71  # first weights of LoRA that simulates recovery in a search
    MASK_BATCH = 72  # batches of plan.mode=learned
    MASK_DRAWS = 73  # depth masks that it draws
    GATE_TRAIN_BATCH = 74  # batches that plan.mode=rarts trains weights on
    GATE_VALIDATION_BATCH = 75  # batches that it trains gates on
    CALIBRATION_SETS = 79  # sets of states to score units with
    TIMESTEPS = 83  # timesteps that modulation layers are fitted and judged at
    PRICE_SIGNS = 84  # signs that backward sweeps put in front of the velocity
    CONTIGUOUS_REMOVALS = 89  # runs of blocks that the study takes away
    SCATTERED_REMOVALS = 97  # blocks apart from each other that it takes away
    REFERENCE_HALVES = 98  # pictures of a reference that are compared with its others
    PICTURE = 101  # noise of the evaluation's pictures
    SOURCE_PICTURES = 103  # the seed of pictures that are drawn to start from


def seeds(seed: int, count: int, device: torch.device | str = "cpu") -> Iterator[torch.Generator]:
    """One generator an image, so that batch size does not change a picture's noise."""
    for index in range(count):
        yield torch.Generator(device).manual_seed(seed * 1_000_003 + index)


def captured_noise(seed: int, batch: int, count: int) -> list[torch.Generator]:
    """The noise of a batch of pictures whose states are recorded, a generator each."""
    return list(seeds(seed * 7919 + batch, count))


def step_generator(seed: int, step: int, stream: Stream) -> torch.Generator:
    """A CPU generator that depends on (seed, step, stream) alone."""
    mixed = (seed * 1_000_003 + step) * 8_191 + stream
    return torch.Generator().manual_seed(mixed % (2**63 - 1))
