"""Errors meant for people: what happened, what was expected, and the remedy.

Everything a user can cause derives from :class:`UserError`; the command line prints
its one line and exits with code 2. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can mend. The message is one line: what, got, expected, remedy."""


class ConfigError(UserError):
    """A configuration key or value that cannot be used."""


class ArtifactError(UserError):
    """A file of a run directory that is missing, damaged, or of another run."""


class ModelError(UserError):
    """A model that cannot be found, loaded, or compressed."""


class BudgetError(UserError):
    """A budget that no plan can meet."""


class HubError(UserError):
    """A finished pipeline that could not be pushed to the hub."""


class TrainingError(UserError):
    """Training that cannot go on (NaN losses, for example)."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest valid name, or an empty string."""
    match = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""


def shortened(value: object, most: int = 200) -> str:
    """Return a value as the text of a message has it: one line, the middle of a long one left out."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
