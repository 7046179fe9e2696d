"""Other sizes of one bundle: substitutes are taken out again."""

from __future__ import annotations

from dataclasses import replace

from ppcl.errors import ArtifactError
from ppcl.pruning.planner import select
from ppcl.student.assembly import (
    run_name,
)
from ppcl.student.bundle import Bundle
from ppcl.student.masks import zero_shares
from ppcl.student.plan import Segment


def check_pluggable(bundle: Bundle) -> None:
    """Make sure that substitutes can be taken out.

    Raises:
        ArtifactError: Weights of kept blocks were tuned for all substitutes together.
    """
    if bundle.tuned or bundle.lora:
        raise ArtifactError(
            "this bundle's kept blocks were tuned together with all of its substitutes, so none can be taken out; "
            "distill with --set distill.train=substitutes for a bundle of many sizes"
        )


def select_bundle(bundle: Bundle, kind: str, value: float) -> Bundle:
    """Take out substitutes until a smaller saving is left: the teacher's blocks go back in their places.

    Kept blocks with zeros save no parameters and stay; blocks that go back are the teacher's own, without zeros.

    Args:
        bundle: A bundle with all substitutes.
        kind: ``keep``, ``speedup`` or ``fit_gb``.
        value: The budget that is still met.

    Raises:
        BudgetError: All substitutes together do not meet it.
        ArtifactError: Weights of kept blocks were tuned for all substitutes together.
    """
    check_pluggable(bundle)
    dense = {name: tuple(_dense(s) for s in pieces) for name, pieces in bundle.plan.stacks.items()}
    plan = select(replace(bundle.plan, stacks=dense), kind, value)
    sparse = {(n, s.first): s for n, pieces in bundle.plan.stacks.items() for s in pieces if s.is_sparse_only}
    stacks = {
        name: tuple(s if s.is_substitute else sparse.get((name, s.first), s) for s in pieces)
        for name, pieces in plan.stacks.items()
    }
    plan = replace(plan, stacks=stacks, sparsity=bundle.plan.sparsity)
    members = [key for key, _ in Bundle(plan, {}).members()]
    names = tuple(f"{run_name(key)}/" for key in members)
    masks = {name: mask for name, mask in bundle.masks.items() if name.startswith(names)}
    plan = zero_shares(plan, masks, plan.predicted.params)
    return Bundle(plan, {key: bundle.substitutes[key] for key in members}, masks=masks)


def _dense(segment: Segment) -> Segment:
    return replace(segment, sparsity=0.0) if segment.is_sparse_only else segment
