"""Sparse students: zeros where the masks say, through training, files, sizes and export."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import DUAL, SINGLE, flux_call, plan_for, qwen_call, tiny_flux, tiny_qwen, write_states

from ppcl.common.tensor_files import read_tensors
from ppcl.config import DistillConfig, load_config
from ppcl.config.sparsity import SparsityConfig
from ppcl.distill.trainer import Distiller
from ppcl.errors import ArtifactError, ConfigError, ModelError
from ppcl.pruning.selection import select_bundle
from ppcl.pruning.sparsity import sparse_layers, sparse_plan, zeros_of
from ppcl.student.bundle import build_student, load_bundle
from ppcl.student.masks import Masks, pack_masks, unpack_masks
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import adapter_for

QWEN_RUN = [(DUAL, 1, 2)]


def settings(train: str = "all", steps: tuple[int, int, int] = (2, 2, 3), **sparsity: Any) -> DistillConfig:
    return DistillConfig(
        keep_start=False, local_steps=steps[0], alternating_steps=steps[1], output_steps=steps[2], batch_size=4,
        from_fit=False, train=train, checkpoint_every=1, warmup_steps=1, weight_decay=0.1, ema_decay=0.5,
        output_learning_rate=1e-2, local_learning_rate=1e-2,
        sparsity=SparsityConfig(**{"batch_size": 3, "states": 6, **sparsity}),
    )  # fmt: skip


def distiller(
    out: Path,
    chosen: DistillConfig,
    transformer: Any = None,
    runs: Any = None,
    call: Any = None,
    precision: str = "fp32",
) -> Any:
    transformer = transformer or tiny_qwen(4)
    call = call or qwen_call
    if not (out / "calibration").is_dir():
        write_states(out / "calibration", "train", [call(seed=s) for s in (1, 2)], transformer)
    plan = plan_for(transformer, QWEN_RUN if runs is None else runs)
    return Distiller(transformer, adapter_for(transformer), plan, out / "calibration", out, chosen, 0, precision)


def zeros_in(student: Any, masks: dict[str, torch.Tensor], plan: Any) -> list[torch.Tensor]:
    """The masked weights of a built student that should be zero, layer by layer."""
    found = []
    for name, mask in masks.items():
        stack, run, path = name.split("/")
        position = [f"{s.first}-{s.last}" for s in plan.stacks[stack]].index(run)
        block = getattr(student, stack)[position]
        found.append(block.get_parameter(path)[~mask])
    return found


@pytest.mark.parametrize("train", ["all", "substitutes"])
def test_zeros_stay_through_all_stages_files_and_export(train: str, tmp_path: Path) -> None:
    made = distiller(tmp_path, settings(train, share=0.5))
    before = {name: value.clone() for name, value in made.transformer.state_dict().items()}
    start = copy.deepcopy(made.substitutes[DUAL, 0, 0].state_dict())
    bundle = made.run()
    assert all(torch.equal(before[name], value) for name, value in made.transformer.state_dict().items())
    assert set(bundle.substitutes) == {(DUAL, 0, 0), (DUAL, 1, 2), (DUAL, 3, 3)}  # every block has zeros
    assert not any("mod" in name for name in bundle.masks)
    after = bundle.substitutes[DUAL, 0, 0].state_dict()
    trained = "attn.to_q.weight"
    assert not torch.equal(start[trained], after[trained])
    name = f"{DUAL}/0-0/{trained}"
    assert torch.equal(start[trained] == 0, after[trained] == 0)  # what is trained is what stays
    assert bundle.masks[name].sum(1).tolist() == [16] * 32
    for kind in ("local", "alternating", "output"):
        state = read_tensors(next((tmp_path / "checkpoints" / f"distill-{kind}").glob("*/*.safetensors")))[0]
        whole = train == "all" and kind == "output"
        key = f"student.{DUAL}.0.{trained}" if whole else f"{DUAL}/0-0.{trained}"
        for slot in ("model", "ema", "optimizer/exp_avg", "optimizer/exp_avg_sq"):
            assert (state[f"{slot}/{key}"][~bundle.masks[name]] == 0).all(), (kind, slot)

    adapter = adapter_for(made.transformer)
    loaded = load_bundle(tmp_path / "bundle", made.transformer, adapter)
    assert loaded.masks.keys() == bundle.masks.keys()
    assert all(torch.equal(loaded.masks[n], m) for n, m in bundle.masks.items())
    student = build_student(made.transformer, adapter, loaded, torch.bfloat16)
    assert all((part == 0).all() for part in zeros_in(student, loaded.masks, loaded.plan))
    student.save_pretrained(tmp_path / "student")
    again = type(student).from_pretrained(tmp_path / "student", dtype=torch.bfloat16)
    assert type(again) is type(made.transformer)  # stock: nothing of ours is needed
    record = zeros_of(again)
    assert record["pattern"] == "unstructured"
    assert record["zeros"] == pytest.approx(loaded.plan.sparsity["zeros"], rel=1e-3)
    assert loaded.plan.sparsity["zeros_in_layers"] == pytest.approx(0.5)
    assert zeros_of(made.transformer) == {}
    with torch.no_grad():
        assert torch.isfinite(velocity(again.float(), qwen_call())).all()


def test_a_killed_distillation_goes_on_with_the_masks_it_began_with(tmp_path: Path) -> None:
    chosen = settings("substitutes", share=0.5, criterion="gblm", allocation="ecoflap")
    whole = distiller(tmp_path / "a", chosen).run()
    first = distiller(tmp_path / "b", chosen)
    first._local()
    # another run's masks would be made anew; those of this one are read, whatever scores would say now
    path = tmp_path / "b" / "checkpoints" / "distill-masks" / "masks.safetensors"
    made = path.stat().st_mtime_ns
    again = distiller(tmp_path / "b", chosen).run()
    assert path.stat().st_mtime_ns == made
    assert all(torch.equal(again.masks[name], mask) for name, mask in whole.masks.items())
    for key, block in whole.substitutes.items():
        other = again.substitutes[key].state_dict()
        assert all(torch.equal(value, other[name]) for name, value in block.state_dict().items())
    distiller(tmp_path / "b", settings("substitutes", share=0.25))
    assert path.stat().st_mtime_ns != made


def test_ecoflap_gives_blocks_their_own_shares_and_the_whole_its_share(tmp_path: Path) -> None:
    teacher = tiny_qwen(4)
    with torch.no_grad():
        for parameter in teacher.transformer_blocks[3].parameters():
            parameter.mul_(0.01)  # a block that hardly matters
    made = distiller(tmp_path, settings(share=0.5, allocation="ecoflap"), teacher, [])
    found = [segment.sparsity for segment in made.plan.stacks[DUAL]]
    assert sum(found) / 4 == pytest.approx(0.5, abs=0.02)  # rows are rounded to whole weights
    assert max(found) <= 0.62
    assert len({round(value, 3) for value in found}) > 1


def test_a_smaller_size_keeps_its_zeros(tmp_path: Path) -> None:
    made = distiller(tmp_path, settings("substitutes", (1, 0, 0), pattern="2:4"))
    made.run()
    adapter = adapter_for(made.transformer)
    loaded = load_bundle(tmp_path / "bundle", made.transformer, adapter)
    chosen = select_bundle(loaded, "keep", 1.0)  # without the run
    assert set(chosen.substitutes) == {(DUAL, 0, 0), (DUAL, 3, 3)}
    assert [bool(s.sparsity) for s in chosen.plan.stacks[DUAL]] == [True, False, False, True]
    student = build_student(made.transformer, adapter, chosen)
    assert all((part == 0).all() for part in zeros_in(student, chosen.masks, chosen.plan))
    assert {name.split("/")[1] for name in chosen.masks} == {"0-0", "3-3"}
    assert chosen.plan.sparsity["zeros"] < loaded.plan.sparsity["zeros"]
    for _, module in student.transformer_blocks[0].attn.named_modules():
        if isinstance(module, torch.nn.Linear):
            groups = (module.weight == 0).reshape(len(module.weight), -1, 4).sum(-1)
            assert (groups >= 2).all()


def test_both_lists_of_flux_and_smaller_modules_are_left_alone(tmp_path: Path) -> None:
    teacher = tiny_flux()
    made = distiller(tmp_path, settings(steps=(1, 0, 1), share=0.5, criterion="taylor"), teacher, [], flux_call)
    bundle = made.run()
    assert {name.split("/")[0] for name in bundle.masks} == {DUAL, SINGLE}
    assert not any("norm" in name for name in bundle.masks)
    student = build_student(teacher, adapter_for(teacher), bundle)
    assert all((part == 0).all() for part in zeros_in(student, bundle.masks, bundle.plan))


def test_a_teacher_in_half_precision_is_scored_and_judged_under_autocast(tmp_path: Path) -> None:
    write_states(tmp_path / "calibration", "train", [qwen_call(seed=1)], tiny_qwen(4))
    write_states(tmp_path / "calibration", "held-out", [qwen_call(seed=2)], tiny_qwen(4))
    chosen = settings(steps=(1, 0, 1), share=0.5, criterion="gblm", allocation="ecoflap")
    chosen = chosen.model_copy(update={"keep_start": True})
    made = distiller(tmp_path, chosen, tiny_qwen(4).bfloat16(), None, None, "bf16")
    bundle = made.run()
    student = build_student(made.transformer, adapter_for(made.transformer), bundle)
    assert student.dtype == torch.bfloat16
    assert all((part == 0).all() for part in zeros_in(student, bundle.masks, bundle.plan))


def test_off_changes_nothing(tmp_path: Path) -> None:
    made = distiller(tmp_path, settings(steps=(1, 0, 0)))
    assert made.plan == plan_for(made.transformer, QWEN_RUN)
    assert not made.masks.masks
    assert not (tmp_path / "checkpoints" / "distill-masks").exists()
    assert "sparsity" not in DistillConfig().identity()
    assert DistillConfig(sparsity=SparsityConfig(share=0.5)).identity()["sparsity"]["share"] == 0.5
    assert "sparsity" not in build_student(made.transformer, adapter_for(made.transformer), made.run()).config["_ppcl"]


def test_masks_are_bits_on_disk() -> None:
    block = torch.nn.Module()
    block.fc = torch.nn.Linear(13, 5)
    blocks = {("s", 0, 0): block}
    mask = torch.rand(5, 13, generator=torch.Generator().manual_seed(0)) > 0.5
    packed = pack_masks({"s/0-0/fc.weight": mask})
    assert packed["s/0-0/fc.weight"].shape == (5, 2)
    assert packed["s/0-0/fc.weight"].dtype == torch.uint8
    assert torch.equal(unpack_masks(packed, blocks)["s/0-0/fc.weight"], mask)
    for name in ("s/0-0/other.weight", "s/1-1/fc.weight"):
        with pytest.raises(ArtifactError, match="does not belong"):
            unpack_masks({name: packed["s/0-0/fc.weight"]}, blocks)
        with pytest.raises(ArtifactError, match="is of no weight"):
            Masks({name: mask}, blocks)
    with pytest.raises(ArtifactError, match=r"its weight \(5, 13\)"):
        Masks({"s/0-0/fc.weight": mask[:, :4]}, blocks)


def test_a_pattern_that_fits_no_layer_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ModelError, match=r"fits no layer of QwenImage.*rows of \d+ weights do not divide.*2:5"):
        distiller(tmp_path, settings(pattern="2:5"))
    teacher, chosen = tiny_qwen(2), SparsityConfig(pattern="16:64")
    plan = sparse_plan(plan_for(teacher, []), chosen)
    blocks = {(DUAL, i, i): block for i, block in enumerate(teacher.transformer_blocks)}
    found = sparse_layers(plan, adapter_for(teacher), blocks, chosen)
    assert {layer.module.in_features for layer in found} == {128}  # of 32 and 128
    assert "stay dense: rows of 32" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sparsity.criterion=wandda"], "did you mean 'wanda'"),
        (["sparsity.patern=2:4"], "unknown key 'distill.sparsity.patern' .did you mean 'pattern'"),
        (["sparsity.pattern=4:2"], "n:m with 0 < n < m"),
        (["sparsity.share=1"], "less than 1"),
        (["sparsity.pattern=2:4", "sparsity.share=0.6"], "makes 0.5 of the weights zero; leave the share out"),
        (["sparsity.pattern=2:4", "sparsity.allocation=ecoflap"], "use allocation=uniform or pattern=unstructured"),
        (["sparsity.share=0.5", "distill.train=lora"], "does not fit distill.train=lora"),
        (["sparsity.criterion=nowhere.py:Own"], r"there is no file nowhere\.py"),
    ],
)
def test_what_is_wrong_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config([], overrides)
    assert "\n" not in str(caught.value)


def test_short_and_long_names_are_one_setting(tmp_path: Path) -> None:
    # YAML 1.1 reads 2:4 as 124 seconds
    assert load_config([], ["sparsity.pattern=2:4"]).distill.sparsity.n_of_m == (2, 4)
    assert load_config([], ["distill.sparsity.share=0.3"]).distill.sparsity.zeros == 0.3
    (tmp_path / "c.yaml").write_text("sparsity:\n  pattern: 4:8\ndistill:\n  local_steps: 7\n")
    config = load_config([tmp_path / "c.yaml"], ["sparsity.criterion=gblm"])
    assert (config.distill.sparsity.zeros, config.distill.local_steps) == (0.5, 7)
    assert config.distill.sparsity.criterion == "gblm"
    (tmp_path / "c.yaml").write_text("sparsity: {share: 0.5}\ndistill: {sparsity: {share: 0.4}}\n")
    with pytest.raises(ConfigError, match=re.escape("sparsity.share=0.5 and distill.sparsity.share=0.4 are one")):
        load_config([tmp_path / "c.yaml"], [])


def test_plan_criterion_is_fit_criterion(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config([], ["plan.criterion=nirvana", "plan.keep=0.7"])
    assert config.fit.criterion == "nirvana"
    assert config.plan.keep == 0.7
    assert "plan.criterion=nirvana means fit.criterion=nirvana" in caplog.text
    assert load_config([], ["plan.criterion=nirvana", "fit.criterion=wanda"]).fit.criterion == "wanda"  # the later
    with pytest.raises(ConfigError, match="did you mean 'nirvana'"):
        load_config([], ["plan.criterion=nirvanna"])
    (tmp_path / "c.yaml").write_text("plan: {criterion: taylor}\nfit: {criterion: gblm}\n")
    with pytest.raises(ConfigError, match="are one setting"):
        load_config([tmp_path / "c.yaml"], [])
