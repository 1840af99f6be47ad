"""Which rank gets which images, and how much idle time that saves."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from adatape_kernels.recipes.distributed.dealing import (
    Dealer,
    dealt,
    in_turn,
    rows_of,
    rows_tensors,
    saved_rows,
)
from adatape_kernels.recipes.distributed.imbalance import Imbalance
from adatape_kernels.recipes.distributed.ranks import ALONE, Ranks


def largest(rows, hands):
    return max(sum(rows[position] for position in hand) for hand in hands)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("images", [0, 1, 2, 7])
def test_every_image_is_dealt_once_and_nearly_as_well_as_can_be(images, ranks):
    generator = np.random.default_rng(images)
    rows = generator.integers(1, 60, images).tolist()
    hands = dealt(rows, ranks)
    assert len(hands) == ranks and all(hand == sorted(hand) for hand in hands)
    assert sorted(itertools.chain(*hands)) == list(range(images))
    if images and ranks**images <= 3000:
        best = min(
            max(sum(r for r, to in zip(rows, chosen, strict=True) if to == k) for k in range(ranks))
            for chosen in itertools.product(range(ranks), repeat=images)
        )
        assert best <= largest(rows, hands) <= 4 / 3 * best
    assert largest(rows, hands) <= largest(rows, in_turn(images, ranks)) * 4 / 3


def test_images_of_equal_cost_are_dealt_evenly():
    assert [len(hand) for hand in dealt(17 * [4.0], 5)] == [4, 4, 3, 3, 3]


def dealers(count):
    """The dealers of all ranks, whose model has 5 rows an image and whose group is a sum."""
    config = SimpleNamespace(num_patches=4)
    module = SimpleNamespace(model=SimpleNamespace(config=config, num_prefix_tokens=1))
    forward = SimpleNamespace(module=module)
    return [Dealer(forward, Ranks(number, count), 6) for number in range(count)]


def test_what_images_took_decides_the_next_epoch(monkeypatch):
    lens, batch = torch.tensor([0, 9, 0, 4, 4, 0]), torch.tensor([5, 3, 1, 4, 2, 0])
    two, parts = dealers(2), []
    for dealer in two:
        share = dealer.share(batch)
        assert len(share.positions) == 3  # nothing is known yet
        assert share.weight(2) == 2 / 6
        taken = share.taken(lens[batch])
        share.learn([SimpleNamespace(halted=None, tape_lens=taken)])
    monkeypatch.setattr(
        Ranks, "summed", lambda self, tensor: parts.append(tensor.clone()) or tensor
    )
    for dealer in two:
        dealer.end_epoch()
    rows, steps = parts[0] + parts[2], parts[1] + parts[3]
    assert rows.tolist() == (lens + 5).tolist()
    assert steps.sum() == rows.sum() and steps.shape == (1, 2)
    for dealer in two:
        dealer.rows = rows
    hands = [dealer.share(batch).positions for dealer in two]
    assert sorted(torch.cat(hands).tolist()) == list(range(6))
    assert [rows[batch[hand]].sum().item() for hand in hands] == [24, 23]


def test_a_rank_without_images_counts_for_nothing():
    share = dealers(3)[2].share(torch.tensor([4, 2]))
    assert share.positions.tolist() == [] and share.weight(1) == 0
    assert share.taken(torch.tensor([7, 8])).tolist() == [7]


@pytest.mark.parametrize("together", [1, 2, 3])
@pytest.mark.parametrize("images", [1, 2, 7, 12])
def test_images_that_are_mixed_go_to_one_rank_by_what_they_take_together(images, together):
    rows = torch.randint(5, 20, (40,), generator=torch.Generator().manual_seed(images))
    batch = torch.arange(39, -1, -3)[:images]
    groups = [
        [*range(first, min(first + together, images))] for first in range(0, images, together)
    ]
    hands = dealt([float(rows[batch[group]].sum()) for group in groups], 3)
    expected = [[position for number in hand for position in groups[number]] for hand in hands]
    shares = [
        Dealer(None, Ranks(number, 3), 40, rows).share(batch, together) for number in range(3)
    ]
    assert [share.positions.tolist() for share in shares] == expected
    assert {share.positions.dtype for share in shares} == {torch.long}
    assert {share.most for share in shares} == {max(map(len, expected))}


def test_one_process_is_dealt_nothing():
    dealer = Dealer(None, ALONE, 6)
    assert dealer.share(torch.arange(3)) is None and dealer.end_epoch() is None


def test_rows_of_models_that_halt_are_those_of_all_steps():
    examples = SimpleNamespace(halted=SimpleNamespace(steps=torch.tensor([4, 2])))
    assert rows_of(examples, 10).tolist() == [40, 20]
    rows = SimpleNamespace(halted=SimpleNamespace(steps=torch.tensor([[1, 3], [2, 0]])))
    assert rows_of(rows, 10).tolist() == [4, 2]


def test_an_imbalance_says_what_ranks_wait_for():
    found = Imbalance.of(torch.tensor([[10, 30], [20, 20], [0, 40]]))
    assert found.rows_per_rank == 20 and found.most_rows == 30
    assert found.idle_share == pytest.approx(1 / 3)
    assert found.words() == "2 ranks of 20 rows a step, 33.3% idle"
    assert Imbalance.of(torch.zeros(2, 2)).idle_share == 0


def test_a_checkpoint_keeps_what_images_took():
    rows = torch.tensor([9, 0, 5])
    kept = rows_tensors(rows)
    assert [tensor.dtype for tensor in kept.values()] == [torch.int32]
    assert torch.equal(saved_rows(Path("c"), kept, 3), rows)
    assert rows_tensors(torch.zeros(3, dtype=torch.long)) == {}
    assert saved_rows(Path("c"), {}, 2).tolist() == [0, 0]  # that of an older version
    (name,) = kept
    for damaged in (rows.int()[:2], rows.float(), -rows.int()):
        with pytest.raises(ValueError, match=r"^c: expected rows of images to be 3 int32 numbers"):
            saved_rows(Path("c"), {name: damaged}, 3)


def test_a_run_that_goes_on_is_dealt_by_the_rows_of_its_checkpoint():
    rows = torch.tensor([90, 10, 10, 10, 10, 50])
    shares = [Dealer(None, Ranks(n, 2), 6, rows).share(torch.arange(6)) for n in range(2)]
    assert [share.positions.tolist() for share in shares] == [[0], [1, 2, 3, 4, 5]]
    assert [share.most for share in shares] == [5, 5]


def test_rows_are_overwritten_where_the_caller_sees_them(monkeypatch):
    monkeypatch.setattr(Ranks, "summed", lambda self, tensor: tensor)
    rows = torch.tensor([7, 7, 7])
    config = SimpleNamespace(num_patches=4)
    model = SimpleNamespace(config=config, num_prefix_tokens=1)
    dealer = Dealer(SimpleNamespace(module=SimpleNamespace(model=model)), Ranks(0, 2), 3, rows)
    share = dealer.share(torch.tensor([2, 1]))
    share.learn([SimpleNamespace(halted=None, tape_lens=torch.tensor([3]))])
    dealer.end_epoch()
    assert rows.tolist() == [7, 7, 8]
