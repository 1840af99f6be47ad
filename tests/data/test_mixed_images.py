"""Mixup, RandAugment and random erasing, whose numbers come from a given generator alone."""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_same_bits

from adatape_kernels.data import augment, rand_augment
from adatape_kernels.data.mixup import Mixture
from adatape_kernels.models.cross_entropy import classification_loss

pytestmark = pytest.mark.no_backend


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_images_and_targets_are_mixed_by_the_same_shares():
    images, labels = torch.rand(5, 3, 4, 4), torch.tensor([0, 2, 1, 1, 0])
    mixture = Mixture.draw(5, 0.4, generator())
    mixed, targets = mixture.images(images), mixture.targets(labels, 3)
    for row, share in enumerate(mixture.shares.tolist()):
        assert 0.5 <= share <= 1
        expected = share * images[row] + (1 - share) * images[row - 1]
        torch.testing.assert_close(mixed[row], expected)
        assert targets[row, labels[row]] >= 0.5
    torch.testing.assert_close(targets.sum(1), torch.ones(5))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_loss_of_mixed_targets_is_a_sum_over_both_labels(kind):
    logits, labels = torch.randn(5, 4, generator=generator()), torch.tensor([0, 2, 1, 3, 0])
    mixture = Mixture.draw(5, 1.0, generator(1))
    found = classification_loss(logits, mixture.targets(labels, 4), 0.0, kind)
    total = 0.0
    for row, share in enumerate(mixture.shares.tolist()):
        for weight, label in ((share, labels[row]), (1 - share, labels[row - 1])):
            one = classification_loss(logits[row : row + 1], label.view(1), 0.0, kind)
            total += weight * one.double() / 5
    torch.testing.assert_close(found.double(), total, rtol=1e-5, atol=1e-6)


def test_shares_are_those_of_the_distribution():
    shares = Mixture.draw(20_000, 0.5, generator()).shares
    # The larger of x and 1 - x is on average 1/2 + 1/pi where x is arcsine distributed.
    assert shares.mean().item() == pytest.approx(0.5 + 1 / torch.pi, abs=0.01)
    assert_same_bits(Mixture.draw(9, 0.5, generator()).shares, shares[:9])
    assert not torch.equal(Mixture.draw(9, 0.5, generator(1)).shares, shares[:9])


def test_one_image_is_mixed_with_itself():
    image, mixture = torch.rand(1, 1, 2, 2), Mixture.draw(1, 0.5, generator())
    torch.testing.assert_close(mixture.images(image), image)
    assert mixture.targets(torch.tensor([1]), 3).tolist() == [[0, 1, 0]]


@pytest.mark.parametrize("side", [1, 2, 8, 28])
def test_erasing_overwrites_one_rectangle(side):
    images = torch.full((40, 3, side, side), 2.0)
    erased = augment.erase(images, 1.0, generator())
    assert erased.shape == images.shape and erased.dtype == images.dtype
    for image in erased:
        changed = (image != 2).all(0)
        assert torch.equal(changed, (image != 2).any(0)) and changed.any()
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        height, width = (len(found) for found in (rows, columns))
        assert changed.sum() == height * width  # all of its bounding box
        assert image[:, changed].max() < 1
    if side == 28:
        area = (erased != 2).double().mean((1, 2, 3))
        assert 0.01 < area.min() and area.max() < 0.36
    assert_same_bits(augment.erase(images, 0.0, generator()), images)
    some = (augment.erase(images, 0.5, generator()) != 2).flatten(1).any(1)
    assert 8 < some.sum() < 32


def test_without_kornia_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(rand_augment, "find_spec", lambda name: None)
    message = r"randaugment: expected kornia .*pip install 'adatape-kernels\[augment\]'"
    with pytest.raises(RuntimeError, match=message):
        rand_augment.require_kornia("randaugment")


@pytest.mark.parametrize("channels", [1, 3])
def test_randaugment_changes_each_image_by_the_generator_alone(channels):
    pytest.importorskip("kornia")
    images = F.interpolate(torch.rand(24, channels, 4, 4, generator=generator()), (16, 16))
    change = rand_augment.RandAugment(2, 15)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = change(images, generator())
    assert torch.equal(torch.get_rng_state(), before)
    assert first.shape == images.shape and first.dtype == images.dtype
    assert first.min() >= 0 and first.max() <= 1
    changed = (first != images).flatten(1).any(1)
    assert changed.sum() > 12
    torch.manual_seed(6)
    torch.rand(3)
    assert_same_bits(rand_augment.RandAugment(2, 15)(images, generator()), first)
    assert not torch.equal(change(images, generator(1)), first)
