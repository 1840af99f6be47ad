"""The picture of models at many budgets."""

import io
from collections.abc import Sequence
from typing import Any

from adatape_kernels.recipes.budget.budget_result import BudgetResult
from adatape_kernels.recipes.line_styles import style_of
from adatape_kernels.recipes.pictures import axes_of, drawn_name, plain_settings


def drawn(results: Sequence[BudgetResult]) -> bytes:
    """Return the picture as PNG."""
    with plain_settings():
        content = io.BytesIO()
        figure_of(results).savefig(content, dpi=130)
    return content.getvalue()


def figure_of(results: Sequence[BudgetResult]) -> Any:
    """Draw accuracy against halting thresholds, rows, FLOPs and images per second.

    Each model and longest tape is a line, along which the threshold grows.
    """
    figure, axes = axes_of(2, 2, 10.5, 8)
    by_speed = axes[1, 1]
    several = len({r.run for r in results}) > 1
    lines = list(dict.fromkeys((r.run, r.num_tape_tokens) for r in results))
    for number, (run, longest) in enumerate(lines):
        own = [r for r in results if (r.run, r.num_tape_tokens) == (run, longest)]
        label = f"up to {longest} tape {'token' if longest == 1 else 'tokens'}"
        look = style_of(number)
        accuracies = [100 * r.accuracy for r in own]
        costs = {
            "halting threshold": [r.halt_threshold for r in own],
            "mean rows of an image": [r.mean_rows for r in own],
            "MFLOP an image": [r.flops / 1e6 for r in own],
        }
        for axis, (name, cost) in zip(axes.flat, costs.items(), strict=False):
            (line,) = axis.plot(cost, accuracies, **look)
            axis.set(xlabel=name, ylabel="test accuracy, %")
        line.set_label(f"{drawn_name(run)}, {label}" if several else label)
        # Times of a busy machine are in no order, and a line along them would say nothing.
        speeds = [r.images_per_second for r in own]
        spans = [sorted(r.images_per_second_p20_p80) for r in own]
        by_speed.plot(speeds, accuracies, **{**look, "linestyle": "none"})
        by_speed.hlines(accuracies, *zip(*spans, strict=True), color=look["color"], linewidth=0.7)
    by_speed.set(
        xlabel="images per second (lines: 20th to 80th percentile)", ylabel="test accuracy, %"
    )
    for axis in axes.flat:
        axis.margins(x=0.06, y=0.08)
        axis.spines[["top", "right"]].set_visible(False)
    legend = figure.legend(
        loc="outside lower center", ncols=2 if several else 3, frameon=False, fontsize=9
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # `$` is a letter of a run's name like any other
    return figure
