"""Old import paths of docs/extending.md, and of scripts: they work for one more release, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {  # old module -> where its names are now, looked for in this order
    "ppcl.adapters": ("ppcl.teacher.families",),
    "ppcl.artifacts": (
        *("ppcl.student.plan", "ppcl.teacher.model_info", "ppcl.analysis.artifacts", "ppcl.pruning.artifacts"),
        "ppcl.common.artifacts",
    ),
    "ppcl.bundle": ("ppcl.student.bundle",),
    "ppcl.compressed": ("ppcl.modules.compressed",),
    "ppcl.cost": ("ppcl.student.prediction", "ppcl.teacher.flops"),
    "ppcl.criteria": ("ppcl.pruning.criteria",),
    "ppcl.criteria.base": ("ppcl.pruning.criteria.base",),
    "ppcl.criteria.gradients": ("ppcl.pruning.criteria.gradients",),
    "ppcl.planning.allocations": ("ppcl.pruning.allocations",),
    "ppcl.prompts": ("ppcl.capture.prompts",),
    "ppcl.searches": ("ppcl.pruning.searches",),
    "ppcl.searches.base": ("ppcl.pruning.searches.base",),
    "ppcl.slicing": ("ppcl.modules.slicing",),
    "ppcl.trees": ("ppcl.teacher.call_arguments",),
    "ppcl.width": ("ppcl.modules.replacements",),
}
MOVED_WITHIN = {  # modules that became packages
    "ppcl.capture": ("ppcl.teacher.calls", "ppcl.capture.states", "ppcl.capture.trajectories"),
    "ppcl.student": ("ppcl.student.assembly",),
    "ppcl.teacher": ("ppcl.teacher.loading", "ppcl.teacher.calls", "ppcl.teacher.description"),
}


def moved_attribute(module: str, name: str) -> Any:
    """A name of a module that became a package.

    Raises:
        AttributeError: There is no such name.
    """
    if name.startswith("__"):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return _found(module, name, MOVED_WITHIN[module])


def _found(old: str, name: str, places: Sequence[str]) -> Any:
    for place in places:
        module = importlib.import_module(place)
        if hasattr(module, name):
            warnings.warn(f"{old}.{name} is {place}.{name} now; the old name goes with the next release", stacklevel=3)
            return getattr(module, name)
    raise AttributeError(f"module {old!r} has no attribute {name!r}")


class _MovedModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _found(self.__name__, name, MOVED[self.__name__])


class _Finder(MetaPathFinder, Loader):
    """Finds what is in ``MOVED``, and the packages above it."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        is_package = any(old.startswith(f"{fullname}.") for old in MOVED)
        if fullname in MOVED or is_package:
            return ModuleSpec(fullname, self, is_package=is_package)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _MovedModule(spec.name) if spec.name in MOVED else ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: names are looked for when they are asked for."""


def install() -> None:
    """Let the old paths be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
