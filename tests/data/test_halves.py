import pytest
import torch
from checks import refused
from image_files import write_folder
from shard_files import example, write_shard

from adatape_kernels.data import load

pytest.importorskip("PIL.Image", reason="image folders need Pillow")


def test_val_is_the_test_where_test_stands_beside_it(tmp_path):
    for half, count in (("train", 4), ("val", 3), ("test", 2)):
        write_folder(tmp_path / half, count=count)
        members = [part for number in range(2 * count) for part in example(number, number % 2)]
        write_shard(tmp_path / "shards" / half / "0.tar", members)
    for name, folder in (("imagefolder", tmp_path), ("shards", tmp_path / "shards")):
        data = load(name, folder, image_size=8)
        assert (len(data.train_labels), len(data.test_labels), data.notes) == (8, 6, ())


@pytest.mark.parametrize("inner", ["train", "."])
def test_a_split_is_stated_where_the_folder_has_none(tmp_path, inner):
    write_folder(tmp_path / "a" / inner, count=10)
    members = [part for number in range(20) for part in example(number, number % 2)]
    write_shard(tmp_path / "b" / inner / "0.tar", members)
    missing = "train folder" if inner == "." else "val or test beside train"
    for name, folder in (("imagefolder", tmp_path / "a"), ("shards", tmp_path / "b")):
        data = load(name, folder, image_size=8, seed=5)
        assert data.notes == (
            f"4 of 20 images, drawn by the seed 5, are the test, since {folder} has no {missing}",
        )
        assert (len(data.train_labels), len(data.test_labels)) == (16, 4)
        again = load(name, folder, image_size=8, seed=5)
        every = torch.arange(4)
        assert torch.equal(again.test_images[every], data.test_images[every])


def test_images_without_folders_are_one_line_that_says_what_to_do(tmp_path):
    write_folder(tmp_path / "train")
    (tmp_path / "val").mkdir()
    for number in range(3):
        (tmp_path / "val" / f"ILSVRC2012_val_0000000{number}.JPEG").touch()
    with refused(
        "data-dir",
        f"a folder for each class in {tmp_path / 'val'}",
        "got 3 images without one (ILSVRC2012_val_00000000.JPEG, …)",
        "move each to val/CLASS/, with the names of the classes in train/",
    ):
        load("imagefolder", tmp_path)
    with refused("data-dir", f"each class in {tmp_path / 'val'}", "3 images without one"):
        load("imagefolder", tmp_path / "val")
