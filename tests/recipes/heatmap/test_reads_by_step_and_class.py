"""What single steps read of the middle, and what entries that are read say of a class."""

import math

import pytest
import torch

from adatape_kernels.op_types import TapeSelection
from adatape_kernels.recipes.heatmap import heatmap
from adatape_kernels.recipes.heatmap.read_statistics import entries_read, entropy_bits, places_read


def selection(indices):
    indices = torch.tensor(indices, dtype=torch.int32)
    counts = (indices >= 0).any(2).sum(1).int()
    return TapeSelection(indices, torch.ones(indices.shape), counts, torch.ones(len(indices)))


def test_the_middles_share_of_each_step():
    """Of 4 · 4 patches those with the numbers 5, 6, 9 and 10 are the middle."""
    read = selection([[[5, 0], [6, 9], [-1, -1]], [[1, 2], [-1, -1], [-1, -1]]])
    places = places_read(read, torch.tensor([0, 0]), 1, 4)
    by_step = places.centre_share_by_step
    assert by_step[:2].tolist() == [1 / 4, 1.0] and by_step[2].isnan()
    assert places.centre_share == 3 / 6


@pytest.mark.parametrize("classes", [2, 8])
def test_what_an_entry_says_of_the_class(classes):
    labels = torch.arange(classes).repeat(5)
    own = entries_read(selection([[[label]] for label in labels.tolist()]), labels, classes, 50)
    assert own.class_information == pytest.approx(math.log2(classes))
    same = entries_read(selection([[[3, 7]] for _ in labels]), labels, classes, 50)
    assert same.class_information == 0 and same.entropy == 1
    none = entries_read(selection([[[-1]] for _ in labels]), labels, classes, 50)
    assert none.class_information == none.entropy == 0


def test_class_information_is_what_the_formula_of_mutual_information_says():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (200,), generator=generator)
    indices = (labels[:, None, None] + torch.randint(4, (200, 1, 1), generator=generator)) % 5
    found = entries_read(selection(indices.tolist()), labels, 3, 5)
    joint = found.by_class.double() / found.by_class.sum()
    alone = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    expected = sum(
        p * math.log2(p / q)
        for p, q in zip(joint.flatten().tolist(), alone.flatten().tolist(), strict=True)
        if p
    )
    assert found.class_information == pytest.approx(expected) and expected > 0.1
    assert entropy_bits(torch.tensor([1, 1, 2, 0])) == 1.5


def test_the_report_names_the_entries_that_are_read_most(runs, tmp_path, capsys):
    (read,) = heatmap.run(runs / "learn", tmp_path / "h")["reads"]
    assert "bits of the class" in capsys.readouterr().out
    most = read["most_read"]
    assert [each["count"] for each in most] == sorted(filter(None, read["counts"]), reverse=True)
    for each in most:
        assert each["count"] == read["counts"][each["entry"]] == sum(each["counts_by_class"])
