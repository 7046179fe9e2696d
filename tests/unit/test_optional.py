"""Packages that ppcl can do without."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from ppcl.common.optional import optional_module
from ppcl.errors import UserError


def test_a_package_that_is_there_is_imported() -> None:
    assert optional_module("json.decoder", "reading", "data").JSONDecodeError


def test_a_missing_package_is_to_be_installed() -> None:
    said = "capture.data needs the package nowhere_to_be_found, which is not installed; pip install 'ppcl[data]'"
    with pytest.raises(UserError, match=f"^{re.escape(said)}, or draw$"):
        optional_module("nowhere_to_be_found.inside", "capture.data", "data", "draw")


def test_one_that_cannot_be_imported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pyarrow beside an older numpy, or a package that itself misses another."""
    (tmp_path / "broken_package.py").write_text("raise ImportError('wants numpy 2\\nor newer')")
    (tmp_path / "poor_package.py").write_text("import nowhere_to_be_found")
    monkeypatch.syspath_prepend(tmp_path)
    said = r"broken_package, which cannot be imported: wants numpy 2 or newer; pip install --upgrade 'ppcl\[data\]'$"
    with pytest.raises(UserError, match=said):
        optional_module("broken_package", "capture.data", "data")
    with pytest.raises(UserError, match="cannot be imported: No module named 'nowhere_to_be_found'"):
        optional_module("poor_package", "capture.data", "data")
    for name in ("broken_package", "poor_package"):
        sys.modules.pop(name, None)
