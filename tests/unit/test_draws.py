"""Best of several calibration draws, and what criteria say they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from test_criteria import setting
from tiny_models import cut_parts, noise, qwen_call, tiny_qwen, write_states

from ppcl.capture.states import States
from ppcl.config import FitConfig
from ppcl.errors import ConfigError
from ppcl.modules.replacements import set_module
from ppcl.modules.slicing import masked
from ppcl.pruning.criteria import CRITERIA, unit_cost
from ppcl.pruning.criteria.base import BACKWARD
from ppcl.pruning.criteria.bip import EPOCHS
from ppcl.pruning.criteria.draws import best_draw, cut_error, draw_states
from ppcl.pruning.fewer_units import criterion_cost, scores_of_all
from ppcl.pruning.unit_search import CutSite
from ppcl.teacher.call_arguments import batch_size
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import adapter_for


def test_the_error_is_that_of_a_transformer_without_those_units() -> None:
    transformer, adapter, sites, call = setting()
    scores = [noise(site.units.count, seed=i) for i, site in enumerate(sites)]
    found = cut_error(transformer, adapter, sites, scores, 0.5, [call])
    with torch.no_grad():
        before = velocity(transformer, call)
        twin = tiny_qwen(2)
        for site, score in zip(sites, scores, strict=True):
            kept = sorted(torch.argsort(score, descending=True)[: site.units.count // 2].tolist())
            block = twin.transformer_blocks[site.block]
            set_module(block, site.path, masked(block.get_submodule(site.path), site.units.part(kept)))
        after = velocity(twin, call)
        assert torch.equal(velocity(transformer, call), before)  # hooks are gone
    assert found == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
    assert cut_error(transformer, adapter, sites, scores, 1.0, [call]) == 0


def test_the_draw_of_least_error_is_kept() -> None:
    sets: list[Any] = [[{"draw": i}] for i in range(4)]
    errors = {0: 0.3, 1: float("nan"), 2: 0.1, 3: 0.1}
    asked = []

    def error(scores: list[torch.Tensor]) -> float:
        asked.append(int(scores[0]))
        return errors[int(scores[0])]

    def score(states: Any) -> list[torch.Tensor]:
        return [torch.tensor(states[0]["draw"])]

    assert int(best_draw(score, error, sets)[0]) == 2  # of equals the first
    assert asked == [0, 1, 2, 3]
    assert int(best_draw(score, error, sets[3:])[0]) == 3
    assert asked == [0, 1, 2, 3]  # one draw is not measured


def test_draws_are_sets_of_one_size_and_the_first_is_the_even_one(tmp_path: Path) -> None:
    write_states(tmp_path, "train", [qwen_call(4, seed=s) for s in range(3)])
    train = States(tmp_path, "train")
    sets, again, other = (draw_states(train, 3, 4, 8, seed) for seed in (0, 0, 1))
    key = "hidden_states"
    evenly = torch.cat([b[key] for b in train.batches(4, 8)])
    assert torch.equal(torch.cat([b[key] for b in sets[0]]), evenly)
    assert {sum(map(batch_size, drawn)) for drawn in sets} == {8}
    flat = [[torch.cat([b[key] for b in drawn]) for drawn in made] for made in (sets, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(flat[0], flat[1], strict=True))
    assert not torch.equal(flat[0][1], flat[2][1])
    assert not torch.equal(flat[0][1], flat[0][2])


def test_units_are_chosen_by_the_best_draw(tmp_path: Path) -> None:
    transformer, adapter, sites, _ = setting()
    held_out = [qwen_call(seed=9)]
    sets = [[qwen_call(seed=s)] for s in (1, 2, 3)]
    settings = FitConfig(criterion="nirvana", width=("ffn",), width_shares=(0.5,), criterion_draws=3)
    site = sites[1]
    errors = []
    for states in sets:
        scores = CRITERIA["nirvana"].score(transformer, adapter, [site], states, 0)
        errors.append(cut_error(transformer, adapter, [site], scores, 0.5, held_out))
    best = min(range(3), key=errors.__getitem__)
    (alone,) = cut_parts(transformer, site, [sets[best]], settings, tmp_path / "alone")
    (found,) = cut_parts(transformer, site, sets, settings, tmp_path / "all", held_out)
    assert len(set(errors)) == 3
    assert found["kept"] == alone["kept"]


def test_each_says_what_it_costs_before_it_starts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    costs = {name: criterion.cost for name, criterion in CRITERIA.items()}
    assert costs == {
        **dict.fromkeys(("magnitude", "random"), 0),
        **dict.fromkeys(("activation", "wanda"), 1),
        **dict.fromkeys(("gblm", "nirvana", "taylor"), BACKWARD),
        "bip": 1 + EPOCHS * 2 * BACKWARD,
    }
    sets = [[qwen_call(4)], [qwen_call(4)]]
    assert criterion_cost(FitConfig(criterion="wanda"), sets[:1], [qwen_call(3)]) == 4
    assert criterion_cost(FitConfig(criterion="wanda"), sets, [qwen_call(3)]) == 2 * 4 + 2 * 2 * 3
    assert "criterion wanda, 2 draws of 4 states: 20 runs of the teacher" in capsys.readouterr().err
    path = tmp_path / "own.py"
    path.write_text("class Own:\n    def score(self, transformer, adapter, sites, batches, seed): ...\n")
    assert unit_cost(f"{path}:Own", 4) is None
    assert criterion_cost(FitConfig(criterion=f"{path}:Own"), sets, []) is None
    assert "it does not say what it costs" in capsys.readouterr().err


def test_forward_passes_are_as_many_as_were_said() -> None:
    transformer, adapter, sites, call = setting()
    calls = []
    handle = transformer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(1), with_kwargs=True)
    for name, criterion in CRITERIA.items():
        calls.clear()
        criterion.score(transformer, adapter, sites, [call, call], 0)
        each = 1 + EPOCHS * 2 if name == "bip" else min(1, criterion.cost)
        assert len(calls) == 2 * each, name
    handle.remove()
    assert adapter == adapter_for(transformer)


@pytest.mark.parametrize(("criterion", "draws"), [("magnitude", 1), ("wanda", 1), ("taylor", 1), ("activation", 2)])
def test_streamed_blocks_are_not_scored_by_what_asks_for_all_of_them(criterion: str, draws: int) -> None:
    """Weights that are still in files would be scored as they stand in memory: not at all."""
    _, _, sites, call = setting()
    settings = FitConfig(criterion=criterion, criterion_draws=draws)
    with pytest.raises(ConfigError, match=f"fit.criterion={criterion} .* blocks=resident"):
        scores_of_all(cast("Any", object()), [CutSite("ffn", (sites[1],))], [[call]] * draws, settings, 0)
