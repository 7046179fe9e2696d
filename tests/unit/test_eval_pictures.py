"""Folders of real pictures of any kind, cached features, statistics files, bounded memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ppcl.capture.prompts import read_prompts
from ppcl.errors import ArtifactError, UserError
from ppcl.eval import pictures
from ppcl.eval.features import load_extractor, resize
from ppcl.eval.fid import FeatureStatistics, fid
from ppcl.eval.fidelity import lpips, lpips_weights, psnr
from ppcl.eval.pictures import compare_pairs, describe, load_statistics, reference_files
from ppcl.eval.scoring import measure, reference_of


class Means:
    """Features are the 4 x 4 mean colours; counts the pictures that it is shown, and the most at once."""

    name = "means"

    def __init__(self) -> None:
        self.seen, self.most_pixels = 0, 0

    def image_features(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        self.most_pixels = max(self.most_pixels, images.shape[0] * images.shape[2] * images.shape[3])
        return F.adaptive_avg_pool2d(resize(images, 16), 4).flatten(1)

    def text_features(self, texts: object) -> None:
        return None


def noise(height: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures of five sizes and six modes in two folders, two with one name, and a text file."""
    made = tmp_path / "real"
    (made / "more").mkdir(parents=True)
    Image.fromarray(noise(20, 30, 0)).save(made / "a.png")
    Image.fromarray(noise(16, 16, 1)).save(made / "b.PNG")
    Image.fromarray(noise(40, 24, 2)).convert("L").save(made / "grey.png")
    Image.fromarray(np.dstack([noise(16, 16, 3), np.full((16, 16), 128, np.uint8)])).save(made / "clear.png")
    Image.fromarray(noise(16, 16, 4)).convert("P").save(made / "palette.gif")
    Image.fromarray(noise(64, 64, 5)).save(made / "photo.jpg")
    Image.fromarray(noise(16, 16, 6)).save(made / "more" / "a.png")
    (made / "notes.txt").write_text("no picture")
    return made


def test_any_size_and_mode_and_equal_names(folder: Path) -> None:
    files = reference_files(folder)
    assert len(files) == 7
    found = describe(files, Means())
    assert found.shape == (7, 48)
    for row, path in zip(found, files, strict=True):
        alone = describe([path], Means())
        assert torch.allclose(row, alone[0], atol=1e-4), path.name
    grey = found[[path.name for path in files].index("grey.png")].reshape(3, -1)
    assert torch.equal(grey[0], grey[2])
    clear = found[[path.name for path in files].index("clear.png")]
    assert clear.mean() > 175  # half transparent: laid on white


def test_features_are_cached_by_content(folder: Path, tmp_path: Path) -> None:
    cache, network = tmp_path / "cache.safetensors", Means()
    files = reference_files(folder)
    first = describe(files, network, cache)
    assert torch.equal(describe(files, network, cache), first)
    assert network.seen == 7
    shutil.move(folder / "a.png", folder / "renamed.png")  # other names, the same contents
    again = describe(reference_files(folder), network, cache)
    assert network.seen == 7
    assert torch.equal(again.sort(0).values, first.sort(0).values)
    Image.fromarray(noise(16, 16, 9)).save(folder / "b.PNG")  # the same name, other content
    describe(reference_files(folder), network, cache)
    assert network.seen > 7
    network.name = "other"  # another network must not get these
    describe(files := reference_files(folder), network, cache)
    assert network.seen >= 14 + len(files)
    cache.write_bytes(b"damaged")
    assert torch.equal(describe(files, network, cache), describe(files, Means()))


def test_an_interrupted_look_ends_up_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "CHUNK", 2)
    monkeypatch.setattr(pictures, "SAVE_EVERY", 1)
    files, cache = reference_files(folder), tmp_path / "cache.safetensors"
    whole = describe(files, Means())
    files[5].write_bytes(files[5].read_bytes()[:100])
    kept = files[5].read_bytes()
    with pytest.raises(ArtifactError, match=f"{files[5].name} cannot be used"):
        describe(files, Means(), cache)
    assert kept == files[5].read_bytes()  # a user's picture is never touched
    late = Means()
    describe(files[:5], late, cache)
    assert late.seen <= 1  # two whole chunks were kept
    assert whole.shape == (7, 48)


def test_bad_folders_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        reference_files(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="holds no pictures") as caught:
        reference_files(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ArtifactError, match=r"cut\.png cannot be used"):
        describe(reference_files(tmp_path), Means())


def test_statistics_of_other_tools_are_read(tmp_path: Path) -> None:
    """pytorch-fid writes mu and sigma alone; both ways round."""
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = features + 0.3
    path = tmp_path / "theirs.npz"
    np.savez(path, mu=features.mean(0).numpy(), sigma=np.cov(features.numpy(), rowvar=False))
    theirs = load_statistics(path, 6)
    assert (theirs.count, theirs.features) == (None, None)
    found = measure(drawn, theirs, None)
    assert set(found) == {"fid"}
    assert found["fid"].value == pytest.approx(fid(drawn, features), rel=1e-9)
    assert found["fid"].interval is not None
    moments = FeatureStatistics()
    moments.update(features)
    moments.save(tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as ours:  # as pytorch-fid reads it
        assert np.allclose(ours["mu"], features.mean(0))
        assert np.allclose(ours["sigma"], np.cov(features.numpy(), rowvar=False))
    assert load_statistics(tmp_path / "ours.npz", 6).count == 50
    with pytest.raises(ArtifactError, match="6 features, the evaluator gives 8"):
        load_statistics(path, 8)
    with pytest.raises(ValueError, match="without a count"):
        FeatureStatistics.load(path).update(features)


def test_memory_does_not_grow_with_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "CHUNK_PIXELS", 64 * 64 * 4)
    for index in range(150):
        Image.fromarray(noise(64, 64, index)).save(tmp_path / f"{index}.bmp")
    network = Means()
    assert describe(reference_files(tmp_path), network).shape == (150, 48)
    assert network.most_pixels <= 64 * 64 * 4
    assert network.seen == 150


def test_fewer_pictures_than_features_and_fewer_than_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    few, real = torch.randn(4, 32, generator=generator), torch.randn(20, 32, generator=generator)
    found = measure(few, reference_of(real), None)
    assert set(found) == {"fid", "kid"}  # no five neighbours, no subsets
    assert all(np.isfinite(one.value) and np.isfinite(one.items).all() for one in found.values())
    with pytest.raises(UserError, match="at least 2 pictures"):
        measure(few[:1], reference_of(real), None)


def test_pairs_of_different_sizes_have_no_paired_measures(tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in ("1.png", "2.png", "3.png"))
    Image.fromarray(noise(16, 16, 0)).save(one)
    Image.fromarray(noise(16, 16, 1)).save(two)
    Image.fromarray(noise(24, 16, 1)).save(three)
    measures = {"psnr": lambda a, b: psnr(a, b).values}
    assert compare_pairs([one, one], [one, two], measures)["psnr"][0] == 100
    assert compare_pairs([one, one], [one, three], measures) == {}


def test_lpips_runs_once_its_weights_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights in the right place: the real loading code, no download."""
    import torchvision

    from ppcl.eval import fidelity

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path, is_there = lpips_weights()
    assert not is_there
    assert path.name.startswith("alexnet")
    random = torchvision.models.alexnet(weights=None)
    monkeypatch.setattr(torchvision.models, "alexnet", lambda weights: random)
    fidelity._lpips_network.cache_clear()
    images = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = lpips(images, torch.cat([images[:1], 255 - images[1:]]))
    fidelity._lpips_network.cache_clear()
    assert found.values[0] == pytest.approx(0, abs=1e-6)
    assert found.values[1] > 0
    with pytest.raises(ValueError, match="at least 32 pixels"):
        lpips(images[..., :16], images[..., :16])


ODD = [
    "a cat, a dog, and a hat",
    'the words "no entry" on a door',
    "it's a d'oh moment\\n",
    "a 🐳 on 红色 ground — naïve",
    "two lines\nof text",
    "next\u2028line",
    " ".join(f"word{i}" for i in range(1000)),
]


def test_odd_prompts_are_read_and_described(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(ODD), encoding="utf-8")
    assert read_prompts(path) == ODD
    lines = [prompt for prompt in ODD if "\n" not in prompt]
    plain = tmp_path / "prompts.txt"
    plain.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert read_prompts(plain) == lines
    features = load_extractor("emoji").text_features(ODD)
    assert features is not None
    assert features.shape[0] == len(ODD)
    assert bool(features.isfinite().all())
    path.write_text('{"a": 1}')
    with pytest.raises(UserError, match="has no prompts"):
        read_prompts(path)
    path.write_text("[")
    with pytest.raises(UserError, match="is not JSON"):
        read_prompts(path)
