"""How much of a modulation LoRA's effect survives on low-rank modulation: dropped, folded, widened?

    python benchmarks/lora_low_rank.py

The embedded teacher with all its modulation layers at low rank; one LoRA with random factors, one trained for a few
steps. The effect is how far the LoRA moves the velocity on held-out states; lost is the part of it that is missing.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor, nn

from ppcl.capture.prompts import prompts_for
from ppcl.capture.states import States
from ppcl.capture.trajectories import capture
from ppcl.config import CaptureConfig
from ppcl.modules.compressed import compress_class
from ppcl.modules.replacements import LowRankLinear, Metric, apply_width, fill_low_rank, residuals
from ppcl.pipelines.lora_low_rank import fold, widen
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import Adapter, adapter_for
from ppcl.teacher.loading import load_pipeline

TARGETS = ["img_mod.1", "txt_mod.1"]


@torch.no_grad()
def low_rank_student(transformer: Any, adapter: Adapter, calls: list[dict[str, Any]], tolerance: float) -> Any:
    """A copy with every modulation layer at the least rank within the tolerance, in the metric of its inputs."""
    student, seen = copy.deepcopy(transformer), {}
    paths = [
        f"{spec.name}.{index}.{path}"
        for spec in adapter.stacks
        for index in range(len(adapter.blocks(transformer, spec)))
        for path in spec.modulation.values()
    ]
    first = transformer.get_submodule(paths[0])  # every modulation layer sees the same conditioning
    handle = first.register_forward_pre_hook(lambda _, inputs: seen.setdefault("x", []).append(inputs[0]))
    for call in calls:
        velocity(transformer, call)
    handle.remove()
    x = torch.cat(seen["x"]).double()
    metric = Metric.of(x.mean(0), torch.cov(x.T, correction=0))
    parts = {}
    for path in paths:
        missed = residuals(transformer.get_submodule(path).weight, metric)
        parts[path] = {"kind": "low_rank", "size": max(1, int((missed > tolerance).sum()))}
    apply_width(student, parts)
    for path in paths:
        old, made = transformer.get_submodule(path), student.get_submodule(path)
        assert isinstance(made, LowRankLinear)
        fill_low_rank(made, old.weight, old.bias, metric)
    compress_class(student, parts)
    sizes = [part["size"] for part in parts.values()]
    print(f"{len(parts)} layers, rank {min(sizes)} to {max(sizes)} of {x.shape[1]} inputs")
    return student


def random_lora(transformer: nn.Module, rank: int, share: float) -> dict[str, Tensor]:
    """Gaussian factors, each update as large as ``share`` of its weight (Frobenius)."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(tuple(TARGETS)):
            a = torch.randn(rank, module.in_features, generator=generator)
            b = torch.randn(module.out_features, rank, generator=generator)
            b *= share * module.weight.norm() / (b @ a).norm()
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    return tensors


def trained_lora(transformer: nn.Module, calls: list[dict[str, Any]], rank: int, steps: int) -> dict[str, Tensor]:
    """Factors trained to say to each prompt what the teacher says to another one of its batch."""
    torch.manual_seed(0)
    model = copy.deepcopy(transformer).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for step in range(steps):
        call = calls[step % len(calls)]
        other = {k: v.roll(1, 0) if k.startswith("encoder") and isinstance(v, Tensor) else v for k, v in call.items()}
        with torch.no_grad():
            target = velocity(transformer, other)
        loss = (velocity(model, call) - target).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"  step {step}: loss {loss.item():.4f}", end="\r")
    print()
    return {k: v.detach().clone() for k, v in get_peft_model_state_dict(model).items()}


@torch.no_grad()
def with_lora(student: Any, lora: dict[str, Tensor], how: str) -> Any:
    """A copy of the student with the LoRA added to its weights in one of the three ways."""
    model = copy.deepcopy(student)
    if how == "drop":
        return model
    inner = {key.replace(".lora_", ".down.lora_"): value for key, value in lora.items()}
    tensors = widen(inner, model) if how == "widen" else fold(inner, model)[0]
    for key, a in tensors.items():
        if ".lora_A." in key:
            model.get_submodule(key.removesuffix(".lora_A.weight")).weight += tensors[key.replace("_A.", "_B.")] @ a
    return model


def main() -> None:
    """Print a table: for each LoRA the size of its effect, and how much of it each way loses."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--tolerance", type=float, default=0.03, help="as fit.modulation_tolerances")
    given.add_argument("--rank", type=int, default=8)
    given.add_argument("--share", type=float, default=0.1, help="random LoRA: ||B A|| over ||W||")
    given.add_argument("--steps", type=int, default=40, help="of training")
    options = given.parse_args()
    pipeline = load_pipeline("emoji", torch.device("cpu"))
    transformer = pipeline.transformer.eval().requires_grad_(False)
    settings = CaptureConfig(
        num_prompts=24, batch_size=6, num_inference_steps=6, states_per_prompt=3, height=48, width=48
    )
    with tempfile.TemporaryDirectory() as folder:
        capture(pipeline, prompts_for("emoji", None, 2)[0][:24], Path(folder), settings, 0)
        train, held_out = (list(States(Path(folder), split).batches(6)) for split in ("train", "held-out"))
    student = low_rank_student(transformer, adapter_for(transformer), train, options.tolerance)
    loras = {
        "random": random_lora(transformer, options.rank, options.share),
        "trained": trained_lora(transformer, train, options.rank, options.steps),
    }
    print("LoRA | effect | lost by drop | lost by fold | lost by widen | share of the update that folding keeps")
    for name, lora in loras.items():
        shares = fold({k.replace(".lora_", ".down.lora_"): v for k, v in lora.items()}, student)[1].values()
        exact = copy.deepcopy(transformer)
        with torch.no_grad():
            for key, a in lora.items():
                if ".lora_A." in key:
                    exact.get_submodule(key.removesuffix(".lora_A.weight")).weight += (
                        lora[key.replace("_A.", "_B.")] @ a
                    )
            call = held_out[0]
            effect = velocity(exact, call) - velocity(transformer, call)
            bare, size = velocity(student, call), velocity(transformer, call).norm()
            lost = [
                ((velocity(with_lora(student, lora, how), call) - bare - effect).norm() / effect.norm()).item()
                for how in ("drop", "fold", "widen")
            ]
        cells = [f"{effect.norm() / size:.3f}", *(f"{x:.1%}" for x in lost), f"{sum(shares) / len(shares):.1%}"]
        print(" | ".join([name, *cells]))


if __name__ == "__main__":
    main()
