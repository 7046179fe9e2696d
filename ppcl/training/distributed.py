"""Data-parallel training: how many processes train, and what they tell each other.

Substitutes are trained by many small backward passes inside one pass of the teacher, so there is
no single forward call that ``DistributedDataParallel`` could wrap. Instead every process draws the
same batch (a function of seed and step), takes its own part of it, and weighs its losses by what
that part counts in the mean over the whole batch; the gradients are then added up before they are
clipped. The result does not depend on the number of processes beyond float rounding.

accelerate reads the launcher's environment, chooses the device, starts torch.distributed and passes objects on. All
goes through one group: what is in CPU memory over gloo, what is on GPUs over nccl.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from ppcl.errors import ConfigError, UserError
from ppcl.training.launch import check_launcher, world

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
R = TypeVar("R")

_BUCKET = 32 * 1024 * 1024  # numbers in one message: large enough to keep a network busy, small beside a model
_BACKENDS = "cpu:gloo,cuda:nccl"  # gloo waits without keeping a GPU busy, and objects are passed on from CPU memory
_PATIENCE = timedelta(days=30)  # others wait while one process captures or evaluates, for hours


@dataclass(frozen=True)
class Share:
    """What a part of a batch counts in the means over the whole batch; the shares of all parts add up to 1.

    Attributes:
        samples: Share of the samples, for means over samples and over tokens without padding.
        tokens: Share of the valid tokens by the name of the argument that marks them, for means over those.
    """

    samples: float = 1.0
    tokens: Mapping[str, float] = field(default_factory=dict)

    def of(self, mask: str | None) -> float:
        """The share for a mean over the valid tokens that ``mask`` marks (None: there is no padding)."""
        return self.tokens.get(mask, self.samples) if mask is not None else self.samples


WHOLE = Share()


class Group:
    """The processes that train together; of one process every method is the obvious.

    Args:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @property
    def local_size(self) -> int:
        """Processes on this machine, as the launcher counts them; all of them where it does not say."""
        return min(self.size, int(os.environ.get("LOCAL_WORLD_SIZE", self.size)))

    def place(self, device: torch.device) -> torch.device:
        """The device of this process: of several GPUs the one with its local number."""
        return PartialState().device if self.size > 1 else device

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            torch.distributed.barrier()  # accelerate's wait_for_everyone waits on the GPU, and keeps it busy

    def close(self) -> None:
        """Leave together, at the end of a program."""
        if self.size > 1:
            self.barrier()
            PartialState().destroy_process_group()

    def on_main(self, work: Callable[[], T]) -> T:
        """Let the first process work while the others wait; all of them get its result.

        Raises:
            UserError: What the first process raised, in all of them.
        """
        if self.size == 1:
            return work()
        answer: list[Any] = [None, None]  # accelerate's on_main_process neither waits nor hands on result and error
        if self.is_main:
            try:
                answer[0] = work()
            except UserError as error:
                answer[1] = error
        result, refusal = broadcast_object_list(answer)
        if refusal is not None:
            raise refusal
        return cast(T, result)

    def spread(self, jobs: Mapping[K, V], work: Callable[[dict[K, V]], dict[K, R]]) -> dict[K, R]:
        """Do independent jobs, each in one of the processes; all of them get all results."""
        if self.size == 1:
            return work(dict(jobs))
        # every n-th one, since neighbours cost alike; split_between_processes would cut the list in pieces
        results = self.gather(work(dict(list(jobs.items())[self.rank :: self.size])))
        merged = {key: value for part in results for key, value in part.items()}
        return {key: merged[key] for key in jobs}

    def gather(self, value: V) -> list[V]:
        """What each of the processes has, in the order of their numbers; all of them get it."""
        return cast(list[V], gather_object([value])) if self.size > 1 else [value]

    def any(self, here: bool) -> bool:
        """Whether it holds in any of the processes."""
        return self.sum_scalars({"": float(here)})[""] > 0 if self.size > 1 else here

    def sum_scalars(self, row: Mapping[str, float]) -> dict[str, float]:
        """Add up numbers that all processes have under the same names."""
        if self.size == 1 or not row:
            return dict(row)
        values = torch.tensor(list(row.values()), dtype=torch.float64)
        torch.distributed.all_reduce(values)  # accelerate's reduce refuses what is in CPU memory where it is debugged
        return dict(zip(row, values.tolist(), strict=True))

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up the gradients of all processes in place; where no process has one, it stays None."""
        if self.size == 1 or not parameters:
            return
        here = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        torch.distributed.all_reduce(here, torch.distributed.ReduceOp.MAX)
        gradients = []
        for parameter, used in zip(parameters, here.tolist(), strict=True):
            if used:
                if parameter.grad is None:  # an expert that no token of this process chose
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in _buckets(gradients):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            torch.distributed.all_reduce(flat)
            pieces = torch.split(flat, [g.numel() for g in bucket])
            for gradient, total in zip(bucket, pieces, strict=True):
                gradient.copy_(total.view_as(gradient))

    def sum_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Add up tensors of all processes in place."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    @torch.no_grad()
    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by those of the first process."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor.detach(), src=0)


SINGLE = Group()


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Cut a list of tensors into lists of one dtype and about ``_BUCKET`` numbers, in order."""
    buckets: list[list[Tensor]] = []
    count = 0
    for tensor in tensors:
        if not buckets or count + tensor.numel() > _BUCKET or buckets[-1][0].dtype != tensor.dtype:
            buckets.append([])
            count = 0
        buckets[-1].append(tensor)
        count += tensor.numel()
    return buckets


def connect(cpu: bool, asked: int | None = None) -> Group:
    """Join the processes that a launcher started, if there was one.

    Args:
        cpu: Train on the CPU (gloo); else each process has the GPU of its local number (nccl).
        asked: The number of processes that the user wants; None takes what there is.

    Raises:
        ConfigError: Another number of processes runs, or the launcher did not say all that they need, or somebody
            joined them without gloo.
    """
    group = SINGLE
    check_launcher()
    if world() > 1:
        state = PartialState(cpu=cpu, backend="gloo" if cpu else _BACKENDS, timeout=_PATIENCE)
        joined = torch.distributed.get_backend_config()
        if "cpu:gloo" not in joined:
            raise ConfigError(
                f"the processes were joined over {joined} before; ppcl needs {_BACKENDS}, or joins them itself"
            )
        group = Group(state.process_index, state.num_processes)
    if asked is not None and asked != group.size:
        raise ConfigError(
            f"{asked} processes were asked for, {group.size} train; start the command with "
            f"python -m torch.distributed.run --standalone --nproc_per_node {asked} -m ppcl, or ask for {group.size}"
        )
    return group


def add_up(rows: Iterable[Mapping[K, float]]) -> dict[K, float]:
    """Sum rows of equal names, e.g. the weighed losses of the parts of a batch."""
    total: dict[K, float] = {}
    for row in rows:
        for key, value in row.items():
            total[key] = total[key] + value if key in total else value
    return total
