"""How the program starts under a launcher, and how it ends: exit codes and last lines. No torch."""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import typer

from ppcl.common.outside import printable
from ppcl.errors import ConfigError, UserError
from ppcl.training import stopping


def world() -> int:
    """How many processes the launcher says it started (torchrun and ``accelerate launch`` set ``WORLD_SIZE``)."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() and len(text) < 7 else 1


def check_launcher() -> None:
    """Refuse what a launcher did not set whole: the processes would wait for others that nobody started.

    Raises:
        ConfigError: ``WORLD_SIZE`` says that there are several, and what else they need is missing or wrong.
    """
    if world() < 2:
        return
    rank, port = (os.environ.get(name, "") for name in ("RANK", "MASTER_PORT"))
    wrong = ""
    if not (rank.isdecimal() and len(rank) < 7 and int(rank) < world()):
        wrong = f"RANK is {rank!r}"
    elif not os.environ.get("MASTER_ADDR"):
        wrong = "MASTER_ADDR is not set"
    elif not (port.isdecimal() and len(port) < 6):
        wrong = f"MASTER_PORT is {port!r}"
    if wrong:
        raise ConfigError(
            f"WORLD_SIZE is {world()}, but {printable(wrong)}: unset WORLD_SIZE, or start the command with "
            f"python -m torch.distributed.run --standalone --nproc_per_node {world()} -m ppcl"
        )


class _Sink(io.FileIO):
    """The standard output or error, from which somebody may stop reading: what is written is lost then, no more."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EBADF):
                raise
            return memoryview(data).nbytes


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Let no line that cannot be shown end a run: a closed stream is silent, an ASCII one has numbers of characters."""
    for number in range(3):  # or the next file that is opened has its number, and is written to by all that prints
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = lasting = _lasting(before[0], 1), _lasting(before[1], 2)
    try:
        yield
    finally:
        for stream in lasting:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


def _lasting(output: Any, number: int) -> Any:
    if output is None or output.closed:
        return Path(os.devnull).open("w", encoding="utf-8", errors="backslashreplace")
    if os.name == "nt" or output not in (sys.__stdout__, sys.__stderr__):
        return output  # somebody else's: a console of Windows, a test, a notebook
    with contextlib.suppress(OSError, ValueError):
        output.flush()
    sink = io.BufferedWriter(_Sink(number, "w", closefd=False))
    return io.TextIOWrapper(sink, output.encoding, "backslashreplace", line_buffering=True)


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
        raise UserError(
            f"ppcl {command} runs in one process, got {world()}; start it without the launcher, or unset WORLD_SIZE"
        )


def guarded(app: Callable[[], object]) -> None:
    """Run the command line: user errors are one line and exit code 2; SIGTERM is exit code 0."""
    with lasting_streams():
        _guarded(app)


def _guarded(app: Callable[[], object]) -> None:
    try:
        with stopping.on_signals():
            app()
    except UserError as error:
        typer.echo(f"error: {printable(str(error))}", err=True)
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
