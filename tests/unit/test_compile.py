"""Training with compiled blocks is training; the compiler is a stand-in, so that nothing takes minutes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from train_worker import STAGES, new_distiller, weights, write_all_states

from ppcl.config import DistillConfig
from ppcl.distill import compiled
from ppcl.distill.compiled import BlockCompiler
from ppcl.distill.trainer import Distiller
from ppcl.training.distributed import SINGLE

MORE: dict[str, dict[str, Any]] = {
    **{name: STAGES[name] for name in ("local", "alternating", "all")},
    "lora": {"local_steps": 0, "output_steps": 2, "train": "lora", "lora_rank": 2},
    "checkpointing": {"local_steps": 0, "alternating_steps": 1, "output_steps": 2, "checkpointing": True},
}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What was compiled, by a compiler that runs graphs as they are."""
    seen: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, examples: Any) -> Any:
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", backend)
    return seen


def trained(folder: Path, name: str, **changes: Any) -> tuple[dict[str, torch.Tensor], Distiller]:
    """The weights of a stage."""
    distiller = new_distiller(folder, "all", SINGLE, **{"alternating_steps": 0, **MORE[name], **changes})
    distiller.run()
    return weights(distiller), distiller


def compare(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert max(float((first[k].float() - second[k].float()).abs().max()) for k in first) < 1e-5


# "checkpointing" has steps of both other kinds
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ("alternating", "lora") else ()) for n in MORE]
)
def test_compiled_blocks_learn_the_same(name: str, tmp_path: Path, graphs: list[torch.fx.GraphModule]) -> None:
    for folder in ("plain", "compiled"):
        write_all_states(tmp_path / folder)
    plain, _ = trained(tmp_path / "plain", name)
    assert not graphs
    found, distiller = trained(tmp_path / "compiled", name, compile=True)
    assert graphs
    compare(found, plain)
    names = {path.name for path in (tmp_path / "compiled" / "all" / "bundle").iterdir()}
    assert names == {path.name for path in (tmp_path / "plain" / "all" / "bundle").iterdir()}
    for module in (*distiller.transformer.modules(), *distiller.student.modules()):
        assert "forward" not in module.__dict__
    assert not any("_orig_mod" in key for key in distiller.student.state_dict())


@pytest.mark.slow
def test_alike_blocks_share_what_is_compiled(tmp_path: Path, graphs: list[torch.fx.GraphModule]) -> None:
    write_all_states(tmp_path)  # two shapes, with and without padding; teacher and substitutes
    trained(tmp_path, "local", compile=True, local_steps=12)
    many = len(graphs)
    trained(tmp_path, "local", compile=True, local_steps=18)
    # teacher and substitutes x (a lone state without a mask + padded batches of 4 and of 5, views or not), 30 steps
    assert len(graphs) == many <= 10


def test_a_compiled_run_goes_on_where_a_plain_one_was(tmp_path: Path, graphs: list[torch.fx.GraphModule]) -> None:
    for folder in ("whole", "parts"):
        write_all_states(tmp_path / folder)
    whole, _ = trained(tmp_path / "whole", "all", output_steps=3)

    class Enough(Exception):
        pass

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 2:
            raise Enough

    with pytest.raises(Enough):
        new_distiller(tmp_path / "parts", "all", SINGLE, stop).run()
    rows: list[int] = []
    resumed = new_distiller(tmp_path / "parts", "all", SINGLE, lambda row: rows.append(row["step"]), compile=True)
    resumed.run()
    assert rows == [2]
    assert graphs
    compare(weights(resumed), whole)


def test_offloaded_blocks_stay_as_they_are(tmp_path: Path, graphs: list[torch.fx.GraphModule]) -> None:
    for folder in ("plain", "compiled"):
        write_all_states(tmp_path / folder)
    plain, _ = trained(tmp_path / "plain", "local")
    found, _ = trained(tmp_path / "compiled", "local", compile=True, offload="cpu")
    assert graphs  # the substitutes
    compare(found, plain)


def test_without_a_compiler_training_goes_on_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(graph: Any, examples: Any) -> Any:
        raise RuntimeError("no C++ compiler found")

    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", broken)
    for folder in ("plain", "compiled"):
        write_all_states(tmp_path / folder)
    plain, _ = trained(tmp_path / "plain", "local")
    with caplog.at_level(logging.WARNING):
        found, _ = trained(tmp_path / "compiled", "local", compile=True)
    (line,) = [record.getMessage() for record in caplog.records if "distill.compile" in record.getMessage()]
    assert "blocks run uncompiled" in line and "no C++ compiler found" in line
    compare(found, plain)


def test_a_blocks_own_error_is_not_the_compilers(graphs: list[torch.fx.GraphModule]) -> None:
    class Wrong(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("mine")

    block = Wrong()
    compiler = BlockCompiler(True)
    with compiler.on([block, block]), pytest.raises(ValueError, match="mine"):
        block(torch.zeros(1))
    assert "forward" not in block.__dict__


def test_says_how_not_what() -> None:
    assert DistillConfig(compile=True).identity() == DistillConfig().identity()
