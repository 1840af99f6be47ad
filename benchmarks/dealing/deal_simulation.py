"""Simulates how long 8 to 1,024 ranks wait for one another, with and without balanced dealing.

    python -m adatape_kernels.benchmarks.dealing.deal_simulation
    python -m adatape_kernels.benchmarks.dealing.deal_simulation --recorded
    python -m adatape_kernels.benchmarks.dealing.deal_simulation --recorded --variant S/16

No rank is started: images are dealt as training deals them, by the rows that each took in the epoch
before. What each reads in two epochs is drawn from a distribution, some of the images anew in the
second; or, with `--recorded`, from what the images of a run read in epochs that followed each
other (`dealing.recorded_lengths`), in proportion to the longest tape. A rank's step costs as many
units as its images have rows, or with `--variant` the seconds that are predicted for an H100
(`dealing.rank_step_cost`).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from adatape_kernels.benchmarks.dealing import rank_step_cost, recorded_lengths
from adatape_kernels.benchmarks.dealing.rank_step_cost import StepCost
from adatape_kernels.benchmarks.reports.imagenet_cost import VARIANTS
from adatape_kernels.cli.option_kinds import OptionKind
from adatape_kernels.recipes.distributed.dealing import dealt, in_turn

RANKS = (8, 32, 128, 512, 1024)
CHANGED = (0.0, 0.1, 0.5)
"""Shares of images whose length is drawn anew in the second epoch."""


@dataclass(frozen=True)
class DealtWork:
    """How a number of ranks spends its time."""

    ranks: int
    in_turn: float
    """Share of the time that ranks compute if images are dealt out in turn."""
    balanced: float
    """The same if they are dealt by the rows that each took last time."""

    @property
    def idle_left(self) -> float:
        """Idle time with balanced dealing, as a share of that without."""
        return (1 / self.balanced - 1) / (1 / self.in_turn - 1)


def distribution(name: str, most: int) -> np.ndarray:
    """Return the probability of each tape length from 0 to `most`.

    Skewed: one image in ten reads all tokens, and the others a tenth of them, as in the shapes of
    the benchmarks. Uniform: all lengths are as likely.
    """
    shares = np.zeros(most + 1)
    if name == "uniform":
        shares[:] = 1 / (most + 1)
    else:
        shares[most // 10], shares[most] = 0.9, 0.1
    return shares


def joint(shares: np.ndarray, changed: float) -> np.ndarray:
    """Return the probability of each pair of lengths in two epochs.

    Args:
        shares: the probability of each tape length, from 0 on.
        changed: probability that an image's second length is drawn anew.
    """
    return (1 - changed) * np.diag(shares) + changed * np.outer(shares, shares)


def simulated(
    pairs: np.ndarray,
    ranks: int,
    per_rank: int,
    cost: StepCost,
    steps: int = 20,
    seed: int = 0,
) -> DealtWork:
    """Return how ranks spend their time over some steps.

    Args:
        pairs: (m, m), the probability that an image reads so much in one epoch and in the next,
            each from nothing to the longest tape of `cost`.
        ranks: number of ranks.
        per_rank: number of images in a batch for each rank.
        cost: what a rank's images cost.
        steps: number of steps.
        seed: decides the draws.
    """
    generator = np.random.default_rng(seed)
    lengths = np.rint(np.linspace(0, cost.longest, len(pairs))).astype(int)
    busy, spent = 0.0, {"in turn": 0.0, "balanced": 0.0}
    for _ in range(steps):
        drawn = generator.choice(pairs.size, ranks * per_rank, p=pairs.ravel())
        last, now = lengths[drawn // len(pairs)], cost.images(lengths[drawn % len(pairs)])
        hands = {
            "in turn": in_turn(len(last), ranks),
            "balanced": dealt((last + cost.own_rows).tolist(), ranks),
        }
        busy += now.sum() / ranks + cost.step
        for name, deal in hands.items():
            spent[name] += max(now[hand].sum() for hand in deal) + cost.step
    return DealtWork(ranks, busy / spent["in turn"], busy / spent["balanced"])


def table(rows: Sequence[tuple[str, Sequence[DealtWork]]], titles: Sequence[str]) -> str:
    """Return the results in Markdown.

    Args:
        rows: what the lengths of a row are called, and its simulations.
        titles: what tells the simulations of a row apart.
    """
    heads = " | ".join(f"{title} | idle left" for title in titles)
    lines = [f"| lengths | ranks | in turn | {heads} |", "|---" * (3 + 2 * len(titles)) + "|"]
    for name, works in rows:
        first = works[0]
        found = [f"{work.balanced:.1%} | {work.idle_left:.0%}" for work in works]
        lines.append(f"| {name} | {first.ranks:,} | {first.in_turn:.1%} | {' | '.join(found)} |")
    return "\n".join(lines)


def _drawn(ranks: Sequence[int], per_rank: int, cost: StepCost) -> str:
    """Return the table of lengths that are drawn from a distribution."""
    rows = [
        (
            name,
            [
                simulated(joint(distribution(name, cost.longest), changed), number, per_rank, cost)
                for changed in CHANGED
            ],
        )
        for name in ("skewed", "uniform")
        for number in ranks
    ]
    return table(rows, [f"balanced, {changed:.0%} changed" for changed in CHANGED])


def _recorded(file: Path, ranks: Sequence[int], per_rank: int, cost: StepCost) -> str:
    """Return the table of recorded lengths: of a run's first pair of epochs, and later ones."""
    pairs = recorded_lengths.read(file)
    chosen = [pairs[at] for at in sorted({0, len(pairs) // 2, len(pairs) - 1})]
    rows = [
        (
            f"of epoch {each.epoch}, {each.changed:.0%} changed",
            [simulated(each.joint, number, per_rank, cost)],
        )
        for each in chosen
        for number in ranks
    ]
    return table(rows, ["balanced"])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return 2 if the recorded lengths cannot be read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add(
        "--recorded",
        type=Path,
        nargs="?",
        const=recorded_lengths.RESULT,
        metavar="FILE",
        help="draw lengths from those of a run; default of FILE: %(const)s",
    )
    add("--variant", choices=VARIANTS, help="predicted seconds of ImageNet's recipe, on an H100")
    add("--most", type=int, help="most tape tokens; default: 50, or those of the variant")
    add("--own-rows", type=int, help="rows beside the tape; default: 197, or those of the variant")
    add("--per-rank", type=int, default=32, help="images for each rank; default: %(default)s")
    ranks = OptionKind(int, many=True)
    add("--ranks", type=ranks.of_word, default=RANKS, metavar="N,N", help="default: 8 to 1,024")
    add(
        "--fixed",
        type=float,
        default=0.0,
        help="rows a step besides, without --variant; default: 0",
    )
    arguments = parser.parse_args(argv)
    if arguments.variant is None:
        cost = StepCost(own_rows=197, longest=50, row=1.0, step=arguments.fixed)
    else:
        cost = rank_step_cost.of_variant(arguments.variant)
    asked = {"longest": arguments.most, "own_rows": arguments.own_rows}
    cost = replace(cost, **{name: count for name, count in asked.items() if count is not None})
    sizes = arguments.ranks, arguments.per_rank, cost
    try:
        recorded = arguments.recorded
        print(_drawn(*sizes) if recorded is None else _recorded(recorded, *sizes))
    except (ValueError, OSError) as error:
        print(f"deal_simulation: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
