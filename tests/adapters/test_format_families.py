"""Files for other programs, of tiny models of each family, loaded by diffusers' own single-file and GGUF loaders."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils
from ordinary_heads import heads_of
from tiny import TINY

from ppcl.common.tensor_files import read_tensor_header
from ppcl.errors import ModelError
from ppcl.export.formats import export_as
from ppcl.export.gguf_file import TYPES
from ppcl.export.layouts import LAYOUTS
from ppcl.export.support import refusal, single_file_classes
from ppcl.modules.compressed import compress_class
from ppcl.modules.parts import join
from ppcl.modules.replacements import apply_width
from ppcl.modules.slicing import joined, neurons_of
from ppcl.pruning.unit_search import find_sites
from ppcl.teacher.blocks import ResidentBlocks
from ppcl.teacher.families import adapter_for
from ppcl.teacher.trace import record_boundaries

CLASSES = single_file_classes()
GGUF = ("flux", "flux2", "ltx", "sd3", "sd35_medium", "qwen", "wan", "lumina2", "z_image")


def tiny(name: str) -> tuple[Any, dict[str, Any]]:
    """A tiny model and a call of it, with a network wide enough for what is tested here."""
    model, inputs = TINY[name]()
    if name == "wan":
        model = type(model).from_config({**model.config, "ffn_dim": 128})
    return model, inputs


def saved(model: Any, folder: Path, **options: Any) -> Path:
    """A pipeline folder with that transformer and nothing else."""
    model.save_pretrained(folder / "transformer", **options)
    index = {"_class_name": "APipeline", "transformer": ["diffusers", type(model).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@torch.no_grad()
def output(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    result = model.eval()(**inputs, return_dict=False)[0]
    return torch.stack(list(result)) if isinstance(result, list) else result


def by_diffusers(model: Any, file: Path, folder: Path, **options: Any) -> Any:
    kind = next(base for base in type(model).__mro__ if base.__name__ in CLASSES)
    return kind.from_single_file(str(file), config=str(folder), subfolder="transformer", **options)


@pytest.fixture(autouse=True)
def any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let diffusers' conversions of FLUX and Lumina 2 take the tiny models' widths for granted, not the real ones."""
    for name, numbers in {
        "FluxTransformer2DModel": {"inner_dim = 3072": "inner_dim = 32"},
        "Lumina2Transformer2DModel": {"q_dim = 2304": "q_dim = 32", "v_dim = 768": "v_dim = 16"},
    }.items():
        source = inspect.getsource(CLASSES[name]["checkpoint_mapping_fn"])
        for real, tiny in numbers.items():
            assert real in source
            source = source.replace(real, tiny)
        scope = dict(vars(single_file_utils))
        exec(source, scope)
        function = scope[CLASSES[name]["checkpoint_mapping_fn"].__name__]
        monkeypatch.setitem(CLASSES[name], "checkpoint_mapping_fn", function)


@pytest.mark.parametrize("name", TINY)
def test_every_family_loads_from_one_file_or_is_refused(name: str, tmp_path: Path) -> None:
    model, inputs = TINY[name]()
    folder = saved(model, tmp_path / "model", max_shard_size="200KB")
    file = tmp_path / "model.safetensors"
    if refusal("single-file", type(model).__name__):
        with pytest.raises(ModelError, match=f"{type(model).__name__} as single-file: diffusers has no .* diffusers"):
            export_as(folder, file, "single-file")
        assert not file.exists()
        return
    export_as(folder, file, "single-file")
    loaded = by_diffusers(model, file, folder)
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    layout = LAYOUTS.get(type(model).__name__)
    names = layout.arranged(model.state_dict()) if layout else model.state_dict()
    assert list(read_tensor_header(file)) == list(names)


def found(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Every module of every second block that a call shows units of, half of them kept."""
    adapter = adapter_for(model)
    calls, _ = record_boundaries(model, adapter, inputs, {(stack.name, 0) for stack in adapter.stacks})
    return {
        join(site.place[0], str(site.place[1]), site.path): joined(
            [one.units.part(range(1, one.units.count, 2)) for one in site.sites]
        )
        for site in find_sites(ResidentBlocks(model), calls, ("ffn", "attention"))
        if site.place[1] % 2 == 0
    }


def smaller(model: Any, kind: str, inputs: dict[str, Any]) -> tuple[str, ...]:
    """Make modules of every second block smaller, in place; returns their paths."""
    adapter, parts = adapter_for(model), found(model, inputs) if kind == "found" else {}
    for stack in adapter.stacks:
        for i, block in list(enumerate(adapter.blocks(model, stack)))[::2]:
            for path, module in block.named_modules():
                units = heads_of(module) if kind == "heads" else None
                if kind == "narrow" and path in stack.ffn.values():
                    units = neurons_of(module)
                if units is not None:
                    parts[f"{stack.name}.{i}.{path}"] = units.part(range(1, units.count, 2))
                elif kind == "low_rank" and path in stack.modulation.values():
                    parts[f"{stack.name}.{i}.{path}"] = {"kind": "low_rank", "size": 3}
                elif kind == "linear" and path in stack.ffn.values():
                    parts[f"{stack.name}.{i}.{path}"] = {"kind": "linear", "size": 0}
    apply_width(model, parts)
    compress_class(model, parts)
    return tuple(parts)


ROUNDING = {"F16": 1e-3, "BF16": 1e-2, "Q8": 2e-2, "Q5": 0.1, "Q4": 0.25}
OFFERED = {
    **dict.fromkeys(("flux", "sd3", "sd35_medium", "qwen"), ("low_rank", "narrow", "heads", "linear")),
    "wan": ("narrow", "linear"),
    "lumina2": ("narrow", "linear"),
    "z_image": ("narrow", "heads", "linear"),
}
OFFERED = {name: (*kinds, "found") for name, kinds in OFFERED.items()}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in OFFERED.items() for kind in kinds])
def test_smaller_modules_are_multiplied_out(name: str, kind: str, tmp_path: Path) -> None:
    model, inputs = tiny(name)
    paths = smaller(model, kind, inputs)
    folder, file = saved(model, tmp_path / "model"), tmp_path / "model.safetensors"
    if kind == "linear" and name in ("lumina2", "z_image"):  # gated, without biases
        with pytest.raises(ModelError, match=r"layers.0.feed_forward \('linear'\) is no .* fit.width=\[\]"):
            export_as(folder, file, "single-file")
        return
    assert export_as(folder, file, "single-file").multiplied_out == len(paths)
    loaded = by_diffusers(model, file, folder)
    assert type(loaded).__name__ == type(model).__name__.removeprefix("PPCL")
    expected = output(model, inputs)
    assert torch.allclose(output(loaded, inputs), expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "Q8_0") for name in GGUF), *(("qwen", kind) for kind in TYPES if kind != "Q8_0")]
)
def test_gguf_loads_in_diffusers_within_the_rounding(name: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model, inputs = tiny(name)
    folder, file = saved(model, tmp_path / "model"), tmp_path / "model.gguf"
    export_as(folder, file, "gguf", kind)
    config = diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32)
    loaded = by_diffusers(model, file, folder, quantization_config=config, dtype=torch.float32)
    expected = output(model, inputs)
    error = float((output(loaded, inputs) - expected).norm() / expected.norm())
    assert error < ROUNDING[kind.partition("_")[0]]
