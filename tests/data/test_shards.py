import re

import pytest
import torch
from checks import refused
from shard_files import example, image_bytes, write_set, write_shard

from adatape_kernels.data import load
from adatape_kernels.data.image_file import decode
from adatape_kernels.data.loading.unreadable_images import UnreadableImages, count_unreadable

pytest.importorskip("PIL.Image", reason="shards need Pillow")


def test_images_and_labels_are_those_of_the_members(tmp_path):
    write_set(tmp_path)
    found = load("shards", tmp_path, image_size=6)
    assert found.train_labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert found.test_labels.tolist() == [1, 2]
    assert found.class_names == ("class 0", "class 1", "class 2")
    chosen = torch.tensor([5, 0, 6])
    for number, image in zip(chosen.tolist(), found.train_images[chosen], strict=True):
        (tmp_path / "one.png").write_bytes(image_bytes(number))
        assert torch.equal(image, decode(tmp_path / "one.png", 6))
    assert found.train_images[torch.tensor([], dtype=torch.long)].shape == (0, 3, 6, 6)


def test_shards_without_train_are_split_by_the_seed(tmp_path):
    write_shard(tmp_path / "a.tar", [part for n in range(10) for part in example(n, n % 2)])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    found, again, other = (load("shards", tmp_path, image_size=4, seed=s) for s in (1, 1, 2))
    assert found.class_names == ("cat", "dog") and len(found.test_labels) == 2
    held = found.test_images.chosen
    assert torch.equal(held, again.test_images.chosen)
    assert not torch.equal(held, other.test_images.chosen)
    both = torch.cat([held, found.train_images.chosen])
    assert both.sort().values.tolist() == list(range(10))
    assert found.notes == (
        f"2 of 10 images, drawn by the seed 1, are the test, since {tmp_path} has no train folder",
    )


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([("x.png", b""), ("x.cls", b"3")], ["x.cls", "0 to 1", "got 3"]),
        ([("x.png", b""), ("x.cls", b"-1")], ["x.cls", "0 to 1", "got -1"]),
        ([("x.png", b""), ("x.cls", b"cat")], ["x.cls", "an integer", "cat"]),
        ([("x.png", b""), ("x.json", b"[1]")], ["x.json", 'integer "label"']),
        ([("x.png", b""), ("x.json", b'{"label": true}')], ["x.json", 'integer "label"']),
        ([("x.png", b"")], ["x.png", "a label beside it", "none"]),
        ([("x.cls", b"1")], ["x.*", "an image beside", "none"]),
        ([("x.png", b""), ("x.jpg", b"")], ["x.jpg", "one image", "second"]),
        ([("x.cls", b"1"), ("x.json", b"")], ["x.json", "one label", "second"]),
    ],
)
def test_a_wrong_member_is_one_line_that_names_shard_and_member(tmp_path, members, said):
    shard = write_shard(tmp_path / "0.tar", [*example(0, 0), *members, *example(2, 1)])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with refused(f"{shard}: {said[0]}", *said[1:]):
        load("shards", tmp_path, image_size=4)


def test_a_test_label_beyond_those_of_the_training_is_refused(tmp_path):
    write_set(tmp_path)
    shard = write_shard(tmp_path / "val" / "9.tar", example(0, 3))
    with refused(f"{shard}: part/000000.cls", "0 to 2", "got 3"):
        load("shards", tmp_path, image_size=4)


def test_a_shard_that_is_cut_short_anywhere_is_one_line_that_names_it(tmp_path):
    members = [part for number in range(3) for part in example(number, number % 2)]
    shard = write_shard(tmp_path / "0.tar", members)
    content = shard.read_bytes()
    end = len(content.rstrip(b"\0"))
    for length in (*range(0, end, 256), *range(512, end, 512), end):
        shard.write_bytes(content[:length])
        with pytest.raises(ValueError) as caught:
            load("shards", tmp_path, image_size=4)
        message = str(caught.value)
        assert message.startswith(f"{shard}: expected") and "\n" not in message
        if length > 2048:  # behind the first member's header and content
            assert re.search(r"part/00000\d\.(png|cls|json)", message)


def test_what_is_no_tar_file_is_one_line(tmp_path):
    for content in (b"no tar at all" * 100, b"\x1f\x8b" + bytes(600)):
        (tmp_path / "0.tar").write_bytes(content)
        with refused(str(tmp_path / "0.tar"), "a whole tar file"):
            load("shards", tmp_path, image_size=4)
    (tmp_path / "0.tar").write_bytes(bytes(10240))
    with refused("data-dir", "expected images", "got none"):
        load("shards", tmp_path, image_size=4)
    (tmp_path / "0.tar").unlink()
    with refused("data-dir", "*.tar", "none"):
        load("shards", tmp_path, image_size=4)


def test_a_damaged_image_names_shard_and_member_and_can_be_skipped(tmp_path):
    broken = ("part/000001.png", image_bytes(1)[:30])
    shard = write_shard(
        tmp_path / "train" / "0.tar",
        [*example(0, 0), broken, ("part/000001.cls", b"1"), *example(2, 1)],
    )
    write_shard(tmp_path / "val" / "0.tar", example(0, 0))
    images = load("shards", tmp_path, image_size=4).train_images
    with refused(f"{shard}: part/000001.png", "got no readable one"):
        images[torch.arange(3)]
    found = UnreadableImages(1)
    count_unreadable(images, torch.arange(3), found)
    assert list(found.reasons) == [1]
    content = shard.read_bytes()
    shard.write_bytes(content[:600])
    with refused(f"{shard}: the member at byte 4608", "bytes", "cut short since"):
        images[torch.tensor([2])]
