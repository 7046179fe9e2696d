"""The output stage through LoRA: what it trains, what it keeps, and that it goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_replacements import mixed
from tiny_models import DUAL, SINGLE, flux_call, plan_for, qwen_call, tiny_flux, tiny_qwen, write_states

from ppcl.common.tensor_files import read_tensors
from ppcl.config import DistillConfig
from ppcl.distill.trainer import Distiller
from ppcl.errors import ArtifactError
from ppcl.export.pipeline import cast
from ppcl.pruning.selection import select_bundle
from ppcl.student.bundle import build_student, load_bundle
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import adapter_for

SETTINGS = DistillConfig(
    keep_start=False,
    local_steps=2, output_steps=4, batch_size=4, from_fit=False, train="lora", lora_rank=3, checkpoint_every=1,
    output_learning_rate=1e-2, warmup_steps=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A plan of depth and width of the tiny Qwen-Image, and the files that distilling it reads."""
    folder = tmp_path_factory.mktemp("inputs")
    return mixed(tiny_qwen(4), folder), folder


def distiller(inputs: tuple[Any, Path], out: Path, log: Any = None, transformer: Any = None, **changes: Any) -> Any:
    chosen, folder = inputs
    transformer = transformer or tiny_qwen(4)
    settings = SETTINGS.model_copy(update=changes)
    return Distiller(
        transformer, adapter_for(transformer), chosen, folder / "calibration", out, settings, 0, "fp32", log,
        closed_forms=folder / "analysis.safetensors",
    )  # fmt: skip


def test_only_lora_and_substitutes_are_trained_and_the_merged_student_is_the_same(
    inputs: tuple[Any, Path], tmp_path: Path
) -> None:
    transformer = tiny_qwen(4)
    adapter, rows = adapter_for(transformer), []
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    made = distiller(inputs, tmp_path, rows.append, transformer)
    bundle = made.run()
    assert all(torch.equal(before[name], value) for name, value in transformer.state_dict().items())
    assert not any(p.requires_grad for p in transformer.parameters())

    state = read_tensors(next((tmp_path / "checkpoints" / "distill-output").glob("*/*.safetensors")))[0]
    trained = {name.removeprefix("model/") for name in state if name.startswith("model/")}
    assert {name.removeprefix("optimizer/exp_avg/") for name in state if "/exp_avg/" in name} <= trained
    kept = {name for name in trained if not name.startswith(f"{DUAL}/1-2.")}
    assert {"lora" if "lora_" in n else n.split(".")[2] for n in kept} == {"lora", "img_mlp", "img_mod", "txt_mod"}
    assert {n.split(".")[1] for n in kept} == {"0", "2"}  # blocks 0 and 3 of the teacher; 1-2 became block 1
    assert not any("img_mlp.lora" in n or "mod.1.down.lora" in n for n in kept)

    call = qwen_call()
    with torch.no_grad():
        unmerged = velocity(made.student, call)
    student = build_student(transformer, adapter, bundle)
    loaded = build_student(transformer, adapter, load_bundle(tmp_path / "bundle", transformer, adapter))
    without = bundle.__class__(bundle.plan, bundle.substitutes)
    with torch.no_grad():
        torch.testing.assert_close(velocity(student, call), unmerged, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(velocity(loaded, call), velocity(student, call), atol=0, rtol=0)
        bare = velocity(build_student(transformer, adapter, without), call)
    assert (bare - unmerged).norm() > 1e-3 * unmerged.norm()  # the LoRA does something
    assert not any("lora" in name for name, _ in student.named_modules())
    assert type(student).__name__ == "PPCLQwenImageTransformer2DModel"

    assert {v.shape[0] for k, v in bundle.lora.items() if "lora_A" in k} == {3}
    assert not bundle.tuned
    assert f"{DUAL}.2.txt_mlp.net.2.lora_B.weight" not in bundle.lora  # the last block's text goes nowhere
    with pytest.raises(ArtifactError, match="none can be taken out"):
        select_bundle(bundle, "keep", 0.9)
    losses = [row["loss"] for row in rows if row["stage"] == "distill.output"]
    assert len(losses) == 4


def test_it_learns(inputs: tuple[Any, Path], tmp_path: Path) -> None:
    """With the substitutes frozen in place by a tiny rate, the kept blocks' LoRA alone lowers the error."""
    errors = {}
    for train in ("lora", "substitutes"):
        rows: list[Any] = []
        made = distiller(inputs, tmp_path / train, rows.append, train=train, output_steps=6, ema_decay=0.0)
        made.run()
        transformer = tiny_qwen(4)
        with torch.no_grad():
            target, found = (velocity(m, qwen_call(seed=50)) for m in (transformer, made.student))
        errors[train] = ((found - target).norm() / target.norm()).item()
    assert errors["lora"] < errors["substitutes"], errors


@pytest.mark.parametrize("stop", [2])
def test_a_killed_stage_goes_on_bit_by_bit(inputs: tuple[Any, Path], tmp_path: Path, stop: int) -> None:
    def kill(row: dict[str, Any]) -> None:
        if row["stage"] == "distill.output" and row["step"] == stop:
            raise KeyboardInterrupt

    whole = distiller(inputs, tmp_path / "whole").run()
    with pytest.raises(KeyboardInterrupt):
        distiller(inputs, tmp_path / "parts", kill).run()
    torch.manual_seed(99)  # whatever the process drew before
    parts = distiller(inputs, tmp_path / "parts").run()
    assert whole.lora.keys() == parts.lora.keys() and whole.lora
    assert all(torch.equal(value, parts.lora[name]) for name, value in whole.lora.items())
    for key, block in whole.substitutes.items():
        other = parts.substitutes[key].state_dict()
        assert all(torch.equal(value, other[name]) for name, value in block.state_dict().items())


def test_a_half_precision_teacher_and_two_stacks(tmp_path: Path) -> None:
    transformer = tiny_flux().to(torch.bfloat16)
    write_states(tmp_path / "calibration", "train", [flux_call(4, seed=s) for s in range(2)])
    plan = plan_for(transformer, [(SINGLE, 1, 2)])
    made = distiller((plan, tmp_path), tmp_path, transformer=transformer, local_steps=0)
    made.recipe.precision = "bf16"
    bundle = made.run()
    assert {v.dtype for v in bundle.lora.values()} == {torch.float32}
    student = build_student(transformer, adapter_for(transformer), bundle)
    assert student.dtype == torch.bfloat16
    assert {name.split(".")[0] for name in bundle.lora} == {DUAL, SINGLE}
    moved = student.get_submodule(f"{DUAL}.0.attn.to_q").weight
    assert not torch.equal(moved, transformer.get_submodule(f"{DUAL}.0.attn.to_q").weight)
    cast(student, torch.float32)
    with torch.no_grad():
        assert velocity(student, flux_call()).isfinite().all()
