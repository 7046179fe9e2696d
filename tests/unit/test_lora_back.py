"""A LoRA trained on a compressed pipeline, converted for its teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ordinary_heads import heads_of
from safetensors.torch import load_file, save_file
from test_lora_bridge import lora_for
from tiny_compressed import QWEN, bundle_for, teacher_for
from tiny_models import DUAL
from torch import Tensor

from ppcl.errors import ModelError, UserError
from ppcl.modules.compressed import compress_class
from ppcl.modules.replacements import apply_width
from ppcl.modules.slicing import kept_features, neurons_of
from ppcl.pipelines import convert_lora
from ppcl.student.bundle import build_student
from ppcl.teacher.families import adapter_for

LAYERS = (
    *("img_mod.1.down", "img_mod.1.up", "txt_mod.1.down", "txt_mod.1", "attn.to_q", "attn.to_add_out", "attn.to_out.0"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp", "img_in"),
)
PLACES = {0: 0, 2: 3, 3: 4, 4: 5}  # the student's blocks that are one of the teacher's; 1 stands for 1 and 2


@pytest.fixture(scope="module")
def pipe() -> Any:
    """A compressed Qwen-Image: a run, layers of low rank, an affine map, half the neurons and half the heads."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    teacher = teacher_for("qwen")
    student = build_student(teacher, adapter_for(teacher), bundle_for(teacher, QWEN))
    block = student.transformer_blocks[4]
    sliced = {
        f"{DUAL}.4.img_mlp": neurons_of(block.img_mlp).part(range(0, neurons_of(block.img_mlp).count, 2)),
        f"{DUAL}.4.attn": heads_of(block.attn).part([1]),
    }
    apply_width(student, sliced)
    compress_class(student, {**student.config["pruning"], **sliced})
    return QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, student)


@pytest.fixture(scope="module")
def lora(pipe: Any) -> dict[str, Tensor]:
    return lora_for(pipe.transformer, LAYERS)


def updates(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {key.removeprefix("transformer.").removesuffix(".lora_A.weight") for key in tensors if ".lora_A." in key}
    return {n: tensors[f"transformer.{n}.lora_B.weight"] @ tensors[f"transformer.{n}.lora_A.weight"] for n in names}


def converted(pipe: Any, tensors: dict[str, Tensor], folder: Path, header: dict[str, str] | None = None) -> Any:
    save_file(tensors, folder / "student.safetensors", header)
    report = convert_lora(folder / "student.safetensors", folder / "teacher.safetensors", pipe, to="teacher")
    return load_file(folder / "teacher.safetensors"), report


def test_every_update_is_the_teachers_where_the_teacher_has_the_place(
    pipe: Any, lora: dict[str, Tensor], tmp_path: Path
) -> None:
    back, report = converted(pipe, lora, tmp_path)
    ours, theirs, student = updates(lora), updates(back), pipe.transformer
    teacher = dict(teacher_for("qwen").named_modules())
    assert all(theirs[name].shape == teacher[name].weight.shape for name in theirs)
    seen = set()
    for name, update in ours.items():
        number, inside = (int(name.split(".")[1]), name.split(".", 2)[2]) if name.startswith(DUAL) else (None, name)
        if number == 1 or (inside.startswith("txt_mlp") and student.config["pruning"].get(f"{DUAL}.{number}.txt_mlp")):
            assert f"transformer.{name}.lora_A.weight" in report.dropped
            continue
        new = name if number is None else f"{DUAL}.{PLACES[number]}.{inside}"
        seen.add(new.removesuffix(".down").removesuffix(".up"))
        if inside.endswith((".up", ".down")):
            layer = student.get_submodule(name.rpartition(".")[0])
            down, up = (
                p.weight + ours.get(f"{name.rpartition('.')[0]}.{s}", 0)
                for p, s in ((layer.down, "down"), (layer.up, "up"))
            )
            expected = up @ down - layer.up.weight @ layer.down.weight
            assert torch.allclose(theirs[new.rpartition(".")[0]], expected, atol=1e-4)
        elif number == 4 and inside.startswith(("img_mlp", "attn")):
            part = student.config["pruning"][f"{DUAL}.4.{inside.split('.')[0]}"]
            rest = theirs[new].clone()
            axis = 0 if inside.split(".", 1)[1] in part["rows"] else 1
            kept = kept_features(part, rest.shape[axis], inside.split(".", 1)[1])
            assert torch.equal(rest.index_select(axis, kept), update)
            assert not rest.index_fill_(axis, kept, 0.0).any()
        else:
            assert torch.equal(theirs[new], update)
    assert seen == theirs.keys()
    assert dict(report.moved)[f"{DUAL}.2"] == f"{DUAL}.3"
    assert f"{DUAL}.1" in report.lost
    assert report.other == ("transformer.img_in.lora_A.weight", "transformer.img_in.lora_B.weight")


def test_the_teacher_loads_it_by_itself(pipe: Any, lora: dict[str, Tensor], tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    back, _ = converted(pipe, lora, tmp_path)
    teacher = teacher_for("qwen")
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    whole = QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, teacher)
    whole.load_lora_weights(str(tmp_path / "teacher.safetensors"))
    whole.fuse_lora()
    whole.unload_lora_weights()
    after = teacher.state_dict()
    changed = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])}
    assert changed == updates(back).keys()


def test_there_and_back_is_the_same(pipe: Any, tmp_path: Path) -> None:
    tensors = lora_for(teacher_for("qwen"), ("attn.to_k", "img_in", "img_mlp.net.2"))
    save_file(tensors, tmp_path / "first.safetensors")
    convert_lora(tmp_path / "first.safetensors", tmp_path / "student.safetensors", pipe)
    convert_lora(tmp_path / "student.safetensors", tmp_path / "back.safetensors", pipe, to="teacher")
    back = load_file(tmp_path / "back.safetensors")
    gone = (f"{DUAL}.1.", f"{DUAL}.2.", f"{DUAL}.0.img_mlp.")  # a run, and an affine map
    kept = {key for key in tensors if not any(name in key for name in gone)}
    assert kept == back.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in kept if f"{DUAL}.5." not in key)


@pytest.mark.parametrize("how", ["metadata", "pattern", "rslora", "alphas"])
def test_strength_is_multiplied_in(pipe: Any, tmp_path: Path, how: str) -> None:
    tensors = lora_for(pipe.transformer, ("2.attn.to_q",), rank=4)
    header, expected = {"format": "pt"}, {"metadata": 2.0, "pattern": 3.0, "rslora": 4.0, "alphas": 0.5}[how]
    config: dict[str, Any] = {"transformer.r": 4, "transformer.lora_alpha": 8}
    if how == "pattern":
        config["transformer.alpha_pattern"] = {"attn.to_q": 12}
    if how == "rslora":
        config["transformer.use_rslora"] = True
    if how == "alphas":
        tensors["transformer.transformer_blocks.2.attn.to_q.alpha"] = torch.tensor(2.0)
    else:
        header["lora_adapter_metadata"] = json.dumps(config)
    back, _ = converted(pipe, tensors, tmp_path, header)
    name = f"{DUAL}.2.attn.to_q"
    assert torch.allclose(updates(back)[f"{DUAL}.3.attn.to_q"], expected * updates(tensors)[name], atol=1e-5)
    assert not any(key.endswith(".alpha") for key in back)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({f"transformer.{DUAL}.2.attn.to_q.lora_magnitude_vector": (32,)}, "without DoRA"),
        ({f"lora_unet_{DUAL}_2_attn_to_q.lora_down.weight": (2, 32)}, "diffusers cannot read"),  # half of it
        ({f"transformer.{DUAL}.7.attn.to_q.lora_A.weight": (2, 32)}, "is not whole"),
        ({f"transformer.{DUAL}.7.attn.to_q.lora_{s}.weight": n for s, n in (("A", (2, 32)), ("B", (32, 2)))}, "7"),
        (
            {f"transformer.{DUAL}.2.attn.to_q.lora_{s}.weight": n for s, n in (("A", (2, 8)), ("B", (8, 2)))},
            "not trained on",
        ),
        (
            {f"transformer.{DUAL}.1.attn.to_q.lora_{s}.weight": n for s, n in (("A", (2, 32)), ("B", (32, 2)))},
            "nothing of",
        ),
    ],
)
def test_what_does_not_go_back_is_refused(
    pipe: Any, tmp_path: Path, change: dict[str, tuple[int, ...]], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        converted(pipe, {name: torch.ones(size) for name, size in change.items()}, tmp_path)
    assert not (tmp_path / "teacher.safetensors").exists()


def test_the_way_back_needs_the_pipeline(pipe: Any, lora: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(lora, tmp_path / "student.safetensors")
    arguments = (tmp_path / "student.safetensors", tmp_path / "teacher.safetensors")
    with pytest.raises(ModelError, match="was not compressed by ppcl"):
        convert_lora(*arguments, {DUAL: [0, 1]}, to="teacher")
    with pytest.raises(UserError, match="expected one of student, teacher"):
        convert_lora(*arguments, pipe, to="techer")


def in_other_names(tensors: dict[str, Tensor], trainer: str) -> dict[str, Tensor]:
    """The same LoRA as ai-toolkit or kohya's trainers name it."""
    renamed = {}
    for key, tensor in tensors.items():
        module, side = key.removeprefix("transformer.").removesuffix(".weight").rsplit(".lora_", 1)
        if trainer == "ai-toolkit":
            renamed[f"diffusion_model.{module}.lora_{side}.weight"] = tensor
        else:
            name = "lora_unet_" + module.replace(".", "_")
            renamed[f"{name}.lora_{'down' if side == 'A' else 'up'}.weight"] = tensor
            renamed[f"{name}.alpha"] = torch.tensor(float(tensor.shape[0 if side == "A" else 1]))
    return renamed


@pytest.mark.parametrize("trainer", ["ai-toolkit", "kohya"])
def test_loras_of_other_trainers_come_back_as_diffusers_own_do(trainer: str, pipe: Any, tmp_path: Path) -> None:
    whole = tuple(name for name in LAYERS if name.startswith("attn."))
    tensors = lora_for(pipe.transformer, whole)
    expected, _ = converted(pipe, tensors, tmp_path)
    back, _ = converted(pipe, in_other_names(tensors, trainer), tmp_path)
    assert back.keys() == expected.keys()
    for name, update in updates(back).items():
        assert torch.allclose(update, updates(expected)[name], atol=1e-6)
