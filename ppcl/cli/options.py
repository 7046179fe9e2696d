"""What the commands share: their options, and how a run is opened from them."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from ppcl.config import parse_size
from ppcl.errors import ConfigError
from ppcl.training.launch import silence_others

logger = logging.getLogger(__name__)
Model = Annotated[str, typer.Argument(help="'emoji' (embedded), a pipeline folder, or a hub id")]
Out = Annotated[Path, typer.Option("--out", help="the run directory; run again to resume")]
Files = Annotated[list[Path] | None, typer.Option("--config", help="YAML file(s), later ones win")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="override a key, e.g. distill.local_steps=500")]
Prompts = Annotated[Path | None, typer.Option("--prompts", help="text file, one prompt a line")]
Keep = Annotated[float | None, typer.Option("--keep", help="share of the transformer's parameters, e.g. 0.6")]
Speedup = Annotated[float | None, typer.Option("--speedup", help="predicted speed-up, e.g. 1.7")]
Fit = Annotated[str | None, typer.Option("--fit", help="all weights within, e.g. 24GB")]
PushTo = Annotated[str | None, typer.Option("--push-to-hub", help="then upload the pipeline, e.g. user/name")]
Processes = Annotated[int | None, typer.Option("--processes", min=1, help="that must train (docs/training.md)")]
Private = Annotated[bool, typer.Option("--private", help="create that repository private")]
Table = Annotated[Path | None, typer.Option("--table", help="also write it here, e.g. docs/NAME.md")]
Seeds = Annotated[str, typer.Option("--seeds", help="training seeds, e.g. 0,1,2")]
Methods = Annotated[str | None, typer.Option("--methods", help="all, or some, e.g. ours,path,units-wanda")]
Budgets = Annotated[
    str | None, typer.Option("--budgets", help="of --methods; keep=0.7,keep=0.5,speedup=1.5 if left out")
]
Mode = Annotated[
    str | None,
    typer.Option("--mode", help="the search: optimal, paper, others (docs/extending.md), or FILE.py:Class"),
]


def resolve(
    model: str,
    files: list[Path] | None,
    sets: list[str] | None,
    keep: float | None,
    speedup: float | None,
    fit: str | None,
    mode: str | None,
) -> Any:
    """Build the config: built-in file for the embedded model, files, overrides, budget options."""
    from ppcl.config import load_config

    overrides = list(sets or [])
    given = {"keep": keep, "speedup": speedup, "fit_gb": parse_size(fit) if fit else None}
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) > 1:
        raise ConfigError(f"give one budget, got {len(chosen)}: --keep, --speedup and --fit exclude each other")
    if chosen:  # the option replaces a budget from a file
        overrides = [f"plan.{name}={chosen.get(name, 'null')}" for name in given] + overrides
    if mode:
        overrides.append(f"plan.mode={mode}")
    built_in = [Path(__file__).resolve().parents[1] / "assets" / "emoji.yaml"] if model == "emoji" else []
    return load_config([*built_in, *(files or [])], overrides)


def open_run(
    model: str,
    out: Path,
    files: list[Path] | None,
    sets: list[str] | None,
    prompts: Path | None,
    keep: float | None = None,
    speedup: float | None = None,
    fit: str | None = None,
    mode: str | None = None,
    processes: int | None = None,
) -> Any:
    """Open the run directory of a command; config errors come before heavy imports."""
    from ppcl.config import load_config  # noqa: F401 - config errors come before heavy imports
    from ppcl.run.stages import Run

    sets = [*(sets or []), *([f"processes={processes}"] if processes else [])]
    config = resolve(model, files, sets, keep, speedup, fit, mode)
    quiet_libraries()
    silence_others()
    run = Run(model, out, config, prompts, shlex.join(["ppcl", *sys.argv[1:]]))
    if run.group.size > 1 or config.processes:
        typer.echo(f"{run.group.size} process{'es' * (run.group.size > 1)} training", err=True)
    return run


def quiet_libraries() -> None:
    """Keep other libraries' chatter off the terminal; errors still show."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars in a log file are noise
    warnings.filterwarnings("ignore", message=".*torch_dtype.*")  # diffusers renames it; older versions need it
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")


def skip_peft() -> None:
    """Keep diffusers from importing peft, which takes three seconds and has nothing to do with a model's shapes."""
    from diffusers.utils import import_utils

    if hasattr(import_utils, "_peft_available"):
        import_utils._peft_available = False


def check_push(repo_id: str | None, private: bool) -> None:
    """Say early what would keep a push from working, since hours may lie before it."""
    quiet_libraries()
    if repo_id is None:
        if private:
            logger.warning("--private has no effect without --push-to-hub")
        return
    from ppcl.export.hub import check_repo_id, has_token

    check_repo_id(repo_id)
    if not has_token():
        logger.warning("no token for the hub yet: log in with `hf auth login` before the push, or set HF_TOKEN")


def push_folder(folder: Path, repo_id: str | None, private: bool) -> None:
    """Upload a pipeline folder, if a repository was given."""
    if repo_id is None:
        return
    from ppcl.export.card import PLACEHOLDER
    from ppcl.export.hub import push

    typer.echo(f"pushed:  {push(folder, repo_id, private, PLACEHOLDER)}")
