"""The comparison as a table, which is Markdown and is read on a terminal as it is."""

from collections.abc import Callable, Sequence

from adatape_kernels.recipes.compare.compare_result import (
    COSTS,
    CompareResult,
    Cost,
    Group,
    Spread,
    front_in_words,
    grouped,
    pareto_front,
)

COST_NAMES: dict[Cost, str] = {
    "images_per_second": "images per second",
    "flops_per_image": "FLOPs per image",
}
_SHORT: dict[Cost, str] = {"images_per_second": "speed", "flops_per_image": "FLOPs"}
_TITLES = (
    "model",
    "layers",
    "accuracy, %",
    "images/s",
    "MFLOP",
    "rows",
    "tape",
    "parameters",
    "front",
)
_WORDS = ("model", "front")


def table(results: Sequence[CompareResult]) -> str:
    """Return a line for each model and size, and below it what the columns mean."""
    groups = grouped(results)
    fronts = {cost: pareto_front(groups, cost) for cost in COSTS}
    rows = [_TITLES, *(_row(group, fronts) for group in groups)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_TITLES))]
    left = [title in _WORDS for title in _TITLES]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(cells, widths, left, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * width if to_left else f"{'-' * (width - 1)}:"
        for width, to_left in zip(widths, left, strict=True)
    ]
    seeds = len({result.seed for result in results})
    over = "of one seed" if seeds == 1 else f"means over {seeds} seeds ± their standard deviation"
    lines = [line(rows[0]), line(rule), *map(line, rows[1:]), ""]
    lines += [
        f"Numbers are {over}.",
        "MFLOP, rows in all layers and tape tokens are those of an image. On the Pareto front is",
        "what no other model and size beats in accuracy and cost.",
    ]
    lines += [
        f"Accuracy against {COST_NAMES[cost]}: {front_in_words(groups, cost)}." for cost in COSTS
    ]
    return "\n".join(lines)


def _row(group: Group, fronts: dict[Cost, list[Group]]) -> tuple[str, ...]:
    on = [name for cost, name in _SHORT.items() if group in fronts[cost]]
    tape = _text(group.spread("mean_tape_tokens"), "{:.2f}".format) if group.is_adatape else ""
    return (
        group.model,
        str(group.size),
        _text(group.spread("accuracy"), lambda value: f"{100 * value:.2f}"),
        _text(group.spread("images_per_second"), "{:,.0f}".format),
        _text(group.spread("flops_per_image"), lambda value: f"{value / 1e6:.2f}"),
        _text(group.spread("mean_rows"), "{:.1f}".format),
        tape,
        f"{group.results[0].parameters:,}",
        "both" if len(on) == len(COSTS) else "".join(on),
    )


def _text(spread: Spread, shown: Callable[[float], str]) -> str:
    if spread.deviation is None:
        return shown(spread.mean)
    return f"{shown(spread.mean)} ± {shown(spread.deviation)}"
