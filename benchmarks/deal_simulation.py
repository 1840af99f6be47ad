"""Simulates how long 8 to 1,024 ranks wait for one another, with and without balanced dealing.

    python -m adatape_kernels.benchmarks.deal_simulation
    python -m adatape_kernels.benchmarks.deal_simulation --lengths runs/imagenet/report.json

No rank is started: images are dealt as training deals them, and a rank's step is taken to cost as
many units as its images have rows, and `--fixed` rows for what it does besides. Lengths are drawn
from a distribution, or from the numbers of images by tape length in a run's report.json. Images
are dealt by what they took in the epoch before. The table has a column for runs in which no image
takes another length than that, and for runs in which one in ten or every other is drawn anew.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adatape_kernels.cli.option_kinds import OptionKind
from adatape_kernels.recipes.distributed.dealing import dealt, in_turn

RANKS = (8, 32, 128, 512, 1024)
CHANGED = (0.0, 0.1, 0.5)
"""Shares of images that take another length than in the epoch before."""


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


def recorded(file: Path) -> np.ndarray:
    """Return the shares of images by tape length in a run's report."""
    report = json.loads(file.read_text())
    counts = np.array(report.get("images_by_tape_length", report.get("tape_lens")), dtype=float)
    return counts / counts.sum()


def simulated(
    shares: np.ndarray,
    ranks: int,
    per_rank: int,
    own_rows: int,
    changed: float = 0.0,
    fixed: float = 0.0,
    steps: int = 20,
    seed: int = 0,
) -> DealtWork:
    """Return how ranks spend their time over some steps.

    Args:
        shares: the probability of each tape length, from 0 on.
        ranks: number of ranks.
        per_rank: number of images in a batch for each rank.
        own_rows: rows of an image beside its tape.
        changed: probability that an image takes another length than it took last time.
        fixed: what a rank's step costs beside its rows, in rows.
        steps: number of steps.
        seed: decides the draws.
    """
    generator = np.random.default_rng(seed)
    busy, spent = 0.0, {"in turn": 0.0, "balanced": 0.0}
    for _ in range(steps):
        last, other = generator.choice(len(shares), (2, ranks * per_rank), p=shares)
        now = np.where(generator.random(len(last)) < changed, other, last) + own_rows
        hands = {
            "in turn": in_turn(len(last), ranks),
            "balanced": dealt((last + own_rows).tolist(), ranks),
        }
        busy += now.sum() / ranks + fixed
        for name, deal in hands.items():
            spent[name] += max(now[hand].sum() for hand in deal) + fixed
    return DealtWork(ranks, busy / spent["in turn"], busy / spent["balanced"])


def table(rows: Sequence[tuple[str, Sequence[DealtWork]]]) -> str:
    """Return the results in Markdown, of a distribution's name and its runs by CHANGED."""
    titles = [f"balanced, {changed:.0%} changed | idle left" for changed in CHANGED]
    lines = [f"| lengths | ranks | in turn | {' | '.join(titles)} |", "|---" * 9 + "|"]
    for name, works in rows:
        first = works[0]
        found = [f"{work.balanced:.1%} | {work.idle_left:.0%}" for work in works]
        lines.append(f"| {name} | {first.ranks:,} | {first.in_turn:.1%} | {' | '.join(found)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--lengths", type=Path, metavar="REPORT", help="draw lengths from a run's report.json")
    add("--most", type=int, default=50, help="most tape tokens; default: %(default)s")
    add("--own-rows", type=int, default=197, help="rows beside the tape; default: %(default)s")
    add("--per-rank", type=int, default=32, help="images for each rank; default: %(default)s")
    add(
        "--ranks",
        type=OptionKind(int, many=True).of_word,
        default=RANKS,
        metavar="N,N",
        help="default: 8 to 1,024",
    )
    add("--fixed", type=float, default=0.0, help="rows a step besides; default: %(default)s")
    arguments = parser.parse_args(argv)
    chosen = {name: distribution(name, arguments.most) for name in ("skewed", "uniform")}
    if arguments.lengths is not None:
        chosen = {"recorded": recorded(arguments.lengths)}
    sizes, fixed = (arguments.per_rank, arguments.own_rows), arguments.fixed
    rows = [
        (name, [simulated(shares, ranks, *sizes, changed, fixed) for changed in CHANGED])
        for name, shares in chosen.items()
        for ranks in arguments.ranks
    ]
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
