"""What the commands share: their options, each written once, and how a run is opened from them.

A command takes dataclasses of options; :func:`expanded` turns each of their fields into an option of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import os
import shlex
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ppcl.config import parse_size
from ppcl.config.names import BUDGETS
from ppcl.errors import ConfigError
from ppcl.training.launch import silence_others

logger = logging.getLogger(__name__)
Model = Annotated[str, typer.Argument(help="'emoji' (embedded), a pipeline folder, or a hub id")]
Out = Annotated[Path, typer.Option("--out", help="the run directory; run again to resume")]
Table = Annotated[Path | None, typer.Option("--table", help="also write it here, e.g. docs/NAME.md")]
Seeds = Annotated[str, typer.Option("--seeds", help="training seeds, e.g. 0,1,2")]
Keep = Annotated[float | None, typer.Option("--keep", help="share of the transformer's parameters, e.g. 0.6")]
Teacher = Annotated[str | None, typer.Option("--teacher", help="where a moved run finds its teacher now")]
Rounds = Annotated[int | None, typer.Option("--rounds", help="times to prune and recover on the way to the budget")]
Component = Annotated[
    str | None, typer.Option("--component", help="which transformer, of two (Wan 2.2): transformer_2, or both")
]
Processes = Annotated[int | None, typer.Option("--processes", min=1, help="that must train (docs/training.md)")]


@dataclass(frozen=True)
class Settings:
    """Where settings come from: files, overrides, and the prompts."""

    config: Annotated[list[Path] | None, typer.Option("--config", "-c", help="YAML file(s), later ones win")] = None
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="override a key, e.g. distill.local_steps=500")
    ] = None
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="one prompt a line; or .jsonl, .json, .csv, .tsv")
    ] = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was given."""
        return self == type(self)()


@dataclass(frozen=True)
class Budget:
    """What the plan must meet, and who looks for it."""

    keep: Keep = None
    speedup: Annotated[float | None, typer.Option("--speedup", help="predicted speed-up, e.g. 1.7")] = None
    fit: Annotated[str | None, typer.Option("--fit", help="all weights within, e.g. 24GB")] = None
    mode: Annotated[
        str | None,
        typer.Option("--mode", help="the search: optimal, paper, others (docs/extending.md), or FILE.py:Class"),
    ] = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was given."""
        return self == type(self)()

    def given(self) -> dict[str, float]:
        """The budgets that were given, by the name of their setting."""
        size = None if self.fit is None else parse_size(self.fit)
        values = {"keep": self.keep, "speedup": self.speedup, "fit_gb": size}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Push:
    """Where the finished pipeline is uploaded to."""

    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", help="then upload the pipeline, e.g. user/name")
    ] = None
    private: Annotated[bool, typer.Option("--private", help="create that repository private")] = False

    def check(self) -> None:
        """Say early what would keep a push from working, since hours may lie before it."""
        quiet_libraries()
        if self.push_to_hub is None:
            if self.private:
                logger.warning("--private has no effect without --push-to-hub")
            return
        from ppcl.export.hub import check_repo_id, has_token

        check_repo_id(self.push_to_hub)
        if not has_token():
            logger.warning("no token for the hub yet: log in with `hf auth login` before the push, or set HF_TOKEN")

    def upload(self, folder: Path) -> None:
        """Upload a pipeline folder, if a repository was given."""
        if self.push_to_hub is None:
            return
        from ppcl.export.card import PLACEHOLDER
        from ppcl.export.hub import push

        url = push(folder, self.push_to_hub, self.private, PLACEHOLDER)
        typer.echo(f"pushed:  {url}")


@dataclass(frozen=True)
class OtherFormat:
    """What a finished pipeline is written as for other programs."""

    format: Annotated[
        str | None, typer.Option("--format", help="of a finished one: diffusers, single-file, comfyui or gguf")
    ] = None
    gguf_type: Annotated[
        str | None, typer.Option("--gguf-type", help="of the blocks' matrices: F16 (default), BF16, Q8_0, Q4_0 ...")
    ] = None

    def is_given(self) -> bool:
        """Whether a format was given.

        Raises:
            ConfigError: An option of one format was given without it.
        """
        if self.gguf_type is not None and self.format != "gguf":
            raise ConfigError("--gguf-type has no effect without --format gguf; give both or none")
        return self.format is not None


def expanded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn a command's dataclasses of options into single options, as typer reads them off a signature."""
    hints = typing.get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        kind = groups.get(parameter.name)
        if kind is None:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
            continue
        of_fields = typing.get_type_hints(kind, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=of_fields[field.name]
            )
            for field in dataclasses.fields(kind)
        ]

    @functools.wraps(command)
    def called(**values: Any) -> None:
        for name, kind in groups.items():
            fields = [field.name for field in dataclasses.fields(kind)]
            values[name] = kind(**{field: values.pop(field) for field in fields})
        command(**values)

    ordered = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    called.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    del called.__wrapped__  # type: ignore[attr-defined]
    return called


def resolve(
    model: str,
    settings: Settings,
    budget: Budget,
    processes: int | None = None,
    rounds: int | None = None,
    component: str | None = None,
) -> Any:
    """Build the config: the model's own defaults, files, overrides, budget options.

    Raises:
        ConfigError: A key or value cannot be used, or there are several budgets.
    """
    from ppcl.config import for_model, load_config

    overrides = list(settings.overrides or [])
    given = budget.given()
    if len(given) > 1:
        raise ConfigError(f"give one budget, got {len(given)}: --keep, --speedup and --fit exclude each other")
    if given:  # the option replaces a budget from a file
        overrides = [f"plan.{name}={given.get(name, 'null')}" for name in BUDGETS] + overrides
    if budget.mode is not None:
        overrides.append(f"plan.mode={budget.mode}")
    if rounds is not None:
        overrides.append(f"plan.rounds={rounds}")
    if component is not None:
        overrides.append(f"capture.component={component}")
    if processes:
        overrides.append(f"processes={processes}")
    return for_model(model, load_config(settings.config or [], overrides))


def open_run(
    model: str, out: Path, settings: Settings, budget: Budget | None = None, processes: int | None = None
) -> Any:
    """Open the run directory of a command; config errors come before heavy imports."""
    config = resolve(model, settings, budget or Budget(), processes)
    import ppcl.run

    quiet_libraries()
    silence_others()
    return _said(ppcl.run.open_run(model, out, config, settings.prompts, shlex.join(["ppcl", *sys.argv[1:]])))


def open_rounds(
    model: str,
    out: Path,
    settings: Settings,
    budget: Budget,
    processes: int | None,
    rounds: int | None,
    component: str | None,
) -> Iterator[Any]:
    """Open the runs of ``ppcl compress``, one after the other; see :func:`open_run`."""
    config = resolve(model, settings, budget, processes, rounds, component)
    import ppcl.run

    quiet_libraries()
    silence_others()
    for number, step in enumerate(
        ppcl.run.open_rounds(model, out, config, settings.prompts, shlex.join(["ppcl", *sys.argv[1:]]))
    ):
        if not number:
            _said(step.run)
            if not any(getattr(config.plan, name) for name in BUDGETS):
                typer.echo("no budget was given: --{} {:g}".format(*config.plan.budget), err=True)
        yield step


def _said(run: Any) -> Any:
    """The run, after saying how many processes train it."""
    if run.group.size > 1 or run.config.processes:
        typer.echo(f"{run.group.size} process{'es' * (run.group.size > 1)} training", err=True)
    return run


def quiet_libraries() -> None:
    """Keep other libraries' chatter off the terminal; errors still show."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars in a log file are noise
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")


def skip_peft() -> None:
    """Keep diffusers from importing peft, which takes three seconds and has nothing to do with a model's shapes."""
    from diffusers.utils import import_utils

    if hasattr(import_utils, "_peft_available"):
        import_utils._peft_available = False
