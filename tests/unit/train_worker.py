"""Trains every stage on a tiny teacher; run by itself or by torch's launcher (see test_distributed.py)."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tiny_models import DUAL, describe_alone, plan_for, qwen_call, tiny_qwen, write_states

import ppcl.distill.trainer as trainer
from ppcl.analysis.analyze import analyze
from ppcl.capture.padding import check_padding
from ppcl.capture.trajectories import write_calls
from ppcl.common.files import write_json
from ppcl.common.parts import is_part
from ppcl.common.tensor_files import StoredTensors, write_tensors
from ppcl.config import AnalyzeConfig, DistillConfig, FitConfig
from ppcl.config.sparsity import SparsityConfig
from ppcl.distill.fit import fit
from ppcl.distill.trainable import kept_blocks
from ppcl.distill.trainer import Distiller
from ppcl.teacher.blocks import ResidentBlocks
from ppcl.teacher.calls import Call, velocity
from ppcl.teacher.families import adapter_for
from ppcl.training.distributed import Group, connect
from ppcl.training.launch import guarded
from ppcl.training.lora import factors

RUNS = [(DUAL, 0, 1), (DUAL, 3, 4)]
BATCH = 5  # not a multiple of two, and padded texts: the parts do not count the same
RATES: dict[str, Any] = {"local_learning_rate": 3e-4, "output_learning_rate": 3e-4, "warmup_steps": 1}
STAGES: dict[str, dict[str, Any]] = {
    "local": {"local_steps": 2, "output_steps": 0},
    "single": {"local_steps": 2, "output_steps": 0, "one_at_a_time": True},
    "carried": {"local_steps": 1, "carried_steps": 2, "output_steps": 0},
    "kept": {
        **{"local_steps": 0, "carried_steps": 2, "carried_kept": True, "output_steps": 0},
        **{"train": "lora", "lora_rank": 2},
    },
    "corrected": {"local_steps": 0, "correct": True, "output_steps": 0, "keep_start": False},
    "sequential": {"local_steps": 2, "output_steps": 0, "sequence": "sequential"},
    "alternating": {"local_steps": 0, "alternating_steps": 2, "output_steps": 0},
    "output": {"local_steps": 0, "output_steps": 2, "train": "substitutes"},
    "all": {"local_steps": 0, "output_steps": 3, "train": "all"},
    "few": {"local_steps": 0, "output_steps": 0, "few_steps": {"num_inference_steps": 2, "training_steps": 2}},
}


def new_distiller(folder: Path, name: str, group: Group, log: Any = None, **changes: Any) -> Distiller:
    """A distiller of one stage; states are in ``folder/states``."""
    teacher = tiny_qwen(5)
    settings = DistillConfig(**{"batch_size": BATCH, "checkpoint_every": 1, **RATES, **STAGES[name], **changes})
    plan = plan_for(teacher, RUNS)
    few = settings.few_steps.num_inference_steps
    if few:
        group.on_main(functools.partial(write_trajectories, folder))
    distiller = Distiller(
        *(teacher, adapter_for(teacher), plan, folder / "states", folder / name, settings, 0, "fp32", log),
        group=group,
        trajectories=folder / "trajectories" if few else None,
    )
    if settings.correct:  # which is judged on held-out states
        distiller.held_out = distiller.states
    return distiller


def write_trajectories(folder: Path) -> None:
    """Trajectories of two steps in ``folder/trajectories``, with padded texts; and states, if there are none."""
    if not (folder / "states").is_dir():
        for split, seed in (("train", 3), ("held-out", 30)):
            write_states(folder / "states", split, [qwen_call(batch=4, seed=seed)], tiny_qwen(5, seed=1))
    place = folder / "trajectories"
    if (place / "call.json").is_file():
        return
    for split, seed in (("train", 5), ("held-out", 50)):
        for number, text in enumerate((5, 4)):
            start = qwen_call(batch=4, text=text, seed=seed + number, padded=text == 5)
            calls = []
            for step, time in enumerate((1.0, 0.5)):
                latents = start["hidden_states"] if not step else 0.5 * start["hidden_states"]
                arguments = {**start, "hidden_states": latents, "timestep": torch.full((4,), time)}
                calls.append(Call(arguments, start["hidden_states"]))  # which leads to where the next step begins
            write_calls(place / f"{split}-{number:04d}.safetensors", calls, jumps=[-0.5, -0.5])
    write_json(place / "call.json", {"num_inference_steps": 2, "true_cfg_scale": 1.0})


def weights(distiller: Distiller) -> dict[str, torch.Tensor]:
    """What was trained."""
    found = {f"{run}/{k}": v for run, block in distiller.substitutes.items() for k, v in block.state_dict().items()}
    tuned = {k: v for k, v in distiller._tuned().items()}
    lora = factors(kept_blocks(distiller.student, distiller.adapter, distiller.plan))
    return {name: tensor.clone() for name, tensor in {**found, **tuned, **lora}.items()}


def train_all(folder: Path, group: Group, stages: Iterable[str] = STAGES, **changes: Any) -> dict[str, torch.Tensor]:
    """Train stages apart, and the fit; return all weights, with the losses of each step."""
    result: dict[str, torch.Tensor] = {}
    for name in stages:
        rows: list[dict[str, Any]] = []
        distiller = new_distiller(folder, name, group, rows.append, **changes)
        distiller.run()
        result |= {f"{name}/{key}": value for key, value in weights(distiller).items()}
        result[f"{name}/losses"] = torch.tensor([row["loss"] for row in rows])
    return result | fit_all(folder, group)


def fit_all(folder: Path, group: Group) -> dict[str, torch.Tensor]:
    """The analyze stage: its maps and numbers; and the fit stage: its blocks, closed forms and vectors."""
    source, out, states = ResidentBlocks(tiny_qwen(5)), folder / "fit", folder / "fit-states"
    model = describe_alone(source.transformer)

    def write() -> None:
        out.mkdir(exist_ok=True)
        for split, seed in (("train", 3), ("held-out", 30)):
            calls = [qwen_call(batch=7, seed=seed, padded=True), qwen_call(batch=2, text=4, seed=seed + 10)]
            write_states(states, split, calls)

    group.on_main(write)
    analysis = analyze(source, model, states, out, AnalyzeConfig(batch_size=2), 0, group=group)
    settings = FitConfig(steps=2, batch_size=BATCH, max_run=2, max_candidates=3, eval_states=8, width_states=8)
    forms = StoredTensors(out / "analysis.safetensors")
    fit(source, analysis, forms, states, out, settings, 0, None, group, "fp32")
    group.barrier()
    files = (out / f"{name}.safetensors" for name in ("candidates", "width", "prices"))
    fitted = {f"fit/{name}": tensor for file in files for name, tensor in StoredTensors(file).items()}
    found = {f"analysis/{name}": tensor for name, tensor in StoredTensors(out / "analysis.safetensors").items()}
    stack = analysis.stacks[0]
    numbers = {
        "cka": [[-1.0 if value is None else value for value in row] for row in stack.cka],
        "intervals": stack.intervals,
        "stability": [(one.same, one.first, one.last) for one in stack.interval_stability],
        "influence": stack.influence,
        "probe_error": list(stack.probe_error.values()),
        "linearity": [*stack.ffn_linearity.values(), stack.text_linearity["output"]],
        "missed": list(stack.modulation_residual.values()),
    }
    return fitted | found | {f"analysis/{name}": torch.tensor(value) for name, value in numbers.items()}


def train_split(folder: Path, group: Group, mode: bool | str) -> dict[str, torch.Tensor]:
    """Train the output stage with a student that is split over the processes, in two parts a step.

    A forward pass without a backward pass follows each step, as pictures need it, and one the training.
    """
    write_all_states(folder)
    call = qwen_call(batch=1, seed=11)
    seen: list[bool] = []
    unshard = trainer.unshard

    def look(student: torch.nn.Module) -> None:
        seen.extend(is_part(p) for p in student.parameters())
        unshard(student)

    @torch.no_grad()
    def draw(student: torch.nn.Module) -> None:
        velocity(student, call)

    trainer.unshard = look
    distiller = new_distiller(folder, "all", group, shard=mode, accumulate=2, sample_every=1)
    distiller.sample = lambda step, student: draw(student)
    try:
        distiller.run()
    finally:
        trainer.unshard = unshard
    assert len(seen) > 50
    draw(distiller.student)
    trained = weights(distiller)
    assert type(distiller.student) is type(distiller.transformer) and not any(map(is_part, trained.values()))
    return trained


def train_beside_split_teacher(folder: Path, group: Group) -> dict[str, torch.Tensor]:
    """Train every stage with a teacher that is split, the last one with a student that is, too.

    Teacher and student run once more after each step of that stage, as pictures need it.
    """
    write_all_states(folder)
    call, result = qwen_call(batch=1, seed=11), {}
    cases: list[tuple[str, str, dict[str, Any]]] = [
        *(
            (name, name, {"sample_every": 1})
            for name in STAGES
            if name not in ("all", "single", "carried", "kept", "corrected")
        ),
        ("all", "all", {"sample_every": 1, "shard": True, "accumulate": 2}),
        ("all", "whole", {"sample_every": 1, "checkpointing": True}),
    ]
    for name, place, changes in cases:
        parts: list[float] = []
        distiller = new_distiller(folder, name, group, shard_teacher=True, **changes)
        teacher = distiller.transformer
        kept = {key: value.clone() for key, value in teacher.state_dict().items()}
        weights_in_blocks = [p for block in distiller._teacher_blocks for p in block.parameters()]
        whole = sum(p.numel() for p in weights_in_blocks)

        @torch.no_grad()
        def draw(
            step: int, student: torch.nn.Module, d: Distiller = distiller, n: int = whole, parts: list[float] = parts
        ) -> None:
            own: list[Any] = [p for block in d._teacher_blocks for p in block.parameters()]
            parts.append(sum(p.to_local().numel() for p in own) / n)
            velocity(student, call)
            velocity(d.transformer, call)

        distiller.sample = draw
        distiller.run()
        assert [round(part, 1) for part in parts] == [0.5] * distiller.settings.output_steps
        assert {type(block).__name__ for block in distiller._teacher_blocks} == {"QwenImageTransformerBlock"}
        assert all(torch.equal(value, kept[key]) for key, value in teacher.state_dict().items())
        result |= {f"{place}/{key}": value for key, value in weights(distiller).items()}
        group.on_main(functools.partial(shutil.rmtree, folder / name))  # the next one of this name starts anew
    return result


def train_sparse(folder: Path, group: Group) -> dict[str, torch.Tensor]:
    """Train half of the weights, in local and output steps, the latter split over the processes."""
    write_all_states(folder)
    sparsity = SparsityConfig(share=0.5, criterion="gblm", allocation="ecoflap", states=8)
    distiller = new_distiller(folder, "all", group, local_steps=1, shard=True, sparsity=sparsity, keep_start=False)
    bundle = distiller.run()
    return {**weights(distiller), **{f"mask/{name}": mask for name, mask in bundle.masks.items()}}


def write_all_states(folder: Path, together: bool = False) -> None:
    """Padded states of two shapes, the second so few that a part of a batch stays empty; ``together`` in one call."""
    calls = [qwen_call(batch=7, seed=3, padded=True), qwen_call(batch=1, text=4, seed=5)]
    write_states(folder / "states", "train", calls)
    if together:
        teacher = tiny_qwen(5)
        check_padding(teacher, adapter_for(teacher), folder / "states")


def train_as(task: str, folder: Path, group: Group) -> dict[str, torch.Tensor]:
    """The weights of a task of several processes, in a folder of its own."""
    if task in ("pieces", "padded"):
        group.on_main(functools.partial(write_all_states, folder, together=task == "padded"))
        return train_all(folder, group)
    return {
        "split": lambda: train_split(folder, group, True),
        "zero2": lambda: train_split(folder, group, "zero2"),
        "teacher": lambda: train_beside_split_teacher(folder, group),
        "sparse": lambda: train_sparse(folder, group),
    }[task]()


def main(tasks: str, folder: Path) -> None:
    """Do what the tests ask for: tasks one after the other, or die in training."""
    torch.set_num_threads(1)
    group = connect(cpu=True, asked=int(os.environ["ASKED"]) if "ASKED" in os.environ else None)
    if tasks not in ("kill", "stop"):
        for task in tasks.split(","):
            result = train_as(task, folder / task, group)
            if group.is_main:
                write_tensors(folder / task / "result.safetensors", result, {"processes": group.size})
        group.close()
        return

    def die(row: dict[str, Any]) -> None:  # the first process alone is told
        if row["step"] == 1:
            number = signal.SIGKILL if tasks == "kill" else signal.SIGTERM
            os.kill(os.getpid(), number)

    new_distiller(folder, "all", group, die).run()


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1], Path(sys.argv[2])))
