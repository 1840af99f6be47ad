import itertools

import numpy as np
import pytest
import torch
from checks import refused
from image_files import write_folder

from adatape_kernels.data import AspectFolder, AspectImages, Normaliser, aspect_grid
from adatape_kernels.data.image_file import decode, sides_in_file

Image = pytest.importorskip("PIL.Image", reason="image folders need Pillow")


def gradient(height, width):
    """A picture whose red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    channels = [255 * x / max(1, width - 1), 255 * y / max(1, height - 1), 0 * x]
    return Image.fromarray(np.stack(channels, 2).round().astype(np.uint8))


def test_a_grid_is_within_the_limit_and_in_proportion():
    for height, width, most in itertools.product(
        (1, 7, 16, 40, 224, 601), (1, 16, 33, 480, 9_000), (1, 2, 49, 196)
    ):
        rows, columns = aspect_grid(height, width, patch_size=16, max_patches=most)
        assert 1 <= rows * columns <= most
        short, long = sorted((height, width))
        fewer, more = sorted((rows, columns))
        assert fewer == 1 or 16 * fewer <= short  # nothing is enlarged
        assert (rows <= columns) == (height <= width) or rows == columns
        if fewer * long / short + 0.5 <= most // fewer:
            assert abs(more - fewer * long / short) <= 0.5


def test_a_grid_takes_as_many_patches_as_it_can():
    limits = {"patch_size": 16, "max_patches": 196}
    assert aspect_grid(224, 224, **limits) == (14, 14)
    assert aspect_grid(1000, 1000, **limits) == (14, 14)
    assert aspect_grid(223, 300, **limits) == (12, 16)  # 13 by 17 would be too many
    assert aspect_grid(32, 64, **limits) == (2, 4)
    assert aspect_grid(5, 5, **limits) == (1, 1)
    assert aspect_grid(1, 100_000, **limits) == (1, 196)


def test_a_turned_image_has_a_turned_grid():
    for height, width in itertools.product(range(1, 120, 7), repeat=2):
        limits = {"patch_size": 4, "max_patches": 50}
        rows, columns = aspect_grid(height, width, **limits)
        assert aspect_grid(width, height, **limits) == (columns, rows)


def test_images_keep_their_aspect(tmp_path):
    sides = ((40, 80), (80, 40), (33, 33), (8, 300), (5, 9))
    files = [tmp_path / f"{i}.png" for i in range(len(sides))]
    for file, (height, width) in zip(files, sides, strict=True):
        gradient(height, width).save(file)
    images = AspectImages(files, patch_size=8, max_patches=18)
    found = images[torch.arange(len(files))]
    assert [tuple(image.shape) for image in found] == [
        (3, 24, 48),
        (3, 48, 24),
        (3, 32, 32),
        (3, 8, 144),
        (3, 8, 16),
    ]
    assert images.patch_counts.tolist() == [image[0].numel() // 64 for image in found]
    for image in found:
        assert image.dtype == torch.uint8
        red, green, _ = image.float()
        assert (red.diff(dim=1) >= 0).all() and (green.diff(dim=0) >= 0).all()
    assert [image.shape for image in images[torch.tensor([3, 0])]] == [(3, 8, 144), (3, 24, 48)]
    assert images[torch.tensor([], dtype=torch.long)] == []


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_picture_is_upright_and_its_rows_are_those_of_its_file(tmp_path, turn):
    file = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = turn
    gradient(64, 160).save(file, exif=exif, quality=95)
    images = AspectImages([file], patch_size=16, max_patches=10)
    (image,) = images[torch.tensor([0])]
    assert image.shape == ((3, 80, 32) if turn >= 5 else (3, 32, 80))
    assert images.patch_counts.tolist() == [10]
    square = decode(file, 32).float()
    shrunk = torch.nn.functional.interpolate(image[None].float(), (32, 32))[0]
    for axis in (1, 2):  # colours grow or fall alike
        assert torch.equal(
            (square.mean(axis).diff().sum(1) > 9), (shrunk.mean(axis).diff().sum(1) > 9)
        )


def test_large_pictures_are_decoded_small(tmp_path):
    file = tmp_path / "large.jpg"
    gradient(800, 1_600).save(file)
    assert sides_in_file(file) == (800, 1_600)
    (image,) = AspectImages([file], patch_size=8, max_patches=50)[torch.tensor([0])]
    assert image.shape == (3, 40, 80)
    assert (image[0].float().mean(0) - torch.linspace(0, 255, 80)).abs().max() < 8


def test_a_folder_of_classes(tmp_path):
    write_folder(tmp_path, classes=("cat", "dog"), count=10)
    for i in range(5):
        gradient(20, 60 - 8 * i).save(tmp_path / "cat" / f"wide{i}.png")
    photos = AspectFolder(tmp_path, patch_size=4, max_patches=30, seed=3)
    assert photos.class_names == ("cat", "dog") and photos.num_classes == 2
    assert len(photos.train_images) == 20 and len(photos.test_images) == 5
    assert photos.train_labels.bincount().tolist() == [12, 8]
    again = AspectFolder(str(tmp_path), patch_size=4, max_patches=30, seed=3)
    assert again.test_images.files == photos.test_images.files
    photos.look()
    normalise = Normaliser.of(photos.train_images)
    pixels = [normalise(image / 255).flatten(1) for image in photos.train_images[torch.arange(20)]]
    std, mean = torch.std_mean(torch.cat(pixels, 1), 1)
    torch.testing.assert_close(mean, torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(std, torch.ones(3), rtol=0, atol=1e-2)


def test_a_damaged_file_is_named_by_its_head_and_by_a_look(tmp_path):
    write_folder(tmp_path, classes=("cat", "dog"), count=4)
    file = sorted((tmp_path / "cat").iterdir())[0]
    noise = np.random.default_rng(0).integers(256, size=(50, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    file.write_bytes(file.read_bytes()[:4_000])
    photos = AspectFolder(tmp_path, patch_size=4, max_patches=9)
    with refused(file):
        photos.look()
    file.write_bytes(b"no image")
    images = AspectImages([file], patch_size=4, max_patches=9)
    with refused(file):
        _ = images.patch_counts
    with refused(file):
        images[torch.tensor([0])]


def test_what_is_wrong_is_named(tmp_path):
    for folder, error in ((None, TypeError), (b"x", TypeError), ("", ValueError)):
        with refused("folder", error=error):
            AspectFolder(folder, patch_size=4, max_patches=9)
    with refused("folder", "got none"):
        AspectFolder(tmp_path / "missing", patch_size=4, max_patches=9)
    write_folder(tmp_path, classes=("only",))
    with refused("data-dir", "two or more classes"):
        AspectFolder(tmp_path, patch_size=4, max_patches=9)
    for name, value, error in (
        ("patch_size", 0, ValueError),
        ("patch_size", 4.0, TypeError),
        ("patch_size", 1 << 20, ValueError),
        ("max_patches", 0, ValueError),
        ("max_patches", True, TypeError),
        ("max_patches", 1 << 60, ValueError),
        ("height", 0, ValueError),
        ("width", None, TypeError),
    ):
        given = {"height": 4, "width": 4, "patch_size": 4, "max_patches": 9, name: value}
        if name in ("patch_size", "max_patches"):
            with refused(name, error=error):
                AspectImages([], patch_size=given["patch_size"], max_patches=given["max_patches"])
        if value != 1 << 20 and value != 1 << 60:
            with refused(name, error=error):
                aspect_grid(**given)
    for files in ([3], None, "a.png", b"a.png"):
        with refused("files", error=TypeError):
            AspectImages(files, patch_size=4, max_patches=9)
