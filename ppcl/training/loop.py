"""One training loop for everything that is trained here; see :class:`TrainingLoop` for how it is written.

All randomness of a step is a function of (seed, step), so a resumed run repeats the undisturbed one bit by bit: there
is no data position and no generator state to restore. Of several processes each leaves the gradients of its part of the
batch, weighed, and the loop adds them up; the first process alone writes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.common.parts import is_part, part_of
from ppcl.common.progress import Progress
from ppcl.errors import ArtifactError, TrainingError, UserError
from ppcl.training import stopping
from ppcl.training.checkpoints import (
    load_optimizer_tensors,
    newest_checkpoint,
    optimizer_tensors,
    write_checkpoint,
)
from ppcl.training.distributed import SINGLE, Group, add_up
from ppcl.training.eight_bit import set_rate
from ppcl.training.optimizers import new_optimizers
from ppcl.training.settings import LoopSettings
from ppcl.training.sharding import average_into, whole

logger = logging.getLogger(__name__)


def schedule_at(step: int, settings: LoopSettings) -> float:
    """The share of the peak learning rate: linear warm-up, then cosine decay to ``final_fraction``."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    span = max(1, settings.steps - settings.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - settings.warmup) / span)))
    return settings.final_fraction + (1 - settings.final_fraction) * cosine


@dataclass
class _Step:
    """The step that runs: its number and learning rate, when it and the loop began, what was counted and logged."""

    number: int
    rate: float = 0.0
    began: float = 0.0
    loop_began: float = 0.0
    first: int = 0
    parts: list[Mapping[str, float]] = field(default_factory=list)
    row: dict[str, Any] | None = None


_SPIKE_WARMUP = 20  # losses behind the running average before a spike can be told


class TrainingLoop:
    """Trains modules for a number of steps, resumably.

    A training reads from top to bottom::

        loop = TrainingLoop(modules, settings, folder, fingerprint)
        for step in loop:  # from the newest checkpoint on
            loss = ...  # of this process's part of the batch, drawn by the number of the step
            loss.backward()
            loop.add({"loss": loss.item()})
            loop.step()  # clips, steps, averages, logs

    An iteration ends with a checkpoint where one is due, and with leaving where SIGTERM came.

    Args:
        modules: Trainable modules by name; their parameters with ``requires_grad`` are trained.
        settings: See :class:`LoopSettings`.
        folder: Where ``step-*`` checkpoints live; all processes must see it.
        fingerprint: Identifies the run; a checkpoint of another fingerprint is not resumed.
        log: Receives one dict a step (``step``, ``loss`` and so on), in the first process.
        label: Name shown beside the progress bar.
        group: The processes that train.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        settings: LoopSettings,
        folder: Path,
        fingerprint: str,
        log: Callable[[dict[str, Any]], None] | None = None,
        label: str = "train",
        group: Group = SINGLE,
    ) -> None:
        self.settings, self.folder, self.fingerprint = settings, Path(folder), fingerprint
        self.log, self.label, self.group = log, label, group
        self.bad_steps, self._counted, self._usual = 0, 0, 0.0
        self._released: list[float] = []
        self._now = _Step(0)
        self.parameters: dict[str, nn.Parameter] = {
            f"{name}.{key}": parameter
            for name, module in modules.items()
            for key, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.plain = [p for p in self.parameters.values() if not is_part(p)]  # FSDP2 adds up the others' gradients
        group.copy_from_main(self.plain)
        self._clipped = [self._of(name) for name in modules] if settings.clip_each else [[*self.parameters.values()]]
        layers = (m for top in modules.values() for m in top.modules() if isinstance(m, nn.Linear))
        matrices = {id(layer.weight) for layer in layers}
        self.optimizers = new_optimizers(self.parameters, matrices, settings)
        self.ema = {k: p.detach().float().clone() for k, p in self.parameters.items()} if settings.ema_decay else {}

    def __iter__(self) -> Iterator[int]:
        """Numbers of the steps that are still to be done.

        Raises:
            Stopped: SIGTERM came; the state is saved.
        """
        end, start = self.settings.steps, self.resume()
        with stopping.deferred(), Progress(self.label, total=end, start=start) as progress:
            began = time.perf_counter()
            for step in range(start, end):
                self._now = _Step(step, self._set_rates(step), time.perf_counter(), began, start)
                yield step
                if self._now.row is None:
                    raise AssertionError("the body of the loop calls step() once")
                progress.advance(loss=self._now.row.get("loss"))
                stop = self.group.any(stopping.pending())
                if (step + 1) % self.settings.checkpoint_every == 0 or step + 1 == end or stop:
                    self.save(step + 1)
                if stop:
                    raise stopping.Stopped

    def _set_rates(self, step: int) -> float:
        """Set the learning rates of a step; returns the one of AdamW."""
        share = schedule_at(step, self.settings)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                set_rate(group, group["peak"] * share)
        return self.settings.learning_rate * share

    def add(self, scalars: Mapping[str, float]) -> None:
        """Count what is to be logged of a part of the step's batch; parts and processes add up."""
        self._now.parts.append(scalars)

    def step(self) -> dict[str, Any]:
        """Let the optimizers take their step by the gradients that are there, and log it; returns what is logged.

        Raises:
            TrainingError: Too many losses or gradients were not finite; the last good state is saved.
            UserError: The log cannot be written; the state is saved first, if there is room for it.
        """
        now = self._now
        self.group.sum_gradients(self.plain)
        scalars = self.group.sum_scalars(add_up(now.parts))
        norms = [self._clip(group) for group in self._clipped]
        norm = math.hypot(*norms, *self._released)
        self._released.clear()
        problem, spike = self._problem(scalars, norm)
        taken = not problem or (self.settings.clip_each and not spike)  # by the modules whose gradients are finite
        if problem:
            self._leave_out(now.number, problem, now.rate, taken)
        if taken:
            self._take(norms, now.number)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        end = time.perf_counter()
        seconds, done = end - now.began, now.number + 1 - now.first
        left = (end - now.loop_began) / done * (self.settings.steps - now.number - 1)
        row: dict[str, Any] = {"step": now.number, **scalars, "gradient_norm": norm, "learning_rate": now.rate}
        row = {key: value if math.isfinite(value) else None for key, value in row.items()}  # JSON has no NaN
        row |= {"bad_steps": self.bad_steps, "seconds": seconds, "seconds_left": round(left, 1)}
        if self.settings.batch_size:
            row["samples_per_second"] = round(self.settings.batch_size / seconds, 3)
        now.row = row
        self._report(row)
        return row

    def _report(self, row: dict[str, Any]) -> None:
        if self.log is None or not self.group.is_main:
            return
        try:
            self.log(row)
        except UserError:
            if not any(map(is_part, self.parameters.values())):  # the other processes' parts are out of reach now
                with contextlib.suppress(UserError):
                    self._write(row["step"] + 1, self._state())
            raise

    def _take(self, norms: Sequence[float], step: int) -> None:
        """Let all take their step whose gradients are finite; the moving average follows."""
        for group, norm in zip(self._clipped, norms, strict=True):
            for parameter in group if not math.isfinite(norm) else ():
                parameter.grad = None
        for optimizer in self.optimizers:
            optimizer.step()
        self._update_ema(step)

    def _of(self, name: str) -> list[nn.Parameter]:
        """The trained parameters of a module."""
        return [p for key, p in self.parameters.items() if key.startswith(f"{name}.")]

    def _clip(self, parameters: Iterable[nn.Parameter]) -> float:
        """Clip gradients together; return their norm before."""
        there = [p for p in parameters if p.grad is not None]
        return float(whole(nn.utils.clip_grad_norm_(there, self.settings.clip_norm)))

    def release(self, name: str) -> None:
        """Let one module take its step now, clipped by itself, and drop its gradients, before the step of all.

        For modules that learn independently of each other, whose gradients need not all be in memory then. One whose
        gradient is not finite takes no step; the others do.

        Args:
            name: Of the module, whose gradients are complete in this process.
        """
        parameters = self._of(name)
        self.group.sum_gradients(parameters)
        norm = self._clip(parameters)
        self._released.append(norm)
        here = set(parameters)
        waiting = {p: p.grad for p in self.plain if p not in here and p.grad is not None}  # of earlier parts of a batch
        for parameter in waiting:
            parameter.grad = None
        if math.isfinite(norm):
            for optimizer in self.optimizers:
                optimizer.step()
        for parameter in parameters:
            parameter.grad = None
        for parameter, gradient in waiting.items():
            parameter.grad = gradient

    def _problem(self, scalars: Mapping[str, float], norm: float) -> tuple[str, bool]:
        """What is wrong with a step, or nothing, and whether it is a spike; a good step enters the running average."""
        bad = next(
            (k for k, v in scalars.items() if not math.isfinite(v)), "" if math.isfinite(norm) else "the gradient"
        )
        if bad:
            return f"{bad} became NaN or infinite", False
        loss, factor = scalars.get("loss", 0.0), self.settings.spike_factor
        if factor and self._counted >= _SPIKE_WARMUP and loss > factor * self._usual:
            return f"loss {loss:.3g} was more than {factor:g} times its running average", True
        self._counted += 1
        self._usual += (loss - self._usual) * max(0.02, 1 / self._counted)
        return "", False

    def _leave_out(self, step: int, problem: str, rate: float, apart: bool) -> None:
        """Count a bad step; too many end the training.

        Args:
            step: Its number.
            problem: What is wrong with it.
            rate: The learning rate.
            apart: Modules whose gradients are finite take it all the same, some of them have already.

        Raises:
            TrainingError: There were more than ``max_bad_steps``.
        """
        self.bad_steps += 1
        if self.bad_steps <= self.settings.max_bad_steps:
            logger.warning(
                "%s: %s at step %d; the step is left out%s (%d of at most %d)",
                *(self.label, problem, step, " where that is so" if apart else "", self.bad_steps),
                self.settings.max_bad_steps,
            )
            return
        self.bad_steps -= 1  # the state that is saved is the one before this step
        self.save(step)
        raise TrainingError(
            f"{self.label}: {problem} at step {step}; the state before it is kept in "
            f"{self.folder / f'step-{step}'}; lower the learning rate ({rate:.2g}) and run again"
        )

    @torch.no_grad()
    def _update_ema(self, step: int) -> None:
        if self.ema:
            decay = min(self.settings.ema_decay, (1 + step) / (10 + step))
            targets = [p.detach().float() for p in self.parameters.values()]
            average_into(list(self.ema.values()), targets, 1 - decay)

    @torch.no_grad()
    def load_ema(self) -> None:
        """Copy the moving average into the trained parameters (nothing without one)."""
        for key, average in self.ema.items():
            self.parameters[key].copy_(average)

    def save(self, step: int) -> None:
        """Write ``step-N`` and remove the oldest ones; the first process alone keeps whole tensors, in CPU memory.

        Raises:
            UserError: The folder cannot be written; all processes stop.
        """
        tensors: dict[str, Tensor] = {}
        for name, tensor in self._state().items():
            gathered = whole(tensor)
            if self.group.is_main:
                tensors[name] = gathered.cpu()
        self.group.on_main(lambda: self._write(step, tensors))

    def _state(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {f"model/{k}": p for k, p in self.parameters.items()}
        tensors |= {f"ema/{k}": v for k, v in self.ema.items()}
        return tensors | optimizer_tensors(self.optimizers, self.parameters)

    def _write(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        meta = {
            "step": step,
            "fingerprint": self.fingerprint,
            "settings": json.loads(json.dumps(asdict(self.settings))),
            "bad_steps": self.bad_steps,
            "usual_loss": [self._counted, self._usual],
        }
        write_checkpoint(self.folder, step, tensors, meta, self.settings.keep_checkpoints)

    @torch.no_grad()
    def resume(self) -> int:
        """Load the newest checkpoint of this fingerprint; return the step to go on from (0 without one)."""
        self.group.barrier()  # nobody writes any more
        newest = newest_checkpoint(self.folder, self.fingerprint)
        if newest is None:
            return 0
        path, tensors, meta = newest
        wanted = {*(f"model/{key}" for key in self.parameters), *(f"ema/{key}" for key in self.ema)}
        if not wanted <= tensors.keys() or not isinstance(meta.get("step"), int):
            raise ArtifactError(f"{path} belongs to another model; delete {self.folder} and run again")
        for key, parameter in self.parameters.items():
            parameter.copy_(part_of(tensors[f"model/{key}"], parameter))
        load_optimizer_tensors(self.optimizers, self.parameters, tensors)
        for key, average in self.ema.items():
            average.copy_(part_of(tensors[f"ema/{key}"], average))
        self.bad_steps = int(meta.get("bad_steps", 0))
        self._counted, self._usual = meta.get("usual_loss", (0, 0.0))
        return int(meta["step"])
