"""Runs of `train` that take a fraction of a second: their options, and comparisons of them."""

import csv

from checks import assert_same_bits

from adatape_kernels.cli import main
from adatape_kernels.recipes import checkpoint

TINY = {"data": "mnist", "patch": 14, "bank_patch": 7, "dim": 8, "depth": 1, "heads": 2, "ffn": 8}
TINY |= {"num_tape_tokens": 2, "topk": 2, "batch": 20, "epochs": 2}


def exit_code(words):
    """The exit code of a command, which ends the program where its options cannot be parsed."""
    try:
        return main(words)
    except SystemExit as stop:
        return stop.code


def curve(out):
    """The rows of metrics.csv without the speed, which differs from run to run."""
    with open(out / "metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        row.pop("images_per_second")
    return rows


def assert_same_run(one, other):
    """Equal metrics, and checkpoints whose tensors have the same bits."""
    assert curve(one) == curve(other)
    ours, theirs = (checkpoint.load(out).tensors for out in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert_same_bits(ours[name], tensor)


def stop_after(monkeypatch, epoch, *, before_the_rest=True):
    """Interrupt the run at the checkpoint of an epoch: behind it, or else in its place."""
    original = checkpoint.save

    def save(run, saved):
        if saved.epoch == epoch and not before_the_rest:
            raise KeyboardInterrupt
        original(run, saved)
        if saved.epoch == epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save)
