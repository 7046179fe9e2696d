"""The embedded default: data, evaluator, teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ppcl.capture.prompts import prompts_for
from ppcl.emoji.bake import is_wanted
from ppcl.emoji.data import ASSETS, GROUNDS, SIZE, load_emoji, load_pairs, load_pictures, load_tiles
from ppcl.eval.clip import caption_ranks
from ppcl.eval.features import load_extractor
from ppcl.teacher.loading import EMBEDDED, load_pipeline


def folder_megabytes(name: str) -> float:
    return sum(p.stat().st_size for p in (ASSETS / name).rglob("*") if p.is_file()) / 1e6


def as_tensor(pairs):
    return torch.from_numpy(load_pictures(pairs)).permute(0, 3, 1, 2).contiguous()


def test_every_pair_has_its_own_caption_and_one_split():
    pairs, emoji = load_pairs(), load_emoji()
    assert len(pairs) == len(emoji) * len(GROUNDS) == len({pair.caption for pair in pairs}) > 2500
    assert all(is_wanted(row.name, row.group) for row in emoji)
    splits = {name: set(load_pairs(name)) for name in ("train", "new pair", "new emoji")}
    assert sum(map(len, splits.values())) == len(pairs)
    tiles = {name: {pair.tile for pair in members} for name, members in splits.items()}
    assert not tiles["new emoji"] & (tiles["train"] | tiles["new pair"])
    assert tiles["new pair"] < tiles["train"]  # both halves of a new pair are known
    assert {pair.ground for pair in splits["new pair"]} <= {pair.ground for pair in splits["train"]}


def test_the_first_round_of_pairs_names_every_emoji_once():
    pairs = load_pairs()[: len(load_emoji())]
    assert [pair.tile for pair in pairs] == list(range(len(pairs)))
    assert len({pair.ground for pair in pairs}) == len(GROUNDS)


def test_pictures_show_the_emoji_on_its_ground():
    names = {row.name: tile for tile, row in enumerate(load_emoji())}
    pairs = [pair for pair in load_pairs() if pair.tile in (names["red heart"], names["blue heart"])]
    alpha = load_tiles()[..., 3]
    for pair, picture in zip(pairs, load_pictures(pairs), strict=True):
        assert (picture[alpha[pair.tile] == 0] == GROUNDS[pair.ground]).all()
        red, _, blue = picture[alpha[pair.tile] == 255].astype(float).mean(0)
        assert red > blue + 20 if pair.tile == names["red heart"] else blue > red + 20
    assert load_pictures(pairs, 64).shape == (len(pairs), 64, 64, 3)


def test_evaluation_prompts_are_pairs_that_neither_teacher_nor_student_saw():
    calibration, evaluation = prompts_for("emoji", None, 128)
    assert len(evaluation) == len(set(evaluation)) == 128
    assert set(calibration) == {pair.caption for pair in load_pairs("train")}
    assert set(evaluation) <= {pair.caption for pair in load_pairs("new pair")}


def test_assets_stay_small():
    assert folder_megabytes("data") < 10
    assert folder_megabytes("evaluator") < 8
    assert folder_megabytes("teacher") < 40


@pytest.mark.parametrize("split", ["train", "new pair"])
def test_the_evaluator_tells_right_from_shuffled_captions(split):
    pairs = load_pairs(split)[:: 1 if split == "new pair" else 9]
    extractor = load_extractor("emoji")
    images, texts = extractor.image_features(as_tensor(pairs)), extractor.text_features([p.caption for p in pairs])
    assert texts is not None
    assert (caption_ranks(images, texts) == 1).double().mean() > 0.85
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(texts)))
    assert (caption_ranks(images, texts[order]) == 1).double().mean() < 0.05


def test_the_teacher_is_a_stock_pipeline_that_follows_captions():
    pipe = load_pipeline("emoji", torch.device("cpu"))
    assert type(pipe).__module__.startswith("diffusers.")
    assert len(pipe.transformer.transformer_blocks) >= 24
    assert EMBEDDED["emoji"].is_dir()
    rows = [pair.caption for pair in load_pairs("train")[:384:24]]
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
    assert (caption_ranks(extractor.image_features(drawn), texts) == 1).double().mean() >= 0.4
