"""How the program starts under a launcher, and how it ends: exit codes and last lines. No torch."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import typer

from ppcl.errors import UserError
from ppcl.training import stopping


def world() -> int:
    """How many processes the launcher says it started (torchrun and ``accelerate launch`` set ``WORLD_SIZE``)."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() else 1


def silence_others() -> None:
    """Let the first process alone speak; the others' bugs still show (:func:`guarded`)."""
    if world() > 1 and os.environ.get("RANK", "0") != "0":
        sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115


def refuse_several(command: str | None) -> None:
    """Keep a launcher from starting many of what works alone.

    Raises:
        UserError: There are several processes.
    """
    if world() > 1:
        raise UserError(f"ppcl {command} runs in one process, got {world()}; start it without the launcher")


def guarded(app: Callable[[], object]) -> None:
    """Run the command line: user errors are one line and exit code 2; SIGTERM is exit code 0."""
    try:
        with stopping.on_sigterm():
            app()
    except UserError as error:
        typer.echo(f"error: {' '.join(str(error).splitlines())}", err=True)
        _leave(2)
    except stopping.Stopped:
        typer.echo("stopped by SIGTERM; the same command goes on from here", err=True)
        _leave(0)
    except (KeyboardInterrupt, SystemExit) as stop:  # typer turns an interrupt into exit code 130
        if isinstance(stop, SystemExit) and stop.code != 130:
            raise
        typer.echo("interrupted; the same command goes on from here", err=True)
        _leave(130)
    except Exception:
        if stopping.requested():  # another process stopped first, and a message to it failed
            _leave(0)
        sys.stderr = sys.__stderr__
        raise


def _leave(code: int) -> NoReturn:
    """End the program with an exit code, also before the processes have left their group together.

    Closing the group here could wait for a process that is gone, and Python's way out with an open one aborts now and
    then (gloo's threads are still running), with SIGABRT for the exit code. So that way is not taken.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
