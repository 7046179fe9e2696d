"""Gates on blocks, trained together with LoRA as simulated recovery: what ``learned`` and ``rarts`` share.

A gate g stands before what a block adds to the residual stream: h + g (block(h) - h). At 1 the block is there, at 0 it
is not. LoRA on all blocks (W + B A, a few percent of the weights) stands for the training that follows pruning. The
teacher's own weights never get a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.capture.states import States
from ppcl.common.devices import autocast
from ppcl.common.streams import step_generator
from ppcl.errors import ModelError
from ppcl.pruning.criteria.base import checkpointed
from ppcl.pruning.searches.base import Context
from ppcl.pruning.searches.teacher import Teacher
from ppcl.student.assembly import StandIn, with_blocks
from ppcl.teacher.call_arguments import to_device
from ppcl.teacher.calls import Call, velocity
from ppcl.teacher.families import Adapter, StackSpec
from ppcl.training.lora import with_lora
from ppcl.training.losses import velocity_loss

LORA_RANK = 8
PASSES = 3  # forwards that one step of one student counts: its forward pass, and the backward pass as two


class GatedBlock(StandIn):
    """A block behind a gate.

    Args:
        adapter: The family.
        stack: The block's stack.
        block: It.
    """

    def __init__(self, adapter: Adapter, stack: StackSpec, block: nn.Module) -> None:
        super().__init__(block)
        self.adapter, self.stack, self.block = adapter, stack, block
        self.gate: Tensor | float = 1.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The states before the block, and the gate's share of what it does to them."""
        before = self.adapter.input_states(self.stack, self.adapter.bind(self.block, args, kwargs))
        after = self.adapter.output_states(self.stack, self.block(*args, **kwargs))
        gate = self.gate
        return self.adapter.pack(self.stack, {s: h + gate * (after[s] - h) for s, h in before.items()})


class GatedStudent:
    """The teacher with gates on some blocks and LoRA on all.

    Args:
        teacher: Its weights are shared, not copied.
        gated: (stack, block) of the blocks with a gate, in execution order.
        seed: Fixes the first LoRA; two students of one seed are equal.

    Raises:
        ModelError: Blocks of this family cannot stand behind a gate.
    """

    def __init__(self, teacher: Teacher, gated: Sequence[tuple[str, int]], seed: int) -> None:
        self.teacher = teacher
        generator, wanted = step_generator(seed, 0, 71), set(gated)
        self.gated: list[GatedBlock] = []
        lists: dict[str, list[nn.Module]] = {}
        for spec in teacher.adapter.stacks:
            lists[spec.name] = []
            for index, block in enumerate(teacher.blocks(spec.name)):
                tuned = with_lora(block, LORA_RANK, {}, generator)
                if (spec.name, index) in wanted:
                    tuned = GatedBlock(teacher.adapter, spec, tuned)
                    self.gated.append(tuned)
                lists[spec.name].append(tuned)
        self.parameters = [p for blocks in lists.values() for b in blocks for p in b.parameters() if p.requires_grad]
        self.student = with_blocks(teacher.transformer, lists)
        self._check()

    def _check(self) -> None:
        """With all gates at 1 and LoRA that does nothing yet, the student must be the teacher."""
        name = type(self.teacher.transformer).__name__
        for stack in {block.stack.name: block.stack for block in self.gated}.values():
            if set(stack.inputs) != set(stack.outputs):
                raise ModelError(
                    f"blocks of {name}.{stack.name} take {', '.join(stack.inputs)} and give "
                    f"{', '.join(stack.outputs)}; a gate needs both alike: choose another plan.mode, e.g. optimal"
                )
        call = next(self.teacher.train.answered(1))
        with torch.no_grad():
            error = float(self.loss(call, torch.ones(len(self.gated))))
        if not error < 1e-2:
            raise ModelError(
                f"{name} with open gates gives another velocity than without (error {error**0.5:.2g}); its blocks "
                "cannot be gated: choose another plan.mode, e.g. optimal"
            )

    def loss(self, call: Call, gates: Tensor) -> Tensor:
        """Squared relative velocity error, averaged over a batch of states.

        Args:
            call: The batch, with the teacher's answers.
            gates: (number of gated blocks,).
        """
        device = self.teacher.device
        for block, gate in zip(self.gated, gates.to(device), strict=True):
            block.gate = gate
        moved = to_device(call.arguments, device)
        with checkpointed(self.student), autocast(device, self.teacher.precision):
            return velocity_loss(velocity(self.student, moved), call.velocity.to(device))


def draw(states: States, context: Context, step: int, stream: int) -> Call:
    """The batch of a step, a function of (seed, step, stream) alone."""
    generator = step_generator(context.seed, step, stream)
    call, _ = next(states.parts(context.settings.search_batch, generator))
    return call


def apply_gradients(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: Sequence[Tensor]) -> None:
    """One step of an optimizer on some parameters alone; no gradient stays behind."""
    gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
