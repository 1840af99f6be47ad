"""The picture of one model at many budgets."""

import io
from collections.abc import Sequence
from typing import Any

from adatape_kernels.recipes.budget.budget_result import BudgetResult
from adatape_kernels.recipes.pictures import axes_of, plain_settings

# Colours that the colour-blind tell apart; marks and lines differ in black and white too.
_STYLES: tuple[tuple[str, str, Any], ...] = (
    ("#0072b2", "o", "-"),
    ("#d55e00", "s", "--"),
    ("#009e73", "^", "-."),
    ("#cc79a7", "D", ":"),
    ("#56b4e9", "v", (0, (5, 1, 1, 1))),
)


def drawn(results: Sequence[BudgetResult]) -> bytes:
    """Return the picture as PNG: accuracy against FLOPs and against images per second.

    Each longest tape is a line, along which the threshold grows; each threshold stands beside its
    mark in the left part.
    """
    with plain_settings():
        figure, axes = axes_of(1, 2, 10.5, 4.4)
        by_flops, by_speed = axes[0]
        for number, longest in enumerate(dict.fromkeys(r.num_tape_tokens for r in results)):
            color, marker, line = _STYLES[number % len(_STYLES)]
            own = [r for r in results if r.num_tape_tokens == longest]
            accuracies = [100 * r.accuracy for r in own]
            style: dict[str, Any] = dict(
                color=color, marker=marker, linestyle=line, markerfacecolor="none"
            )
            tokens = "token" if longest == 1 else "tokens"
            label = f"up to {longest} tape {tokens}"
            by_flops.plot([r.flops / 1e6 for r in own], accuracies, **style, label=label)
            by_speed.plot([r.images_per_second for r in own], accuracies, **style)
            for place, text in _labels(own).items():
                # Lines that meet have their texts on different sides.
                by_flops.annotate(
                    text,
                    place,
                    xytext=(7, 0) if number % 2 else (-7, 0),
                    textcoords="offset points",
                    ha="left" if number % 2 else "right",
                    va="center",
                    color=color,
                    fontsize=7,
                )
        by_flops.set(xlabel="MFLOP an image", ylabel="test accuracy, %")
        by_flops.set_title("Beside each mark: halting thresholds", fontsize=10)
        by_speed.set(xlabel="images per second", ylabel="test accuracy, %")
        for axis in (by_flops, by_speed):
            axis.margins(x=0.08, y=0.12)
            axis.spines[["top", "right"]].set_visible(False)
        by_flops.legend(frameon=False, fontsize=8)
        content = io.BytesIO()
        figure.savefig(content, dpi=130)
    return content.getvalue()


def _labels(results: Sequence[BudgetResult]) -> dict[tuple[float, float], str]:
    """Return the text beside each place, (MFLOP, accuracy in %), of results that may coincide."""
    thresholds: dict[tuple[float, float], list[float]] = {}
    for r in results:
        thresholds.setdefault((r.flops / 1e6, 100 * r.accuracy), []).append(r.halt_threshold)
    return {
        place: f"{min(own):.3g}" if len(own) == 1 else f"{min(own):.3g} to {max(own):.3g}"
        for place, own in thresholds.items()
    }
