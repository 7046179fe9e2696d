"""README and docs: short enough, no link leads nowhere, no command names what is not there, the site has all pages."""

from __future__ import annotations

import pydoc
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from ppcl.cli import app
from ppcl.config.reference import settings_reference

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
COMMANDS = typer.main.get_command(app).commands


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings make."""
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


def test_readme_is_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link} does not exist"
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{link} has no such heading"


def test_every_page_can_be_reached() -> None:
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page not in reached:
            reached.add(page)
            targets = [(page.parent / link.partition("#")[0]).resolve() for link in links(page)]
            ahead += [target for target in targets if target.suffix == ".md"]
    assert set(PAGES) - reached == set()


def nav_pages(entry: object) -> list[str]:
    """The pages of a part of mkdocs' ``nav``."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in nav_pages(part)]


def test_the_site_has_every_page_once() -> None:
    nav = yaml.safe_load((ROOT / ".ci" / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(nav_pages(nav)) == sorted(pages)


def test_the_reference_of_python_names_what_exists() -> None:
    for name in re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE):
        assert pydoc.locate(name), name


def commands(page: Path) -> list[list[str]]:
    """The calls of ppcl in a page's shell blocks and in its tables, word by word."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    lines += re.findall(r"`(ppcl [a-z]+ [^`]+)`", text)
    calls = [re.sub(r"^.*?\bppcl ", "", line) for line in lines if re.search(r"(^|[ /])ppcl [a-z]", line)]
    return [shlex.split(call, comments=True) for call in calls]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_have_the_options_that_pages_name(page: Path) -> None:
    for name, *words in commands(page):
        assert name in COMMANDS, f"there is no ppcl {name}"
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        given = {option for word in words for option in re.findall(r"(?<![\w-])(--?[a-z][\w-]*)", word.split("=")[0])}
        assert given <= known, f"ppcl {name} has no {sorted(given - known)}"


def test_the_reference_has_all_settings_as_they_are() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert settings_reference() in page
    for key in ("`seed`", "`capture.num_prompts`", "`distill.sparsity.share`", "`distill.one_at_a_time`"):
        assert page.count(f"| {key} |") == 1


def test_each_situation_is_held_by_a_test_that_there_is() -> None:
    rows = [row for row in (ROOT / "docs" / "situations.md").read_text().splitlines() if row.startswith("| ")][1:]
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named, row
        for file, test in named:
            (path,) = (ROOT / "tests").rglob(file)
            assert re.search(rf"^def {test}\(", path.read_text(), re.MULTILINE), f"{file} has no {test}"
