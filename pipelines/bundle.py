"""Load a run's bundle and change its size while it is in use."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppcl.errors import ArtifactError, UserError

if TYPE_CHECKING:
    import torch

    from ppcl.student.bundle import Bundle
    from ppcl.teacher.families import Adapter


class Plugboard:
    """Puts a bundle's substitutes into a transformer and takes them out; nothing is copied.

    Args:
        transformer: The transformer in use, of a compressed class; it is changed in place.
        adapter: Its family.
        bundle: All substitutes.
    """

    def __init__(self, transformer: Any, adapter: Adapter, bundle: Bundle) -> None:
        self.transformer, self.adapter, self.bundle = transformer, adapter, bundle
        self.config = dict(transformer.config)  # the teacher's
        self.teacher = {spec.name: list(adapter.blocks(transformer, spec)) for spec in adapter.stacks}
        self.tails = {spec.name: list(adapter.all_blocks(transformer, spec)) for spec in adapter.stacks}
        self.tails = {name: blocks[len(self.teacher[name]) :] for name, blocks in self.tails.items()}
        self.active: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all substitutes, ``stack/first-last``."""
        from ppcl.student.assembly import run_name

        return tuple(run_name(key) for key, _ in self.bundle.members())

    def select(
        self,
        keep: float | None = None,
        speedup: float | None = None,
        fit_gb: float | None = None,
        active: Collection[str] | None = None,
    ) -> tuple[str, ...]:
        """Change the size, in place.

        Args:
            keep: Share of the teacher's parameters.
            speedup: Predicted speed-up.
            fit_gb: GB that all the pipeline's weights may take.
            active: Names of the substitutes to put in, instead of a budget.

        Returns:
            The names of the substitutes that are in now.

        Raises:
            UserError: Not exactly one choice was given, or a name is unknown.
            BudgetError: All substitutes together do not meet the budget.
        """
        from torch import nn

        from ppcl.pruning.selection import select_bundle
        from ppcl.student.assembly import run_name
        from ppcl.student.record import register_plan

        given = {"keep": keep, "speedup": speedup, "fit_gb": fit_gb, "active": active}
        chosen = {name: value for name, value in given.items() if value is not None}
        if len(chosen) != 1:
            raise UserError(f"select takes one of keep, speedup, fit_gb and active, got {len(chosen)}")
        if active is not None:
            unknown = sorted(set(active) - set(self.names))
            if unknown:
                raise UserError(f"there is no substitute '{unknown[0]}'; known: {', '.join(self.names)}")
            plan = _only(self.bundle, set(active))
        else:
            ((kind, value),) = chosen.items()
            plan = select_bundle(self.bundle, kind, value).plan  # type: ignore[arg-type]
        for name, segments in plan.stacks.items():
            blocks: list[nn.Module] = []
            for segment in segments:
                key = (name, segment.first, segment.last)
                blocks.append(self.bundle.substitutes[key] if segment.is_substitute else self.teacher[name][key[1]])
            setattr(self.transformer, name, nn.ModuleList([*blocks, *self.tails[name]]))
        register_plan(self.transformer, self.adapter, plan, self.config)
        self.active = tuple(
            run_name((n, s.first, s.last)) for n, pieces in plan.stacks.items() for s in pieces if s.is_substitute
        )
        return self.active


def _only(bundle: Bundle, active: set[str]) -> Any:
    """The plan with these substitutes alone."""
    from dataclasses import replace

    from ppcl.student.assembly import run_name
    from ppcl.student.plan import identity_segments
    from ppcl.student.prediction import predict

    stacks = {}
    for name, segments in bundle.plan.stacks.items():
        pieces: list[Any] = []
        for segment in segments:
            if segment.is_substitute and run_name((name, segment.first, segment.last)) not in active:
                pieces += identity_segments(segment.last + 1)[segment.first :]
            else:
                pieces.append(segment)
        stacks[name] = tuple(pieces)
    return replace(bundle.plan, stacks=stacks, predicted=predict(bundle.plan.model, stacks))


def load_bundle(
    run: str | Path,
    keep: float | None = None,
    speedup: float | None = None,
    fit_gb: float | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    teacher: str | None = None,
) -> Any:
    """Load the teacher's pipeline with a run's substitutes plugged in.

    Both the teacher's blocks and the substitutes are in memory, so that
    ``pipe.transformer.select(keep=0.5)`` changes the size at once. To save memory, write one size
    with ``ppcl export RUN --keep 0.5 --out DIR`` and load that.

    Args:
        run: The run directory, whose distill stage is done.
        keep: See :meth:`Plugboard.select`; all substitutes are put in if no budget is given.
        speedup: See there.
        fit_gb: See there.
        dtype: Of the weights; float32 on a CPU and bfloat16 elsewhere if None.
        device: Where the pipeline goes.
        teacher: Where the teacher is, if it or the run was moved; it must be the one that the run was made from.

    Returns:
        The pipeline; ``pipe.transformer.select`` is :meth:`Plugboard.select` and ``pipe.transformer.plugboard`` knows
        the substitutes' names; of a run of another transformer that one has them.

    Raises:
        ArtifactError: There is no bundle, or its kept blocks were tuned together with all substitutes.
        BudgetError: The bundle does not reach the budget.
        ModelError: The teacher is not there, or another one is.
    """
    from ppcl.common.devices import resolve_device
    from ppcl.pruning.selection import check_pluggable
    from ppcl.student.bundle import check_teacher, read_plan
    from ppcl.student.bundle import load_bundle as read_bundle
    from ppcl.teacher.families import adapter_for
    from ppcl.teacher.loading import load_pipeline
    from ppcl.teacher.origin import teacher_of

    folder = Path(run)
    if not (folder / "bundle" / "bundle.json").is_file():
        raise ArtifactError(f"{folder} has no bundle; run ppcl distill (or compress) first")
    place = resolve_device(device)
    model = teacher_of(folder, teacher)
    plan = read_plan(folder / "bundle")
    check_teacher(plan, model, folder / "bundle")
    pipeline = load_pipeline(model, place, dtype, component=plan.model.component)
    transformer = getattr(pipeline, plan.model.component)
    adapter = adapter_for(transformer)
    bundle = read_bundle(folder / "bundle", transformer, adapter)
    check_pluggable(bundle)
    board = _plugged_in(transformer, adapter, bundle, place)
    if keep is speedup is fit_gb is None:
        board.select(active=board.names)
    else:
        board.select(keep, speedup, fit_gb)
    return pipeline


def _plugged_in(transformer: Any, adapter: Any, bundle: Any, device: torch.device) -> Plugboard:
    """Give a transformer its substitutes, and the class that can have smaller modules."""
    from ppcl.modules.compressed import compress_class

    for block in bundle.substitutes.values():
        block.to(device=device, dtype=transformer.dtype).requires_grad_(False).eval()
    board = Plugboard(transformer, adapter, bundle)
    compress_class(transformer, transformer.config.get("pruning") or {})
    transformer.plugboard = board
    return board
