"""Measures how much faster an epoch is in two processes than in one, and writes it down.

    python -m adatape_kernels.benchmarks.dealing.process_speed --batches 128,256 --rounds 5

In each round `train` runs once in one process and once under torchrun in two, with one thread in
each process and the same batch, images and seed. What counts is the images a second of the last
epoch, which `metrics.csv` has. The report holds those of every round and the median of the ratios,
so that a machine that is busy for a while changes a round and not the result.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adatape_kernels.recipes.machine import environment

RESULT = Path(__file__).parents[1] / "results/process-speed.json"
OPTIONS = ("--data", "fashion-mnist", "--limit", "6400", "--epochs", "2")
_TRAIN = ("-m", "adatape_kernels.cli", "train", "--device", "cpu")


def images_per_second(processes: int, options: Sequence[str], folder: Path) -> float:
    """Return how many images a second the last epoch of a run of `train` took.

    Args:
        processes: 1 for `train` alone, more for as many under torchrun.
        options: the command's options, without `--out`.
        folder: that of the run, which must not be there yet.

    Raises:
        subprocess.CalledProcessError: the run failed; what it said has been printed.
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes)]
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run(
        [*command, *_TRAIN, *options, "--out", str(folder)],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **one_thread},
    )
    with (folder / "metrics.csv").open() as file:
        return float(list(csv.DictReader(file))[-1]["images_per_second"])


def compared(one: Sequence[float], several: Sequence[float]) -> dict[str, Any]:
    """Return the images a second of each round, their ratios and the median of these.

    Example:
        >>> compared([100.0, 80.0, 90.0], [180.0, 160.0, 171.0])["ratio"]
        1.9
    """
    ratios = [together / alone for together, alone in zip(several, one, strict=True)]
    return {
        "one": [round(each) for each in one],
        "several": [round(each) for each in several],
        "ratios": [round(each, 2) for each in ratios],
        "ratio": round(statistics.median(ratios), 2),
    }


def measured(
    batches: Sequence[int], rounds: int, processes: int, options: Sequence[str] = OPTIONS
) -> dict[str, Any]:
    """Return what `compared` does for each batch, and what it was measured with.

    Raises what `images_per_second` raises.
    """
    torch.set_num_threads(1)  # as `environment` says
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for batch in batches:
            rates: dict[int, list[float]] = {1: [], processes: []}
            for number in range(rounds):
                for count, some in rates.items():
                    run = Path(folder, f"{batch}-{count}-{number}")
                    some.append(images_per_second(count, [*options, "--batch", f"{batch}"], run))
            found.append({"batch": batch, **compared(rates[1], rates[processes])})
    return {
        "processes": processes,
        "options": list(options),
        "batches": found,
        "environment": environment(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the result; return 1 if a run failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batches", default="128,256", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each; default: %(default)s")
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--write", type=Path, default=RESULT, help="default: %(default)s")
    parser.add_argument(
        "options",
        nargs="*",
        metavar="OPTION",
        default=OPTIONS,
        help=f"of `train`, behind --; default: {' '.join(OPTIONS)}",
    )
    given = parser.parse_args(argv)
    if given.processes < 2 or given.rounds < 1:
        parser.error("expected two processes or more, and a round or more")
    try:
        batches = [int(each) for each in given.batches.split(",")]
    except ValueError:
        parser.error(f"--batches: expected numbers, as in 128,256, got {given.batches}")
    try:
        found = measured(batches, given.rounds, given.processes, given.options)
    except subprocess.CalledProcessError as error:
        print(f"process_speed: {error}", file=sys.stderr)
        return 1
    text = json.dumps(found, indent=1)
    given.write.write_text(f"{text}\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
