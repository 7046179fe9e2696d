"""Both reports in a real browser: everything that can be clicked is, at desktop and phone size, without an error."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ppcl.common.files import write_json
from ppcl.eval.report import write_report
from ppcl.eval.report_models import write_models_report

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
PROMPTS = [f"{colour} {thing}" for thing in ("cat", "boat", "owl") for colour in ("red", "blue", "green", "white")] * 2
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BROWSER, reason="no chromium or google-chrome on the PATH"),
]


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """One page of a headless browser; what it says on its console is kept in ``page.said``."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=list(FLAGS), timeout=120_000)
        opened = browser.new_page()
        opened.set_default_timeout(120_000)  # a busy machine is slow, not wrong
        opened.said = []
        opened.on("console", lambda message: opened.said.append(message.text))
        opened.on("pageerror", lambda error: opened.said.append(str(error)))
        opened.on("request", lambda request: opened.said.append(request.url) if request.url[:4] == "http" else None)
        yield opened
        browser.close()


def draw(folder: Path, shift: int) -> None:
    """Write pictures of one model, and their prompts."""
    folder.mkdir(parents=True)
    write_json(folder / "prompts.json", {"prompts": PROMPTS})
    for index in range(len(PROMPTS)):
        pixels = np.full((32, 48, 3), 255 - 9 * index, np.uint8)
        pixels[8 : 20 + shift * index % 8, 12:30] = (40, 90, 200)
        Image.fromarray(pixels).save(folder / f"{index:04d}.png")


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run with pictures."""
    run = tmp_path_factory.mktemp("run")
    for index, name in enumerate(("teacher/seed-0", "student/seed-0", "teacher/seed-1")):
        draw(run / "eval" / name, index)
    write_json(run / "eval" / "metrics.json", {"teacher": {"fid": 3.0}, "student": {"fid": 4.0}})
    return write_report(run)


def number(value: float) -> dict[str, float]:
    """A number with its interval."""
    return {"value": value, "low": 0.9 * value, "high": 1.2 * value}


@pytest.fixture(scope="module")
def models_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of an evaluation of three models."""
    out = tmp_path_factory.mktemp("models")
    labels = {"A <b>": (4e6, 2.0), "B": (2e6, 12.0), "C": (3e6, 4.0)}
    models: list[dict[str, Any]] = []
    comparisons: list[dict[str, Any]] = []
    for index, (label, (params, fid)) in enumerate(labels.items()):
        draw(out / "pictures" / label / "seed-0", index)
        costs = {"latency_ms": params / 1e5, "peak_memory_bytes": None}
        time = {"latency_ms": fid, "latency_p10_ms": 1.0, "latency_p90_ms": 20_000.0, "times_as_fast": 1.5 * index}
        work = [{"part": "picture", "batch_size": 4, "num_inference_steps": steps, **time} for steps in (10, 20)]
        blocks = [{"first": block, "last": block, "width": []} for block in range(60 * index)]
        one = {"label": label, "model": label, "params": params, "numbers": {"fid": number(fid)}, "costs": costs}
        models.append(one | {"speed": work, "blocks": {"transformer_blocks": blocks} if blocks else {}})
        steps = [{"timestep_low": 0.0, "timestep_high": 1.0, "error": 0.1, "low": 0.1, "high": 0.2}]
        made = {"label": label, "against": "A <b>", "average_drop": number(fid), "fidelity": {"psnr": number(30 + fid)}}
        made |= {"velocity_error_by_timestep": steps, "param_ratio": 0.5, "speedup": 1.5, "verdict": f"{label} keeps"}
        comparisons += [made] if index else []
    settings = {
        "prompts": 24,
        "seed": 0,
        "num_inference_steps": 2,
        "features": "emoji",
        "level": 0.95,
        "notes": ["few"],
    }
    write_json(out / "metrics.json", {**settings, "models": models, "comparisons": comparisons})
    return write_models_report(out)


def visit(page: Any, path: Path, size: str, scheme: str) -> None:
    """Open a page; nothing may be wider than the screen."""
    page.set_viewport_size(dict(zip(("width", "height"), SIZES[size], strict=True)))
    page.emulate_media(color_scheme=scheme)
    page.goto(path.as_uri(), wait_until="domcontentloaded")
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]


def divider(page: Any) -> int:
    """Where the divider is, in percent; what is seen must agree."""
    value = int(page.locator("#viewer input").input_value())
    assert f"{100 - value}%" in page.locator("#viewer .over").evaluate("image => image.style.clipPath")
    return value


def use_viewer(page: Any, num_shots: int) -> None:
    """Open a pair by keyboard, move and flip, go to its neighbours, swap sides, close."""
    first = page.locator(".gallery .pair button").first
    first.focus()
    page.keyboard.press("Enter")
    viewer = page.locator("#viewer")
    assert viewer.is_visible()
    assert divider(page) == 50
    page.keyboard.press("ArrowRight")
    assert divider(page) == 51
    for key, expected in (("f", 0), (" ", 100)):
        page.keyboard.press(key)
        assert divider(page) == expected
    box = viewer.locator(".stage").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    assert abs(divider(page) - 25) <= 1
    caption = viewer.locator("p").first
    assert caption.inner_text() == "red cat"
    page.keyboard.press("n")
    assert caption.inner_text() == "blue cat"
    for name, expected in (("next", "green cat"), ("previous", "blue cat"), ("flip", "blue cat")):
        viewer.locator(f"button[name={name}]").click()
        assert caption.inner_text() == expected
    left, right = viewer.locator("select").first, viewer.locator("select").last
    assert left.locator("option").count() == num_shots
    shown = viewer.locator(".over").get_attribute("src")
    right.select_option("0")
    assert viewer.locator(".under").get_attribute("src") == shown
    page.keyboard.press("Escape")
    assert not viewer.is_visible()
    first.click()
    viewer.locator("button[name=close]").click()
    assert not viewer.is_visible()


def use_filter(page: Any) -> None:
    """Type words: only cards with all of them stay, also folded ones; clearing brings the others back."""
    cards = page.locator(".gallery .pair")
    page.locator(".filter input").fill("OWL red")
    assert page.locator(".gallery .pair:visible").count() == 2
    assert page.locator(".filter output").inner_text() == f"2 of {cards.count()} shown"
    page.locator(".filter input").fill("")
    assert page.locator(".gallery .pair[hidden]").count() == 0


def sort_table(page: Any) -> None:
    """Click every column twice; order and aria-sort follow, and what is not measured stays last."""
    labels = page.locator(".sortable tbody th")
    heads = page.locator(".sortable thead th")
    expected = {"FID": ["A <b>", "C", "B"], "Parameters": ["B", "C", "A <b>"], "PSNR": ["C", "B", "A <b>"]}
    for index in range(heads.count()):
        head = heads.nth(index)
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "ascending"
        assert page.locator("[aria-sort]").count() == 1
        name = head.inner_text().split(",")[0].split(" ")[0].strip()
        if name in expected:
            assert labels.all_inner_texts() == expected[name]
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "descending"
        if name == "PSNR":
            assert labels.all_inner_texts() == ["B", "C", "A <b>"]


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "light"), ("phone", "dark")])
def test_run(page: Any, run_page: Path, size: str, scheme: str) -> None:
    visit(page, run_page, size, scheme)
    use_filter(page)
    use_viewer(page, num_shots=2)
    for summary in page.locator("summary").all():
        summary.click()
    for link in page.locator("nav a").all():
        link.click()
    assert page.said == []


@pytest.mark.parametrize(("size", "scheme"), [("desktop", "dark"), ("phone", "light")])
def test_models(page: Any, models_page: Path, size: str, scheme: str) -> None:
    visit(page, models_page, size, scheme)
    assert page.locator("svg").count() == 3
    assert page.locator("#speed tbody tr").count() == 2
    assert page.locator("#blocks .strip").count() == 2
    sort_table(page)
    use_filter(page)
    use_viewer(page, num_shots=3)
    for link in page.locator("nav a").all():
        link.click()
    assert page.said == []


def test_the_table_needs_no_mouse(page: Any, models_page: Path) -> None:
    visit(page, models_page, "desktop", "light")
    page.locator(".sortable thead button").first.focus()
    page.keyboard.press("Enter")
    assert page.locator(".sortable thead th").first.get_attribute("aria-sort") == "ascending"
    assert page.said == []
