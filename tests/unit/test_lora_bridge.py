"""LoRA of the teacher on depth-pruned transformers, against updates written into the weights by hand."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ordinary_heads import heads_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import DUAL, SINGLE, flux_call, noise, plan_for, qwen_call, random_substitutes, tiny_flux, tiny_qwen
from torch import Tensor

from ppcl.errors import ModelError, UserError
from ppcl.modules.compressed import compress_class
from ppcl.modules.replacements import apply_width
from ppcl.modules.slicing import neurons_of
from ppcl.pipelines import convert_lora, kept_blocks, load_lora, remap_lora
from ppcl.student.bundle import Bundle, build_student
from ppcl.teacher.families import adapter_for

RUNS = [(DUAL, 1, 3)]  # of six blocks: 0, [1, 3], 4, 5
KEPT = {DUAL: [0, [1, 3], 4, 5]}
FLUX_RUNS = [(DUAL, 0, 1), (SINGLE, 1, 2)]


def student_of(teacher: Any, runs: list[Any]) -> Any:
    adapter = adapter_for(teacher)
    bundle = Bundle(plan_for(teacher, runs), random_substitutes(teacher, adapter, runs))
    return build_student(teacher, adapter, bundle)


def qwen_pipe(runs: list[Any] | None = None) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    transformer = student_of(tiny_qwen(6), RUNS if runs is None else runs)
    return QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, transformer)


def flux_pipe() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    transformer = student_of(tiny_flux(3, 4), FLUX_RUNS)
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, transformer)


def lora_for(teacher: Any, layers: tuple[str, ...], rank: int = 2) -> dict[str, Tensor]:
    """A LoRA for layers of all blocks, with diffusers' names."""
    tensors = {}
    for seed, (name, module) in enumerate(teacher.named_modules()):
        if isinstance(module, torch.nn.Linear) and name.endswith(layers):
            tensors[f"transformer.{name}.lora_A.weight"] = 0.5 * noise(rank, module.in_features, seed=seed)
            tensors[f"transformer.{name}.lora_B.weight"] = 0.5 * noise(module.out_features, rank, seed=seed + 9000)
    return tensors


@torch.no_grad()
def add_by_hand(
    student: Any, tensors: dict[str, Tensor], places: dict[str, str], scale: Any = lambda name: 1.0
) -> None:
    """Add scale * B A to the layers of the blocks in ``places`` (teacher's block -> student's block)."""
    modules = dict(student.named_modules())
    for key, down in tensors.items():
        name = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        block = re.match(r"\w+\.\d+", name)
        if ".lora_A." not in key or (block and block[0] not in places):
            continue
        module = modules[name.replace(block[0] + ".", places[block[0]] + ".", 1) if block else name]
        module.weight += scale(name) * tensors[key.replace("lora_A", "lora_B")] @ down


def named(places: dict[int, int], stack: str = DUAL) -> dict[str, str]:
    return {f"{stack}.{old}": f"{stack}.{new}" for old, new in places.items()}


@torch.no_grad()
def run_qwen(transformer: Any) -> Tensor:
    return transformer(**qwen_call(), return_dict=False)[0]


LAYERS = ("attn.to_q", "attn.to_out.0", "img_mlp.net.2", "img_in")


@pytest.fixture(scope="module")
def lora() -> dict[str, Tensor]:
    return lora_for(tiny_qwen(6), LAYERS)


def test_bridge_equals_the_update_by_hand_and_plain_loading_does_not(lora: dict[str, Tensor]) -> None:
    pipe, plain, reference = qwen_pipe(), qwen_pipe(), qwen_pipe().transformer
    bare = run_qwen(reference)
    add_by_hand(reference, lora, named({0: 0, 4: 2, 5: 3}))
    expected = run_qwen(reference)
    report = load_lora(pipe, lora)
    torch.testing.assert_close(run_qwen(pipe.transformer), expected, atol=1e-5, rtol=1e-5)
    assert (len(report.mapped), len(report.dropped), len(report.other)) == (18, 18, 2)
    assert report.moved[1] == (f"{DUAL}.4", f"{DUAL}.2") and report.lost == tuple(f"{DUAL}.{i}" for i in (1, 2, 3))
    assert "transformer_blocks.5 -> transformer_blocks.3" in str(report) and "dropped: 18 tensors of 3" in str(report)
    plain.load_lora_weights(dict(lora))  # no error, and the wrong blocks: what the bridge is for
    wrong = run_qwen(plain.transformer)
    assert (wrong - expected).norm() > 0.05 * (expected - bare).norm()
    pipe.unload_lora_weights()
    torch.testing.assert_close(run_qwen(pipe.transformer), bare, atol=1e-5, rtol=1e-5)


def test_smaller_modules_lose_their_lora_and_the_rest_keeps_it() -> None:
    """Blocks 4 and 5 have an affine map for one FFN and are kept otherwise (low rank: test_lora_low_rank.py)."""
    lora = lora_for(tiny_qwen(6), (*LAYERS, "txt_mlp.net.2"))

    def pipe() -> Any:
        made = qwen_pipe()
        parts = {
            f"{DUAL}.2.img_mlp": {"kind": "linear", "size": 0},
            f"{DUAL}.3.txt_mlp": {"kind": "linear", "size": 0},
        }
        torch.manual_seed(1)
        apply_width(made.transformer, parts)
        compress_class(made.transformer, parts)
        return made

    bridged, reference = pipe(), pipe().transformer
    fitting = {k: v for k, v in lora.items() if "blocks.4.img_mlp" not in k and "blocks.5.txt_mlp" not in k}
    add_by_hand(reference, fitting, named({0: 0, 4: 2, 5: 3}))
    report = load_lora(bridged, lora)
    torch.testing.assert_close(run_qwen(bridged.transformer), run_qwen(reference), atol=1e-5, rtol=1e-5)
    assert report.lost == (*(f"{DUAL}.{i}" for i in (1, 2, 3)), f"{DUAL}.4.img_mlp", f"{DUAL}.5.txt_mlp")
    bridged.set_adapters(bridged.get_list_adapters()["transformer"], 0.0)  # scales are looked up by class name
    torch.testing.assert_close(run_qwen(bridged.transformer), run_qwen(pipe().transformer), atol=1e-5, rtol=1e-5)


def test_a_lora_is_cut_as_its_module_was() -> None:
    """Block 4 with half of its image neurons, block 5 with one head: what the whole layers' updates do to the rest."""
    layers = (*LAYERS, "img_mlp.net.0.proj", "attn.add_k_proj", "attn.to_add_out")
    teacher = tiny_qwen(6)
    lora = lora_for(teacher, layers)
    blocks = teacher.transformer_blocks
    neurons, heads = neurons_of(blocks[4].img_mlp), heads_of(blocks[5].attn)
    assert neurons and heads
    parts = {
        f"{DUAL}.2.img_mlp": neurons.part(range(1, 128, 2)),
        f"{DUAL}.3.attn": heads.part([1]),
    }
    bridged = qwen_pipe()
    whole = copy.deepcopy(bridged.transformer)
    add_by_hand(whole, lora, named({0: 0, 4: 2, 5: 3}))
    for transformer in (bridged.transformer, whole):
        apply_width(transformer, parts)
        compress_class(transformer, parts)
    report = load_lora(bridged, lora)
    torch.testing.assert_close(run_qwen(bridged.transformer), run_qwen(whole), atol=1e-5, rtol=1e-5)
    assert len(report.cut) == 2 + 4
    assert "cut to the neurons and heads that were kept: 6 tensors" in str(report)


def peft_file(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A LoRA written by diffusers and PEFT, whose blocks differ in rank and alpha."""
    from diffusers import QwenImagePipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    teacher = tiny_qwen(6)
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=r".*transformer_blocks\.[0-4]\.attn\.(to_q|to_k)",
        rank_pattern={"transformer_blocks.4.attn.to_q": 3},
        alpha_pattern={"transformer_blocks.4.attn.to_q": 1, "to_k": 5, r"transformer_blocks\.(1|4)\.attn\.to_v": 2},
        init_lora_weights=False,
    )
    torch.manual_seed(3)
    teacher.add_adapter(config)
    tensors = get_peft_model_state_dict(teacher)
    metadata = _collate_lora_metadata({"transformer": teacher})
    QwenImagePipeline.save_lora_weights(folder, transformer_lora_layers=tensors, **metadata)
    return folder / "pytorch_lora_weights.safetensors", {f"transformer.{k}": v for k, v in tensors.items()}


def peft_scale(name: str) -> float:
    if name == f"{DUAL}.4.attn.to_q":
        return 1 / 3
    return 5 / 2 if name.endswith("to_k") else 6 / 2


def test_metadata_goes_with_the_blocks(tmp_path: Path) -> None:
    file, tensors = peft_file(tmp_path / "lora")
    reference = qwen_pipe().transformer
    add_by_hand(reference, tensors, named({0: 0, 4: 2}), peft_scale)
    expected = run_qwen(reference)
    loaded = qwen_pipe()
    load_lora(loaded, file, adapter_name="style")
    torch.testing.assert_close(run_qwen(loaded.transformer), expected, atol=1e-5, rtol=1e-5)
    assert loaded.get_active_adapters() == ["style"]
    for how in (qwen_pipe(), KEPT):
        converted = tmp_path / f"converted-{type(how).__name__}.safetensors"
        convert_lora(file, converted, how)
        plain = qwen_pipe()
        plain.load_lora_weights(str(converted))
        torch.testing.assert_close(run_qwen(plain.transformer), expected, atol=1e-5, rtol=1e-5)


def test_converter_keeps_metadata_and_marks_the_file(tmp_path: Path) -> None:
    file, _ = peft_file(tmp_path / "lora")
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    save_file(tensors, file, {**header, "modelspec.title": "a style"})
    out = tmp_path / "new" / "converted.safetensors"
    convert_lora(str(file), str(out), KEPT)
    with safe_open(out, "pt") as opened:
        written = opened.metadata()
    adapter = json.loads(written["lora_adapter_metadata"])
    assert written["modelspec.title"] == "a style" and json.loads(written["ppcl_kept_blocks"]) == KEPT
    assert adapter["transformer.rank_pattern"] == {f"^{DUAL}.2.attn.to_q": 3}
    assert adapter["transformer.alpha_pattern"] == {f"^{DUAL}.2.attn.to_q": 1, "to_k": 5}
    assert adapter["transformer.target_modules"] == [f"{DUAL}.{b}.attn.{x}" for b in (0, 2) for x in ("to_k", "to_q")]
    assert adapter["transformer.lora_alpha"] == 6
    for again in (out, out.parent):
        with pytest.raises(UserError, match="already converted"):
            load_lora(qwen_pipe(), again)
    with pytest.raises(UserError, match="already converted"):
        convert_lora(out, tmp_path / "twice.safetensors", KEPT)
    assert [p.name for p in out.parent.iterdir()] == ["converted.safetensors"]


def kohya(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for key, value in tensors.items():
        name, _, kind = key.removeprefix("transformer.").partition(".lora_")
        flat = "lora_unet_" + name.replace(".", "_")
        out[f"{flat}.lora_{'down' if kind[0] == 'A' else 'up'}.weight"] = value
        out[f"{flat}.alpha"] = torch.tensor(2.0)
    return out


@pytest.mark.parametrize(
    "form", ["bare", "peft", "peft default", "diffusion_model", "kohya", "alpha"], ids=lambda f: f.replace(" ", "-")
)
def test_other_formats(form: str) -> None:
    tensors = lora_for(tiny_qwen(6), ("attn.to_q",))
    bare = {k.removeprefix("transformer."): v for k, v in tensors.items()}
    given, scale = {
        "bare": (bare, 1.0),
        "peft": ({f"base_model.model.{k}": v for k, v in bare.items()}, 1.0),
        "peft default": ({k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}, 1.0),
        "diffusion_model": ({f"diffusion_model.{k}": v for k, v in bare.items()}, 1.0),
        "kohya": (kohya(tensors), 1.0),
        "alpha": (
            {
                **tensors,
                **{k.replace("lora_A.weight", "alpha"): torch.tensor(1.0) for k in tensors if "lora_A" in k},
            },
            0.5,
        ),
    }[form]
    pipe, reference = qwen_pipe(), qwen_pipe().transformer
    add_by_hand(reference, tensors, named({0: 0, 4: 2, 5: 3}), lambda name: scale)
    load_lora(pipe, given)
    torch.testing.assert_close(run_qwen(pipe.transformer), run_qwen(reference), atol=1e-5, rtol=1e-5)


def test_flux_two_stacks_and_alphas(tmp_path: Path) -> None:
    tensors = lora_for(tiny_flux(3, 4), ("attn.to_q", "proj_mlp"))
    alphas = {k.replace("lora_A.weight", "alpha"): torch.tensor(1.0) for k in tensors if "lora_A" in k}
    reference = flux_pipe().transformer
    add_by_hand(reference, tensors, named({2: 1}) | named({0: 0, 3: 2}, SINGLE), lambda name: 0.5)
    with torch.no_grad():
        expected = reference(**flux_call(), return_dict=False)[0]
        pipe = flux_pipe()
        report = load_lora(pipe, {**tensors, **alphas})
        found = pipe.transformer(**flux_call(), return_dict=False)[0]
        save_file({**tensors, **alphas}, tmp_path / "flux.safetensors")
        convert_lora(tmp_path / "flux.safetensors", tmp_path / "out.safetensors", flux_pipe())
        plain = flux_pipe()
        plain.load_lora_weights(str(tmp_path / "out.safetensors"))
        converted = plain.transformer(**flux_call(), return_dict=False)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(converted, expected, atol=1e-5, rtol=1e-5)
    assert (f"{SINGLE}.3", f"{SINGLE}.2") in report.moved and f"{SINGLE}.1" in report.lost


def test_start_goes_to_the_substitute_only_if_recorded(lora: dict[str, Tensor]) -> None:
    pipe, reference = qwen_pipe(), qwen_pipe().transformer
    assert pipe.transformer.config["_ppcl"]["starts"] == {DUAL: [None, "middle", None, None]}
    add_by_hand(reference, lora, named({0: 0, 2: 1, 4: 2, 5: 3}))
    report = load_lora(pipe, lora, runs="start")
    torch.testing.assert_close(run_qwen(pipe.transformer), run_qwen(reference), atol=1e-5, rtol=1e-5)
    assert report.lost == (f"{DUAL}.1", f"{DUAL}.3")
    for starts in (None, {DUAL: [None, "mean", None, None]}):
        with pytest.raises(UserError, match="started from"):
            remap_lora(lora, KEPT, runs="start", starts=starts)


def a(key: str, width: int = 32) -> dict[str, Tensor]:
    return {f"{key}.lora_A.weight": torch.zeros(2, width), f"{key}.lora_B.weight": torch.zeros(32, 2)}


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (a("transformer.transformer_blocks.6.attn.to_q"), r"block 6 .* had 6 \(0-5\)"),
        (a("transformer.single_transformer_blocks.0.attn.to_q"), "another family"),
        (a("transformer.visual_blocks.0.attn.to_q"), "another family"),
        (a("unet.down_blocks.0.attn.to_q"), "blocks are in transformer_blocks; the LoRA was made for another family$"),
        (a("transformer.transformer_blocks.0.ff.net.2"), "no module 'transformer_blocks.0.ff.net.2'"),
        (a("transformer.transformer_blocks.0.attn.to_q", 48), "48 in_features, but the layer has 32"),
        (a("transformer.something"), "no module 'something'"),
        (a("text_encoder.model.layers.0.q_proj"), "text encoder alone"),
        (a("transformer.transformer_blocks.2.attn.to_q"), "nothing of this LoRA is left: all"),
        ({"lora_A.weight": torch.zeros(2, 2)}, "no module"),
    ],
)
def test_errors_of_loading(tensors: dict[str, Tensor], match: str) -> None:
    pipe = qwen_pipe()
    with pytest.raises(UserError, match=match) as caught:
        load_lora(pipe, tensors)
    assert "\n" not in str(caught.value)
    assert not hasattr(pipe.transformer, "peft_config")


def test_other_block_lists_of_the_transformer_stay(lora: dict[str, Tensor]) -> None:
    refiner = a("transformer.embedder.refiner_blocks.0.to_q")
    _, report = remap_lora({**lora, **refiner}, KEPT, unpruned=["embedder.refiner_blocks"])
    assert set(refiner) < set(report.other)
    with pytest.raises(UserError, match="another family"):
        remap_lora({**lora, **refiner}, KEPT)


def test_other_errors(lora: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tensors"):
        remap_lora({}, KEPT)
    with pytest.raises(UserError, match="another family, or has names of another program, which load_lora"):
        remap_lora(kohya(lora), KEPT)
    with pytest.raises(UserError, match="expected one of drop, start"):
        remap_lora(lora, KEPT, runs="all")
    for wrong in ({DUAL: [0, 2]}, {DUAL: [0, [1]]}, {DUAL: [[1, 0]]}, {DUAL: ["0"]}):
        with pytest.raises(ModelError, match="is expected"):
            remap_lora(lora, wrong)
    with pytest.raises(ModelError, match="empty"):
        remap_lora(lora, {})
    for missing in (tmp_path / "missing.safetensors", "missing.safetensors", "./missing"):
        with pytest.raises(
            UserError, match=r"no LoRA at .*missing.*; expected a \.safetensors file, a folder with one"
        ):
            load_lora(qwen_pipe(), missing)
    with pytest.raises(UserError, match="does not exist"):
        convert_lora(tmp_path / "missing.safetensors", tmp_path / "out.safetensors", KEPT)
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(UserError, match="not a readable"):
        convert_lora(tmp_path / "text.safetensors", tmp_path / "out.safetensors", KEPT)
    teacher = SimpleNamespace(transformer=tiny_qwen(2))
    for call in (lambda: load_lora(teacher, lora), lambda: kept_blocks(teacher)):
        with pytest.raises(ModelError, match=r"was not compressed by ppcl: .*use diffusers' own calls"):
            call()
    with pytest.raises(ModelError, match="cannot load LoRA"):
        load_lora(SimpleNamespace(transformer=qwen_pipe().transformer), lora)


def test_an_unknown_option_is_refused() -> None:
    pipe = qwen_pipe()
    with pytest.raises(UserError, match=r"load_lora takes no adapter_nam \(did you mean 'adapter_name'\?\)"):
        load_lora(pipe, lora_for(tiny_qwen(6), ("to_q",)), adapter_nam="style")
    with pytest.raises(UserError, match="QwenImagePipeline has no transformer_2; leave load_into_transformer_2 out"):
        load_lora(pipe, lora_for(tiny_qwen(6), ("to_q",)), load_into_transformer_2=True)
    assert not getattr(pipe.transformer, "peft_config", {})


def two_experts(*compressed: int) -> tuple[Any, Any]:
    """A Wan 2.2 pipeline of which some transformers have one block for 1-3, and the teacher of each."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    def transformer() -> Any:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=16, ffn_dim=32, num_layers=6, rope_max_seq_len=32,
        )  # fmt: skip

    teacher = transformer()
    parts = [student_of(transformer(), [("blocks", 1, 3)]) if n in compressed else transformer() for n in (1, 2)]
    pipe = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), *parts, boundary_ratio=0.7)
    return pipe, teacher


def test_a_lora_of_the_second_expert_goes_there() -> None:
    """Wan 2.2: LoRAs come in pairs, and the second transformer has all its blocks."""
    pipe, teacher = two_experts(1)
    first, tensors = pipe.transformer, lora_for(teacher, ("attn1.to_q",))
    report = load_lora(pipe, tensors, adapter_name="low", load_into_transformer_2=True)
    assert list(pipe.transformer_2.peft_config) == ["low"]
    assert not getattr(first, "peft_config", {})
    assert (len(report.other), report.dropped) == (len(tensors), ())
    load_lora(pipe, tensors, adapter_name="high")
    assert list(first.peft_config) == ["high"] and list(pipe.transformer_2.peft_config) == ["low"]


def test_a_lora_of_a_compressed_second_expert_goes_to_its_blocks(tmp_path: Path) -> None:
    """Each transformer is bridged by its own record; one that has all its blocks takes a LoRA as it is."""
    pipe, teacher = two_experts(2)
    tensors = lora_for(teacher, ("attn1.to_q",))
    assert kept_blocks(pipe, "transformer_2") == {"blocks": [0, [1, 3], 4, 5]}
    report = load_lora(pipe, tensors, adapter_name="low", load_into_transformer_2=True)
    assert list(pipe.transformer_2.peft_config) == ["low"] and not getattr(pipe.transformer, "peft_config", {})
    assert ("blocks.5", "blocks.3") in report.moved and len(report.dropped) == 6
    layer = pipe.transformer_2.blocks[3].attn1.to_q
    torch.testing.assert_close(layer.lora_A["low"].weight, tensors["transformer.blocks.5.attn1.to_q.lora_A.weight"])
    report = load_lora(pipe, tensors, adapter_name="high")
    assert list(pipe.transformer.peft_config) == ["high"] and len(report.other) == len(tensors)
    save_file(tensors, tmp_path / "low.safetensors")
    convert_lora(tmp_path / "low.safetensors", tmp_path / "new.safetensors", pipe, component="transformer_2")
    pipe.load_lora_weights(tmp_path / "new.safetensors", adapter_name="again", load_into_transformer_2=True)
    torch.testing.assert_close(layer.lora_A["again"].weight, layer.lora_A["low"].weight)
