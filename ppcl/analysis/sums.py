"""The sums behind the closed forms of one block at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ppcl.analysis.moments import Moments, add_up
from ppcl.analysis.sweep import Seen
from ppcl.errors import ModelError
from ppcl.teacher.blocks import Place
from ppcl.teacher.families import StackSpec
from ppcl.teacher.families.masks import valid_rows, valid_tokens
from ppcl.training.distributed import SINGLE, Group


def sampled_tokens(
    states: Tensor, valid: Tensor | None, first: int, num_states: int, rows_per_feature: int
) -> Tensor | None:
    """Which tokens of a batch enter the sums, (B, tokens) bool; None is all of them.

    Every stride-th, starting one token later in every state, so that all places count alike and neither the batch size
    nor what other batches look like matters.

    Args:
        states: (B, tokens, features).
        valid: Tokens that are no padding; None: all.
        first: Number of the batch's first state among those of its split.
        num_states: States of the split.
        rows_per_feature: Tokens of all states that enter, per feature; 0: all.
    """
    batch, tokens, features = states.shape
    wanted = rows_per_feature * features
    stride = max(1, num_states * tokens // wanted) if wanted else 1
    if stride == 1:
        return valid
    place = torch.arange(tokens) + torch.arange(first, first + batch)[:, None]
    chosen = (place % stride == 0).to(states.device)
    return chosen if valid is None else chosen & valid


@dataclass
class Totals:
    """The sums of one block.

    Attributes:
        moments: By split and signal: a stream (what the block adds to it), ``ffn.<stream>`` (what the network makes of
            its input), or ``input.text`` (the text that enters the attention, from that of the block before).
        cosines: Over held-out tokens, the sum of the cosines of states before and after, and their number.
        tokens: Of the training states, by stream; counted at the first block of a stack.
    """

    moments: dict[tuple[str, str], Moments] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=lambda: {"sum": 0.0, "count": 0.0})
    tokens: dict[str, float] = field(default_factory=dict)


class BlockSums:
    """The sums behind the closed forms of a block.

    Args:
        num_states: Of each split.
        rows_per_feature: Tokens that enter the sums, per feature of a stream; 0: all. A regression of d features knows
            its weights long before the last of a million tokens.
        solve: Takes the sums of a block when its last batch was seen; they are dropped after.
        group: The processes that sweep; all get the whole sums.
    """

    def __init__(
        self,
        num_states: Mapping[str, int],
        rows_per_feature: int,
        solve: Callable[[Place, Totals], None],
        group: Group = SINGLE,
    ) -> None:
        self.num_states, self.rows_per_feature, self.solve, self.group = num_states, rows_per_feature, solve, group
        self.place: Place = ("", 0)
        self.totals = Totals()

    def begin(self, stack: StackSpec, index: int, block: nn.Module) -> Sequence[str] | None:
        """Every block counts, and in it the feed-forward networks and the text input of the attention."""
        self.place, self.totals = (stack.name, index), Totals(tokens=dict.fromkeys(stack.inputs, 0.0))
        return [*stack.ffn.values(), *([stack.text_qkv] if stack.text_qkv else [])]

    def see(self, seen: Seen) -> Mapping[str, Tensor]:
        """Add a batch; the text input is wanted again at the next block."""
        split, spec = seen.batch.split, seen.call.stack
        masks = valid_tokens(spec, seen.call.arguments)
        projections = seen.layers.get(spec.text_qkv or "")
        texts = {"text_input": projections[-1].input} if projections else {}
        for stream, before in seen.call.inputs.items():
            after = seen.call.outputs[stream]
            if after is None:
                continue
            valid = masks.get(stream)
            rows = sampled_tokens(before, valid, seen.batch.first, self.num_states[split], self.rows_per_feature)
            x, y = valid_rows(before, rows), valid_rows(after, rows)
            self._add((split, stream), x, y - x)
            if split == "held-out":
                similarity = nn.functional.cosine_similarity(x.float(), y.float(), dim=-1)
                self.totals.cosines["sum"] += float(similarity.double().sum())
                self.totals.cosines["count"] += len(x)
            elif seen.call.index == 0:
                self.totals.tokens[stream] += before.shape[:2].numel() if valid is None else int(valid.sum())
            network = seen.layers.get(spec.ffn.get(stream, ""))
            if network and network[-1].input.ndim == 3:
                pair = spec.turn(network[-1].input), spec.turn(network[-1].output)
                self._add((split, f"ffn.{stream}"), valid_rows(pair[0], rows), valid_rows(pair[1], rows))
            if stream == "text" and texts and "text_input" in seen.carried:
                earlier, now = seen.carried["text_input"], texts["text_input"]
                self._add((split, "input.text"), valid_rows(earlier, rows), valid_rows(now, rows))
        return texts

    def finish(self) -> None:
        """Hand over the sums."""
        totals, self.totals = self.totals, Totals()
        totals.moments = add_up(totals.moments, self.group)
        totals.cosines = self.group.sum_scalars(totals.cosines)
        totals.tokens = self.group.sum_scalars(totals.tokens)
        for (_, signal), moments in totals.moments.items():
            if not moments.is_finite():
                raise ModelError(
                    f"{self.place[0]}/{self.place[1]}: its states ('{signal}') are NaN or infinite in this format; run "
                    "again with --set precision=fp32"
                )
        self.solve(self.place, totals)

    def _add(self, key: tuple[str, str], x: Tensor, y: Tensor) -> None:
        if key not in self.totals.moments:
            self.totals.moments[key] = Moments(x.shape[-1], y.shape[-1], x.device)
        self.totals.moments[key].update(x, y)
