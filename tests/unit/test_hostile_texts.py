"""What an artifact says is not the user's wish, and where this machine keeps its files is nobody's business."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluation_file import comparison, evaluation, model, number, step
from markdown_it import MarkdownIt
from tiny_models import plan_for, tiny_qwen

from ppcl.common.tables import fenced, markdown_table, plain
from ppcl.config import RunConfig, load_config
from ppcl.eval.markdown import measured_table, report
from ppcl.eval.models import settings_for
from ppcl.eval.results import Evaluation
from ppcl.export.card import Facts, Making, model_card, shown_command
from ppcl.export.pipeline import hide_folders
from ppcl.run.summary import print_evaluation

HOSTILE = [
    *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a | b | c", "![x](http://host/x.png)"),
    *("[click](http://host)", "`code`", "```\n<b>out</b>\n```", "a\n\n# heading\n\n<i>x</i>", "</td></tr><a href=x>"),
    *("a\\|b", "\\<b>", "[red]x[/red]", "[/]", "[a]: http://host", "<http://host>"),
]


def render(markdown: str) -> str:
    """Markdown as a hub shows it, with the HTML in it."""
    return str(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))


OURS = {"h1", "h2", "h3", "p", "strong", "blockquote", "table", "thead", "tbody", "tr", "th", "td", "pre", "code"}


def foreign_tags(markdown: str) -> set[str]:
    return set(re.findall(r"<([a-z]\w*)", render(markdown))) - OURS


def hostile_evaluation(text: str) -> Evaluation:
    """Numbers of two models that are all named by a text."""
    rows = [model(text, {"fid": number(11.0)}), model(f"{text} 2", {"fid": number(12.0)})]
    about = comparison(f"{text} 2", text, {"psnr": number(30.0)}, verdict=text)
    about["velocity_error_by_timestep"] = [step(0.0, 1.0, 0.1)]
    changes = {"features": text, "reference": text, "notes": [text]}
    return Evaluation.model_validate(evaluation(rows, [about], **changes))


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_results_are_shown_and_do_nothing(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = hostile_evaluation(text)
    written = report(result)
    assert foreign_tags(written) == set()
    assert render(written).count("<h1>") == 1
    (line,) = [line for line in written.splitlines() if line.startswith("| FID")]
    assert len(re.findall(r"(?<!\\)\|", line)) == 4  # the row of two models keeps its cells
    assert "<code>" not in render(plain(text))
    assert foreign_tags(measured_table(result)) == set()
    print_evaluation(result)  # brackets are styles to rich
    assert "note: " in capsys.readouterr().out


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_in_a_model_card_are_shown_and_do_nothing(text: str) -> None:
    plan = replace(plan_for(tiny_qwen(), [("transformer_blocks", 1, 2)]), mode=text)
    making = Making((f"ppcl compress x --prompts {text}",), 0, "ppcl 1", "cpu")
    licence = {"license": "other", "license_name": text, "license_link": text}
    card = model_card(plan, Facts(f"owner/{text}", text, making=making, licence=licence))
    body = card.partition("\n---\n")[2]
    assert foreign_tags(body) == set()
    assert yaml.safe_load(card.split("---\n")[1])["license_name"] == text


def test_fences_and_cells() -> None:
    assert fenced("a", "bash") == "```bash\na\n```"
    assert fenced("a\n````\nb") == "`````\na\n````\nb\n`````"
    assert markdown_table(["a", "b"], [["x|y", "1\n2"]]).splitlines()[-1] == "| x\\|y | 1 2 |"


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("ppcl compress m --prompts=/home/me/p.txt", "ppcl compress m --prompts=p.txt"),
        ("ppcl compress m --prompts=~/a/p.txt", "ppcl compress m --prompts=p.txt"),
        ("ppcl compress m -c/home/me/c.yaml", "ppcl compress m -cc.yaml"),
        ("ppcl compress m --set capture.data=/d/{000..012}.tar", "ppcl compress m --set 'capture.data={000..012}.tar'"),
        ("ppcl compress m --set fit.criterion=/home/me/x.py:Mine", "ppcl compress m --set fit.criterion=x.py:Mine"),
        ("ppcl compress m --mode /home/me/x.py:Mine", "ppcl compress m --mode x.py:Mine"),
        ("ppcl compress m --set 'a=[/home/a.txt, /home/b.txt]'", "ppcl compress m --set 'a=[a.txt, b.txt]'"),
        ("ppcl compress m --set a.features=local-dir:/home/me/clip", "ppcl compress m --set a.features=local-dir:clip"),
        ("ppcl compress ../../clients/acme --out ./runs/a", "ppcl compress acme --out a"),
        ("ppcl compress file:///home/me/m --out //home/me/a", "ppcl compress m --out a"),
        ("ppcl compress 'C:\\Users\\me\\m' --out='D:/runs/a b'", "ppcl compress m '--out=a b'"),
        ("ppcl compress owner/name --config configs/a.yaml --out runs/a", None),
        ("ppcl compress m --set capture.data=hub:owner/name --set x=https://host/a", None),
        ("ppcl compress it's /home/me/m", "ppcl compress it's m"),
        ("ppcl.compress('/home/me/m')", "ppcl.compress('m')"),
    ],
)  # fmt: skip
def test_commands_are_shown_without_the_folders_of_this_machine(command: str, shown: str | None) -> None:
    assert shown_command(command) == (shown or command)


def test_configs_are_published_without_the_folders_of_this_machine(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    contents: dict[str, dict[str, Any]] = {
        "model_index.json": {"_name_or_path": str(tmp_path), "vae": ["diffusers", "AutoencoderKL"]},
        "transformer/config.json": {"_name_or_path": str(tmp_path / "transformer"), "_ppcl": {"source_model": "tiny"}},
        "vae/config.json": {"_name_or_path": "../secret/vae", "sizes": [1, 2]},
        "text_encoder/config.json": {"text_config": {"_name_or_path": "~/models/x", "torch_dtype": "float32"}},
        "tokenizer/tokenizer_config.json": {
            "name_or_path": "/root/.cache/huggingface/hub/models--a--b/snapshots/c/tokenizer",
            "tokenizer_file": "/root/.cache/huggingface/tokenizer.json", "chat_template": "/home/me",
            "added_tokens_decoder": {"0": {"content": "/a/b"}},
        },
        "scheduler/scheduler_config.json": {"_name_or_path": "owner/name"},
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    untouched = (folder / "scheduler" / "scheduler_config.json").read_bytes()
    hide_folders(folder, "tiny")
    written = {name: json.loads((folder / name).read_text()) for name in contents}
    for name in ("model_index.json", "transformer/config.json", "vae/config.json"):
        assert written[name] == {**contents[name], "_name_or_path": "tiny"}
    assert written["text_encoder/config.json"]["text_config"] == {"_name_or_path": "tiny", "torch_dtype": "float32"}
    assert written["tokenizer/tokenizer_config.json"] == {
        **contents["tokenizer/tokenizer_config.json"], "name_or_path": "tiny", "tokenizer_file": "tokenizer.json",
    }  # fmt: skip
    assert (folder / "scheduler" / "scheduler_config.json").read_bytes() == untouched


def run_from_elsewhere(folder: Path, **config: Any) -> str:
    folder.mkdir()
    (folder / "stages.json").write_text('{"model": "owner/name", "identity": "x"}')
    (folder / "config.yaml").write_text(yaml.safe_dump({"config": config}))
    return str(folder)


def test_a_run_says_how_pictures_are_drawn_and_nothing_else(tmp_path: Path) -> None:
    capture = {"height": 48, "width": 64, "guidance_scale": 2.5, "negative_prompt": "blur", "data": "/home/me/photos"}
    evaluate = {"num_inference_steps": 3, "features": "inception"}
    elsewhere = {"wandb": "online", "device": "cuda:7", "threads": 999, "processes": 64, "blocks": "streamed"}
    other = {"fit": {"criterion": "/tmp/evil.py:Evil"}, "plan": {"mode": "/tmp/evil.py:Evil"}, "export": {"dtype": "x"}}
    run = run_from_elsewhere(tmp_path / "run", seed=5, capture=capture, evaluate=evaluate, **elsewhere, **other)
    config = settings_for([run], [], [])
    drawn = {name: value for name, value in capture.items() if name != "data"}
    expected = {"seed": 5, "capture": drawn, "evaluate": evaluate}
    assert config == RunConfig.model_validate(expected)
    assert settings_for([run], [], ["wandb=offline", "seed=1"]) == load_config(
        [], ["wandb=offline"], {**expected, "seed": 1}
    )


def test_a_run_names_no_folder_of_this_machine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluate = {"features": "local-dir:/home/you/clip", "batch_size": 3}
    run = run_from_elsewhere(tmp_path / "run", evaluate=evaluate)
    config = settings_for([run], [], [])
    assert (config.evaluate.features, config.evaluate.batch_size) == ("auto", 3)
    assert "set evaluate.features" in caplog.text
    for number_, content in enumerate(([], 3, {"capture": 3}, {"evaluate": None}, {"capture": {"height": None}})):
        run = run_from_elsewhere(tmp_path / str(number_))
        Path(run, "config.yaml").write_text(yaml.safe_dump({"config": content}))
        assert settings_for([run], [], []) == RunConfig.model_validate({})


READY = r"\{\{ (?:.*\|(?:fenced|table)\b|measured|header|result\.prompts|\"\{:)"


def test_no_line_of_a_markdown_template_begins_with_a_text_of_others() -> None:
    """It could be a heading, a list or a quotation there; tables, fences and numbers cannot."""
    root = Path(__file__).resolve().parents[2]
    templates = [*(root / "eval" / "templates").glob("*.md"), *(root / "ppcl" / "export" / "templates").glob("*.md")]
    assert len(templates) == 3
    for template in templates:
        text = re.sub(r"\{%.*?%\}", "", template.read_text(encoding="utf-8"), flags=re.DOTALL)
        first = [line for line in text.splitlines() if line.startswith("{{") and not re.match(READY, line)]
        assert first == [], template
