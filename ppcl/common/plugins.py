"""Names that stand for code: one of a table, or ``path/to/file.py:ClassName`` or ``module:ClassName``. No torch here.

A file that is named so is run as any Python module is, so only name files that you would run.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ppcl.common.files import digest
from ppcl.errors import ConfigError, nearest


@dataclass(frozen=True)
class Table(Mapping[str, Any]):
    """Names that stand for code, which is imported when it is asked for; code of the user's stands beside them.

    Attributes:
        noun: What they are names of, for messages.
        setting: The config key that names one.
        methods: That it must have, with the names of their arguments.
        places: ``module:attribute`` of each name.
    """

    noun: str
    setting: str
    methods: Mapping[str, tuple[str, ...]]
    places: Mapping[str, str]

    def __getitem__(self, name: str) -> Any:
        """The object of a name; of a class, a new instance."""
        return load_object(self.places[name], self.setting, self.methods)

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def named(self, name: str) -> Any:
        """The object of a name in the table, or of ``file.py:ClassName`` or ``module:ClassName``.

        Raises:
            ConfigError: There is none of this name, or it cannot be loaded.
        """
        if name in self:
            return self[name]
        if ":" not in name:
            raise ConfigError(f"{self.setting}={name}: {self._unknown(name)}")
        return load_object(name, self.setting, self.methods)

    def valid(self, name: str) -> str:
        """Return a name if it can stand for code; the code itself is looked for when it is loaded.

        Raises:
            ValueError: It cannot; the message names the nearest one of the table.
        """
        place, _, attribute = name.rpartition(":")
        if place and attribute.isidentifier():
            if place.endswith(".py") and not Path(place).expanduser().is_file():
                raise ValueError(f"there is no file {place}")
            return name
        if ":" in name or name.endswith(".py"):
            raise ValueError(f"got {name!r}, expected file.py:ClassName or module:ClassName")
        if name not in self:
            raise ValueError(self._unknown(name))
        return name

    def _unknown(self, name: str) -> str:
        return f"unknown {self.noun}{nearest(name, self)}; valid: {', '.join(self)}"


def source_of(name: str) -> str | None:
    """The text of the file that a name points into, which is part of what a result depends on; None without one.

    Raises:
        ConfigError: It cannot be read as UTF-8.
    """
    path = Path(name.rpartition(":")[0]).expanduser()
    if path.suffix != ".py" or not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from None


def load_object(name: str, setting: str, methods: Mapping[str, tuple[str, ...]]) -> Any:
    """Load what a name stands for; of a class, an instance.

    Args:
        name: A place and a class (or anything else that has the methods); paths are relative to the working directory.
        setting: The config key that it stands in, for messages.
        methods: Methods that it must have, with the names of their arguments.

    Raises:
        ConfigError: The file or module, the class, or a method is not there, or takes other arguments.
    """
    place, _, attribute = name.rpartition(":")
    module = _module(place, f"{setting}={name}")
    named = getattr(module, attribute, None)
    if named is None:
        defined = [n for n, value in vars(module).items() if all(hasattr(value, method) for method in methods)]
        alternatives = f"; with {' and '.join(methods)}: {', '.join(defined)}" if defined else ""
        raise ConfigError(f"{setting}={name}: {place} has no '{attribute}'{nearest(attribute, defined)}{alternatives}")
    try:
        plugin = named() if isinstance(named, type) else named
    except Exception as error:  # whatever the user's code raises is the user's to mend
        kind = "" if isinstance(error, TypeError) else f"{type(error).__name__}: "
        problem = f"{kind}{error}".replace("\n", " ")
        raise ConfigError(f"{setting}={name}: {problem}; expected a class that is made without arguments") from error
    for method, arguments in methods.items():
        _check_signature(plugin, method, arguments, f"{setting}={name}")
    return plugin


def _module(place: str, what: str) -> ModuleType:
    """Import a file or a module."""
    path = Path(place).expanduser()
    try:
        if path.suffix != ".py":
            return importlib.import_module(place)
        name = f"ppcl_external_{path.stem}_{digest(str(path.resolve()))[:8]}"  # files of one name are apart
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None  # it is a file of Python source by its name
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    except FileNotFoundError as error:
        raise ConfigError(f"{what}: there is no file {error.filename or path}") from error
    except Exception as error:  # whatever the user's code raises is the user's to mend
        problem = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise ConfigError(f"{what}: {place} cannot be imported: {problem}") from error


def _check_signature(plugin: Any, method: str, arguments: tuple[str, ...], what: str) -> None:
    wanted = f"{method}({', '.join(arguments)})"
    function = getattr(plugin, method, None)
    if not callable(function):
        raise ConfigError(f"{what} has no method {wanted}")
    signature = inspect.signature(function)
    try:
        signature.bind(*arguments)
    except TypeError:
        got = ", ".join(signature.parameters)
        raise ConfigError(f"{what}: got {method}({got}), expected {wanted} after self") from None
