"""The whole command with one width of all networks: the result is of diffusers' own class, loaded without ppcl."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from test_families import OPTIONS
from tiny_pipelines import PIPELINES

from ppcl import cli
from ppcl.common.files import read_json
from ppcl.export.formats import export_as
from ppcl.student.bundle import build_student, load_bundle
from ppcl.teacher.families import adapter_for

ALONE = """
import sys
from diffusers import DiffusionPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
folder, file, call, answers = sys.argv[1:]
models = [
    DiffusionPipeline.from_pretrained(folder).transformer,
    WanTransformer3DModel.from_single_file(file, config=folder, subfolder="transformer"),
]
assert {type(model) for model in models} == {WanTransformer3DModel}
assert not any(name.partition(".")[0] == "ppcl" for name in sys.modules)
given = load_file(call)
save_file({str(i): m.eval()(**given, return_dict=False)[0].detach() for i, m in enumerate(models)}, answers)
"""


@pytest.fixture(scope="module")
def run(prompts_file, small_config, tmp_path_factory):
    """A compressed Wan whose networks all keep half of their neurons, and a block less."""
    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    PIPELINES["wan"]().save_pretrained(folder / "model")
    options = [*OPTIONS, "fit.width=[ffn]", "plan.uniform_width=true", "fit.width_shares=[0.5]", "fit.max_run=2"]
    arguments = ["compress", folder / "model", "--out", folder / "run", "--config", small_config, "--keep", 0.65]
    arguments += ["--prompts", prompts_file, *(part for option in options for part in ("--set", option))]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["ppcl", *map(str, arguments)])
        cli.main()
    assert not stop.value.code
    return folder / "run"


@pytest.mark.slow
def test_a_process_without_ppcl_loads_the_folder_and_the_file(run, tmp_path):
    folder = run / "pipeline"
    assert read_json(folder / "transformer" / "config.json")["ffn_dim"] == 16
    assert "nothing but diffusers is needed" in (folder / "README.md").read_text()
    torch.manual_seed(1)
    call = {
        "hidden_states": torch.randn(2, 4, 2, 4, 4),
        "timestep": torch.tensor([300.0, 800.0]),
        "encoder_hidden_states": torch.randn(2, 6, 32),
    }
    save_file(call, tmp_path / "call.safetensors")
    export_as(run, tmp_path / "wan.safetensors", "single-file")
    files = [tmp_path / name for name in ("wan.safetensors", "call.safetensors", "answers.safetensors")]
    done = subprocess.run([sys.executable, "-c", ALONE, folder, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    teacher = WanTransformer3DModel.from_pretrained(run.parent / "model" / "transformer")
    adapter = adapter_for(teacher)
    bundled = build_student(teacher, adapter, load_bundle(run / "bundle", teacher, adapter))
    with torch.no_grad():
        expected = bundled.eval()(**call, return_dict=False)[0]
    for answer in load_file(files[-1]).values():
        assert torch.allclose(answer, expected, atol=1e-5)
    predicted = json.loads((run / "plan.json").read_text())["predicted"]["params"]
    assert predicted == sum(p.numel() for p in bundled.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("plan.uniform_width=true", "fit.width=[modulation]"), "fit.width leaves out ffn; add it"),
        (("plan.uniform_width=true", "plan.mode=path"), "kept by plan.mode=optimal, got path"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(settings, message, run, ppcl):
    before = (run / "plan.json").read_bytes()
    code, _, err = ppcl("plan", run.parent / "model", "--out", run, *(p for s in settings for p in ("--set", s)))
    assert (code, message in err) == (2, True), err
    assert len(err.strip().splitlines()) == 1
    assert (run / "plan.json").read_bytes() == before


def test_a_family_without_a_number_for_it_is_refused_before_anything_is_captured(prompts_file, tmp_path, ppcl):
    torch.manual_seed(0)
    PIPELINES["flux"]().save_pretrained(tmp_path / "model")
    arguments = ["--prompts", prompts_file, "--set", "plan.uniform_width=true", "--set", "device=cpu"]
    code, _, err = ppcl("compress", tmp_path / "model", "--out", tmp_path / "run", *arguments)
    assert code == 2
    assert "config of FluxTransformer2DModel has no number for the width" in err
    assert "set plan.width=[] for depth alone" in err
    assert not (tmp_path / "run" / "calibration").exists()
