"""A few held-out tokens through all levels, for the CKA table; a consumer of the forward sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ppcl.analysis.cka import GROUPS, sample_rows
from ppcl.analysis.findings import Findings
from ppcl.analysis.sweep import Seen
from ppcl.capture.states import States
from ppcl.common.lazy import Lazy
from ppcl.common.streams import Stream, step_generator
from ppcl.errors import UserError
from ppcl.teacher.blocks import Place
from ppcl.teacher.families import StackSpec
from ppcl.teacher.families.masks import valid_tokens
from ppcl.training.distributed import SINGLE, Group

KIND = "tokens"


@dataclass
class Kept:
    """Tokens of one batch.

    Attributes:
        tokens: (n, d) by stream, ``before/`` and ``after/`` the block.
        owners: Of each token the group of prompts, by stream.
    """

    tokens: dict[str, Tensor] = field(default_factory=dict)
    owners: dict[str, list[int]] = field(default_factory=dict)


class KeptTokens:
    """Keeps a few tokens of each held-out state, the same ones at every block; independent of the batch size.

    Args:
        states: The held-out ones.
        count: Tokens a stream to keep, at most: one of every so many states, or several of each.
        seed: Fixes which.
        findings: Receives them.
        group: The processes that sweep; the first one writes.
    """

    def __init__(self, states: States, count: int, seed: int, findings: Findings, group: Group = SINGLE) -> None:
        self.seed, self.findings, self.group = seed, findings, group
        self.quota, self.stride = max(1, count // len(states)), -(-len(states) // count)
        prompts = dict.fromkeys(mark.prompt for mark in states.marks.values())
        numbers = {prompt: number for number, prompt in enumerate(prompts)}
        self.groups = {row: numbers[mark.prompt] % GROUPS for row, mark in states.marks.items()}
        self.place: Place = ("", 0)
        self.kept: dict[int, Kept] = {}  # by number of the batch

    def begin(self, stack: StackSpec, index: int, block: nn.Module) -> Sequence[str] | None:
        """Every block counts, and no layer inside it."""
        self.place, self.kept = (stack.name, index), {}
        return ()

    def see(self, seen: Seen) -> None:
        """Keep tokens of a held-out batch."""
        if seen.batch.split != "held-out":
            return
        kept = self.kept[seen.batch.number] = Kept()
        masks = valid_tokens(seen.call.stack, seen.call.arguments)
        for stream, before in seen.call.inputs.items():
            after = seen.call.outputs[stream]
            if after is not None:
                rows, kept.owners[stream] = self._rows(seen, before, masks.get(stream))
                kept.tokens[f"after/{stream}"] = _picked(after, rows)
                if seen.call.index == 0:
                    kept.tokens[f"before/{stream}"] = _picked(before, rows)

    def finish(self) -> None:
        """Write them, whoever saw them, in the order of their batches."""
        found = {number: kept for own in self.group.gather(self.kept) for number, kept in own.items()}
        self.kept = {}
        tokens: dict[str, list[Tensor]] = {}
        owners: dict[str, list[int]] = {}
        for number in sorted(found):
            for name, part in found[number].tokens.items():
                tokens.setdefault(name, []).append(part)
            for stream, groups in found[number].owners.items():
                owners.setdefault(stream, []).extend(groups)
        tensors = {name: torch.cat(parts) for name, parts in tokens.items()}
        self.group.on_main(lambda: self.findings.write(KIND, self.place, tensors, {"owners": owners}))

    def _rows(self, seen: Seen, before: Tensor, valid: Tensor | None) -> tuple[Tensor, list[int]]:
        """Which of a batch's (B * tokens) rows are kept, and the group of each."""
        picked, owners = [torch.empty(0, dtype=torch.long)], []
        for row, place in enumerate(seen.batch.rows):
            number = seen.batch.first + row
            if number % self.stride:
                continue
            available = torch.arange(before.shape[1]) if valid is None else valid[row].cpu().nonzero()[:, 0]
            generator = step_generator(self.seed, number, Stream.CKA_TOKENS)
            chosen = available[sample_rows(len(available), self.quota, generator)]
            picked.append(chosen + row * before.shape[1])
            owners += [self.groups[place]] * len(chosen)
        return torch.cat(picked).to(before.device), owners


def _picked(states: Tensor, rows: Tensor) -> Tensor:
    return states.flatten(0, 1)[rows].float().cpu()


def kept_levels(findings: Findings, stack: str, stream: str, blocks: int) -> tuple[Sequence[Tensor], list[int]]:
    """The kept tokens of a stack, M + 1 levels of (n, d) by groups of prompts; and the tokens of each group.

    Raises:
        UserError: There are too few for CKA.
    """
    owners = torch.tensor(findings.numbers(KIND, (stack, 0))["owners"].get(stream, []))
    if len(owners) < 4:
        raise UserError(
            f"CKA needs at least 4 held-out tokens of the {stream} stream, got {len(owners)}; "
            "raise capture.num_prompts or capture.states_per_prompt"
        )
    order = owners.argsort(stable=True)

    def level(number: int) -> Tensor:
        place, name = (stack, max(0, number - 1)), f"{'after' if number else 'before'}/{stream}"
        return findings.tensors(KIND, place, name)[0][order]

    return Lazy(blocks + 1, level), owners.bincount(minlength=GROUPS).tolist()
