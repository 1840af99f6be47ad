"""The speed of the loaders of several ranks together."""

from types import SimpleNamespace

from adatape_kernels.recipes.distributed.loading_of_ranks import LoadingOfRanks, loading_of
from adatape_kernels.recipes.distributed.ranks import ALONE, Ranks
from adatape_kernels.recipes.training.train_loop import EpochResult


def test_speeds_are_added_and_the_longest_waiting_counts(monkeypatch):
    others = [(70.0, 0.1), (40.0, 0.5)]
    monkeypatch.setattr(Ranks, "gathered", lambda self, found: found + others)
    times = SimpleNamespace(images_per_second=100.0, waiting_share=0.3)
    found = loading_of(times, Ranks(0, 3))
    assert found == LoadingOfRanks(3, 210.0, 0.5)
    (remark,) = EpochResult(1, 0.0, 0.0, 0.0, 0.0, found).remarks()
    assert remark == (
        "the loaders of 3 ranks alone 210 images/s; "
        "a rank waited for data 50% of the time (--workers)"
    )


def test_one_process_speaks_of_its_own_loader():
    times = SimpleNamespace(images_per_second=100.0, waiting_share=0.3)
    assert loading_of(times, ALONE) is times
