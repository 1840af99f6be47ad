"""How long a rank waits for others, by a clock and a store that the test makes."""

import time

import pytest

from adatape_kernels.recipes.distributed import joining, rank_watch, ranks
from adatape_kernels.recipes.distributed.rank_watch import RankWatch


class SilentStore:
    """A store that hears of nobody but this rank."""

    def add(self, name, number):
        return number

    def check(self, names):
        return False

    def compare_set(self, name, expected, value):
        return value.encode()


class Clock:
    """The event that a watch waits for between two looks, which take as long as it is told."""

    def __init__(self, gaps):
        self.now, self.looks, self.gaps = 0.0, 0, gaps

    def wait(self, seconds):
        self.now += self.gaps.get(self.looks, seconds)
        self.looks += 1
        return self.looks > 1000

    def monotonic(self):
        return self.now


@pytest.mark.parametrize(
    ("gaps", "seconds"),
    [
        ({}, 45),
        # The machine was stopped for an hour, and its other processes need a moment, too.
        ({3: 3600}, 3600 + 36),
    ],
)
def test_silence_is_measured_while_the_own_process_runs(monkeypatch, gaps, seconds):
    clock, said = Clock(gaps), []
    watch = RankWatch(SilentStore(), 0, 2, beat=3.0, patience=40.0)
    watch._ended = clock
    monkeypatch.setattr(rank_watch.time, "monotonic", clock.monotonic)
    monkeypatch.setattr(watch, "_end", said.append)
    watch._watch()
    assert said == ["expected to hear of rank 1 within 40 seconds, and it is gone"]
    assert seconds - 6 < clock.now <= seconds + 6


@pytest.mark.parametrize("seconds", [0.01, 60])
def test_a_rank_that_waits_for_others_says_so_after_a_while(monkeypatch, capsys, seconds):
    monkeypatch.setenv("MASTER_ADDR", "node-7")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(joining, "SECONDS_BEFORE_A_NOTE", seconds)
    said, until = "", time.monotonic() + (10 if seconds < 1 else 0.1)
    with joining._said_when_it_takes_long(ranks.Ranks(0, 8)):
        while not said and time.monotonic() < until:
            time.sleep(0.01)
            said += capsys.readouterr().err
    line = "adatape-kernels: note: rank 0 of 8 waits for the others at node-7:29500"
    assert said.startswith(line if seconds < 1 else "") and said.count("\n") == (seconds < 1)
