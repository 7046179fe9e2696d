"""Does a LoRA trained on a compressed model do the same on its teacher, and the other way round?

    python benchmarks/lora_both_ways.py RUN/pipeline

RUN compressed the embedded teacher. A LoRA of the attentions is trained on one of the two to add a pattern to all that
the model says; it is converted (:func:`ppcl.pipelines.convert_lora`) and loaded into the other by plain diffusers. Its
effect is how far it moves the velocity on held-out states, kept is the part of it that the other model shows in that
direction, and the gain is how much nearer a model comes to itself with the pattern.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor

from ppcl.capture.prompts import prompts_for
from ppcl.capture.states import States
from ppcl.capture.trajectories import SPLITS, capture
from ppcl.common.tables import versions
from ppcl.config import CaptureConfig
from ppcl.pipelines import convert_lora
from ppcl.teacher.calls import velocity
from ppcl.teacher.loading import load_pipeline

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def pattern(velocity: Tensor) -> Tensor:
    """What is to be added: the same for every sample and place, half as large as a usual velocity."""
    return 0.5 * torch.randn(velocity.shape[-1], generator=torch.Generator().manual_seed(1)).expand_as(velocity)


def trained_lora(transformer: Any, calls: list[dict[str, Any]], rank: int, steps: int) -> dict[str, Tensor]:
    """Factors that add the pattern, more or less."""
    torch.manual_seed(0)
    model = copy.deepcopy(transformer).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        with torch.no_grad():
            bare = velocity(transformer, calls[step % len(calls)])
        loss = (velocity(model, calls[step % len(calls)]) - bare - pattern(bare)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in get_peft_model_state_dict(model).items()}


@torch.no_grad()
def effect_of(pipe: Any, file: Path, call: dict[str, Any]) -> tuple[Tensor, float, float]:
    """What a LoRA adds to a velocity, how large that is beside it, and how much nearer it brings the pattern."""
    bare = velocity(pipe.transformer, call)
    pipe.load_lora_weights(str(file))
    added = velocity(pipe.transformer, call) - bare
    pipe.unload_lora_weights()
    wanted = pattern(bare)
    return added, float(added.norm() / bare.norm()), 1 - float((added - wanted).norm() / wanted.norm())


def rows(teacher: Any, student: Any, splits: dict[str, States], rank: int, steps: int, folder: Path) -> list[str]:
    """A line of the table for each direction."""
    train, held_out = (list(splits[split].batches(6)) for split in SPLITS)
    lines = []
    for to, (source, target) in {"teacher": (student, teacher), "student": (teacher, student)}.items():
        tensors = trained_lora(source.transformer, train, rank, steps)
        file, converted = folder / f"for-{to}-before.safetensors", folder / f"for-{to}.safetensors"
        named = {f"transformer.{key}": value for key, value in tensors.items()}
        source.save_lora_weights(folder, transformer_lora_layers=tensors, weight_name=file.name)
        report = convert_lora(file, converted, student, to=to)
        here, size, gain = effect_of(source, file, held_out[0])
        there, moved, gained = effect_of(target, converted, held_out[0])
        kept = float((here * there).sum() / here.square().sum())
        cosine = float((here * there).sum() / (here.norm() * there.norm()))
        cells = [f"{size:.3f}", f"{moved:.3f}", f"{kept:.0%}", f"{cosine:.2f}", f"{gain:.0%}", f"{gained:.0%}"]
        blocks = f"{len(report.dropped) // 2} of {len(named) // 2}"
        names = ("student", "teacher") if to == "teacher" else ("teacher", "student")
        lines.append(f"| {names[0]} -> {names[1]} | {' | '.join(cells)} | {blocks} |")
    return lines


def main() -> None:
    """Print the table."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("pipeline", type=Path, help="a compressed pipeline of the embedded teacher")
    given.add_argument("--rank", type=int, default=8)
    given.add_argument("--steps", type=int, default=60, help="of training")
    options = given.parse_args()
    pipes = [load_pipeline(model, torch.device("cpu")) for model in ("emoji", str(options.pipeline))]
    for pipe in pipes:
        pipe.transformer.eval().requires_grad_(False)
    settings = CaptureConfig(
        num_prompts=24, batch_size=6, num_inference_steps=6, states_per_prompt=3, height=48, width=48
    )
    with tempfile.TemporaryDirectory() as folder:
        capture(pipes[0], prompts_for("emoji", None, 2)[0][:24], Path(folder), settings, 0)
        splits = {split: States(Path(folder), split) for split in SPLITS}
        lines = rows(*pipes, splits, options.rank, options.steps, Path(folder))
    print(
        "| trained on -> loaded into | effect there | effect here | kept | cosine | gain there | gain here | dropped |"
    )
    print("| --- |" + " ---: |" * 7)
    print("\n".join(lines))
    print(versions())


if __name__ == "__main__":
    main()
