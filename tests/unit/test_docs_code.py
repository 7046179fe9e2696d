"""The Python of README and docs runs, on a tiny pipeline; what cannot run in a test says why above it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_search_path import tiny_context
from tiny_models import qwen_call, tiny_qwen
from tiny_pipeline import PROMPTS, SMALL

from ppcl.common.files import read_json
from ppcl.config import load_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- not run by a test: [^>]+ -->\n\n?)?```python\n(.*?)```", re.DOTALL)
SETTINGS = ["fit.width=[modulation,ffn]", "plan.keep=0.5", "distill.train=substitutes", "export.remote_code=true"]


def blocks(page: Path) -> list[tuple[bool, str]]:
    """The Python of a page: whether it is run here, and the code. Files of one's own are run by test_extending."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(not mark and not code.startswith("# my_"), code) for mark, code in found]


RUN = [page for page in PAGES if any(is_run for is_run, _ in blocks(page))]


def test_every_block_is_python() -> None:
    assert len(RUN) >= 5
    for page in PAGES:
        for number, (_, code) in enumerate(blocks(page)):
            compile(code, f"{page.name}:{number}", "exec")


@pytest.fixture(scope="module")
def desk(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder that holds what the pages name: runs whose bundles have several sizes, and a LoRA."""
    from ppcl.run import STAGES, Run

    desk = tmp_path_factory.mktemp("desk")
    (desk / "prompts.txt").write_text("\n".join(PROMPTS))
    (desk / "runs").mkdir()
    config = load_config([], SETTINGS, SMALL)
    run = Run(str(tiny_model), desk / "runs" / "half", config, desk / "prompts.txt", "test")
    for stage in list(STAGES)[: list(STAGES).index("export") + 1]:
        run.run(stage)
    for name in ("demo", "qwen"):
        (desk / "runs" / name).symlink_to("half")
    name = "transformer.transformer_blocks.{}.attn.to_q.lora_{}.weight"
    factors = {"A": torch.ones(2, 32), "B": torch.ones(32, 2)}
    left = len(read_json(desk / "runs" / "half" / "plan.json")["stacks"]["transformer_blocks"])
    for file, count in (("style", 6), ("trained_on_student", left)):
        tensors = {name.format(n, part): factors[part].clone() for n in range(count) for part in "AB"}
        save_file(tensors, desk / f"{file}.safetensors")
    return desk


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path, desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, object] = {}
    if page.name == "extending.md":
        context = tiny_context(tiny_qwen(7), qwen_call, tmp_path)
        names = {
            name: getattr(context, name) for name in ("analysis", "candidates", "settings", "seed", "open_teacher")
        }
    monkeypatch.chdir(desk)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    for is_run, code in blocks(page):
        if is_run:
            exec(code, names)
