"""Pipelines whose code goes along, loaded where there is no ppcl."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tiny_compressed import QWEN, bundle_for, compressed, teacher_for, velocity_of
from tiny_models import DUAL
from tiny_pipeline import tiny_qwen_pipeline

import ppcl.pipelines  # noqa: F401 - its classes are known, whichever test is the first
from ppcl.config import ExportConfig
from ppcl.export.pipeline import export
from ppcl.modules.compressed import MODULE
from ppcl.modules.remote_code import source_of, write_code
from ppcl.student.bundle import build_student
from ppcl.student.plan import CompressionPlan
from ppcl.teacher.families import adapter_for
from ppcl.teacher.loading import load_pipeline

# What a user runs who has diffusers and has never heard of this project.
STOCK = """
import sys
sys.modules["ppcl"] = None
import numpy, torch
from diffusers import DiffusionPipeline
folder, out = sys.argv[1:]
try:
    DiffusionPipeline.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("code was run without being asked for")
pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
kind = type(pipeline.transformer)
assert kind.__name__ == "PPCLQwenImageTransformer2DModel", kind
_, info = kind.from_pretrained(folder, subfolder="transformer", output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
assert not any(name.split(".")[0] == "ppcl" and module for name, module in sys.modules.items())
pipeline.set_progress_bar_config(disable=True)
import pickle
from diffusers import AutoModel, ModularPipeline
weights = pipeline.transformer.state_dict()
again = pickle.loads(pickle.dumps(pipeline.transformer))
assert type(again) is kind and all(torch.equal(again.state_dict()[name], weights[name]) for name in weights)
for place, more in ((folder, {"subfolder": "transformer"}), (folder + "/transformer", {})):
    model = AutoModel.from_pretrained(place, trust_remote_code=True, **more)
    assert type(model) is kind and model.state_dict().keys() == weights.keys()
other = DiffusionPipeline.from_pretrained(folder, transformer=again, trust_remote_code=True)
assert other.transformer is again
modular = ModularPipeline.from_pretrained(folder)
modular.load_components(trust_remote_code=True)
assert type(modular.transformer) is kind
picture = pipeline("red cat", negative_prompt=" ", true_cfg_scale=2.0, height=16, width=16, num_inference_steps=2,
                   generator=torch.Generator().manual_seed(0), output_type="np").images
numpy.save(out, picture)
"""


# And one who has both: no code but ppcl's own class, and what diffusers' other loaders make of it.
BOTH = """
import pickle, sys
import ppcl.pipelines
import diffusers
from diffusers import AutoModel, DiffusionPipeline, ModularPipeline
remote, plain = sys.argv[1:]
kind = diffusers.PPCLQwenImageTransformer2DModel
assert type(DiffusionPipeline.from_pretrained(remote).transformer) is kind  # nothing to trust: no code of it is run
for folder, trust in ((remote, {"trust_remote_code": True}), (plain, {})):
    pipeline = DiffusionPipeline.from_pretrained(folder, **trust)
    modular = ModularPipeline.from_pretrained(folder)
    modular.load_components(**trust)
    alone = AutoModel.from_pretrained(folder, subfolder="transformer", **trust)
    again = pickle.loads(pickle.dumps(pipeline.transformer))
    other = DiffusionPipeline.from_pretrained(folder, transformer=alone, **trust)
    assert other.transformer is alone
    for model in (pipeline.transformer, modular.transformer, alone, again):
        assert type(model) is kind is diffusers.PPCLQwenImageTransformer2DModel, (folder, type(model))
"""


def draw(pipeline: Any) -> np.ndarray:
    return pipeline(
        "red cat", negative_prompt=" ", true_cfg_scale=2.0, height=16, width=16, num_inference_steps=2,
        generator=torch.Generator().manual_seed(0), output_type="np",
    ).images  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, CompressionPlan]:
    """A pipeline with its code, the same one in memory, and its plan."""
    pipe = tiny_qwen_pipeline(num_layers=6)
    teacher = pipe.transformer.eval().requires_grad_(False)
    bundle = bundle_for(teacher, QWEN)
    student = build_student(teacher, adapter_for(teacher), bundle)
    folder = tmp_path_factory.mktemp("remote") / "pipeline"
    export(pipe, student, bundle.plan, "owner/name", folder, ExportConfig(remote_code=True))
    pipe.register_modules(transformer=student)
    pipe.set_progress_bar_config(disable=True)
    return folder, pipe, bundle.plan


def test_it_loads_without_ppcl(exported: tuple[Path, Any, CompressionPlan], tmp_path: Path) -> None:
    folder, pipe, _ = exported
    done = subprocess.run(
        [sys.executable, "-I", "-c", STOCK, str(folder), str(tmp_path / "picture.npy")],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.abs(np.load(tmp_path / "picture.npy") - draw(pipe)).max() < 1e-4
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == [MODULE, "PPCLQwenImageTransformer2DModel"]
    card = (folder / "README.md").read_text()
    assert "trust_remote_code=True)" in card and "device_map" in card
    assert "import ppcl.pipelines\n" not in card


@pytest.mark.slow
def test_it_is_ppcls_own_class_where_ppcl_is_imported(
    exported: tuple[Path, Any, CompressionPlan], tmp_path: Path
) -> None:
    folder, pipe, plan = exported
    plain = export(pipe, pipe.transformer, plan, str(folder), tmp_path / "plain", ExportConfig())
    for name in ("model_index.json", "transformer/config.json"):
        assert "auto_map" in json.loads((folder / name).read_text())
        assert "auto_map" not in json.loads((plain / name).read_text())
    done = subprocess.run(
        [sys.executable, "-c", BOTH, str(folder), str(plain)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_ppcl_itself_runs_no_code_of_the_folder(exported: tuple[Path, Any, CompressionPlan], tmp_path: Path) -> None:
    """The evaluate stage loads what export wrote, by the registered class; so can a re-save be loaded."""
    folder, pipe, plan = exported
    code = folder / "transformer" / f"{MODULE}.py"
    text = code.read_text()
    code.write_text("raise SystemExit('this was run')\n")
    try:
        loaded = load_pipeline(str(folder), torch.device("cpu"))
    finally:
        code.write_text(text)
    assert np.abs(draw(loaded) - draw(pipe)).max() < 1e-4
    # exported again without its code, it is one for people who have ppcl
    again = tmp_path / "again"
    export(loaded, loaded.transformer, plan, str(folder), again, ExportConfig())
    assert json.loads((again / "model_index.json").read_text())["transformer"][0] == "diffusers"
    assert not (again / "transformer" / f"{MODULE}.py").exists()
    assert np.abs(draw(load_pipeline(str(again), torch.device("cpu"))) - draw(pipe)).max() < 1e-4


@pytest.mark.parametrize("family", ["qwen", "flux"])
def test_the_code_builds_what_ppcl_builds(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = compressed(family)
    text = source_of(student)
    assert "import ppcl" not in text and "from ppcl" not in text
    write_code(student, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, MODULE, None)  # so that what is imported from this folder is forgotten again
    del sys.modules[MODULE]
    monkeypatch.delattr(diffusers, type(student).__name__)  # or it would be the code's class, too
    made = getattr(importlib.import_module(MODULE), type(student).__name__)
    student.save_pretrained(tmp_path)
    other = made.from_pretrained(tmp_path)
    assert type(other) is not type(student)
    torch.testing.assert_close(velocity_of(other, family), velocity_of(student, family), atol=1e-6, rtol=1e-5)


def test_plans_of_depth_alone_need_no_code(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_qwen_pipeline(num_layers=6)
    teacher = teacher_for("qwen")
    bundle = bundle_for(teacher, {(DUAL, 1, 2): {}})
    student = build_student(teacher, adapter_for(teacher), bundle)
    with caplog.at_level(logging.WARNING):
        export(pipe, student, bundle.plan, "owner/name", tmp_path / "out", ExportConfig(remote_code=True))
    assert "export.remote_code has no effect" in caplog.text
    assert not list((tmp_path / "out" / "transformer").glob("*.py"))
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "QwenImageTransformer2DModel"]
