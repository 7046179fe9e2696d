"""How a finished run ends: nobody reads what it prints, the terminal knows no accents, a signal was swallowed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ppcl.errors import ConfigError
from ppcl.training import stopping
from ppcl.training.distributed import connect
from ppcl.training.stopping import Stopped, deferred, on_signals

ROOT = Path(__file__).resolve().parents[2]
# what a finished run prints, and what comes after it
ENDING = """
import sys
from pathlib import Path
from ppcl.training.launch import guarded

def end():
    import typer
    from rich.console import Console
    from rich.table import Table
    table = Table(title="128 prompts")
    for name in ("FID \\N{DOWNWARDS ARROW}", "teacher"):
        table.add_column(name)
    for number in range(3000):
        table.add_row("23.3 \\N{PLUS-MINUS SIGN} 0.59", "\\N{CAT FACE} \\udcff")
    Console(highlight=False, markup=False).print(table)
    Console(stderr=True).print("\\N{CAT FACE}")
    typer.echo("report:  \\N{CAT FACE}")
    typer.echo("\\N{CAT FACE}", err=True)
    Path(sys.argv[1]).write_text("pushed")

guarded(end)
"""


def finish(arguments: str, place: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """End a run in a shell that does something with its streams."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "CODE": ENDING, "PLACE": str(place), **environment}
    command = f'"{sys.executable}" -c "$CODE" "$PLACE" {arguments}'
    return subprocess.run(["bash", "-o", "pipefail", "-c", command], env=settings, capture_output=True, check=False)


UTF8, ASCII = {"PYTHONIOENCODING": "utf-8"}, {"PYTHONIOENCODING": "ascii"}
OLD = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        *((how, UTF8) for how in (">&-", "2>&-", "<&- >&- 2>&-", "| head -n 1", "| true", "2>&1 | head -c 1", "")),
        *((how, ASCII) for how in ("", "| head -n 1", ">&- 2>&-")),
        *((how, OLD) for how in ("", "> /dev/null")),
    ],
)
def test_a_finished_run_ends_well_whoever_reads(arguments: str, environment: dict[str, str], tmp_path: Path) -> None:
    done = finish(arguments, tmp_path / "place", **environment)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr[-2000:]
    assert (tmp_path / "place").read_text() == "pushed"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk here")
def test_a_full_disk_is_not_silent(tmp_path: Path) -> None:
    done = finish("> /dev/full", tmp_path / "place")
    assert done.returncode != 0
    assert b"No space left" in done.stderr


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """A shell's background jobs ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def swallow_in_an_except() -> None:
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)


def swallow_in_a_destructor() -> None:
    class Loud:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                time.sleep(0)

    Loud()


def swallow_sigterm() -> None:
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("swallow", "raised"),
    [
        (swallow_in_an_except, KeyboardInterrupt),
        (swallow_in_a_destructor, KeyboardInterrupt),
        (swallow_sigterm, Stopped),
    ],
)
def test_a_signal_that_was_swallowed_comes_again(
    swallow: Callable[[], None], raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "AGAIN", 0.2)
    began = time.monotonic()
    with pytest.raises(raised), on_signals():
        swallow()
        while time.monotonic() - began < 10:
            time.sleep(0.01)
    assert time.monotonic() - began < 5
    time.sleep(0.5)  # nothing comes after the block


def test_a_signal_on_its_way_out_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What closes files while an exception passes takes its time, and is not torn apart."""
    monkeypatch.setattr(stopping, "AGAIN", 0.05)
    steps = []
    with pytest.raises(KeyboardInterrupt), on_signals():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        finally:
            for step in range(5):
                time.sleep(0.1)
                steps.append(step)
    assert steps == [0, 1, 2, 3, 4]


def test_a_deferred_sigterm_stays_deferred_and_sigint_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "AGAIN", 0.05)
    steps = []
    with pytest.raises(Stopped), on_signals(), deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        for step in range(3):
            time.sleep(0.1)
            steps.append(step)
    assert steps == [0, 1, 2]
    with pytest.raises(KeyboardInterrupt), on_signals(), deferred():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


LAUNCHED = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"RANK": None, "MASTER_ADDR": None, "MASTER_PORT": None}, "RANK is ''"),
        ({"RANK": None}, "RANK is ''"),
        ({"RANK": "2"}, "RANK is '2'"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "one"}, "RANK is 'one'"),
        ({"RANK": "9" * 5000}, "RANK is"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT is ''"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"RANK": "\n"}, "RANK is"),
    ],
)
def test_a_launcher_that_is_none_is_one_line(
    changes: dict[str, str | None],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    ppcl: Callable[..., tuple[object, str, str]],
    tmp_path: Path,
) -> None:
    for name, value in {**LAUNCHED, **changes}.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE is 2, but [^\n]*: unset WORLD_SIZE, or start the command with"):
        connect(cpu=True)
    code, _, err = ppcl("compress", "emoji", "--out", tmp_path / "run")
    (line,) = err.splitlines()
    assert (code, says in line) == (2, True), err
    assert not (tmp_path / "run").exists()


def test_processes_that_somebody_joined_without_gloo_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("ppcl.training.distributed.PartialState", lambda **_: None)
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(
        ConfigError, match=r"^the processes were joined over cuda:nccl before; ppcl needs cpu:gloo,cuda:"
    ):
        connect(cpu=False)


@pytest.mark.parametrize("value", ["0", "1", "", "two", "-2", "9" * 5000])
def test_a_world_of_one_needs_no_launcher(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    assert connect(cpu=True).size == 1
