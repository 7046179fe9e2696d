"""The sums behind the probes of one block at a time: what a sweep's consumer for the closed forms looks like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ppcl.analysis.moments import Moments, add_up
from ppcl.analysis.sweep import Seen
from ppcl.teacher.blocks import Place
from ppcl.teacher.families import StackSpec
from ppcl.teacher.families.masks import valid_rows, valid_tokens
from ppcl.training.distributed import SINGLE, Group

Sums = dict[tuple[str, str], Moments]  # split, stream


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


class ProbeSums:
    """Sums of x = state before a block and y = what the block adds to it, for each split and stream.

    Args:
        num_states: Of each split.
        rows_per_feature: Tokens that enter the sums, per feature of a stream; 0: all.
        solve: Takes the sums of a block when its last batch was seen; they are dropped after.
        group: The processes that sweep; all get the whole sums.
    """

    def __init__(
        self,
        num_states: Mapping[str, int],
        rows_per_feature: int,
        solve: Callable[[Place, Sums], None],
        group: Group = SINGLE,
    ) -> None:
        self.num_states, self.rows_per_feature, self.solve, self.group = num_states, rows_per_feature, solve, group
        self.place: Place = ("", 0)
        self.sums: Sums = {}

    def begin(self, stack: StackSpec, index: int, block: nn.Module) -> Sequence[str] | None:
        """Every block counts, and no layer inside it."""
        self.place = (stack.name, index)
        return ()

    def see(self, seen: Seen) -> None:
        """Add a batch."""
        split, masks = seen.batch.split, valid_tokens(seen.call.stack, seen.call.arguments)
        for stream, before in seen.call.inputs.items():
            after = seen.call.outputs[stream]
            if after is None:
                continue
            chosen = sampled_tokens(
                before, masks.get(stream), seen.batch.first, self.num_states[split], self.rows_per_feature
            )
            x, y = valid_rows(before, chosen), valid_rows(after, chosen)
            if (split, stream) not in self.sums:
                self.sums[split, stream] = Moments(x.shape[-1], y.shape[-1], x.device)
            self.sums[split, stream].update(x, y - x)

    def finish(self) -> None:
        """Hand over the sums."""
        sums, self.sums = add_up(self.sums, self.group), {}
        self.solve(self.place, sums)
