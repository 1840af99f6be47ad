import pytest
import torch
from checks import refused
from image_files import write_folder

from adatape_kernels.data import AspectFolder, Normaliser, packed_batches, packed_indices
from adatape_kernels.data.packing import OPEN_BATCHES
from adatape_kernels.models import adatape_vit

Image = pytest.importorskip("PIL.Image", reason="image folders need Pillow")


@pytest.mark.parametrize("examples", [0, 1, 5, 3_000])
@pytest.mark.parametrize("most", [50, 300])
def test_each_example_comes_once_and_no_batch_is_too_large(examples, most):
    lens = torch.randint(0, 51, (examples,))
    batches = list(packed_indices(lens, most, seed=7))
    assert sorted(i for batch in batches for i in batch) == list(range(examples))
    assert all(0 < len(batch) and int(lens[batch].sum()) <= most for batch in batches)
    assert batches == list(packed_indices(lens.tolist(), most, seed=7))


def test_batches_are_nearly_full():
    lens = torch.randint(30, 257, (4_000,))
    batches = list(packed_indices(lens, 4_096))
    assert len(batches) < 1.05 * int(lens.sum()) / 4_096 + OPEN_BATCHES
    rows = torch.tensor([int(lens[batch].sum()) for batch in batches[:-OPEN_BATCHES]])
    assert rows.double().mean() > 0.95 * 4_096


def test_the_seed_decides_the_order():
    lens = torch.randint(1, 20, (200,))
    first, second = (list(packed_indices(lens, 64, seed=seed)) for seed in (0, 1))
    assert first != second
    assert first == list(packed_indices(lens, 64))


def test_first_fit_by_a_literal_loop():
    lens = torch.randint(0, 30, (500,)).tolist()
    order = torch.randperm(500, generator=torch.Generator().manual_seed(5)).tolist()
    expected, opened = [], []
    for i in order:
        fitting = [b for b in opened if sum(lens[j] for j in b) + lens[i] <= 40]
        if fitting:
            fitting[0].append(i)
            continue
        if len(opened) == OPEN_BATCHES:
            fullest = max(opened, key=lambda b: sum(lens[j] for j in b))
            opened.remove(fullest)
            expected.append(fullest)
        opened.append([i])
    found = list(packed_indices(lens, 40, seed=5))
    assert found == [*expected, *opened]


def test_wrong_lengths_and_limits_are_named():
    with refused("max_rows", "at least 9 (the rows of example 1)", "got 8"):
        packed_indices([3, 9], 8)
    for lens, error in (
        (None, TypeError),
        ("12", TypeError),
        ([1.5], TypeError),
        ([-1], ValueError),
        (torch.ones(3), ValueError),
        (torch.ones(3, 2, dtype=torch.int64), ValueError),
    ):
        with refused("lens", error=error):
            packed_indices(lens, 8)
    for max_rows, error in ((0, ValueError), (True, TypeError), (None, TypeError)):
        with refused("max_rows", error=error):
            packed_indices([1], max_rows)
    for seed, error in ((-1, ValueError), (1.0, TypeError)):
        with refused("seed", error=error):
            packed_indices([1], 8, seed=seed)


@pytest.fixture
def photos(tmp_path):
    write_folder(tmp_path, classes=("cat", "dog"), count=6)
    for i in range(6):
        size = (16 + 8 * i, 16)
        Image.new("RGB", size, (40 * i, 9, 9)).save(tmp_path / "dog" / f"wide{i}.png")
    return AspectFolder(tmp_path, patch_size=8, max_patches=12)


def test_batches_of_images_train_a_model(photos):
    model = adatape_vit("Ti/8", image_size=16, depth=1, num_classes=2, dim=24, topk=2)
    normalise = Normaliser.of(photos.train_images)
    images, seen = photos.train_images, []
    for batch, labels in packed_batches(
        images, photos.train_labels, max_rows=30, seed=1, normalise=normalise
    ):
        assert sum(image[0].numel() // 64 + 1 for image in batch) <= 30
        loss = model.loss(model(batch), labels)
        loss.backward()
        seen += labels.tolist()
    assert sorted(seen) == sorted(photos.train_labels.tolist())
    assert loss.isfinite()


def test_images_come_with_their_labels(photos):
    images, labels = photos.train_images, photos.train_labels
    order = [i for batch in packed_indices(images.patch_counts + 3, 20, seed=2) for i in batch]
    batches = list(packed_batches(images, labels, max_rows=20, extra_rows=3, seed=2))
    found = [image for batch, _ in batches for image in batch]
    for image, i in zip(found, order, strict=True):
        assert image.dtype == torch.uint8
        assert torch.equal(image, images[torch.tensor([i])][0])
    assert torch.equal(torch.cat([own for _, own in batches]), labels[order])


def test_wrong_arguments_are_named_before_the_first_batch(photos):
    images, labels = photos.train_images, photos.train_labels
    with refused("images", error=TypeError):
        packed_batches(torch.zeros(3, 3, 8, 8), labels, max_rows=30)
    with refused("labels", error=TypeError):
        packed_batches(images, labels.tolist(), max_rows=30)
    with refused("labels"):
        packed_batches(images, labels[1:], max_rows=30)
    with refused("max_rows", "at least"):
        packed_batches(images, labels, max_rows=3)
    for extra, error in ((-1, ValueError), (0.5, TypeError)):
        with refused("extra_rows", error=error):
            packed_batches(images, labels, max_rows=30, extra_rows=extra)
    with refused("normalise", error=TypeError):
        packed_batches(images, labels, max_rows=30, normalise=lambda image: image)
