"""Settings that may be written in two ways."""

from __future__ import annotations

import logging
from typing import Any

from ppcl.errors import ConfigError

logger = logging.getLogger(__name__)


def resolve_aliases(sections: dict[str, Any]) -> dict[str, Any]:
    """Resolve the other ways.

    * ``plan.criterion`` is ``fit.criterion``: plans choose among what the fit stage scored and measured;
    * ``sparsity`` is ``distill.sparsity``, which the distill stage reads;
    * ``quantize`` is ``export.quantize``.

    Args:
        sections: As a file or an override gives them.

    Returns:
        Sections without aliases.

    Raises:
        ConfigError: Both ways are there and say different things.
    """
    sections = _short_quantize(_short_sparsity(sections))
    plan, fit = sections.get("plan"), sections.get("fit") or {}
    if not isinstance(plan, dict) or "criterion" not in plan or not isinstance(fit, dict):
        return sections
    name = plan["criterion"]
    if fit.get("criterion", name) != name:
        raise ConfigError(
            f"plan.criterion={name} and fit.criterion={fit['criterion']} are one setting; give one of them"
        )
    logger.warning(
        "plan.criterion=%s means fit.criterion=%s: the fit stage scores units, plans choose among what it measured",
        *(name, name),
    )
    left = {key: value for key, value in plan.items() if key != "criterion"}
    return {**sections, "plan": left, "fit": {**fit, "criterion": name}}


def _short_sparsity(sections: dict[str, Any]) -> dict[str, Any]:
    short, distill = sections.get("sparsity"), sections.get("distill") or {}
    if not isinstance(short, dict) or not isinstance(distill, dict):
        return sections
    long = distill.get("sparsity") or {}
    if not isinstance(long, dict):
        return sections
    for key in short.keys() & long.keys():
        if short[key] != long[key]:
            raise ConfigError(
                f"sparsity.{key}={short[key]} and distill.sparsity.{key}={long[key]} are one setting; give one of them"
            )
    rest = {key: value for key, value in sections.items() if key != "sparsity"}
    return {**rest, "distill": {**distill, "sparsity": {**long, **short}}}


def _short_quantize(sections: dict[str, Any]) -> dict[str, Any]:
    export = sections.get("export") or {}
    if "quantize" not in sections or not isinstance(export, dict):
        return sections
    kind = sections["quantize"]
    if export.get("quantize", kind) != kind:
        raise ConfigError(f"quantize={kind} and export.quantize={export['quantize']} are one setting; give one of them")
    rest = {key: value for key, value in sections.items() if key != "quantize"}
    return {**rest, "export": {**export, "quantize": kind}}
