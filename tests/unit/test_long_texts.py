"""A text that is longer than a model reads: its beginning counts, wherever it enters, and that is said."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_pipeline import SMALL, tiny_qwen_pipeline

from ppcl.capture.pictures import capture_pictures
from ppcl.capture.prompts import cut_note, reach
from ppcl.capture.states import States
from ppcl.capture.trajectories import capture, prompt_length
from ppcl.config import CaptureConfig
from ppcl.eval.features import cut_texts, load_extractor
from ppcl.eval.report_pictures import SHOWN, prompts_of

LONG = "red cat " + "and a house " * 400
SAID = "longer than the 512 tokens that QwenImagePipeline reads: 1 of 3 texts; their ends do nothing"


@pytest.fixture(scope="module")
def pipeline():
    return tiny_qwen_pipeline()


class Counting:
    """A tokenizer of words."""

    def __init__(self, limit: int) -> None:
        self.model_max_length = limit

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=text.split())


class Processor:
    """Reads pictures first, and text by a tokenizer of its own (FLUX.2, Kandinsky 5)."""

    def __init__(self, limit: int) -> None:
        self.tokenizer = Counting(limit)

    def __call__(self, images: object = None, text: str | None = None) -> None:
        assert images is None, "a text is no picture"


def pipeline_of(asked: int | None, kind: type = Counting, **limits: int) -> object:
    class Pipeline:
        components = {name: kind(limit) for name, limit in limits.items()} | {"tokenizer_4": None, "vae": 3}

        def __call__(self, prompt: str, max_sequence_length: int | None = asked) -> None: ...

    return Pipeline()


@pytest.mark.parametrize(
    ("asked", "limits", "limit"),
    [
        (512, {"tokenizer": 77, "tokenizer_2": 512}, 512),  # FLUX
        (256, {"tokenizer": 77, "tokenizer_2": 77, "tokenizer_3": 512}, 256),  # SD3
        (None, {"tokenizer": 77}, 77),
        (300, {"tokenizer": 10**30}, 300),
        (None, {"tokenizer": 10**30}, None),
        (None, {}, None),
    ],
)
@pytest.mark.parametrize("kind", [Counting, Processor])
def test_the_tokenizer_that_reads_most_sets_the_limit(
    asked: int | None, limits: dict, limit: int | None, kind: type
) -> None:
    found = reach(pipeline_of(asked, kind, **limits))
    assert (found and found[1]) == limit
    texts = ["a", "b " * 78, "c " * 301, "d " * 600]
    note = cut_note(pipeline_of(asked, kind, **limits), texts)
    counted = sum(len(text.split()) > limit for text in texts) if limit else 0
    assert (f": {counted} of 4 texts" in note) if counted else note is None


@pytest.mark.parametrize(
    ("parts", "length"),
    [
        ({"tokenizer": Counting(9)}, 3),
        ({"tokenizer": Processor(9)}, 3),
        ({"tokenizer_2": Counting(9)}, 9),
        ({"tokenizer": None}, 9),
    ],
)
def test_prompts_are_sorted_by_tokens_or_else_by_characters(parts: dict, length: int) -> None:
    assert prompt_length(SimpleNamespace(components=parts), "a red cat") == length


def test_trajectories_and_pictures_cut_alike_and_say_it(
    pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = CaptureConfig(**{**SMALL["capture"], "num_prompts": 3, "batch_size": 1, "guidance_scale": 1.0})
    texts = [LONG, "a boat", "old house"]
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"file_name": f"{n}.png", "text": text} for n, text in enumerate(texts)]
    for row in rows:
        Image.new("RGB", (16, 16), (200, 10, 10)).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.WARNING):
        capture(pipeline, texts, tmp_path / "prompts", settings, 0)
        assert SAID in caplog.text
        caplog.clear()
        of_pictures = settings.model_copy(update={"data": str(folder), "aspect_ratios": ("1:1",)})
        (tmp_path / "pictures").mkdir()
        capture_pictures(pipeline, tmp_path / "pictures", of_pictures, 0, ())
        assert SAID in caplog.text
    longest = [
        max(
            batch["encoder_hidden_states"].shape[1]
            for split in ("train", "held-out")
            for batch in States(tmp_path / name, split).batches(1)
        )
        for name in ("prompts", "pictures")
    ]
    assert longest == [512, 512]


def test_what_the_evaluator_does_not_read() -> None:
    extractor = load_extractor("emoji")
    exact = "frog " * 15  # and the end token
    assert cut_texts(extractor, [exact.strip(), "frog", "frog!!", "", LONG]) == ([LONG], 16)
    assert cut_texts(SimpleNamespace(name="inception"), [LONG]) == ([], 0)
    ends = [LONG + "with a boat", LONG + "on blue"]
    first, second = extractor.text_features(ends)
    assert torch.equal(first, second)


def test_a_page_shows_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps({"prompts": [LONG, "short"]}))
    long, short = prompts_of(tmp_path)
    assert len(long) == SHOWN and LONG.startswith(long[:-1]) and short == "short"
