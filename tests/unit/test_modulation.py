"""What modulation layers are given, and which rank is enough between the recorded timesteps."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import DUAL, SINGLE, describe_alone, flux_call, noise, qwen_call, tiny_flux, tiny_qwen, write_states
from torch import Tensor, nn

from ppcl.analysis.analyze import analyze
from ppcl.analysis.artifacts import Analysis
from ppcl.analysis.modulation import FIRST_SHARE, conditioning, timestep_argument, timesteps
from ppcl.capture.states import States
from ppcl.capture.trajectories import SPLITS
from ppcl.common.tensor_files import read_tensors
from ppcl.config import AnalyzeConfig
from ppcl.errors import ArtifactError
from ppcl.modules.replacements import InputStatistics, LowRankLinear, fill_low_rank
from ppcl.student.assembly import fill_width
from ppcl.teacher.blocks import ResidentBlocks
from ppcl.teacher.calls import Call
from ppcl.teacher.families import adapter_for

STEPS = 12  # of the schedule that is recorded


def schedule(steps: int) -> Tensor:
    return torch.linspace(1, 1 / steps, steps)


def smooth_qwen() -> Any:
    """A tiny Qwen-Image that has learnt to leave fast waves of the timestep out, as far as training goes."""
    transformer = tiny_qwen(2)
    embedder = transformer.time_text_embed.timestep_embedder
    waves = 1000 * torch.exp(-math.log(1e4) * torch.arange(128) / 128)  # turns per timestep, over 2 pi
    embedder.linear_1.weight.mul_(4 * torch.exp(-((waves / 12) ** 2)).repeat(2))
    return transformer


def record(folder: Path, call: Any, transformer: nn.Module) -> None:
    """Two training calls and a held-out one, of other prompts, on the recorded schedule."""
    for split, seeds in (("train", (0, 10)), ("held-out", (20,))):
        calls = [{**call(STEPS, seed=seed), "timestep": schedule(STEPS)} for seed in seeds]
        write_states(folder / "calibration", split, calls, transformer)


def analyzed(transformer: Any, folder: Path, call: Any) -> tuple[Analysis, dict[str, Tensor]]:
    record(folder, call, transformer)
    config = AnalyzeConfig(cka_tokens=16, batch_size=STEPS)
    model = describe_alone(transformer)
    found = analyze(ResidentBlocks(transformer), model, folder / "calibration", folder, config, 0)
    return found, read_tensors(folder / "analysis.safetensors")[0]


def inputs_of(transformer: nn.Module, layer: nn.Module, arguments: dict[str, Any]) -> Tensor:
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    transformer(**arguments)
    handle.remove()
    return seen[0]


def low_rank_error(layer: nn.Linear, rank: int, tensors: dict[str, Tensor], name: str, x: Tensor) -> float:
    """The relative error of a layer's varying output with the closed form of a rank, in float64."""
    made = LowRankLinear(layer.in_features, layer.out_features, rank).double()
    number = int(tensors[f"{name}/inputs"])
    statistics = InputStatistics(*(tensors[f"inputs/{number}/{part}"].double() for part in ("mean", "root")))
    fill_low_rank(made, layer.weight, layer.bias, statistics)
    wanted = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    return ((made(x.double()) - wanted).norm() / (wanted - wanted.mean(0)).norm()).item()


@pytest.mark.parametrize("tolerance", [0.1, 0.03, 0.01])
def test_a_rank_within_the_tolerance_is_so_at_any_number_of_steps(tolerance: float, tmp_path: Path) -> None:
    transformer = smooth_qwen()
    analysis, tensors = analyzed(transformer, tmp_path, qwen_call)
    points = {str(steps): schedule(steps) for steps in (8, 12, 20, 50)}
    points["random"] = torch.rand(200, generator=torch.Generator().manual_seed(3))
    for stream, path in (("image", "img_mod.1"), ("text", "txt_mod.1")):
        for index, block in enumerate(transformer.transformer_blocks):
            layer = block.get_submodule(path)
            missed = analysis.stacks[0].modulation_residual[stream][index]
            rank = next(r for r, share in enumerate(missed) if share <= tolerance)
            assert rank <= 14  # of 32 features: the curve is smooth, so few directions occur
            for where, values in points.items():
                x = inputs_of(transformer, layer, {**qwen_call(len(values)), "timestep": values})
                error = low_rank_error(layer, max(1, rank), tensors, f"{DUAL}/{index}/modulation.{stream}", x)
                assert error <= 1.2 * tolerance, (where, rank)


def test_a_text_that_was_not_fitted_says_whether_a_rank_is_enough(tmp_path: Path) -> None:
    """FLUX adds a pooled text: what is said of a rank holds for prompts and timesteps that were held out."""
    transformer = tiny_flux(2, 2)
    analysis, tensors = analyzed(transformer, tmp_path, flux_call)
    call = {**flux_call(STEPS, seed=20), "timestep": schedule(STEPS) - 0.04}
    for stack, (name, path) in zip(analysis.stacks, ((DUAL, "norm1.linear"), (SINGLE, "norm.linear")), strict=True):
        layer = getattr(transformer, name)[1].get_submodule(path)
        x = inputs_of(transformer, layer, call)
        for rank in (4, 12, 24):
            error = low_rank_error(layer, rank, tensors, f"{name}/1/modulation.image", x)
            assert error == pytest.approx(stack.modulation_residual["image"][1][rank], rel=0.25)
            assert error > 0.05


def test_no_block_runs_to_its_end(tmp_path: Path) -> None:
    """But once, to see which layers are given the same."""
    transformer = tiny_flux(2, 2)
    record(tmp_path, flux_call, transformer)
    ended = []
    transformer.transformer_blocks[0].attn.register_forward_hook(lambda *_: ended.append(1))
    splits = {split: States(tmp_path / "calibration", split) for split in SPLITS}
    found = conditioning(transformer, adapter_for(transformer), splits, STEPS, 0)
    assert len(ended) == 1
    assert len(found) == 2 * 2 + 2
    assert len({id(entry) for entry in found.values()}) == 1  # all layers are given the same
    hooks = [module._forward_pre_hooks for module in transformer.modules()]
    assert not any(hooks)


def test_a_layer_that_reads_what_blocks_made_has_no_low_rank(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer = tiny_qwen(2)
    block = transformer.transformer_blocks[1]

    def scaled(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "temb": kwargs["temb"] * kwargs["hidden_states"].mean((1, 2))[:, None]}

    block.register_forward_pre_hook(scaled, with_kwargs=True)
    record(tmp_path, qwen_call, transformer)
    splits = {split: States(tmp_path / "calibration", split) for split in SPLITS}
    with caplog.at_level(logging.WARNING):
        found = conditioning(transformer, adapter_for(transformer), splits, STEPS, 0)
    assert set(found) == {(DUAL, 0, "image"), (DUAL, 0, "text")}
    assert f"{DUAL}.1: the modulation of the image depends on the blocks before" in caplog.text


def recorded(**arguments: Any) -> list[Call]:
    """Two calls of three samples: their numbers by argument and call."""
    calls = [{name: torch.tensor(values[i]) for name, values in arguments.items()} for i in (0, 1)]
    return [Call({"hidden_states": noise(3, 6, 16), **call}, torch.zeros(3, 1)) for call in calls]


def test_the_timestep_is_the_number_that_varies() -> None:
    times, guidance = [[0.5] * 3, [1.0] * 3], [[3.5] * 3] * 2
    assert timestep_argument(recorded(guidance=guidance, t=times)) == "t"
    assert timestep_argument(recorded(guidance=guidance, t=[[1.0] * 3] * 2)) is None
    assert timestep_argument(recorded(t=times, until=times)) is None


def test_recorded_calls_alone_where_there_is_one_timestep(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    transformer = tiny_flux(2, 2)
    for split, seed in (("train", 0), ("held-out", 20)):
        call = {**flux_call(6, seed=seed), "timestep": torch.ones(6)}
        write_states(tmp_path, split, [call], transformer)
    with caplog.at_level(logging.WARNING):
        splits = {split: States(tmp_path, split) for split in SPLITS}
        found = conditioning(transformer, adapter_for(transformer), splits, 6, 0)
    entry = found[DUAL, 0, "image"]
    assert "of one timestep" in caplog.text
    assert entry.fitted.root.shape[1] <= 5  # of 6 texts, and as many others judge
    assert len(entry.judges) == 1
    assert entry.missed(transformer.transformer_blocks[0].norm1.linear.weight)[-1] > 0.1


def test_timesteps_cover_the_range_and_what_occurs() -> None:
    """Of 1,600: 100 where every schedule begins, 750 evenly, 750 with a third in each stretch between the recorded."""
    seen = torch.tensor([1.0, 0.9, 1.0, 0.9])
    drawn = timesteps(seen, 1600, torch.Generator().manual_seed(0))
    assert FIRST_SHARE == 1 / 16
    assert int((drawn == 1).sum()) == 100
    assert int((drawn >= 0.9).sum()) == pytest.approx(100 + 75 + 375, abs=2)
    assert drawn.min() < 0.002
    assert torch.equal(drawn, timesteps(seen, 1600, torch.Generator().manual_seed(0)))
    whole = timesteps(torch.tensor([951, 1]), 1600, torch.Generator().manual_seed(0))
    assert whole.dtype == torch.int64
    assert 990 < whole.max() < 1000


def test_an_analysis_of_another_version_is_refused_in_one_line(tmp_path: Path) -> None:
    transformer = smooth_qwen()
    _, tensors = analyzed(transformer, tmp_path, qwen_call)
    spec, original = ResidentBlocks(transformer).stacks[DUAL], transformer.transformer_blocks[0]
    path = spec.modulation["image"]
    block, parts = copy.deepcopy(original), {path: {"kind": "low_rank", "size": 2}}
    old = original.get_submodule(path)
    owner, _, last = path.rpartition(".")
    block.get_submodule(owner)._modules[last] = LowRankLinear(old.in_features, old.out_features, 2)
    fill_width(block, original, spec, 0, parts, tensors)
    del tensors[f"{DUAL}/0/modulation.image/inputs"]
    with pytest.raises(ArtifactError, match=r"another version of ppcl wrote it.*run the analyze stage again"):
        fill_width(block, original, spec, 0, parts, tensors)
