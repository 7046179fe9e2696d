"""Files with words, as benchmarks and trainers have them: prompts and captions; what is not understood is named."""

from __future__ import annotations

import csv
import io
import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from ppcl.capture.prompts import read_prompts
from ppcl.capture.sources import Skipped, choose_samples, open_source
from ppcl.config import CaptureConfig
from ppcl.errors import UserError

TEXTS = ["a red cat, on a mat", 'the words "no entry"', "two\nlines", "naïve 红色", "it's a boat; or a ship"]
ROWS = [{"tag": "one", "include": [{"class": "cat"}], "prompt": text} for text in TEXTS]


def table(names: list[str], delimiter: str, **options: object) -> str:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, **options)
    writer.writerows([names, *([text, *["x"] * (len(names) - 1)] for text in TEXTS)])
    return file.getvalue()


PROMPT_FILES = {
    "geneval.jsonl": "\n".join(map(json.dumps, ROWS)),
    "quoted.jsonl": "\n".join(map(json.dumps, TEXTS)),
    "parti.tsv": table(["Prompt", "Category", "Challenge", "Note"], "\t"),
    "drawbench.csv": "\ufeff" + table(["Prompts", "Category"], ","),
    "excel.csv": table(["id", "PROMPT"][::-1], ";"),
    "wise.json": json.dumps([{"Prompt": text, "Explanation": "why"} for text in TEXTS]),
    "list.json": json.dumps(TEXTS),
    "keys.json": json.dumps({f"{n}.png": {"prompt": text} for n, text in enumerate(TEXTS)}),
    "plain.json": json.dumps(dict(enumerate(TEXTS))),
    "coco.json": json.dumps({"images": [{"id": 1}], "annotations": [{"caption": text} for text in TEXTS]}),
    "several.jsonl": "\n".join(json.dumps({"captions": [text, "another"]}) for text in TEXTS),
    "both.jsonl": "\n".join(json.dumps({"text": "on a sign", "prompt": text}) for text in TEXTS),
    "json-lines.txt": "\n".join(map(json.dumps, ROWS)),
}


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_prompts_of_the_usual_benchmarks(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for encoding in ("utf-8", "utf-16"):  # as Windows writes it
        (tmp_path / name).write_bytes(PROMPT_FILES[name].removeprefix("\ufeff").encode(encoding))
        assert [text.replace("\r\n", "\n") for text in read_prompts(tmp_path / name)] == TEXTS
    assert not caplog.records


def test_a_folder_of_texts_and_quotes_that_are_characters(tmp_path: Path) -> None:
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(f"{text}\n")
    assert read_prompts(tmp_path) == TEXTS
    path = tmp_path / "raw.tsv"
    path.write_text("Prompt\tNote\n" + "".join(f'"{n}" is a number\tx\n' for n in range(4)))
    assert read_prompts(path)[0] == '"0" is a number'


def test_braces_are_words_where_they_are_no_objects(tmp_path: Path) -> None:
    lines = [f"{{red|blue}} cat {n}" for n in range(4)]
    (tmp_path / "p.txt").write_text("\n".join(lines))
    assert read_prompts(tmp_path / "p.txt") == lines


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "number,words\n1,cat\n2,dog\n",
            r"no column of prompts \(it has number, words\); call one col",
        ),
        ("a.jsonl", '{"id": 1}\n{"id": 2}\n', r"no column of prompts \(it has id\)"),
        ("a.csv", "a cat, on a mat\na dog, a cat, a hat\n", "no prompts .3 fields in 2 columns."),
        ("a.csv", 'prompt\n"a cat" and more\n', "is no table .*quotes"),
        ("a.json", "3", "holds a int; a list of texts or of objects is expected"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.jsonl", "{\n{\n", "has no prompts"),
        ("a.yaml", "- a cat\n- a dog\n", "no text of one prompt a line, nor one of .jsonl"),
        ("a.txt", b"a cat\n\xff\xfe\xff\n", "cannot be read as UTF-8 text"),
        ("a.txt", "a cat\n", "holds 1 different prompts"),
        ("a.csv", "", "holds 0 different prompts"),
    ],
)
def test_what_holds_no_prompts_is_one_line(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_rows_without_a_prompt_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "p.jsonl").write_text("\n".join([lines[0], '{"prompt": "ha', '{"id": 3}', *lines[1:]]))
    with caplog.at_level(logging.WARNING):
        assert read_prompts(tmp_path / "p.jsonl") == TEXTS
        assert "2 rows are left out, the first is 2: " in caplog.text
        (tmp_path / "p.txt").write_text("# mine\n" + "\n".join(f"cat {n}" for n in range(4)))
        assert read_prompts(tmp_path / "p.txt")[0] == "# mine" and "lines with # are prompts" in caplog.text


CAPTIONS = {"0.png": "one", "1.png": "two, at noon", "2.png": "three"}


def pictures(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(CAPTIONS):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name)


def rows_as(name: str, file: str, words: str, folder: str = "", **more: object) -> str:
    rows = [{file: folder + key, words: text, **more} for key, text in CAPTIONS.items()]
    if name.endswith(".json"):
        return json.dumps(rows)
    if not name.endswith((".csv", ".tsv")):
        return "\n".join(map(json.dumps, rows))
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter="\t" if name.endswith("tsv") else ",")
    writer.writeheader()
    writer.writerows(rows)
    return "\ufeff" + out.getvalue()


def used(data: Path, **settings: object) -> tuple[dict[int, str], dict[str, str]]:
    """Captions by the red of their pictures, and what was left out, by name."""
    skipped = Skipped()
    samples = choose_samples(open_source(CaptureConfig(data=str(data), **settings)), 99, [(8, 8)], (), skipped, 0)
    by_red = {sample.picture().getpixel((0, 0))[0]: sample.caption for sample in samples}
    return by_red, {row["name"]: f"{row['reason']}: {row['detail']}" for row in skipped.rows}


ALL = dict(enumerate(CAPTIONS.values()))
TABLES = {  # where pictures are: table, its columns
    "imagefolder": ("", "metadata.jsonl", "file_name", "text", ""),
    "imagefolder, csv": ("", "metadata.csv", "file_name", "text", ""),
    "a split": ("train", "train/metadata.jsonl", "file_name", "text", ""),
    "pictures in a folder": ("images", "metadata.csv", "file_name", "caption", "images/"),
    "captions.csv": ("", "captions.csv", "image", "caption", ""),
    "musubi": ("", "dataset.jsonl", "image_path", "caption", "{root}/"),
    "DiffSynth": ("", "metadata.csv", "image", "prompt", ""),
    "a list": ("", "metadata.json", "file_name", "text", ""),
    "tabs": ("10_things", "10_things/captions.tsv", "filename", "description", ""),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_captions(name: str, tmp_path: Path) -> None:
    place, table, file, words, prefix = TABLES[name]
    pictures(tmp_path / place)
    (tmp_path / table).write_text(rows_as(table, file, words, prefix.format(root=tmp_path)), encoding="utf-8")
    assert used(tmp_path) == (ALL, {})
    assert used(tmp_path / table) == (ALL, {})  # the table itself will do


@pytest.mark.parametrize("suffix", [".txt", ".caption", ".json"])
def test_files_beside(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "10_frog things"
    pictures(folder)
    for name, text in CAPTIONS.items():
        content = json.dumps({"caption": text, "score": 1}) if suffix == ".json" else text
        (folder / name).with_suffix(suffix).write_text(content)
    assert used(tmp_path) == (ALL, {})


def test_of_several_captions_the_first_and_a_wished_column(tmp_path: Path) -> None:
    pictures(tmp_path)
    rows = [{"file_name": name, "text": [text, "again"], "mine": "wished"} for name, text in CAPTIONS.items()]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert used(tmp_path) == (ALL, {})
    assert used(tmp_path, caption_column="mine")[0] == dict.fromkeys(ALL, "wished")
    nothing, reasons = used(tmp_path, caption_column="captions")  # a wish is not guessed at
    assert not nothing
    wanted = "no caption: there is no captions (but file_name, text, mine); set capture.caption_column"
    assert set(reasons.values()) == {wanted}


def test_one_split_is_taken_where_all_folders_are_splits(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        pictures(tmp_path / split)
        (tmp_path / split / "metadata.csv").write_text(rows_as("metadata.csv", "file_name", "text"), encoding="utf-8")
    (tmp_path / "validation" / "metadata.csv").write_text("file_name,text\n0.png,other\n")
    assert used(tmp_path)[0] == ALL
    assert used(tmp_path, data_split="validation")[0] == {0: "other"}
    (tmp_path / "boats").mkdir()  # no split: a class of pictures may be called train
    assert len(list(open_source(CaptureConfig(data=str(tmp_path))).entries(0, Skipped()))) == 4


def test_what_was_seen_but_not_understood_is_named(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "labels.csv").write_text("id,text\n1,a\n")
    (tmp_path / "notes.json").write_text('{"a": 1}')
    (tmp_path / "0.txt").write_text("one")
    found, reasons = used(tmp_path)
    assert found == {0: "one"}
    beside = "no caption: there is no 1.txt, .caption or .json"
    assert reasons["1.png"] == beside
    assert reasons["labels.csv"] == "unknown table: no column names pictures (id, text); call it file_name"
    assert reasons["notes.json"] == "unknown table: no column names pictures (it has none); call it file_name"
    (tmp_path / "metadata.jsonl").write_bytes(
        b'{"file_name": "0.png", "text": "one"}\n{"file_name": "1.png", "text": "\xff"}\n[1]\n'
    )
    found, reasons = used(tmp_path)
    assert found == {0: "one"}
    assert {name.partition(":")[0] for name in reasons} == {"metadata.jsonl", "labels.csv", "notes.json"}
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    assert "metadata.csv" in used(tmp_path)[1]
