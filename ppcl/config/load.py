"""From YAML files, overrides and the words of the command line to a config; what is wrong is said in one line."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ppcl.common.files import read_yaml
from ppcl.common.reading import MOST_YAML, parse_yaml, read_bytes
from ppcl.config.aliases import resolve_aliases
from ppcl.config.names import BUDGETS
from ppcl.config.schema import RunConfig
from ppcl.errors import ConfigError, nearest, shortened

CONFIGS = Path(__file__).resolve().parents[1] / "configs"  # those that come with ppcl
DEFAULTS = {"emoji": CONFIGS / "emoji.yaml"}  # what a model is compressed with where nothing else is said

_QUOTED = re.compile(r"'([^']+)'")


def _valid_keys(model: type[BaseModel], prefix: tuple[str, ...]) -> list[str]:
    for part in prefix:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _explain(error: ValidationError) -> str:
    """The first problem of a validation error as one line."""
    problem = error.errors()[0]
    location = tuple(str(part) for part in problem["loc"])
    dotted = ".".join(location)
    if problem["type"] == "extra_forbidden":
        valid = _valid_keys(RunConfig, location[:-1])
        return f"unknown key '{dotted}'{nearest(location[-1], valid)}; valid: {', '.join(valid)}"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    if isinstance(problem["input"], dict) and problem["type"] == "value_error":
        return message  # a rule about several keys names them itself
    if problem["type"] == "tuple_type":
        message = "expected a list, e.g. [a,b]"
    if problem["type"] == "literal_error":
        message += nearest(str(problem["input"]), _QUOTED.findall(problem["ctx"]["expected"]))
    dotted = ".".join([*location[:1], *(part for part in location[1:] if not part.isdigit())])  # not where in a list
    return f"{dotted} = {shortened(repr(problem['input']))}: {message}" if dotted else message


def parse_override(text: str) -> tuple[list[str], Any]:
    """Parse ``a.b=c``; the value is YAML, so numbers, booleans and lists work.

    Raises:
        ConfigError: There is no ``=`` or no key.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {shortened(repr(text))} is not of the form section.key=value")
    try:
        return key.strip().split("."), _number(parse_yaml(value))
    except ValueError as reason:
        raise ConfigError(f"--set {shortened(repr(text))}: the value is not valid YAML ({shortened(reason)})") from None


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text; read it as the number that was meant."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with nested ``changes`` applied."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def load_config(files: list[Path], overrides: list[str], defaults: dict[str, Any] | None = None) -> RunConfig:
    """Build the config from defaults, YAML files and ``a.b=c`` overrides, later ones winning.

    A file ``configs/...`` that is not here is the one of that name that comes with ppcl.

    Raises:
        ConfigError: A file is missing or damaged, a key unknown, or a value out of range.
    """
    data: dict[str, Any] = dict(defaults or {})
    for path in files:
        own = CONFIGS.parent / path if path.parts[:1] == (CONFIGS.name,) and not path.exists() else path
        try:
            loaded = parse_yaml(read_bytes(own, MOST_YAML).decode("utf-8-sig")) or {}
        except FileNotFoundError:
            raise ConfigError(f"config file {path} does not exist; those of ppcl are in {CONFIGS}") from None
        except (OSError, ValueError) as reason:
            raise ConfigError(f"config file {path} cannot be read as YAML: {shortened(reason)}") from None
        if not isinstance(loaded, dict):
            raise ConfigError(f"config file {path} must hold a mapping of sections, got {type(loaded).__name__}")
        data = merge(data, resolve_aliases(loaded))
    for text in overrides:
        keys, value = parse_override(text)
        change: Any = value
        for key in reversed(keys):
            change = {key: change}
        data = merge(data, resolve_aliases(change))
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def for_model(model: str, config: RunConfig) -> RunConfig:
    """The config with the model's own defaults in place of everything that nobody set.

    Args:
        model: ``emoji``, a folder, or a hub id; only the embedded model has defaults of its own.
        config: From :func:`load_config`, or what this function made of it: it stays the same then.

    Raises:
        ConfigError: The settings do not fit together with these defaults.
    """
    if model not in DEFAULTS:
        return config
    defaults = read_yaml(DEFAULTS[model])
    given = config.model_dump(exclude_unset=True)
    if given.get("plan", {}).keys() & set(BUDGETS):  # one budget replaces another
        defaults["plan"] = {key: value for key, value in defaults["plan"].items() if key not in BUDGETS}
    try:
        return RunConfig.model_validate(merge(defaults, given))
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def parse_size(text: str) -> float:
    """Turn ``24GB``, ``24`` or ``800MB`` into GB (1e9 bytes).

    Raises:
        ConfigError: It is not a size.
    """
    units = {"gb": 1.0, "mb": 1e-3, "": 1.0}
    number = text.strip().lower().rstrip("bgm")
    unit = text.strip().lower()[len(number) :]
    try:
        size = float(number) * units[unit]
    except (KeyError, ValueError):
        size = 0.0
    if not 0 < size < math.inf:
        raise ConfigError(f"--fit {shortened(repr(text))} is not a size; write it like 24GB or 800MB")
    return size


def parse_seeds(text: str) -> tuple[int, ...]:
    """Turn ``0,1,2`` into seeds.

    Raises:
        ConfigError: It is not a list of different whole numbers from 0 on.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 16 for part in parts) or len(set(map(int, parts))) < len(parts):
        raise ConfigError(f"--seeds {shortened(repr(text))} is not a list of different seeds; write it like 0,1,2")
    return tuple(map(int, parts))


def drawn_seeds(model: str, config: RunConfig) -> int:
    """Seeds whose pictures of the teacher come with ppcl: those of the embedded one by its own settings."""
    if model not in DEFAULTS:
        return 0
    own = for_model(model, load_config([], []))
    sections = {
        "capture": ("height", "width", "guidance_scale", "negative_prompt"),
        "evaluate": ("num_prompts", "num_inference_steps"),
    }
    one, two = (
        [getattr(getattr(settings, section), name) for section, names in sections.items() for name in names]
        for settings in (own, config)
    )
    return own.evaluate.teacher_seeds if one == two and config.seed == own.seed else 0
