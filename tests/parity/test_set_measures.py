"""New measures against other implementations and against their definitions, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ppcl.eval.clip import clip_items
from ppcl.eval.fid import fid, frechet_distance
from ppcl.eval.fidelity import psnr, ssim
from ppcl.eval.neighbours import manifold
from ppcl.eval.set_distances import cmmd, kid, kid_subsets


def feature_sets(ours: int, theirs: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    first = torch.randn(ours, width, generator=generator, dtype=torch.float64)
    return first, 1.2 * torch.randn(theirs, width, generator=generator, dtype=torch.float64) + 0.1


def test_fid_and_kid_match_torchmetrics_classes_on_the_same_features() -> None:
    """The public classes, with features passed through a network that does nothing."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Nothing(torch.nn.Module):
        num_features = 12

        def forward(self, pictures: Tensor) -> Tensor:
            return pictures.flatten(1)

    first, second = (part.reshape(-1, 3, 2, 2) for part in feature_sets(300, 300, 12))
    distance = FrechetInceptionDistance(feature=Nothing(), input_img_size=(3, 2, 2), normalize=False)
    distance.set_dtype(torch.float64)
    kernel = KernelInceptionDistance(feature=Nothing(), subsets=1, subset_size=300)
    for part, real in ((first, False), (second, True)):
        distance.update(part, real=real)
        kernel.update(part, real=real)
    ours = (first.flatten(1), second.flatten(1))
    assert fid(*ours) == pytest.approx(float(distance.compute()), rel=1e-6)
    assert kid(*ours) == pytest.approx(float(kernel.compute()[0]), rel=1e-6)


def test_frechet_of_given_statistics_matches_scipy() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    (a, b), (mu1, mu2) = rng.standard_normal((2, 32, 48)), rng.standard_normal((2, 32))
    sigma1, sigma2 = a @ a.T / 48, 1.5 * b @ b.T / 48
    expected = (mu1 - mu2) @ (mu1 - mu2) + np.trace(sigma1 + sigma2 - 2 * linalg.sqrtm(sigma1 @ sigma2).real)
    found = frechet_distance(*(torch.from_numpy(part) for part in (mu1, sigma1, mu2, sigma2)))
    assert found == pytest.approx(expected, rel=1e-6)


def test_kid_subsets_match_torchmetrics_in_distribution() -> None:
    """Mean and standard deviation over random subsets; the subsets themselves differ."""
    from torchmetrics.image.kid import poly_mmd

    first, second = feature_sets(200, 160, 8)
    generator = torch.Generator().manual_seed(3)
    values = []
    for _ in range(200):
        pick = [torch.randperm(len(part), generator=generator)[:50] for part in (first, second)]
        values.append(float(poly_mmd(first[pick[0]], second[pick[1]])))
    found = kid_subsets(first, second, subsets=200, subset_size=50)
    assert found is not None
    assert found[0] == pytest.approx(np.mean(values), abs=4 * np.std(values) / 200**0.5)
    assert found[1] == pytest.approx(np.std(values), rel=0.2)


def test_cmmd_matches_its_definition() -> None:
    first, second = feature_sets(70, 90, 16)
    x, y = (F.normalize(part, dim=1).numpy() for part in (first, second))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        squares = np.array([[np.sum((p - q) ** 2) for q in b] for p in a])
        return float(np.exp(-squares / (2 * 10.0**2)).mean())

    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    found = cmmd(first, second)
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert float(found.items.mean()) == pytest.approx(found.value)


def test_neighbour_measures_match_their_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Naeem et al. 2020, with whole distance matrices; ours in slabs of a few rows."""
    from ppcl.eval import set_distances

    monkeypatch.setattr(set_distances, "BLOCK_ELEMENTS", 1000)
    drawn, real = feature_sets(60, 80, 6)
    k = 4

    def radius(features: Tensor) -> np.ndarray:
        return np.sort(torch.cdist(features, features).numpy(), axis=1)[:, k]

    distance = torch.cdist(real, drawn).numpy()  # (real, drawn)
    inside = distance < radius(real)[:, None]
    expected = {
        "precision": inside.any(0).mean(),
        "density": inside.sum(0).mean() / k,
        "recall": (distance < radius(drawn)[None]).any(1).mean(),
        "coverage": (distance.min(1) < radius(real)).mean(),
    }
    found = manifold(drawn, real, k)
    for name, value in expected.items():
        assert float(getattr(found, name).mean()) == pytest.approx(value), name
        assert 0 < value < 3


def test_clip_score_matches_open_clip_by_hand() -> None:
    """The embedded evaluator's own towers and its own normalisation, against our features."""
    import open_clip
    from PIL import Image

    from ppcl.emoji.data import load_pairs, load_pictures
    from ppcl.eval.features import files, load_extractor

    pairs = load_pairs("new pair")[:6]
    pictures, captions = load_pictures(pairs), [pair.caption for pair in pairs]
    folder = f"local-dir:{files('ppcl') / 'assets' / 'evaluator'}"
    model, preprocess = open_clip.create_model_from_pretrained(folder)
    with torch.no_grad():
        image = model.eval().encode_image(
            torch.stack([preprocess(Image.fromarray(p)) for p in pictures]), normalize=True
        )
        text = model.encode_text(open_clip.get_tokenizer(folder)(captions), normalize=True)
    expected = 100 * float((image * text).sum(1).clamp(min=0).mean())
    extractor = load_extractor("emoji")
    described = extractor.text_features(captions)
    assert described is not None
    ours = clip_items(extractor.image_features(torch.from_numpy(pictures).permute(0, 3, 1, 2)), described).mean()
    assert ours == pytest.approx(expected, rel=1e-4)
    assert ours > 20


def test_paired_measures_match_torchmetrics() -> None:
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

    generator = torch.Generator().manual_seed(0)
    one = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8, generator=generator)
    two = (one.int() + torch.randint(-9, 10, one.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
    for index in range(3):
        a, b = (part[index : index + 1].double() / 255 for part in (one, two))
        assert psnr(one, two).values[index] == pytest.approx(float(PeakSignalNoiseRatio(data_range=1.0)(a, b)))
        structure = StructuralSimilarityIndexMeasure(data_range=1.0)(a, b)
        assert ssim(one, two).values[index] == pytest.approx(float(structure), rel=1e-5)
