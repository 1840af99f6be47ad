"""The picture of the comparison: accuracy against speed, and against FLOPs."""

import io
import textwrap
from collections.abc import Sequence
from typing import Any

from adatape_kernels.recipes.compare.compare_config import MODELS
from adatape_kernels.recipes.compare.compare_result import (
    COSTS,
    CompareResult,
    Cost,
    Group,
    front_in_words,
    grouped,
    pareto_front,
)
from adatape_kernels.recipes.line_styles import style_of
from adatape_kernels.recipes.pictures import axes_of, plain_settings

_LABELS: dict[Cost, str] = {
    "images_per_second": "images per second",
    "flops_per_image": "MFLOP an image",
}
_UNITS: dict[Cost, float] = {"images_per_second": 1.0, "flops_per_image": 1e6}
# Characters of a panel's title that fit beside one another.
_TITLE_WIDTH = 78
# Where the texts of successive models stand beside their marks, in points.
_PLACES = ((6, 5), (6, -11), (-6, 5), (-6, -11), (8, -3), (-8, -3))


def drawn(results: Sequence[CompareResult], title: str) -> bytes:
    """Return the picture as PNG.

    Each model is a line over its sizes, whose numbers of layers stand beside the marks; a cross
    shows the standard deviation over the seeds. The wide grey line is the Pareto front, and the
    title of each panel says whether AdaTape is on it.

    Args:
        results: of all runs.
        title: what was trained, on what and for how long.
    """
    groups = grouped(results)
    with plain_settings():
        figure, axes = axes_of(1, 2, 12, 5.4)
        for cost, axis in zip(COSTS, axes[0], strict=True):
            _draw_front(axis, pareto_front(groups, cost), cost)
            for number, model in enumerate(MODELS):
                own = [group for group in groups if group.model == model]
                if own:
                    _draw_model(axis, own, cost, number)
            _finish(axis, cost, front_in_words(groups, cost))
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=len(labels), frameon=False,
            handlelength=4,
        )  # fmt: skip
        figure.suptitle(title, fontsize=11)
        content = io.BytesIO()
        figure.savefig(content, dpi=130)
        return content.getvalue()


def _point(group: Group, cost: Cost) -> tuple[float, float]:
    return group.spread(cost).mean / _UNITS[cost], 100 * group.spread("accuracy").mean


def _draw_front(axis: Any, front: Sequence[Group], cost: Cost) -> None:
    """Draw the front as steps: what is reached at a cost is reached at any higher one as well."""
    xs, ys = zip(*(_point(group, cost) for group in front), strict=True)
    axis.plot(
        xs, ys, color="0.82", linewidth=7, solid_capstyle="round", drawstyle="steps-post",
        marker="o", markersize=13, label="Pareto front", zorder=0,
    )  # fmt: skip


def _draw_model(axis: Any, groups: Sequence[Group], cost: Cost, number: int) -> None:
    from matplotlib.patheffects import withStroke

    style = style_of(number)
    points = [_point(group, cost) for group in groups]
    axis.plot(*zip(*points, strict=True), **style, label=groups[0].model)
    for group, point in zip(groups, points, strict=True):
        across, up = group.spread(cost).deviation, group.spread("accuracy").deviation
        if across is not None and up is not None:
            axis.errorbar(
                *point, xerr=across / _UNITS[cost], yerr=100 * up,
                color=style["color"], linewidth=0.7, linestyle="none",
            )  # fmt: skip
        right, above = _PLACES[number % len(_PLACES)]
        axis.annotate(
            str(group.size), point, xytext=(right, above), textcoords="offset points",
            ha="left" if right > 0 else "right", color=style["color"], fontsize=8,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip


def _finish(axis: Any, cost: Cost, words: str) -> None:
    axis.set(xlabel=_LABELS[cost], ylabel="test accuracy, %")
    axis.xaxis.set_major_formatter("{x:,.6g}")
    axis.margins(x=0.1, y=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    text = f"{words[0].upper()}{words[1:]}"
    axis.set_title("\n".join(textwrap.wrap(text, _TITLE_WIDTH)), fontsize=9.5)
