"""FID statistics, KID, CLIP score, retrieval and paired fidelity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ppcl.errors import ArtifactError, UserError
from ppcl.eval.clip import caption_ranks, clip_items
from ppcl.eval.fid import FeatureStatistics, fid, frechet_distance
from ppcl.eval.fidelity import psnr, ssim
from ppcl.eval.set_distances import kid


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics_of(features: Tensor, batch: int) -> FeatureStatistics:
    result = FeatureStatistics()
    for part in torch.split(features, batch):
        result.update(part)
    return result


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_streaming_equals_batch(batch: int) -> None:
    features = noise(100, 6) + 1e4  # a large mean ruins sums of squares
    streamed = statistics_of(features, batch)
    assert streamed.count == 100
    expected = np.cov(features.double().numpy(), rowvar=False)
    assert np.abs(streamed.covariance.numpy() - expected).max() < 1e-9
    assert torch.allclose(streamed.mean, features.double().mean(0), rtol=1e-14)


def test_statistics_file_round_trip(tmp_path: Path) -> None:
    features = noise(30, 4)
    first = statistics_of(features[:20], 20)
    first.save(tmp_path / "statistics.npz")
    loaded = FeatureStatistics.load(tmp_path / "statistics.npz")
    loaded.update(features[20:])
    assert torch.allclose(loaded.covariance, statistics_of(features, 30).covariance, atol=1e-12)
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.npz"]


def test_statistics_refuse_damaged_files_and_pickles(tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    with pytest.raises(ArtifactError, match="does not exist"):
        FeatureStatistics.load(path)
    statistics_of(noise(30, 4), 30).save(path)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ArtifactError, match="not a file of feature statistics"):
        FeatureStatistics.load(path)
    np.savez(path, mu=np.array([{}], dtype=object), sigma=np.eye(1), count=3)
    with pytest.raises(ArtifactError, match="not a file of feature statistics"):
        FeatureStatistics.load(path)
    np.savez(path, mu=np.zeros(2), sigma=np.eye(3), count=3)
    with pytest.raises(ArtifactError, match="do not fit"):
        FeatureStatistics.load(path)


def test_statistics_refuse_other_widths_and_single_pictures() -> None:
    one = statistics_of(noise(1, 4), 1)
    with pytest.raises(UserError, match="at least 2 pictures, got 1"):
        _ = one.covariance
    with pytest.raises(ValueError, match=r"\(N, 4\)"):
        one.update(noise(3, 5))


def test_frechet_by_hand() -> None:
    mean1, mean2 = torch.tensor([0.0, 0.0]), torch.tensor([3.0, 4.0])
    # diagonal covariances: sum of squared differences of the standard deviations
    one, two = torch.diag(torch.tensor([1.0, 4.0])), torch.diag(torch.tensor([9.0, 0.0]))
    assert frechet_distance(mean1, one, mean2, two) == pytest.approx(25 + (1 - 3) ** 2 + (2 - 0) ** 2)


def test_frechet_of_rank_deficient_sets() -> None:
    features = noise(8, 64)  # rank 7 of 64
    assert fid(features, features) == pytest.approx(0, abs=1e-6)
    assert fid(features, features + 2) == pytest.approx(4 * 64, rel=1e-6)
    assert fid(features, noise(8, 64, seed=1)) > 1


def test_frechet_refuses_nan() -> None:
    eye = torch.eye(2)
    with pytest.raises(UserError, match="NaN"):
        frechet_distance(torch.tensor([float("nan"), 0]), eye, torch.zeros(2), eye)


def test_kid_is_unbiased_and_sees_a_shift() -> None:
    same = [kid(noise(40, 8, seed=2 * i), noise(60, 8, seed=2 * i + 1)) for i in range(30)]
    assert min(same) < 0 < max(same)
    assert abs(float(np.mean(same))) < 0.1
    assert kid(noise(40, 8), noise(40, 8, seed=1) + 1) > 1
    with pytest.raises(UserError, match="at least 2"):
        kid(noise(1, 4), noise(5, 4))


def test_clip_score_by_hand() -> None:
    images = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]])
    texts = torch.tensor([[10.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    # cosines 0.6, 0 and -1; the last counts as 0
    assert clip_items(images, texts).tolist() == pytest.approx([60, 0, 0])


def test_retrieval_counts_ties_against() -> None:
    texts = torch.eye(4)
    images = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.8, 0, 0], [1.0, 1.0, 1.0, 0], [1.0, 1.0, 1.0, 1.0]])
    assert caption_ranks(images, texts).tolist() == [1, 2, 3, 4]  # the third ties with two, the last with all
    assert caption_ranks(torch.ones(4, 4), texts).min() > 1
    assert caption_ranks(torch.full((4, 4), float("nan")), texts).min() > 1


def test_pairs_are_checked() -> None:
    with pytest.raises(ValueError, match="pairs"):
        clip_items(noise(3, 4), noise(2, 4))
    with pytest.raises(ValueError, match="pairs"):
        caption_ranks(noise(3, 4), noise(3, 5))
    picture = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="pairs"):
        psnr(picture, picture[:1])
    with pytest.raises(ValueError, match="uint8"):
        psnr(picture, picture.float())
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(picture[..., :8], picture[..., :8])


def test_psnr_by_hand() -> None:
    black = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    grey = torch.stack([black[0], black[0] + 51, black[0] + 255])
    found = psnr(black, grey)
    # equal: the cap; a fifth of the range: 20 log10 5 = 13.98 dB; the whole range: 0 dB
    assert found.values == pytest.approx((100, 13.9794, 0), abs=1e-3)
    assert found.mean == pytest.approx(sum(found.values) / 3)


def test_ssim_of_each_pair() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=generator)
    other = pictures.clone()
    other[39] = pictures[0]
    found = ssim(pictures, other)
    assert len(found.values) == 40
    assert found.values[:39] == pytest.approx([1.0] * 39)
    assert found.values[39] < 0.2
