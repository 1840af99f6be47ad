"""Tables and plots of the recorded rows: python benchmarks/report.py, or make report.

For each CSV file in results/: NAME.md with every case, and plots NAME-rows.png, NAME-batch.png and
NAME-bank.png of what was measured at several sizes. In README.md what stands between
<!-- table: NAME [op …] [B=8 …] --> and <!-- /table --> is replaced by ours beside the best peer.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import plots
import records
from cases import GRAPH, OURS
from records import Row

EXIT_UNREADABLE = 2
README = Path(__file__).parents[1] / "README.md"
ANCHORS = ("dense ViT, same rows", "static ViT, mean length")
"""They compute something else: they stand in the tables, but are nobody's best peer."""

_MARKED = re.compile(r"(<!-- table: ([^\n]+?) -->\n).*?(<!-- /table -->)", re.DOTALL)


class Entry(NamedTuple):
    """A provider's last row of a case, with ours that was timed in turn with it."""

    row: Row
    ours: Row

    @property
    def ratio(self) -> float | None:
        """Its time over ours: above 1 ours is faster."""
        if self.row.median_s and self.ours.median_s:
            return self.row.median_s / self.ours.median_s
        return None


Case = tuple[str, str, str, str]


def entries(rows: Iterable[Row]) -> dict[Case, dict[str, Entry]]:
    """Return the last row of every provider that ran beside ours, by case and provider."""
    found: dict[Case, dict[str, Entry]] = {}
    for group in records.groups(rows):
        ours = group.rows.get(OURS)
        if ours is not None:
            case = found.setdefault(group.case, {})
            case.update({name: Entry(row, ours) for name, row in group.rows.items()})
    return found


def summary(cases: dict[Case, dict[str, Entry]], words: Sequence[str] = ()) -> str:
    """Return a Markdown table: ours beside the best peer, a line a case, slower ones included.

    `words` select: names of ops, and parts of shapes, as "B=16", of which a case has one.
    """
    lines = [
        "| op | direction | dtype | shape | ours, ms | of the limit | best peer | peer / ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ops = [word for word in words if "=" not in word]
    parts = {word for word in words if "=" in word}
    for (op, direction, dtype, shape), found in cases.items():
        if (ops and op not in ops) or (parts and parts.isdisjoint(shape.split())):
            continue
        start = f"| {op} | {direction}"
        rest = f"| {dtype} | {shape} |"
        row = found[OURS].row
        if row.status != "ok":
            lines.append(f"{start} {rest} {row.status} | | | |")
        for graph, how in ((False, ""), (True, " in a CUDA graph")):
            ours, best = _best(found.values(), graph)
            if ours is not None:
                lines.append(f"{start}{how} {rest} {_cells(ours, best)} |")
    return "\n".join(lines)


def _best(found: Iterable[Entry], graph: bool) -> tuple[Entry | None, Entry | None]:
    """Return ours, as a graph the fastest of our forms, and the fastest peer."""
    timed = [e for e in found if e.ratio and e.row.provider.endswith(GRAPH) == graph]
    ours = [e for e in timed if e.row.provider.startswith(OURS) and (graph or _is_ours(e))]
    peers = [e for e in timed if not e.row.provider.startswith((OURS, *ANCHORS))]
    first, second = (
        min(those, key=lambda e: e.ratio or 0, default=None) for those in (ours, peers)
    )
    return first, second


def _cells(ours: Entry, best: Entry | None) -> str:
    start = f"{_ms(ours.row)} | {_percent(ours.row)}"
    if best is None or not best.ratio or not ours.ratio:
        return f"{start} | none |"
    return f"{start} | {best.row.provider} | {best.ratio / ours.ratio:.2f}"


def _is_ours(entry: Entry) -> bool:
    return entry.row.provider == OURS


def _percent(row: Row) -> str:
    share = row.percent_of_limit
    return f"{share:.{0 if share >= 10 else 1}f} %" if share else ""


def _ms(row: Row) -> str:
    return f"{row.median_s * 1e3:.3g}" if row.median_s else ""


def details(name: str, rows: Sequence[Row], cases: dict[Case, dict[str, Entry]]) -> str:
    """Return a page of Markdown with every provider of every case."""
    newest = rows[-1]
    parts = [
        f"# {name}\n",
        f"{newest.device}; torch {newest.torch}; last row {newest.date}, commit {newest.commit}. "
        "How to read it: [benchmarks/README.md](../README.md).\n",
    ]
    limits = {r.case: r for r in rows if r.op == "ceiling"}.values()
    if limits:
        parts.append("| ceiling | dtype | |\n|---|---|---|")
        for row in limits:
            rate = (
                f"{row.gb_per_s:.0f} GB/s"
                if row.gb_per_s
                else f"{row.gflop_per_s or 0:.0f} GFLOP/s"
            )
            parts.append(f"| {row.direction} | {row.dtype} | {rate} |")
        parts.append("")
    for case, found in cases.items():
        parts.append(f"## {' '.join(case)}\n")
        parts.append("| provider | ms | p20 | p80 | / ours | GFLOP/s | GB/s | of the limit | |")
        parts.append("|---|---|---|---|---|---|---|---|---|")
        for provider, (row, ours) in found.items():
            ratio = Entry(row, ours).ratio
            cells = [
                _ms(row),
                f"{row.p20_s * 1e3:.3g}" if row.p20_s else "",
                f"{row.p80_s * 1e3:.3g}" if row.p80_s else "",
                f"{ratio:.2f}" if ratio else "",
                f"{row.gflop_per_s:.3g}" if row.gflop_per_s else "",
                f"{row.gb_per_s:.3g}" if row.gb_per_s else "",
                _percent(row),
                row.note if row.status == "ok" else f"{row.status}: {row.note}",
            ]
            parts.append(f"| {provider} | {' | '.join(c.replace('|', '/') for c in cells)} |")
        parts.append("")
    return "\n".join(parts)


def fill(text: str, tables: dict[str, dict[Case, dict[str, Entry]]]) -> str:
    """Return text with each marked table made anew.

    Raises:
        ValueError: a marker names a file that is not there.
    """

    def made(match: re.Match) -> str:
        name, *words = match[2].split()
        if name not in tables:
            raise ValueError(f"table: expected one of {', '.join(tables)}, got {name!r}")
        return f"{match[1]}{summary(tables[name], words)}\n{match[3]}"

    return _MARKED.sub(made, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Write tables and plots; 2 if a file cannot be read or written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder of CSV files")
    parser.add_argument("--readme", type=Path, default=README, help="file with marked tables")
    arguments = parser.parse_args(argv)
    try:
        tables = {}
        for path in sorted(arguments.results.glob("*.csv")):
            rows = records.read(path)
            if not rows:
                continue
            tables[path.stem] = cases = entries(rows)
            page = path.with_suffix(".md")
            page.write_text(details(path.stem, rows, cases), encoding="utf-8")
            print("\n".join(map(str, [page, *plots.draw(path, cases)])))
        old = arguments.readme.read_text(encoding="utf-8")
        new = fill(old, tables)
        if new != old:
            arguments.readme.write_text(new, encoding="utf-8")
            print(arguments.readme)
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return EXIT_UNREADABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
