"""What the tests of bad inputs share: the command line in this process, and a finished run to damage."""

import hashlib
import shutil
import sys
from pathlib import Path

import pytest
from tiny_pipelines import short_texts

from ppcl import cli


def tree(folder):
    """Digest of every file but the lock by relative name; empty if there is nothing."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file() and not p.name.startswith(".lock") and "checkpoints" not in p.parts
    }


@pytest.fixture(scope="module", autouse=True)
def few_text_tokens():
    """Tiny pipelines work on pictures, not on padding."""
    with pytest.MonkeyPatch.context() as patch:
        short_texts(patch)
        yield


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """Call the command line in this process; returns (exit code, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["ppcl", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, capsys.readouterr().err

    return call


@pytest.fixture
def refuses(run_cli):
    """Call the command line, which must refuse in one line that holds all of ``says``."""

    def call(*arguments, says=(), watch=None):
        before = tree(watch) if watch else None
        code, err = run_cli(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2, err
        assert len(lines) == 1, err
        assert err.rstrip().endswith(lines[0])
        assert "Traceback" not in err
        for text in says:
            assert text in lines[0], lines[0]
        if watch:
            assert tree(watch) == before
        return lines[0]

    return call


@pytest.fixture
def common(tiny_model, prompts_file, small_config):
    """Options that make a good run."""
    return (tiny_model, "--config", small_config, "--prompts", prompts_file)


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """A finished run that a test may damage."""
    return shutil.copytree(finished_run, tmp_path / "run")
