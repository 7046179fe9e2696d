"""The embedded default: data, evaluator, teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ppcl.emoji.bake import held_out
from ppcl.emoji.data import ASSETS, SIZE, is_core, load_captions, load_images
from ppcl.eval.clip import retrieval_at
from ppcl.eval.features import load_extractor
from ppcl.teacher import EMBEDDED, load_pipeline


def folder_megabytes(name: str) -> float:
    return sum(p.stat().st_size for p in (ASSETS / name).rglob("*") if p.is_file()) / 1e6


@pytest.fixture(scope="module")
def pictures():
    return torch.from_numpy(load_images()).permute(0, 3, 1, 2).contiguous()


def test_every_picture_has_one_caption_and_the_split_is_by_emoji(pictures):
    rows = load_captions()
    assert len(rows) == len(pictures) > 1800
    assert len({row.caption for row in rows}) == len(rows)
    assert all((row.split == "held-out") == held_out(row.code) for row in rows)
    assert 300 < sum(map(is_core, rows)) < 500
    assert not any(is_core(row) for row in load_captions("held-out"))


def test_tiles_are_cut_where_they_belong(pictures):
    rows = load_captions()
    by_name = {row.caption: pictures[i].float().mean((1, 2)) for i, row in enumerate(rows)}
    red, blue = by_name["red heart"], by_name["blue heart"]
    assert red[0] > red[2] + 20
    assert blue[2] > blue[0] + 20


def test_assets_stay_small():
    assert folder_megabytes("data") < 10
    assert folder_megabytes("evaluator") < 8
    assert folder_megabytes("teacher") < 40


def test_the_evaluator_tells_right_from_shuffled_captions(pictures):
    rows = load_captions("train")
    chosen = [i for i, row in enumerate(load_captions()) if row.split == "train"][::9]
    extractor = load_extractor("emoji")
    images = extractor.image_features(pictures[chosen])
    texts = extractor.text_features([row.caption for row in rows[::9]])
    assert texts is not None
    assert retrieval_at(images, texts, 1) > 0.9
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(texts)))
    assert retrieval_at(images, texts[order], 1) < 0.05


def test_the_teacher_is_a_stock_pipeline_that_follows_captions(pictures):
    pipe = load_pipeline("emoji", torch.device("cpu"))
    assert type(pipe).__module__.startswith("diffusers.")
    assert len(pipe.transformer.transformer_blocks) >= 24
    assert EMBEDDED["emoji"].is_dir()
    rows = [row.caption for row in load_captions() if is_core(row)][::24]
    generator = [torch.Generator().manual_seed(i) for i in range(len(rows))]
    images = pipe(
        rows, negative_prompt=[" "] * len(rows), true_cfg_scale=3.0, height=SIZE, width=SIZE, num_inference_steps=12,
        generator=generator,
    ).images  # fmt: skip
    assert {image.size for image in images} == {(SIZE, SIZE)}
    drawn = torch.stack([torch.from_numpy(np.asarray(image)).permute(2, 0, 1) for image in images])
    extractor = load_extractor("emoji")
    texts = extractor.text_features(rows)
    assert texts is not None
    # chance is 1 in 16
    assert retrieval_at(extractor.image_features(drawn), texts, 1) >= 0.4
