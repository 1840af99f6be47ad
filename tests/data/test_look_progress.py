"""A look at every image of a set says how far it is, where it takes long."""

import sys

import pytest
import torch

from adatape_kernels.data import ImageSet, image_set


class Files:
    """Images that are no tensor, as files are."""

    def __init__(self, count):
        self.count, self.seen = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, indices):
        self.seen += indices.tolist()
        return torch.zeros(len(indices), 3, 2, 2, dtype=torch.uint8)


def files_set():
    train, test = Files(40), Files(9)
    labels = torch.zeros(40, dtype=torch.long), torch.zeros(9, dtype=torch.long)
    return ImageSet(train, labels[0], test, labels[1], ("one",)), train, test


def test_a_slow_look_shows_how_many_images_are_behind_it(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(image_set, "_QUIET_SECONDS", 0)
    data, train, test = files_set()
    data.look()
    assert (train.seen, test.seen) == (list(range(40)), list(range(9)))
    assert "looking at every image" in capsys.readouterr().err


def test_a_quick_look_is_silent(capsys):
    data, _, _ = files_set()
    data.look()
    images = torch.zeros(4, 1, 2, 2)
    labels = torch.zeros(4, dtype=torch.long)
    ImageSet(images, labels, images, labels, ("one",)).look()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("lacking", ["tqdm", "stderr"])
def test_it_looks_without_a_bar_or_a_terminal(monkeypatch, lacking):
    if lacking == "tqdm":
        monkeypatch.setitem(sys.modules, "tqdm", None)
    else:
        monkeypatch.setattr(sys, "stderr", None)
    data, train, test = files_set()
    data.look()
    assert (len(train.seen), len(test.seen)) == (40, 9)
