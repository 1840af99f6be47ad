"""Records how many tape tokens each image reads from epoch to epoch, beside a run that trains.

    python -m adatape_kernels.benchmarks.dealing.recorded_lengths runs/two --write lengths.json &
    torchrun --nproc-per-node 2 -m adatape_kernels train --data fashion-mnist --out runs/two

A run of several processes keeps in its checkpoint how many rows each image took. This looks at each
checkpoint while it is there, and counts, for two epochs that follow each other, how many images
read m tokens in the one and n in the next. It ends with the run.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adatape_kernels.recipes import checkpoint
from adatape_kernels.recipes.distributed.dealing import saved_rows

RESULT = Path(__file__).parents[1] / "results/lengths-by-epoch.json"
_SECONDS = 0.2
# How long the folder may stay as it is before there is no more run to wait for.
_PATIENCE = 600.0


@dataclass(frozen=True)
class EpochPair:
    """What images read in two epochs that follow each other."""

    epoch: int
    """Number of the second epoch, counted from 1."""
    counts: np.ndarray
    """(longest + 1, longest + 1): number of images by what they read in one and in the other."""

    @property
    def joint(self) -> np.ndarray:
        """The share of images by what they read in the first epoch and in the second."""
        return self.counts / self.counts.sum()

    @property
    def changed(self) -> float:
        """The share of images that read another number of tokens than in the epoch before."""
        return 1 - float(np.trace(self.joint))


def pair(epoch: int, last: Tensor, now: Tensor, own_rows: int, longest: int) -> EpochPair:
    """Return the counts of an epoch's rows (images,) and of those of the epoch before.

    Args:
        epoch: number of the epoch.
        last: how many rows each image took in the epoch before.
        now: the same of this epoch.
        own_rows: rows of an image beside its tape.
        longest: most tape tokens of an image.
    """
    lengths = [rows.numpy() - own_rows for rows in (last, now)]
    counts = np.zeros((longest + 1, longest + 1), dtype=np.int64)
    np.add.at(counts, tuple(lengths), 1)
    return EpochPair(epoch, counts)


def checkpoints(
    folder: Path, patience: float = _PATIENCE, wait: Callable[[float], None] = time.sleep
) -> Iterator[checkpoint.Checkpoint]:
    """Yield each checkpoint of a run's folder once, until the run has its last epoch.

    Args:
        folder: the folder, which need not be there yet.
        patience: seconds after which a folder in which nothing happens ends it.
        wait: sleeps for some seconds.
    """
    epoch, waited = 0, 0.0
    while waited < patience:
        try:
            found = checkpoint.load(folder)
        except ValueError:  # none yet, or the files are just being replaced
            found = None
        if found is None or found.epoch == epoch:
            wait(_SECONDS)
            waited += _SECONDS
            continue
        epoch, waited = found.epoch, 0.0
        yield found
        if epoch >= found.config["epochs"]:
            return


def watched(run: Iterator[checkpoint.Checkpoint]) -> dict[str, Any]:
    """Return what is recorded of a run.

    Raises:
        ValueError: no two epochs that follow each other keep rows, as those of one process do not.
    """
    pairs, last, epoch, facts = [], None, 0, {}
    for found in run:
        images = int(found.data["train_images"])
        rows = saved_rows(Path(checkpoint.INDEX), found.tensors, images)
        if not rows.all():
            raise ValueError("run: expected one of several processes, whose checkpoints keep rows")
        facts, longest = found.config, int(found.config["num_tape_tokens"])
        own_rows = int(found.tensors["model.position"].shape[-2])
        if last is not None and found.epoch == epoch + 1:
            pairs.append(pair(found.epoch, last, rows, own_rows, longest))
        last, epoch, environment = rows, found.epoch, found.environment
    if not pairs:
        raise ValueError("run: expected epochs that follow each other, got none")
    return {
        "pairs": [{"epoch": each.epoch, "counts": each.counts.tolist()} for each in pairs],
        "own_rows": own_rows,
        "config": facts,
        "environment": environment,
    }


def read(file: Path) -> list[EpochPair]:
    """Return the recorded pairs of epochs.

    Raises:
        ValueError: the file holds none.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["pairs"]
        pairs = [EpochPair(int(each["epoch"]), np.array(each["counts"])) for each in found]
        square = all(each.counts.ndim == 2 and len(set(each.counts.shape)) == 1 for each in pairs)
        fits = square and all((each.counts >= 0).all() and each.counts.sum() for each in pairs)
    except (ValueError, KeyError, TypeError):
        fits, pairs = False, []
    if not fits or not pairs:
        raise ValueError(
            f"{file}: expected the recorded lengths of some epochs, got another content"
        )
    return pairs


def main(argv: Sequence[str] | None = None) -> int:
    """Watch a run; return 2 if there is nothing to record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="the folder of the run, which may not be there yet")
    parser.add_argument("--write", type=Path, default=RESULT, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        found: Mapping[str, Any] = watched(checkpoints(arguments.run))
        arguments.write.write_text(json.dumps(found) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"recorded_lengths: {error}", file=sys.stderr)
        return 2
    for each in read(arguments.write):
        print(f"epoch {each.epoch}: {each.changed:.1%} read another number of tokens")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
