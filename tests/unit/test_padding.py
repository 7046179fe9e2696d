"""Texts of different length in one call: where the teacher heeds its mask, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_analyze import numbers
from tiny_models import (
    DUAL,
    describe_alone,
    flux_call,
    padded_batch,
    qwen_call,
    random_substitutes,
    tiny_flux,
    tiny_qwen,
    write_states,
)
from train_worker import new_distiller, weights, write_all_states

from ppcl.analysis.analyze import analyze
from ppcl.capture.padding import check_padding
from ppcl.capture.states import PADDING, States
from ppcl.capture.trajectories import SPLITS
from ppcl.common.files import read_json, write_json
from ppcl.common.tensor_files import read_tensors
from ppcl.config import AnalyzeConfig
from ppcl.distill.local import local_backward
from ppcl.errors import ArtifactError
from ppcl.teacher.blocks import ResidentBlocks
from ppcl.teacher.calls import velocity
from ppcl.teacher.families import adapter_for
from ppcl.training.distributed import SINGLE, WHOLE, Group, add_up

MASK, TEXT = "encoder_hidden_states_mask", "encoder_hidden_states"
CALLS = [qwen_call(4, 5, 0, padded=True), qwen_call(5, 7, 20), qwen_call(3, 9, 40, padded=True)]


def write(folder: Path, transformer: Any, calls: list[dict[str, Any]]) -> States:
    """States after the check that the capture stage makes."""
    write_states(folder, "train", calls, transformer)
    check_padding(transformer, adapter_for(transformer), folder)
    return States(folder, "train")


def test_a_batch_of_several_lengths_is_one_call_with_the_same_velocity(tmp_path: Path) -> None:
    teacher = tiny_qwen(4)
    states = write(tmp_path, teacher, CALLS)
    about = read_json(tmp_path / PADDING)
    assert about["mask"] == MASK and about["error"] < 1e-5
    generator = torch.Generator().manual_seed(1)
    ((call, share),) = states.parts(12, generator)
    assert share == WHOLE and call.arguments[TEXT].shape == (12, 9, 24)
    valid = [states.calls[number].arguments[MASK] for number in range(3)]
    tokens = [7 if valid[number] is None else int(valid[number][row].sum()) for number, row in call.rows]
    assert call.arguments[MASK].sum(1).tolist() == tokens
    with torch.no_grad():
        assert torch.allclose(velocity(teacher, call.arguments), call.velocity, atol=1e-5)
    assert states.pieces(12) == 1 and len(list(states.batches(12))) == 1


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (1, 4), (2, 2)])
def test_gradients_are_those_of_the_pieces(tmp_path: Path, processes: int, accumulate: int) -> None:
    teacher = tiny_qwen(4)
    adapter, runs = adapter_for(teacher), [(DUAL, 0, 1), (DUAL, 2, 3)]
    write_states(tmp_path, "train", CALLS, teacher)
    apart, together = States(tmp_path, "train"), States(tmp_path, "train", MASK)
    rows = together.draw(11, torch.Generator().manual_seed(1))
    gradients, losses = [], []
    for states in (apart, together):
        blocks = {run: b.requires_grad_(True) for run, b in random_substitutes(teacher, adapter, runs).items()}
        parts = [p for rank in range(processes) for p in states.share_out(rows, Group(rank, processes), accumulate)]
        losses.append(add_up(local_backward(teacher, adapter, c.arguments, blocks, share=s) for c, s in parts))
        gradients.append([p.grad for block in blocks.values() for p in block.parameters() if p.grad is not None])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(gradients[0]) > 10
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, 1e-4, 1e-6)


def test_what_is_padded_is_what_the_shares_count(tmp_path: Path) -> None:
    """Beside a text more than twice as long a text is not padded, so a batch is of a few pieces, with their shares."""
    calls = [qwen_call(2, length, 10 * length) for length in (3, 4, 6, 7, 14, 15)]
    write_states(tmp_path, "train", calls)
    states = States(tmp_path, "train", MASK)
    lengths = [sorted({states.batch([row]).arguments[TEXT].shape[1] for row in rows}) for rows in states.together()]
    assert lengths == [[3, 4, 6], [7, 14], [15]]
    assert [half.pieces(12) for half in states.halves()] == [3, 3]
    parts = list(states.parts(12, torch.Generator().manual_seed(0)))
    assert [call.arguments[TEXT].shape[1] for call, _ in parts] == [6, 14, 15]
    assert sum(share.of(MASK) for _, share in parts) == pytest.approx(1)
    counts = [sum(states.calls[call].arguments[TEXT].shape[1] for call, _ in c.rows) for c, _ in parts]
    assert [share.of(MASK) for _, share in parts] == pytest.approx([count / sum(counts) for count in counts])
    assert [share.samples for _, share in parts] == pytest.approx([len(c.rows) / 12 for c, _ in parts])


@pytest.mark.parametrize("fault", ["heedless", "length"])
def test_a_teacher_whose_answer_changes_by_padding_keeps_its_pieces(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that does not heed its mask, and one to which the length of the text as such makes a difference."""
    teacher = tiny_qwen(3)
    forward = type(teacher).forward

    def changed(self: Any, *args: Any, **arguments: Any) -> Any:
        if fault == "heedless":
            arguments[MASK] = None
        else:
            arguments["timestep"] = arguments["timestep"] * (1 + arguments[TEXT].shape[1] / 100)
        return forward(self, *args, **arguments)

    monkeypatch.setattr(type(teacher), "forward", changed)
    states = write(tmp_path, teacher, CALLS)
    assert states.pieces(12) == 3 and states.text_mask == ""
    assert read_json(tmp_path / PADDING)["mask"] == ""
    assert "padded" in caplog.text and "in pieces" in caplog.text


def test_nothing_is_checked_without_a_mask_or_with_one_length(tmp_path: Path) -> None:
    flux = write(tmp_path / "flux", tiny_flux(), [flux_call(3, 5), flux_call(3, 6)])
    assert flux.pieces(6) == 2
    teacher, calls = tiny_qwen(2), [qwen_call(3, 5), qwen_call(2, 5, 9)]
    plain = write(tmp_path / "plain", teacher, calls)
    assert plain.pieces(6) == 1
    assert not list(tmp_path.rglob(PADDING))
    ((call, _),) = States(tmp_path / "plain", "train", MASK).weighed(plain.groups[0], 9)
    assert call.arguments[MASK] is None
    assert torch.equal(call.arguments[TEXT], torch.cat([arguments[TEXT] for arguments in calls]))


def test_padding_is_what_a_pipeline_would_do(tmp_path: Path) -> None:
    states = write(tmp_path, tiny_qwen(2), CALLS)
    (together,) = states.batches(12)
    expected = padded_batch(CALLS)
    assert torch.equal(together[MASK], expected[MASK])
    shown = expected[MASK]
    assert torch.equal(together[TEXT][shown], expected[TEXT][shown])
    assert together["img_shapes"] == expected["img_shapes"]
    assert torch.equal(together["hidden_states"], expected["hidden_states"])


def test_a_damaged_record_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, tiny_qwen(2), CALLS)
    (tmp_path / PADDING).write_text("[]")
    with pytest.raises(ArtifactError, match=r"padding\.json was not written by ppcl capture"):
        States(tmp_path, "train")


def test_the_analysis_leaves_padding_out(tmp_path: Path) -> None:
    teacher = tiny_qwen(3)
    analyses, matrices = [], []
    for name, text_mask in (("apart", ""), ("together", MASK)):
        calibration = tmp_path / name / "calibration"
        for split in SPLITS:
            write_states(calibration, split, CALLS)
        write_json(calibration / PADDING, {"mask": text_mask})
        settings = AnalyzeConfig(cka_tokens=64, batch_size=12, ridges=(1e-4, 1e-1))
        common = (describe_alone(teacher), calibration, tmp_path / name, settings, 0)
        analyses.append(analyze(ResidentBlocks(teacher), *common))
        matrices.append(read_tensors(tmp_path / name / "analysis.safetensors")[0])
    assert numbers(analyses[1]) == pytest.approx(numbers(analyses[0]), rel=1e-3, abs=1e-4)
    assert matrices[0].keys() == matrices[1].keys()
    for key, matrix in matrices[0].items():
        assert torch.allclose(matrices[1][key], matrix, rtol=1e-3, atol=1e-3), key


def test_a_resumed_run_makes_the_same_batches(tmp_path: Path) -> None:
    """Bit by bit what a run without a stop trains."""

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 1:
            raise KeyboardInterrupt

    trained = []
    for name in ("whole", "stopped"):
        write_all_states(tmp_path / name, together=True)
        if name == "stopped":
            with pytest.raises(KeyboardInterrupt):
                new_distiller(tmp_path / name, "local", SINGLE, stop, local_steps=3).run()
        distiller = new_distiller(tmp_path / name, "local", SINGLE, lambda row: None, local_steps=3)
        distiller.run()
        trained.append(weights(distiller))
    assert all(torch.equal(value, trained[1][key]) for key, value in trained[0].items())
