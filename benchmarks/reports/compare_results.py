"""Tells whether a later run is slower, by its ratios to the peers.

    python -m adatape_kernels.benchmarks.reports.compare_results OLD.csv NEW.csv

Times of two runs cannot be compared, ratios within each can: of ours over a peer that did not
change. A case counts where both files timed ours and the peer together.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from adatape_kernels.benchmarks.harness import records
from adatape_kernels.benchmarks.harness.cases import OURS

EXIT_SLOWER, EXIT_UNREADABLE = 1, 2


class RatioChange(NamedTuple):
    """How the ratio of ours to a peer changed in one case."""

    case: records.CaseKey
    provider: str
    peer: str
    old: float
    new: float
    fault: str = ""
    """The reason why there is no new time where there was an old one."""

    @property
    def factor(self) -> float:
        """The new ratio over the old: above 1 ours became slower."""
        return float("inf") if self.fault else self.new / self.old


def changes(
    old: Sequence[records.ResultRow],
    new: Sequence[records.ResultRow],
    provider: str,
    peer: str | None,
) -> Iterator[RatioChange]:
    """Yield each case's change, against one peer or against every one."""
    before, after = (_last(rows, provider) for rows in (old, new))
    for key, (mine, theirs) in before.items():
        case, name = key
        if key not in after or (peer is not None and name != peer):
            continue
        mine_now, theirs_now = after[key]
        if not (mine.median_s and theirs.median_s and theirs_now.median_s):
            continue
        then = mine.median_s / theirs.median_s
        if mine_now.median_s:
            yield RatioChange(case, provider, name, then, mine_now.median_s / theirs_now.median_s)
        else:
            yield RatioChange(case, provider, name, then, 0, f"{mine_now.status}: {mine_now.note}")


def _last(
    rows: Sequence[records.ResultRow], provider: str
) -> dict[tuple[records.CaseKey, str], tuple[records.ResultRow, records.ResultRow]]:
    """Return the provider's row and the peer's, by case and peer, as they last ran together."""
    found = {}
    for group in records.groups(rows):
        mine = group.rows.get(provider)
        if mine is not None:
            for name, row in group.rows.items():
                if name != provider:
                    found[group.case, name] = mine, row
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print what changed; return 1 if something became slower, 2 if a file cannot be read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--peer", metavar="NAME", help="compare by this one; default: by each")
    parser.add_argument("--provider", default=OURS, metavar="NAME", help="default: %(default)s")
    parser.add_argument(
        "--tolerance", type=float, default=0.1, help="growth of a ratio to allow; default: 0.1"
    )
    arguments = parser.parse_args(argv)
    try:
        old, new = records.read(arguments.old), records.read(arguments.new)
        found = list(changes(old, new, arguments.provider, arguments.peer))
        if not found:
            raise ValueError(
                f"compare: expected cases of {arguments.provider} and "
                f"{arguments.peer or 'a peer'} in both files, got none"
            )
    except ValueError as error:
        print(error, file=sys.stderr)
        return EXIT_UNREADABLE
    slower = [each for each in found if each.factor > 1 + arguments.tolerance]
    for each in sorted(slower, key=lambda change: -change.factor):
        now = each.fault or f"{each.new:.3f}, {each.factor:.2f} times"
        print(
            f"slower: {' '.join(each.case)}: {each.provider} / {each.peer} {each.old:.3f} -> {now}"
        )
    print(
        f"{len(found)} ratios compared, {len(slower)} grew by more than {arguments.tolerance:.0%}"
    )
    return EXIT_SLOWER if slower else 0


if __name__ == "__main__":
    sys.exit(main())
