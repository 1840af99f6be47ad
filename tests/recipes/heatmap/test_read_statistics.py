"""Numbers on what is read, beside literal counts."""

import math

import pytest
import torch

from adatape_kernels.data.spoiled_images import blurred, noisy
from adatape_kernels.op_types import TapeSelection
from adatape_kernels.recipes.heatmap import read_statistics


def random_read(images, steps, topk, entries, seed=0):
    """Some images halt early; no entry is read twice."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, steps + 1, (images,), generator=generator)
    indices = torch.full((images, steps, topk), -1, dtype=torch.int32)
    for i in range(images):
        order = torch.randperm(entries, generator=generator)
        for s in range(int(counts[i])):
            indices[i, s] = order[s * topk : (s + 1) * topk]
    weights = (indices >= 0).float() / topk
    return TapeSelection(indices, weights, counts.int(), torch.zeros(images))


def test_places_are_counted_by_class_and_step():
    side, classes = 4, 3
    read = random_read(20, 3, 2, side * side)
    labels = torch.arange(20) % 2  # nobody is of the third class
    places = read_statistics.places_read(read, labels, classes, side)
    marks = read.indices.tolist()
    for y in range(side):
        for x in range(side):
            m = y * side + x
            reads = [any(m in step for step in image) for image in marks]
            assert places.over_all[y, x] == sum(reads) / 20
            for c in range(2):
                own = [r for r, label in zip(reads, labels.tolist(), strict=True) if label == c]
                assert places.by_class[c, y, x] == pytest.approx(sum(own) / len(own))
            assert places.by_class[2, y, x] == 0
            for s in range(3):
                taking = [image[s] for image in marks if image[s][0] >= 0]
                assert places.images_by_step[s] == len(taking)
                share = sum(m in step for step in taking) / len(taking)
                assert places.by_step[s, y, x] == pytest.approx(share)
    every = [m for image in marks for step in image for m in step if m >= 0]
    inside = [m for m in every if m // 4 in (1, 2) and m % 4 in (1, 2)]
    assert places.centre_share == pytest.approx(len(inside) / len(every))
    assert places.uniform_share == 4 / 16


@pytest.mark.parametrize("side, inside", [(1, 1), (2, 0), (3, 1), (4, 4), (7, 9), (8, 16)])
def test_the_middle_is_half_of_either_axis(side, inside):
    mask = read_statistics.middle(side)
    assert int(mask.sum()) == inside
    assert torch.equal(mask, mask.flip(0)) and torch.equal(mask, mask.T)


@pytest.mark.parametrize("images, steps", [(0, 3), (4, 0), (4, 3)])
def test_nothing_read_is_no_place_and_no_entry(images, steps):
    read = TapeSelection(
        torch.full((images, steps, 2), -1, dtype=torch.int32),
        torch.zeros(images, steps, 2),
        torch.zeros(images, dtype=torch.int32),
        torch.zeros(images),
    )
    labels = torch.zeros(images, dtype=torch.long)
    places = read_statistics.places_read(read, labels, 2, 3)
    assert not places.over_all.any() and not places.by_class.any() and not places.by_step.any()
    assert math.isnan(places.centre_share)
    entries = read_statistics.entries_read(read, labels, 2, 9)
    assert entries.dead == 9 and entries.entropy == 0 and not entries.counts.any()


def test_entries_are_counted_by_class():
    read = random_read(30, 4, 2, 12, seed=1)
    labels = torch.arange(30) % 3
    found = read_statistics.entries_read(read, labels, 3, 15)
    every = [
        (int(labels[i]), m)
        for i, image in enumerate(read.indices.tolist())
        for step in image
        for m in step
        if m >= 0
    ]
    for m in range(15):
        assert found.counts[m] == sum(entry == m for _, entry in every)
        for c in range(3):
            assert found.by_class[c, m] == every.count((c, m))
    shares = [n / len(every) for n in found.counts.tolist() if n]
    assert found.dead == 15 - len(shares) >= 3
    assert found.entropy == pytest.approx(-sum(p * math.log2(p) for p in shares))


def test_correlation_is_pearsons_and_none_of_a_constant():
    a, b = torch.tensor([1, 2, 3, 5]), torch.tensor([2.0, 1.0, 4.0, 3.0])
    expected = torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].item()
    assert read_statistics.correlation(a, b) == pytest.approx(expected)
    assert math.isnan(read_statistics.correlation(torch.ones(3), torch.arange(3)))
    entries = read_statistics.LengthsRead(1.0, 2.0, math.nan, 3.0, 4.0, math.nan).entries()
    assert entries["wrong"] is None and entries["correlation_with_loss"] is None
    assert entries["right"] == 2.0


def test_noise_has_its_deviation_and_stays_in_range():
    images = torch.full((50, 1, 16, 16), 0.5)
    changed = noisy(images, 0.1, torch.Generator().manual_seed(0)) - images
    assert abs(changed.std().item() - 0.1) < 0.005 and abs(changed.mean().item()) < 0.005
    bright = noisy(torch.ones(2, 3, 4, 4), 5.0, torch.Generator().manual_seed(0))
    assert bright.max() <= 1 and bright.min() >= 0


def test_blur_is_a_gaussian_and_keeps_what_is_flat():
    flat = torch.rand(2, 3, 1, 1).expand(2, 3, 9, 7)
    torch.testing.assert_close(blurred(flat, 1.0), flat)
    spot = torch.zeros(1, 1, 21, 21)
    spot[0, 0, 10, 10] = 1
    image = blurred(spot, 1.5)[0, 0].double()
    assert abs(image.sum().item() - 1) < 1e-5
    offsets = torch.arange(21, dtype=torch.float64) - 10
    assert abs((image.sum(0) @ offsets**2).item() - 1.5**2) < 0.1
    torch.testing.assert_close(image, image.T)
