"""Plots of time against the tape tokens that are read, the batch, and the size of the bank."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from adatape_kernels.benchmarks.harness.cases import OURS

LEAST_POINTS = 3
COLORS = {OURS: "#c2410c"}
PEER_COLORS = ("#1d4ed8", "#15803d", "#7e22ce", "#0e7490", "#a16207", "#64748b", "#be185d")


class PlotAxis(NamedTuple):
    """A letter of a shape along which an op was measured."""

    name: str
    op: str
    letter: str
    label: str
    logarithmic: bool


AXES = (
    PlotAxis("rows", "model", "tape", "tape tokens that every image reads", False),
    PlotAxis("batch", "model", "B", "images in the batch", True),
    PlotAxis("bank", "tape_select", "M", "tokens in the bank", True),
)


def draw(path: Path, cases: Mapping[tuple, Mapping[str, Any]]) -> list[Path]:
    """Draw what a CSV file's cases allow, into files beside it, if matplotlib is installed."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        print("no plots: matplotlib is not installed")
        return []
    drawn = []
    for axis in AXES:
        found = list(series(axis, cases))
        if not found:
            continue
        figure, panels = pyplot.subplots(
            1, len(found), figsize=(5.6 * len(found), 4.2), squeeze=False, layout="constrained"
        )
        for panel, (title, lines) in zip(panels[0], found, strict=True):
            _panel(panel, axis, title, lines)
        target = path.with_name(f"{path.stem}-{axis.name}.png")
        figure.savefig(target, dpi=130)
        pyplot.close(figure)
        drawn.append(target)
    return drawn


class PlotPoint(NamedTuple):
    """A provider's time at one place of an axis, in milliseconds."""

    place: float
    median: float
    p20: float
    p80: float


PlotLines = dict[str, list[PlotPoint]]
"""The points of each provider."""


def series(
    axis: PlotAxis, cases: Mapping[tuple, Mapping[str, Any]]
) -> Iterator[tuple[str, PlotLines]]:
    """Yield a title and the lines of each direction and dtype.

    Of the cases that differ in the axis' letter only, the longest row is taken.
    """
    runs: dict[tuple, dict[str, PlotLines]] = {}
    for (op, direction, dtype, shape), found in cases.items():
        letters = dict(part.split("=", 1) for part in shape.split() if "=" in part)
        value = letters.pop(axis.letter, "")
        if op != axis.op or not value.isdecimal():
            continue
        rest = " ".join(f"{k}={v}" for k, v in letters.items())
        lines = runs.setdefault((direction, dtype), {}).setdefault(rest, {})
        for provider, (row, _) in found.items():
            if row.median_s:
                times = (1e3 * t for t in (row.median_s, row.p20_s, row.p80_s))
                lines.setdefault(provider, []).append(PlotPoint(float(value), *times))
    for (direction, dtype), by_rest in runs.items():
        rest, lines = max(by_rest.items(), key=lambda item: len(item[1].get(OURS, [])))
        if len(lines.get(OURS, [])) >= LEAST_POINTS:
            kept = {name: sorted(points) for name, points in lines.items() if len(points) > 1}
            yield f"{axis.op}, {direction}, {dtype}\n{rest}", kept


def _panel(panel: Any, axis: PlotAxis, title: str, lines: PlotLines) -> None:
    colors = dict(COLORS)
    for name, points in sorted(lines.items(), key=lambda item: item[0] != OURS):
        ours = name == OURS
        color = colors.setdefault(name, PEER_COLORS[(len(colors) - 1) % len(PEER_COLORS)])
        x, median, low, high = zip(*points, strict=True)
        panel.plot(
            x,
            median,
            color=color,
            linewidth=2.6 if ours else 1.4,
            marker="o",
            markersize=5 if ours else 3.5,
            zorder=3 if ours else 2,
            label=name,
        )
        panel.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
    if axis.logarithmic:
        panel.set_xscale("log")
        panel.set_yscale("log")
        ticks = sorted({point.place for points in lines.values() for point in points})
        panel.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        panel.minorticks_off()
        panel.yaxis.set_major_formatter("{x:g}")
    else:
        panel.set_ylim(bottom=0)
    panel.set_xlabel(axis.label)
    panel.set_ylabel("milliseconds, median (band: p20 to p80)")
    panel.set_title(title, fontsize=9, loc="left")
    panel.grid(color="#e5e7eb", linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.legend(fontsize=8, frameon=False)
