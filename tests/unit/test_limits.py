"""The smallest student that settings allow: bounds no plan beats, refused before anything is done."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from published import FLUX_DEV, QWEN_IMAGE, write_config
from tiny_models import tiny_flux, tiny_qwen

from ppcl.config import load_config
from ppcl.errors import BudgetError
from ppcl.inspection.blueprint import build_on_meta, example_call, flops_on_meta
from ppcl.inspection.limits import check_limits, limits_of
from ppcl.inspection.width import plans
from ppcl.modules.replacements import apply_width
from ppcl.pruning.planner import segments
from ppcl.student.prediction import predict
from ppcl.teacher.description import describe
from ppcl.teacher.families import adapter_for
from ppcl.teacher.flops import count_params

DEPTH = "fit.width=[]"


def limits(model, *changes, flops=None):
    info = describe(SimpleNamespace(transformer=model, components={}), flops)
    return limits_of(model, info, load_config([], list(changes)))


def published(config, *changes):
    model = build_on_meta(config)
    call = example_call(model, (16, 16))
    return limits(model, *changes, flops=flops_on_meta(model, call))


def test_depth_alone_leaves_protected_blocks_and_one():
    model = build_on_meta(QWEN_IMAGE)
    info = describe(SimpleNamespace(transformer=model, components={}))
    (stack,) = info.stacks
    last = predict(info, {stack.name: segments(stack, [(stack.name, 2, 56)], {})})
    found = published(QWEN_IMAGE, DEPTH, "plan.protect_first=2", "plan.protect_last=3")
    assert found.params == last.params
    assert found.param_ratio == pytest.approx(last.param_ratio)
    assert found.speedup == pytest.approx(60 / 6, rel=0.02)


def test_every_stack_keeps_a_block():
    found = published(FLUX_DEV, DEPTH, "plan.protect_first=0", "plan.protect_last=0")
    blocks = [adapter_for(m).blocks(m, spec)[0] for m in [build_on_meta(FLUX_DEV)] for spec in adapter_for(m).stacks]
    outside = 11.90e9 - 19 * count_params(blocks[0]) - 38 * count_params(blocks[1])
    assert found.params == pytest.approx(sum(map(count_params, blocks)) + outside, rel=0.1)


def test_smaller_modules_reach_further_and_their_speed_is_not_known():
    depth, both = published(QWEN_IMAGE, DEPTH), published(QWEN_IMAGE, "fit.width=[modulation,ffn]")
    assert both.params < depth.params
    assert both.speedup is None
    assert published(QWEN_IMAGE, "fit.width=[modulation,ffn]", "plan.width=[]").params == depth.params
    assert published(QWEN_IMAGE, "plan.mode=paper").params == depth.params


@pytest.mark.parametrize("build", [tiny_qwen, tiny_flux])
def test_no_example_of_smaller_modules_beats_the_bound(build):
    model = build()
    bound = limits(model, "fit.width=[modulation,ffn,attention,text]").params
    for _, _, parts in plans(model, adapter_for(model), rank=1):
        copied = build()
        apply_width(copied, parts)
        assert count_params(copied) >= bound


def test_protected_blocks_may_be_more_than_there_are():
    assert published({**QWEN_IMAGE, "num_layers": 2}, DEPTH, "plan.protect_first=5").param_ratio == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["plan.keep=0.01"], r"no plan gives 0.01 of the parameters: --keep 0\.0\d+ is as far"),
        (["plan.speedup=40", DEPTH], r"no plan gives 40 times as fast: --speedup 1\d\.\d+ is as far"),
        (["plan.fit_gb=0.5", DEPTH], r"no plan gives 0.5 GB of weights: --fit 3.48GB is as far"),
    ],
)
def test_what_is_out_of_reach_is_refused_with_what_is_not(changes, says):
    given = ["plan.protect_first=2", "plan.protect_last=2", *changes]
    with pytest.raises(BudgetError, match=says) as caught:
        check_limits(published(QWEN_IMAGE, *given), load_config([], given))
    assert "plan.protect_first=2, plan.protect_last=2" in str(caught.value)
    assert "\n" not in str(caught.value)
    option, value = str(caught.value).partition(": --")[2].split()[:2]
    key = {"keep": "keep", "speedup": "speedup", "fit": "fit_gb"}[option]
    given = [*given[:2], *changes[1:], f"plan.{key}={value.removesuffix('GB')}"]
    check_limits(published(QWEN_IMAGE, *given), load_config([], given))


@pytest.mark.parametrize("command", ["compress", "capture"])
def test_the_command_refuses_before_it_writes(tmp_path, ppcl, command):
    code, _, err = ppcl(command, "emoji", "--out", tmp_path / "run", "--keep", "0.01", "--set", "fit.width=[]")
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "no plan gives 0.01 of the parameters: --keep 0." in line
    assert "fit.width and plan.width without modulation, ffn, attention, text" in line
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_no_published_one_is_not_refused(tmp_path, ppcl):
    folder = write_config(tmp_path, {**QWEN_IMAGE, "_class_name": "Unknown"})
    code, _, err = ppcl("compress", folder, "--out", tmp_path / "run", "--keep", "0.01")
    assert code == 2
    assert "no plan gives" not in err
