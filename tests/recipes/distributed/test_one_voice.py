"""One line says why a process ends, whatever comes while it is about to be said."""

import contextlib
import os
import signal
import threading

import pytest
import torch.distributed as dist

from adatape_kernels import cli
from adatape_kernels.recipes.distributed import last_words, one_voice, rank_watch
from adatape_kernels.recipes.distributed.joining import _stop
from adatape_kernels.recipes.distributed.rank_watch import RankWatch
from adatape_kernels.recipes.distributed.ranks import Ranks

ASKED = (signal.SIGTERM, signal.SIGINT)
REFUSED = ["train", "--data", "digits", "--heads", "3", "--dim", "16", "--out"]


def before(monkeypatch, module, name, do):
    """Do something once, before a function of a module is called."""
    called, left = getattr(module, name), [do]

    def first(*given, **named):
        while left:
            left.pop()()
        return called(*given, **named)

    monkeypatch.setattr(module, name, first)


@pytest.mark.parametrize("number", ASKED)
@pytest.mark.parametrize(
    ("module", "name"),
    [(cli, "printable"), (cli, "say_why"), (one_voice, "_heed_no_more"), (one_voice, "say")],
)
def test_a_request_to_end_does_not_replace_what_was_wrong(
    monkeypatch, capsys, tmp_path, module, name, number
):
    """It comes where torchrun sees another rank fail by the same mistake, a moment earlier."""
    before(monkeypatch, module, name, lambda: os.kill(os.getpid(), number))
    handlers = [*map(signal.getsignal, ASKED)]
    assert cli.main([*REFUSED, str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("adatape-kernels: heads: expected ") and said.count("\n") == 1
    assert [*map(signal.getsignal, ASKED)] == handlers


def test_each_command_of_a_process_says_its_own_line(capsys, tmp_path):
    for _ in range(2):
        assert cli.main([*REFUSED, str(tmp_path / "run")]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"), "one is gone"),
        (KeyError("of something else"), None),
    ],
)
def test_a_request_that_comes_while_a_rank_s_loss_is_on_its_way_up(monkeypatch, error, words):
    """torchrun has seen the rank go, too."""
    monkeypatch.setattr("atexit.register", lambda *given: None)
    watch = RankWatch(None, 0, 2)
    try:
        try:
            raise error
        finally:
            raise KeyboardInterrupt
    except KeyboardInterrupt as stop:
        with pytest.raises((RuntimeError, KeyboardInterrupt)) as raised:
            _stop(Ranks(0, 2), watch, stop)
    assert raised.type is (RuntimeError if words else KeyboardInterrupt)
    assert (words or "") in str(raised.value)


class Store:
    """A store that is gone, or in which the next rank is never heard of."""

    def __init__(self, gone):
        self.gone = gone

    def add(self, name, number):
        if self.gone:
            raise dist.DistNetworkError("Connection reset by peer")
        return number

    def check(self, names):
        return False

    def compare_set(self, name, expected, value):
        return value.encode()

    def set(self, name, value):
        pass


@pytest.fixture
def watched(monkeypatch):
    """How long a watch lets the main thread end and speak, and with which codes it ends all."""
    codes = []
    monkeypatch.setattr(rank_watch.os, "_exit", codes.append)
    monkeypatch.setattr(rank_watch, "_SECONDS_TO_SPEAK", 0.01)
    last_words.forget()
    yield codes
    last_words.forget()


@pytest.mark.parametrize("speaks", [False, True])
def test_the_watch_says_nothing_beside_the_main_thread(watched, capfd, speaks):
    """Both find that a rank is gone."""
    if speaks:
        one_voice.say_why("adatape-kernels: rank 0 of 2: one is gone")
    with RankWatch(Store(gone=False), 0, 2, beat=0.01, patience=0.05) as watch:
        watch._thread.join(20)
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and ("within 0.05 seconds" in said) != speaks
    assert watched == [rank_watch.EXIT_BY_ANOTHER]
    one_voice.say_why("adatape-kernels: another reason")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("ends", [False, True])
def test_a_store_that_goes_with_torchrun_is_not_what_a_rank_that_ends_says(
    watched, monkeypatch, capfd, ends
):
    monkeypatch.setattr(rank_watch, "_SECONDS_TO_END", 20 if ends else 0.01)
    gone = threading.Event()
    with contextlib.suppress(KeyboardInterrupt):
        with RankWatch(Store(gone=True), 0, 2, beat=0.01) as watch:
            gone.wait(0.1)
            if ends:
                raise KeyboardInterrupt
            watch._thread.join(20)
    watch._thread.join(20)
    assert not watch._thread.is_alive()
    assert capfd.readouterr().err.count("store, which is gone") == (not ends)
    assert watched == ([] if ends else [rank_watch.EXIT_BY_ANOTHER])
