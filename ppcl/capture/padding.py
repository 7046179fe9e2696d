"""Whether texts of different length may be padded to go through a model in one call: where that changes nothing.

A mask says which tokens are padding; whether a model heeds it, wherever its text goes, is found out on recorded states.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.capture.states import PADDING, Row, States
from ppcl.common.files import read_json, write_json
from ppcl.teacher.call_arguments import batch_size
from ppcl.teacher.families import Adapter
from ppcl.teacher.families.masks import valid_tokens
from ppcl.teacher.trace import BlockCall, run_traced

logger = logging.getLogger(__name__)


def text_mask(adapter: Adapter) -> str:
    """The argument that marks the padding of a family's text in every block; empty where it declares none."""
    names = {spec.masks.get("text", "") if "text" in spec.inputs else "" for spec in adapter.stacks}
    return names.pop() if len(names) == 1 else ""


def check_padding(transformer: nn.Module, adapter: Adapter, folder: Path) -> None:
    """Find out whether padding changes what a teacher answers, and write that down beside its recorded states.

    Nothing is done where the family has no mask for its text, or all texts are of one length.

    Args:
        transformer: The teacher's.
        adapter: Its family.
        folder: Its states, as :func:`ppcl.capture.trajectories.capture` wrote them.
    """
    mask = text_mask(adapter)
    if not mask:
        return
    states = States(folder, "train", mask)
    ends = [(rows[0], rows[-1]) for rows in states.together()]  # the shortest and the longest text
    ends = [(short, long) for short, long in ends if states.marks[short].shape != states.marks[long].shape]
    if not ends:
        return
    error = padding_error(transformer, adapter, states, max(ends, key=lambda rows: states.marks[rows[1]].size))
    limit = torch.finfo(states.calls[0].velocity.dtype).eps ** 0.5
    if error > limit:
        logger.warning(
            "%s: its answers change by %.1e where a text is padded (rounding is below %.1e), in spite of %s; batches "
            "of texts of several lengths go through it in pieces, which takes longer",
            *(type(transformer).__name__, error, limit, mask),
        )
    record, path = {"mask": mask if error <= limit else "", "error": error}, folder / PADDING
    if not (path.is_file() and read_json(path) == record):  # a file that stays stays as old as it is
        write_json(path, record)


@torch.no_grad()
def padding_error(transformer: nn.Module, adapter: Adapter, states: States, rows: tuple[Row, Row]) -> float:
    """The largest relative difference that padding makes to velocity, or to the valid tokens that leave a block.

    Args:
        transformer: The teacher's.
        adapter: Its family.
        states: With a ``text_mask``.
        rows: A state with a short and one with a long text.

    Returns:
        1 where it matters what the padding is made of, be it a little: a model that heeds its mask gives the same
        bits.
    """
    alone = [answer for row in rows for answer in _answers(transformer, adapter, states.batch([row]).arguments)]
    arguments = states.batch(rows).arguments
    with_zeros = _answers(transformer, adapter, arguments)
    text, hidden = states.text_mask.removesuffix("_mask"), arguments[states.text_mask] == 0
    noise = torch.randn(arguments[text].shape, generator=torch.Generator().manual_seed(0)).to(arguments[text].dtype)
    filled = torch.where(hidden[..., None], noise, arguments[text])
    with_noise = _answers(transformer, adapter, {**arguments, text: filled})
    if any(
        not torch.equal(a, b) for pair in zip(with_zeros, with_noise, strict=True) for a, b in zip(*pair, strict=True)
    ):
        return 1.0
    return max(
        float((padded.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
        for pair in zip(with_zeros, alone, strict=True)
        for padded, expected in zip(*pair, strict=True)
    )


def _answers(transformer: nn.Module, adapter: Adapter, arguments: dict[str, Any]) -> list[list[Tensor]]:
    """Of each sample the valid tokens that leave every block, and the velocity."""
    answers: list[list[Tensor]] = [[] for _ in range(batch_size(arguments))]

    def visit(call: BlockCall) -> None:
        masks = valid_tokens(call.stack, call.arguments)
        for stream, output in call.outputs.items():
            for sample, state in enumerate(output):
                answers[sample].append((state[masks[stream][sample]] if stream in masks else state).cpu())

    output = run_traced(transformer, adapter, arguments, visit)
    for sample, velocity in zip(answers, output if output is not None else (), strict=True):
        sample.append(velocity.cpu())
    return answers
