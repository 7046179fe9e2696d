"""Statistics of fine detail: they see what features that name things overlook."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from ppcl.emoji.data import load_pairs
from ppcl.emoji.variation import load_varied_pictures
from ppcl.errors import UserError
from ppcl.eval.texture import MAX_LEVELS, num_levels, texture_distance, texture_features


def pictures(seed, count=120):
    return torch.from_numpy(load_varied_pictures(load_pairs()[:count], seed)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def reference():
    return texture_features(pictures(1))


@pytest.fixture(scope="module")
def plain(reference):
    return texture_distance(texture_features(pictures(0)), reference).value


def swapped(images, share):
    """Part of the fine detail of each picture is that of another one."""
    coarse = gaussian_blur(images.float(), [7, 7], [1.0, 1.0])
    fine = images.float() - coarse
    return (coarse + (1 - share) * fine + share * fine.roll(1, 0)).clamp(0, 255).round().to(torch.uint8)


def noisy(images, level):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images.float() + level * noise).clamp(0, 255).round().to(torch.uint8)


@pytest.mark.parametrize(
    ("damage", "strengths"),
    [
        (lambda images, sigma: gaussian_blur(images, [5, 5], [sigma, sigma]), (0.5, 0.7, 1.0)),
        (noisy, (2, 4, 8)),
        (swapped, (0.25, 0.5, 1.0)),
    ],
    ids=["blur", "noise", "swapped texture"],
)
def test_small_damage_shows_and_more_of_it_shows_more(damage, strengths, reference, plain):
    found = [texture_distance(texture_features(damage(pictures(0), s)), reference).value for s in strengths]
    assert [plain, *found] == sorted([plain, *found])
    assert found[0] > 1.5 * plain


def test_items_average_to_the_distance(reference):
    distance = texture_distance(texture_features(pictures(0)), reference)
    assert len(distance.items) == 120
    assert float(distance.items.mean()) == pytest.approx(distance.value)


def test_pictures_of_any_size_have_as_many_statistics_as_levels():
    assert [num_levels(side) for side in (11, 12, 24, 48, 1024)] == [0, 1, 2, 3, MAX_LEVELS]
    for height, width in ((12, 40), (25, 31), (48, 48), (200, 333)):
        images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
        features = texture_features(images)
        assert features.shape == (2, 9 * num_levels(min(height, width)) - 3)
        assert features.isfinite().all()
    assert texture_features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).isfinite().all()  # nothing to see


def test_what_is_no_set_of_pictures_is_refused(reference):
    for images in (torch.zeros(0, 3, 48, 48, dtype=torch.uint8), torch.zeros(2, 3, 48, 48), pictures(0, 2)[..., :8]):
        with pytest.raises(ValueError, match="pictures"):
            texture_features(images)
    with pytest.raises(UserError, match="at least 2 pictures"):
        texture_distance(reference[:1], reference)
