"""Measures how much faster steps are in several processes than in one, and writes it down.

    python -m adatape_kernels.benchmarks.dealing.process_speed --batches 128,256 --rounds 5

torchrun starts the processes, of one thread each, and in each round these train a new model three
times, on the same images and with the same seed:

- *one*: rank 0 alone, while the others sleep;
- *several*: all together, as `train` does under torchrun;
- *apart*: all at once, each by itself with its part of the batch. Nothing is sent, so that this is
  what the machine's cores leave several processes, and no communication could be faster.

Of *apart* follows *in step*: what it would have taken had each step taken all processes as long as
the slowest of them, as where they wait for each other in every step, and still send nothing.

What counts is the images a second in the last of two epochs. The three follow each other within
seconds, and the report has those of every round and the medians of the ratios, so that a machine
that is busy for a while changes a round and not the result.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adatape_kernels.data import ImageSet, Normaliser, load
from adatape_kernels.recipes.distributed.joining import started
from adatape_kernels.recipes.distributed.ranks import ALONE, Ranks
from adatape_kernels.recipes.machine import environment
from adatape_kernels.recipes.training.execution import Execution
from adatape_kernels.recipes.training.train_config import TrainConfig
from adatape_kernels.recipes.training.train_loop import EpochResult, train

RESULT = Path(__file__).parents[1] / "results/process-speed.json"
KINDS = ("one", "several", "apart", "in_step")
_EPOCHS = 2
_MODULE = "adatape_kernels.benchmarks.dealing.process_speed"


class TimedStep(NamedTuple):
    """A step of training."""

    images: int
    seconds: float


class _StepTimes:
    """Takes the place of a progress bar, and notes when each step of the last epoch ends."""

    def __init__(self) -> None:
        self.ends: list[tuple[int, float]] = []

    def __enter__(self) -> "_StepTimes":
        return self

    def __exit__(self, *error: object) -> None:
        """Show nothing."""

    def update(self, images: int) -> None:
        """Note the end of a step."""
        self.ends.append((images, time.perf_counter()))

    def set_postfix(self, words: object, refresh: bool) -> None:
        """Show nothing."""

    def write(self, line: str) -> None:
        """Show nothing."""

    def of_last_epoch(self) -> list[TimedStep]:
        """Return its steps but for the first, whose beginning is not known."""
        ends = self.ends[len(self.ends) // _EPOCHS * (_EPOCHS - 1) :]
        pairs = itertools.pairwise(ends)
        return [TimedStep(images, end - before) for (_, before), (images, end) in pairs]


def steps_of(data: ImageSet, name: str, batch: int, ranks: Ranks) -> list[TimedStep]:
    """Train a new model for two epochs, and return the steps of the last.

    Args:
        data: its training half is used.
        name: that of the set, which decides the model.
        batch: number of images of a step, of all ranks together.
        ranks: the processes that share each step.
    """

    def after_epoch(result: EpochResult) -> str:
        return ""

    config = TrainConfig.of({"data": name, "epochs": _EPOCHS, "batch": batch})
    torch.manual_seed(config.seed)
    channels = data.train_images[torch.zeros(1, dtype=torch.long)].shape[1]
    steps = _StepTimes()
    train(
        config.model(data.num_classes, channels),
        data,
        config.plan(),
        Normaliser.of(data.train_images),
        config.augmentation(),
        after_epoch=after_epoch,
        execution=Execution(ranks=ranks),
        bar=steps,
        rows=torch.zeros(len(data.train_labels), dtype=torch.long),
    )
    return steps.of_last_epoch()


def images_per_second(of_processes: Sequence[Sequence[TimedStep]], in_step: bool = False) -> float:
    """Return how many images a second some processes computed together.

    Args:
        of_processes: the steps of each, all of which began at the same time.
        in_step: whether each step is to have taken all as long as the slowest of them.

    Example:
        >>> steps = [[TimedStep(4, 1.0), TimedStep(4, 1.0)], [TimedStep(4, 2.0), TimedStep(4, 0.5)]]
        >>> images_per_second(steps), images_per_second(steps, in_step=True)
        (7.2, 5.333333333333333)
    """
    if in_step:
        together = [*zip(*of_processes, strict=True)]
        seconds = sum(max(step.seconds for step in each) for each in together)
        return sum(step.images for each in together for step in each) / seconds
    totals = [map(sum, zip(*steps, strict=True)) for steps in of_processes]
    return sum(images / seconds for images, seconds in totals)


def compared(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return the images a second of each kind, and how many times as many they are as of one.

    Args:
        rounds: the images a second of each round by kind.

    Example:
        >>> one, other = dict.fromkeys(KINDS, 100.0), dict.fromkeys(KINDS, 80.0)
        >>> found = compared([{**one, "several": 170.0}, {**other, "several": 144.0}])
        >>> found["several"], found["ratios"]["several"], found["medians"]["several"]
        ([170, 144], [1.7, 1.8], 1.75)
    """
    ratios = {kind: [each[kind] / each["one"] for each in rounds] for kind in KINDS[1:]}
    return {
        **{kind: [round(each[kind]) for each in rounds] for kind in KINDS},
        "ratios": {kind: [round(each, 2) for each in some] for kind, some in ratios.items()},
        "medians": {kind: round(statistics.median(some), 2) for kind, some in ratios.items()},
    }


def measured(
    name: str, limit: int, batches: Sequence[int], rounds: int, ranks: Ranks
) -> dict[str, Any]:
    """Return what `compared` does for each batch, and what it was measured with.

    Args:
        name: that of the image set.
        limit: number of training images.
        batches: numbers of images of a step, of all ranks together.
        rounds: how often each is measured.
        ranks: the processes, which all call this.

    Raises:
        ValueError: there is no such set, or it has fewer images.
    """
    data = load(name).limited(limit, 0)
    found = []
    for batch in batches:
        of_rounds = []
        for _ in range(rounds):
            # All begin together, as each waits for what the others have found, and sleeps so long.
            alone = ranks.gathered([steps_of(data, name, batch, ALONE)] if ranks.leads else [])
            several = ranks.gathered([steps_of(data, name, batch, ranks)])
            apart = ranks.gathered([steps_of(data, name, batch // ranks.count, ALONE)])
            rates = (
                images_per_second(alone),
                images_per_second(several[:1]),
                images_per_second(apart),
                images_per_second(apart, in_step=True),
            )
            of_rounds.append(dict(zip(KINDS, rates, strict=True)))
        found.append({"batch": batch, **compared(of_rounds)})
    return {
        "processes": ranks.count,
        "data": name,
        "images": limit,
        "batches": found,
        "environment": environment(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the result; return 1 if a process failed."""
    given_here = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batches", default="128,256", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--data", default="fashion-mnist", help="default: %(default)s")
    parser.add_argument("--limit", type=int, default=2560, help="images; default: %(default)s")
    parser.add_argument("--write", type=Path, default=RESULT, help="default: %(default)s")
    given = parser.parse_args(given_here)
    if given.processes < 2 or given.rounds < 1:
        parser.error("expected two processes or more, and a round or more")
    try:
        batches = [int(each) for each in given.batches.split(",")]
    except ValueError:
        parser.error(f"--batches: expected numbers, as in 128,256, got {given.batches}")
    for batch in batches:
        if batch < 1 or batch % given.processes or given.limit < 3 * batch:
            parser.error(
                f"--batches: expected multiples of the {given.processes} processes, and three of "
                f"each in {given.limit} images, got {batch}"
            )
    if Ranks.of_environment().several:
        return _as_rank(given, batches)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", f"{given.processes}", "-m", _MODULE]
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run([*command, *given_here], env={**os.environ, **one_thread})
    if done.returncode:
        print(f"process_speed: a process ended with code {done.returncode}", file=sys.stderr)
        return 1
    return 0


def _as_rank(given: argparse.Namespace, batches: Sequence[int]) -> int:
    """Measure as one of the processes that torchrun has started; rank 0 writes the result."""
    torch.set_num_threads(1)
    with started(torch.device("cpu")) as ranks:
        found = measured(given.data, given.limit, batches, given.rounds, ranks)
    if ranks.leads:
        text = json.dumps(found, indent=1)
        given.write.write_text(f"{text}\n", encoding="utf-8")
        print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
