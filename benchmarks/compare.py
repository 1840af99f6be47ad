"""Whether a later run is slower, by ratio to a peer: python benchmarks/compare.py OLD.csv NEW.csv

Times of two runs cannot be compared, ratios within each can: of ours over a peer that did not
change. A case counts where both files timed ours and the peer together.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import records
from cases import OURS

EXIT_SLOWER, EXIT_UNREADABLE = 1, 2


class Change(NamedTuple):
    """How a case's ratio to the peer changed: above 1 it became slower."""

    case: tuple[str, str, str, str]
    provider: str
    peer: str
    old: float
    new: float
    fault: str = ""
    """Why there is no new time, where there was an old one."""

    @property
    def factor(self) -> float:
        return float("inf") if self.fault else self.new / self.old


def changes(
    old: Sequence[records.Row], new: Sequence[records.Row], provider: str, peer: str | None
) -> Iterator[Change]:
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
            yield Change(case, provider, name, then, mine_now.median_s / theirs_now.median_s)
        else:
            yield Change(case, provider, name, then, 0, f"{mine_now.status}: {mine_now.note}")


def _last(
    rows: Sequence[records.Row], provider: str
) -> dict[tuple[tuple[str, str, str, str], str], tuple[records.Row, records.Row]]:
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
    """Print what changed; 0 nothing became slower, 1 something did, 2 a file cannot be read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
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
