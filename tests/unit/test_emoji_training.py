"""Pictures that vary within a caption, and the training of the embedded teacher on them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from ppcl.common.tensor_files import read_tensors
from ppcl.emoji import evaluator, teacher
from ppcl.emoji.components import assemble, new_text_encoder, new_tokenizer, new_transformer
from ppcl.emoji.data import ASSETS, SIZE, load_pairs, load_pictures
from ppcl.emoji.evaluator import augment
from ppcl.emoji.sheet import between_seeds, sheet
from ppcl.emoji.vae import new_vae
from ppcl.emoji.variation import Sprites, Variation, load_varied_pictures


def plain(count: int) -> Variation:
    zeros = torch.zeros(count)
    return Variation(zeros + 1, zeros, zeros > 0, torch.zeros(count, 2), torch.zeros(count, 3))


def test_varied_pictures_depend_on_seed_and_caption_alone():
    pairs = load_pairs("train")[:24]
    pictures = load_varied_pictures(pairs, 0)
    assert pictures.shape == (24, SIZE, SIZE, 3)
    assert (load_varied_pictures(pairs[5:9], 0) == pictures[5:9]).all()
    others = load_varied_pictures(pairs, 1)
    error = ((pictures.astype(float) - others) ** 2).mean((1, 2, 3))
    assert error.min() > 0
    assert 13 < 10 * torch.log10(255**2 / torch.from_numpy(error)).mean() < 18  # the teacher was at 45 dB


def test_a_picture_without_variation_is_the_plain_one():
    pairs = load_pairs("train")[:24]
    drawn = Sprites(pairs).draw(torch.arange(24), plain(24))
    real = torch.from_numpy(load_pictures(pairs)).permute(0, 3, 1, 2) / 127.5 - 1
    assert (drawn - real).abs().mean() < 0.02


def test_held_out_pairs_stay_held_out_and_captions_know_nothing_of_the_variation():
    names = {pair.caption for pair in load_pairs()}
    trained = teacher.load_pairs("train")
    assert {pair.caption for pair in trained} < names
    held_out = {(pair.tile, pair.ground) for split in ("new pair", "new emoji") for pair in load_pairs(split)}
    assert not held_out & {(pair.tile, pair.ground) for pair in trained}


def test_a_mirrored_clock_would_show_another_time():
    clock, goblin = (next(p for p in load_pairs() if p.caption.startswith(name)) for name in ("seven-thirty", "goblin"))
    sprites = Sprites([clock, goblin])
    mirrored = dataclasses.replace(plain(2), mirrored=torch.tensor([True, True]))
    straight, turned = (sprites.draw(torch.arange(2), variation) for variation in (plain(2), mirrored))
    assert torch.equal(straight[0], turned[0])
    torch.testing.assert_close(straight[1].flip(-1), turned[1])


def test_the_emoji_stays_within_the_picture():
    pairs = load_pairs("train")[:1] * 64
    variation = dataclasses.replace(Variation.draw(64, torch.Generator().manual_seed(0)), tint=torch.zeros(64, 3))
    pictures = Sprites(pairs).draw(torch.arange(64), variation)
    border = torch.cat([pictures[..., 0, :], pictures[..., -1, :], pictures[..., 0], pictures[..., -1]], -1)
    assert (border > 0.99).float().mean() > 0.9  # a round face on white


def test_the_evaluator_is_trained_on_pictures_that_vary_more():
    sprites = Sprites(load_pairs("train")[:1])
    pictures = augment(sprites, torch.zeros(8, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert pictures.shape == (8, 3, SIZE, SIZE)
    assert pictures.abs().max() <= 1
    assert (pictures[1:] - pictures[0]).abs().mean((1, 2, 3)).min() > 0.05


@pytest.mark.parametrize("ways", ["from nothing", "on from another", "resumed"])
def test_the_evaluator_is_written_with_the_tokenizer_that_it_was_trained_with(tmp_path, monkeypatch, ways):
    kept = evaluator.load_pairs("train")[:8]
    monkeypatch.setattr(evaluator, "load_pairs", lambda split: kept)
    arguments = {"steps": 1, "batch_size": 4}
    if ways == "on from another":
        arguments["start"] = ASSETS / "evaluator"
    evaluator.train(tmp_path / "out", tmp_path / "work", **arguments)
    trained = (tmp_path / "work" / "tokenizer" / "tokenizer.json").read_bytes()
    if ways == "resumed":
        evaluator.train(tmp_path / "out", tmp_path / "work", **arguments)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == trained
    if ways == "on from another":
        assert trained == (ASSETS / "evaluator" / "tokenizer.json").read_bytes()


def test_a_sheet_shows_every_seed_and_tells_how_far_they_are_apart():
    pictures = np.zeros((2, 3, SIZE, SIZE, 3), np.uint8)
    pictures[:, 1:] = 51  # 14 dB from the first, and the last two are the same
    assert between_seeds(pictures[:, :2])["psnr_db"] == pytest.approx(13.98)
    assert between_seeds(pictures[:, 1:]) == {"psnr_db": 80.0, "diversity": 0.0}
    noise = np.random.default_rng(0).integers(0, 256, pictures.shape, np.uint8)
    assert between_seeds(noise)["diversity"] > 0.9
    page = sheet(pictures, pictures[:, 0], ["one", "two"])
    assert page.height == 2 * (SIZE + 18)
    assert page.width >= 2 * 2 * 4 * SIZE


@pytest.fixture
def tiny_pipeline():
    def make():
        torch.manual_seed(0)
        tokenizer = new_tokenizer([pair.caption for pair in load_pairs("train")])
        return assemble(new_vae(), tokenizer, new_text_encoder(tokenizer), new_transformer(num_blocks=2))

    return make


def test_processes_that_share_a_batch_have_its_loss_between_them(tiny_pipeline):
    pipeline = tiny_pipeline()
    batches = teacher.Batches(pipeline, load_pairs("train"), "cpu")

    def loss(part):
        return teacher.velocity_loss(pipeline, batches, 4, torch.Generator().manual_seed(3), part).item()

    parts = [loss(slice(rank, None, 2)) for rank in range(2)]
    assert parts[0] != pytest.approx(parts[1], rel=0.01)
    assert sum(parts) / 2 == pytest.approx(loss(slice(None)), rel=1e-3)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")
def test_training_that_was_interrupted_ends_with_the_same_bits(tiny_pipeline, tmp_path):
    settings = teacher.loop_settings(steps=3, batch_size=4, learning_rate=1e-3)
    assert teacher.train(tiny_pipeline(), tmp_path / "once", settings, compiled=False)
    done = [teacher.train(tiny_pipeline(), tmp_path / "thrice", settings, minutes=0, compiled=False) for _ in range(3)]
    assert done == [False, False, True]
    name = "checkpoints/step-3/state.safetensors"
    (once, _), (thrice, _) = (read_tensors(tmp_path / folder / name) for folder in ("once", "thrice"))
    assert once.keys() == thrice.keys()
    assert all(torch.equal(once[key], thrice[key]) for key in once)
    weights = "pipeline/transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "once" / weights).read_bytes() == (tmp_path / "thrice" / weights).read_bytes()
