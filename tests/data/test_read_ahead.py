import multiprocessing

import pytest
import torch
from checks import refused
from image_files import write_folder

from adatape_kernels.data import load
from adatape_kernels.data.image_set import Subset, look_at, read_in_order
from adatape_kernels.data.loading import ReadAhead, decoded_ahead

pytest.importorskip("PIL.Image", reason="image folders need Pillow")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for half, count in (("train", 2), ("val", 36)):
        write_folder(folder / half, count=count)
    return folder


def read(images, batches):
    with read_in_order(images, batches) as found:
        return [*found]


def test_images_are_the_same_with_any_number_of_workers(photos):
    images = load("imagefolder", photos, image_size=8).test_images
    batches = torch.randperm(72, generator=torch.Generator().manual_seed(0)).split(40)
    expected = [images[batch] for batch in batches]
    for workers in (1, 3):
        for chosen in (decoded_ahead(images, workers), Subset(images, torch.arange(72))):
            found = read(chosen, batches)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        some = Subset(decoded_ahead(images, workers), torch.arange(71, -1, -2))
        (reversed_,) = read(some, [torch.arange(36)])
        assert torch.equal(reversed_, images[torch.arange(71, -1, -2)])
    assert not multiprocessing.active_children()


def test_who_reads_ahead(photos):
    data = load("imagefolder", photos, image_size=8)
    ahead = decoded_ahead(Subset(data.test_images, torch.arange(5)), 2)
    assert isinstance(ahead, ReadAhead) and len(ahead) == 5
    assert torch.equal(ahead[torch.tensor([3])], data.test_images[torch.tensor([3])])
    assert decoded_ahead(data.test_images, 0) is data.test_images
    tensor = torch.zeros(3, 1, 2, 2)
    in_memory = Subset(tensor, torch.arange(2))
    assert decoded_ahead(tensor, 2) is tensor and decoded_ahead(in_memory, 2) is in_memory
    assert [len(part) for part in read(in_memory, [torch.tensor([1]), torch.arange(2)])] == [1, 2]


def test_an_error_of_a_worker_or_of_the_pass_leaves_no_process(photos, tmp_path):
    write_folder(tmp_path / "train", count=2)
    write_folder(tmp_path / "val", count=36)
    bad = tmp_path / "val" / "dog" / "9.jpg"
    bad.write_bytes(bad.read_bytes()[:40])
    images = decoded_ahead(load("imagefolder", tmp_path, image_size=8).test_images, 2)
    with refused(str(bad), "whole JPEG"):
        look_at([images])
    with pytest.raises(KeyError), read_in_order(images, torch.arange(72).split(16)) as found:
        next(found)
        raise KeyError
    assert not multiprocessing.active_children()
