"""A criterion from outside the package: ``path/to/file.py:ClassName`` or ``module:ClassName``.

The file is run as any Python module is, so only name files that you would run.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from ppcl.criteria.base import Criterion, Site
from ppcl.errors import ConfigError, nearest

ARGUMENTS = ("transformer", "adapter", "sites", "batches", "seed")


def load_external(name: str) -> Criterion:
    """Load a criterion that is not in the table.

    Args:
        name: What stands in ``fit.criterion``; paths are relative to the working directory.

    Raises:
        ConfigError: The file or module, the class, or the method is not there, or takes other arguments.
    """
    place, _, attribute = name.rpartition(":")
    module = _module(place, name)
    found = getattr(module, attribute, None)
    if found is None:
        defined = [n for n, value in vars(module).items() if hasattr(value, "score")]
        near = nearest(attribute, defined)
        known = f"; with a method score: {', '.join(defined)}" if defined else ""
        raise ConfigError(f"fit.criterion={name}: {place} has no '{attribute}'{near}{known}")
    try:
        criterion = found() if isinstance(found, type) else found
    except TypeError as error:
        raise ConfigError(f"fit.criterion={name}: {error}; expected a class that is made without arguments") from error
    _check_signature(criterion, name)
    return cast(Criterion, criterion)


def _module(place: str, name: str) -> ModuleType:
    """Import a file or a module."""
    path = Path(place).expanduser()
    try:
        if path.suffix != ".py":
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(f"ppcl_criterion_{path.stem}", path)
        assert spec is not None  # it is a file of Python source by its name
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    except FileNotFoundError as error:
        raise ConfigError(f"fit.criterion={name}: there is no file {error.filename or path}") from error
    except Exception as error:  # whatever the user's code raises is the user's to mend
        problem = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise ConfigError(f"fit.criterion={name}: {place} cannot be imported: {problem}") from error


def _check_signature(criterion: Any, name: str) -> None:
    method = getattr(criterion, "score", None)
    wanted = f"score({', '.join(ARGUMENTS)})"
    if not callable(method):
        raise ConfigError(f"fit.criterion={name} has no method {wanted}")
    signature = inspect.signature(method)
    try:
        signature.bind(*ARGUMENTS)
    except TypeError:
        got = ", ".join(signature.parameters)
        raise ConfigError(f"fit.criterion={name}: got score({got}), expected {wanted} after self") from None


def checked(scores: Any, sites: Sequence[Site], name: str) -> list[Tensor]:
    """Scores as they are used: one float64 tensor on the CPU for each site.

    Args:
        scores: What a criterion returned.
        sites: What it was given.
        name: Of the criterion.

    Raises:
        ConfigError: There are not as many as sites, one is not (units,), or some are NaN or infinite.
    """
    if not isinstance(scores, list | tuple) or len(scores) != len(sites):
        got = str(len(scores)) if isinstance(scores, list | tuple) else type(scores).__name__
        raise ConfigError(f"fit.criterion={name}: got {got} for {len(sites)} sites; expected a list of one tensor each")
    found = []
    for score, site in zip(scores, sites, strict=True):
        where = f"fit.criterion={name}: {site.stack}.{site.block}.{site.path}"
        if not isinstance(score, Tensor) or tuple(score.shape) != (site.units.count,):
            got = str(tuple(score.shape)) if isinstance(score, Tensor) else type(score).__name__
            raise ConfigError(f"{where}: got {got}, expected one score for each of {site.units.count} units")
        bad = int((~torch.isfinite(score)).sum())
        if bad:
            raise ConfigError(f"{where}: {bad} of {len(score)} scores are NaN or infinite; expected numbers")
        found.append(score.detach().double().cpu())
    return found
