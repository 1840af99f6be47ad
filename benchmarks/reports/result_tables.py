"""Makes tables and plots of recorded rows: make report.

    python -m adatape_kernels.benchmarks.reports.result_tables --results FOLDER --readme README.md

Each CSV file of the folder gets a page NAME.md with every case, and plots NAME-rows.png,
NAME-batch.png and NAME-bank.png of what was measured at several sizes. In the README a table of
ours beside the best peer replaces what stands between <!-- table: NAME SELECTION --> and
<!-- /table -->, and one of ours beside every peer what stands between
<!-- peers: NAME SELECTION --> and <!-- /peers -->; other files may have such tables too. SELECTION
is a list of cases with semicolons between them; each names some of an op, a direction, a dtype and
parts of a shape, as `tape_select forward M=784; model forward B=8`.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from adatape_kernels.benchmarks.harness import records
from adatape_kernels.benchmarks.harness.cases import GRAPH, OURS
from adatape_kernels.benchmarks.harness.records import CaseKey, ResultRow
from adatape_kernels.benchmarks.harness.suites import legend
from adatape_kernels.benchmarks.reports import scaling_plots

EXIT_UNREADABLE = 2
ANCHORS = ("dense ViT, same rows", "static ViT, mean length", "copy_ (anchor)")
"""These compute something else: they stand in the tables, but never as the best peer."""

_MARKED = re.compile(r"(<!-- (table|peers): ([^\n]+?) -->\n).*?(<!-- /\2 -->)", re.DOTALL)


class Entry(NamedTuple):
    """A provider's last row of a case, with the row of ours that was timed in turn with it."""

    row: ResultRow
    ours: ResultRow

    @property
    def ratio(self) -> float | None:
        """The provider's time over ours: above 1 ours is faster."""
        if self.row.median_s and self.ours.median_s:
            return self.row.median_s / self.ours.median_s
        return None


Entries = dict[CaseKey, dict[str, Entry]]
"""By case and provider."""


def entries(rows: Iterable[ResultRow]) -> Entries:
    """Return the last row of every provider that ran beside ours, by case and provider."""
    found: Entries = {}
    for group in records.groups(rows):
        ours = group.rows.get(OURS)
        if ours is not None:
            case = found.setdefault(group.case, {})
            case.update({name: Entry(row, ours) for name, row in group.rows.items()})
    return found


def selected(cases: Entries, selection: str) -> Entries:
    """Return the cases that a marker's selection names, in its order; all if it is empty.

    Raises:
        ValueError: a part of the selection names no case.
    """
    if not selection.strip():
        return cases
    found: Entries = {}
    for part in selection.split(";"):
        words = set(part.split())
        fitting = {
            case: entry for case, entry in cases.items() if words <= set(" ".join(case).split())
        }
        if not words or not fitting:
            raise ValueError(f"table: expected words of a recorded case, got {part.strip()!r}")
        found.update(fitting)
    return found


def summary(cases: Entries) -> str:
    """Return a Markdown table: ours beside the best peer, a line a case, slower ones included."""
    lines = [
        "| op | direction | dtype | shape | ours, ms | of the limit | best peer | peer / ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, found in cases.items():
        start = f"| {case.op} | {case.direction}"
        rest = f"| {case.dtype} | {case.shape} |"
        row = found[OURS].row
        if row.status != "ok":
            lines.append(f"{start} {rest} {row.status} | | | |")
        for graph, how in ((False, ""), (True, " in a CUDA graph")):
            ours, best = _best(found.values(), graph)
            if ours is not None:
                lines.append(f"{start}{how} {rest} {_cells(ours, best)} |")
    return "\n".join(lines)


def beside_peers(cases: Entries) -> str:
    """Return a Markdown table of the times of all peers over ours, a line a case."""
    timed = {
        case: {name: entry for name, entry in found.items() if entry.ratio}
        for case, found in cases.items()
    }
    peers = dict.fromkeys(
        name for found in timed.values() for name in found if not name.startswith(OURS)
    )
    columns = ["direction", "dtype", "shape", "ours, ms", "", *(f"{name} / ours" for name in peers)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for case, found in timed.items():
        row = cases[case][OURS].row
        ratios = (f"{found[name].ratio:.2f}" if name in found else "" for name in peers)
        cells = [case.direction, case.dtype, case.shape, _ms(row), row.note, *ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def explanation(cases: Iterable[CaseKey], *, limit: bool = True) -> str:
    """Return a line that explains the columns of a table and the letters in its shapes."""
    letters = [part.partition("=")[0] for case in cases for part in case.shape.split()]
    start = (
        "*of the limit*: the time that the machine's own copy and product would allow, over ours. "
    )
    return f"{start if limit else ''}{'; '.join(legend(letters))}."


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


def _percent(row: ResultRow) -> str:
    share = row.percent_of_limit
    return f"{share:.{0 if share >= 10 else 1}f} %" if share else ""


def _ms(row: ResultRow) -> str:
    return f"{row.median_s * 1e3:.3g}" if row.median_s else ""


def page(name: str, rows: Sequence[ResultRow], cases: Entries) -> str:
    """Return a page of Markdown with every provider of every case."""
    newest = rows[-1]
    parts = [
        f"# {name}\n",
        f"{newest.device}; torch {newest.torch}; last row {newest.date}, commit {newest.commit}. "
        "`adatape-kernels bench --help` explains the letters of shapes.\n",
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
        for provider, entry in found.items():
            cells = (cell.replace("|", "/") for cell in _page_cells(entry))
            parts.append(f"| {provider} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def _page_cells(entry: Entry) -> list[str]:
    """Return a provider's cells in a case's table, behind its name."""
    row, ratio = entry.row, entry.ratio
    return [
        _ms(row),
        f"{row.p20_s * 1e3:.3g}" if row.p20_s else "",
        f"{row.p80_s * 1e3:.3g}" if row.p80_s else "",
        f"{ratio:.2f}" if ratio else "",
        f"{row.gflop_per_s:.3g}" if row.gflop_per_s else "",
        f"{row.gb_per_s:.3g}" if row.gb_per_s else "",
        _percent(row),
        row.note if row.status == "ok" else f"{row.status}: {row.note}",
    ]


def fill(text: str, tables: dict[str, Entries], folder: PurePath) -> str:
    """Return text with each marked table made anew, and below it its legend and where the page is.

    Args:
        text: Markdown with markers.
        tables: the cases of each CSV file, by its name.
        folder: where the pages lie, relative to the text.

    Raises:
        ValueError: a marker names a file or a case that is not there.
    """

    def made(match: re.Match) -> str:
        name, _, selection = match[3].partition(" ")
        if name not in tables:
            raise ValueError(f"table: expected one of {', '.join(tables)}, got {name!r}")
        cases = selected(tables[name], selection)
        page = folder / f"{name}.md"
        page_link = f"[{name}]({page.as_posix()})"
        if ".." in page.parts:  # a page of the site, which these pages are no part of
            page_link = f"`{PurePath(*(p for p in page.parts if p != '..')).as_posix()}`"
        best = match[2] == "table"
        below = f"{explanation(cases, limit=best)} Every case and provider: {page_link}."
        table = summary(cases) if best else beside_peers(cases)
        return f"{match[1]}{table}\n\n{below}\n{match[4]}"

    return _MARKED.sub(made, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Write tables and plots; return 2 if a file cannot be read or written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument(
        "--results",
        type=Path,
        default=records.DEFAULT_OUT,
        help="folder of CSV files; default: %(default)s",
    )
    parser.add_argument(
        "--readme",
        type=Path,
        action="append",
        default=[],
        help="file with marked tables; may be repeated; default: none",
    )
    arguments = parser.parse_args(argv)
    try:
        tables = _write_pages(arguments.results)
        for readme in arguments.readme:
            _fill_readme(readme, tables, arguments.results)
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return EXIT_UNREADABLE
    return 0


def _write_pages(results: Path) -> dict[str, Entries]:
    """Write the page and the plots of each CSV file, and return their cases by the file's name."""
    tables = {}
    for path in sorted(results.glob("*.csv")):
        rows = records.read(path)
        if not rows:
            continue
        tables[path.stem] = cases = entries(rows)
        target = path.with_suffix(".md")
        target.write_text(page(path.stem, rows, cases), encoding="utf-8")
        print("\n".join(map(str, [target, *scaling_plots.draw(path, cases)])))
    return tables


def _fill_readme(readme: Path, tables: dict[str, Entries], results: Path) -> None:
    old = readme.read_text(encoding="utf-8")
    folder = os.path.relpath(results.resolve(), readme.resolve().parent)
    new = fill(old, tables, PurePath(folder))
    if new != old:
        readme.write_text(new, encoding="utf-8")
        print(readme)


if __name__ == "__main__":
    sys.exit(main())
