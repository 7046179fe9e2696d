"""The code of docs/extending.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_criteria import setting
from test_search_path import tiny_context
from tiny_models import qwen_call, tiny_qwen

from ppcl.config import PlanConfig, load_config
from ppcl.errors import ConfigError
from ppcl.pruning.allocations import Class, shares_by
from ppcl.pruning.criteria import CRITERIA, unit_scores
from ppcl.pruning.searches import SEARCHES, choose

DOC = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```python\n# (my_\w+\.py)\n(.*?)```", DOC, re.DOTALL))
CLASSES = {"ffn": Class(100.0, 0.75), "attention": Class(60.0, 0.5, 2.0), "none": Class(0.0, 0.0)}


def written(folder: Path, file: str, name: str) -> str:
    (folder / file).write_text(BLOCKS[file])
    return f"{folder / file}:{name}"


def test_every_block_is_used_here_and_short() -> None:
    assert set(BLOCKS) == {"my_search.py", "my_greedy.py", "my_allocation.py", "my_criterion.py", "my_weights.py"}
    assert all(len(block.splitlines()) <= 30 for block in BLOCKS.values())


def test_the_table_of_searches_is_complete() -> None:
    assert re.findall(r"^\| `(\w+)` \|", DOC, re.MULTILINE) == list(SEARCHES)


@pytest.mark.parametrize(("file", "name"), [("my_search.py", "Alternate"), ("my_greedy.py", "Greedy")])
def test_the_searches(file: str, name: str, tmp_path: Path) -> None:
    search = written(tmp_path, file, name)
    assert load_config([], [f"plan.mode={search}"]).plan.mode == search
    context = tiny_context(tiny_qwen(7), qwen_call, tmp_path, keep=0.7)
    found = choose(search, context)
    assert found.predicted.param_ratio <= 0.7
    if name == "Alternate":
        gone = {i for _, s in found.runs for i in range(s.first + 1, s.last + 1)}
        assert gone == {2, 3, 4}  # 2 and 4 first
    else:
        assert found.teacher_forwards == 4 * 4


def test_the_greedy_search_finds_the_block_that_does_nothing(tmp_path: Path) -> None:
    transformer = tiny_qwen(6)
    block = transformer.transformer_blocks[3]
    with torch.no_grad():
        for layer in (block.attn.to_out[0], block.attn.to_add_out, block.img_mlp.net[2], block.txt_mlp.net[2]):
            layer.weight.zero_()
            layer.bias.zero_()
    context = tiny_context(transformer, qwen_call, tmp_path, keep=0.9)
    found = choose(written(tmp_path, "my_greedy.py", "Greedy"), context)
    assert [(s.first, s.last) for _, s in found.runs] == [(2, 3)]


def test_the_allocation(tmp_path: Path) -> None:
    name = written(tmp_path, "my_allocation.py", "largest_first")
    assert PlanConfig(mode="allocation", allocation=name).allocation == name
    assert shares_by(name, CLASSES, 80.0) == {"ffn": 0.75, "attention": pytest.approx(5 / 60), "none": 0.0}
    changed = PlanConfig(mode="allocation", allocation=name).identity()
    (tmp_path / "my_allocation.py").write_text(BLOCKS["my_allocation.py"] + "\n")
    assert PlanConfig(mode="allocation", allocation=name).identity() != changed
    assert "allocation" not in PlanConfig(allocation=name).identity()


def test_the_names_of_allocations() -> None:
    with pytest.raises(ConfigError, match=r"unknown allocation \(did you mean 'uniform'"):
        load_config([], ["plan.allocation=uniforms"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{}", "got {}, expected a share for each of ffn, attention, none"),
        ("dict.fromkeys(classes, 0.8)", r"got a share of 0.8 of ffn, expected 0 to 0.75"),
        ("dict.fromkeys(classes, float('nan'))", r"got a share of nan of ffn, expected 0 to 0.75"),
    ],
)
def test_what_is_wrong_with_an_allocation_is_one_line(body: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(f"def own(classes, amount):\n    return {body}\n")
    with pytest.raises(ConfigError, match=message):
        shares_by(f"{tmp_path / 'own.py'}:own", CLASSES, 80.0)


def test_the_criterion(tmp_path: Path) -> None:
    transformer, adapter, sites, call = setting()
    name = written(tmp_path, "my_criterion.py", "Spread")
    found = unit_scores(name, transformer, adapter, sites, [call], 0)
    assert [len(score) for score in found] == [2, 128]
    assert all((score > 0).all() for score in found)
    seen: dict[str, Any] = {}
    layer = sites[1].module(transformer, adapter).net[2]
    handle = layer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].flatten(0, 1)))
    transformer(**call)
    handle.remove()
    wanted = seen["x"].std(0) * layer.weight.norm(dim=0)
    torch.testing.assert_close(found[1].float(), wanted.detach(), rtol=1e-4, atol=1e-6)
    assert "bip" in CRITERIA
