"""The paper's ablation: plans by plain CKA, width beside fixed depth, and the whole table on the tiny pipeline."""

import json

import pytest
import torch
from tiny_models import DUAL, describe_alone, qwen_call, tiny_qwen

from ppcl.analysis.cka import linear_cka
from ppcl.common.artifacts import save_artifact
from ppcl.common.tensor_files import write_tensors
from ppcl.config import PlanConfig, load_config
from ppcl.errors import UserError
from ppcl.experiments.ablation import NEEDED, ablate, ablation_rows, state_cka, threshold_ladder
from ppcl.experiments.baselines import run_keys
from ppcl.pruning.artifacts import VECTORS, Candidates
from ppcl.run import Run
from ppcl.teacher.families import adapter_for
from ppcl.teacher.trace import record_boundaries

SETTINGS = [f"fit.width=[{','.join(NEEDED)}]", "fit.max_candidates=12", "plan.keep=0.6", "evaluate.teacher_seeds=1"]


def test_plain_cka_compares_what_enters_with_what_leaves():
    teacher, call = tiny_qwen(4), qwen_call(6)
    adapter = adapter_for(teacher)
    table = state_cka(teacher, adapter, [call])[DUAL]
    calls, _ = record_boundaries(teacher, adapter, call)
    first, last = calls[DUAL, 1].inputs, calls[DUAL, 2].outputs
    by_hand = {s: linear_cka(first[s].flatten(0, 1), last[s].flatten(0, 1)) for s in first}
    sizes = {s: state.shape[1] for s, state in first.items()}
    expected = sum(sizes[s] * by_hand[s] for s in sizes) / sum(sizes.values())
    assert table[1][2] == pytest.approx(expected, rel=1e-4)
    assert table[2][1] == 0


def test_a_stricter_threshold_makes_shorter_runs():
    model = describe_alone(tiny_qwen(6))
    alike = [[1 - 0.1 * (k - u) if k >= u else 0.0 for k in range(6)] for u in range(6)]
    ladder = threshold_ladder(model, {DUAL: alike}, PlanConfig(keep=0.5, protect_first=1, protect_last=1))
    assert ladder[0] == ()
    assert ((DUAL, 1, 2), (DUAL, 3, 4)) in ladder  # pairs reach 0.9, and the ends are protected
    assert ladder[-1] == ((DUAL, 1, 4),)


@pytest.mark.slow
def test_the_whole_table(tiny_model, prompts_file, small_config, tmp_path):
    run = Run(str(tiny_model), tmp_path / "run", load_config([small_config], SETTINGS), prompts_file, "ppcl ablate")
    run.through("fit")
    text = ablate(run, tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text() == text
    rows = ablation_rows(run)
    data = json.loads((run.out / "compare" / "ablation.json").read_text())["rows"]
    assert list(data) == [row.name for row in rows]
    total = run.config.distill.local_steps + run.config.distill.output_steps
    for row in rows:
        log = run.out / "compare" / row.name / "seed-0" / "log.jsonl"
        assert len(log.read_text().splitlines()) == total
        assert f"| {row.label} |" in text
    plans = [row.plan for row in rows]
    assert run_keys(plans[1]) == run_keys(plans[2]) == run_keys(plans[3]) == run_keys(plans[4])  # the depth stays
    kinds = [{p["kind"] for s in plan.stacks[DUAL] for p in s.width.values()} for plan in plans]
    assert not kinds[2]
    assert "low_rank" not in kinds[4]
    assert "low_rank" in kinds[5]
    params = [data[row.name]["seeds"][0]["params"] for row in rows]
    assert params[2] > params[3] > params[4]
    assert params[5] == params[6] == params[7]
    assert [row.settings.sequence for row in rows[:3]] == ["sequential", "sequential", "non-sequential"]
    assert text.count("velocity error ") >= len(rows) - 1


def test_width_must_have_been_measured(tiny_model, prompts_file, small_config, tmp_path):
    run = Run(str(tiny_model), tmp_path / "run", load_config([small_config], ["fit.width=[]"]), prompts_file, "x")
    for stage in ("capture", "analyze"):
        run.run(stage)
    save_artifact(Candidates((), 0, 0.0), run.out / "candidates.json")
    write_tensors(run.out / VECTORS, {"none": torch.zeros(1, 1)})
    with pytest.raises(UserError, match=r"not measured: text, ffn, modulation; run it with --set fit.width="):
        ablation_rows(run)


def test_states_may_be_few():
    torch.manual_seed(0)
    table = state_cka(tiny_qwen(2), adapter_for(tiny_qwen(2)), [qwen_call(2)], tokens=4)
    assert all(0 <= abs(v) <= 1.5 for row in table[DUAL] for v in row)
