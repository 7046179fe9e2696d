"""A sparse run through the real command: zeros in the exported weights, and what the files say of them."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from ppcl.config import load_config
from ppcl.pipelines.semi_structured import is_two_of_four
from ppcl.run import Run


def sparse_layers(transformer):
    """Linear layers inside blocks, modulation left out, by name."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("transformer_blocks") and "_mod." not in name
    }


@pytest.mark.slow
def test_zeros_reach_the_pipeline_and_its_papers(tiny_model, prompts_file, small_config, run_cli, tmp_path):
    sets = ["--set", "sparsity.pattern=2:4", "--set", "distill.train=substitutes"]
    out = tmp_path / "run"
    common = ["--out", out, "--config", small_config, "--prompts", prompts_file]
    code, err = run_cli("compress", tiny_model, *common, *sets)
    assert code == 0, err
    pipeline = DiffusionPipeline.from_pretrained(out / "pipeline")
    assert type(pipeline.transformer).__name__ == "QwenImageTransformer2DModel"
    layers = sparse_layers(pipeline.transformer)
    assert len(layers) == 12 * len(pipeline.transformer.transformer_blocks)
    assert all(is_two_of_four(layer.weight) for layer in layers.values())
    assert all((layer.weight != 0).float().mean() == pytest.approx(0.5, abs=0.02) for layer in layers.values())
    zeros = sum(int((layer.weight == 0).sum()) for layer in layers.values())
    share = zeros / sum(p.numel() for p in pipeline.transformer.parameters())

    found = json.loads((out / "eval" / "metrics.json").read_text())["models"][1]["zeros"]
    assert found["zeros"] == pytest.approx(share, rel=1e-2)
    assert found["pattern"] == "2:4"
    card = (out / "pipeline" / "README.md").read_text()
    assert f"{share:.1%} of all weights are zero" in card
    assert "to_semi_structured" in card
    page = (out / "report.html").read_text()
    assert "Weights that are zero" in page
    assert "(2:4)" in page
    how = json.loads((out / "bundle" / "bundle.json").read_text())
    assert how["distill"]["sparsity"]["pattern"] == "2:4"

    code, err = run_cli("export", out, "--keep", "1.0", "--out", tmp_path / "whole")  # the runs are taken out again
    assert code == 0, err
    whole = DiffusionPipeline.from_pretrained(tmp_path / "whole").transformer
    sparse = {name.split(".")[1] for name, layer in sparse_layers(whole).items() if is_two_of_four(layer.weight)}
    assert 0 < len(sparse) < len(whole.transformer_blocks) == 6

    def done(*overrides):
        config = load_config([small_config], ["distill.train=substitutes", *overrides])
        return [Run(str(tiny_model), out, config, prompts_file).is_done(stage) for stage in ("plan", "distill")]

    assert done("sparsity.pattern=2:4") == [True, True]
    assert done("sparsity.pattern=2:4", "sparsity.states=7") == [True, False]
    assert done() == [True, False]


def test_bad_sparsity_is_one_line_and_costs_nothing(refuses, common, tmp_path):
    out = tmp_path / "run"
    command = ("compress", *common, "--out", out, "--set")
    refuses(*command, "sparsity.criterion=wnda", says=("distill.sparsity.criterion", "did you mean 'wanda'"))
    assert not out.exists()


@pytest.mark.gpu
def test_two_of_four_runs_on_the_tensor_cores():
    from ppcl.pipelines import to_semi_structured

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs an NVIDIA GPU of compute capability 8.0")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda().half().eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.view(-1, 4)[:, 1::2] = 0
        x = torch.randn(3, 64, 256, device="cuda", dtype=torch.half)
        dense = model(x)
        assert to_semi_structured(model) == ["0", "2"]
        torch.testing.assert_close(model(x), dense, rtol=2e-2, atol=2e-2)
