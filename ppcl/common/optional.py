"""Packages that ppcl can do without."""

from __future__ import annotations

import importlib
from typing import Any

from ppcl.errors import UserError


def optional_module(name: str, needed_for: str, extra: str, otherwise: str = "") -> Any:
    """Import a module of an optional package.

    Args:
        name: Of the module.
        needed_for: What cannot be done without it.
        extra: Of ppcl, that installs it.
        otherwise: What to do instead of installing it.

    Raises:
        UserError: Its package is not installed, or cannot be imported, which newer or older packages beside it cause.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        absent = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package
        problem = "is not installed" if absent else f"cannot be imported: {error}".replace("\n", " ")
        remedy = f"pip install {'' if absent else '--upgrade '}'ppcl[{extra}]'"
        remedy += f", or {otherwise}" if otherwise else ""
        raise UserError(f"{needed_for} needs the package {package}, which {problem}; {remedy}") from None
