"""The picture of the parity table: accuracy by length, each model with its seeds."""

import io
import warnings

from adatape_kernels.recipes.line_styles import style_of
from adatape_kernels.recipes.parity.parity_training import ParityResult

_CHANCE = 50
# How far the marks of neighbouring models stand apart, as a share of a length.
_APART = 0.035


def drawn(results: list[ParityResult]) -> bytes:
    """Return the picture as PNG: the mean of each model as a line, each seed as a mark."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, NullLocator

    with matplotlib.rc_context(matplotlib.rcParamsDefault), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axis = figure.subplots()
        models = list(dict.fromkeys(result.model for result in results))
        lengths = sorted({result.length for result in results})
        for number, model in enumerate(models):
            style = style_of(number)
            line = {**style, "marker": ""}
            marks = {**style, "linestyle": "none"}
            # Marks of models that come out alike would hide one another.
            beside = 1 + _APART * (number - (len(models) - 1) / 2)
            own = [result for result in results if result.model == model]
            means = [
                (length * beside, 100 * sum(values) / len(values))
                for length in lengths
                if (values := [r.accuracy for r in own if r.length == length])
            ]
            axis.plot(*zip(*means, strict=True), **line, linewidth=1.5)
            axis.plot(
                [result.length * beside for result in own],
                [100 * result.accuracy for result in own],
                **marks,
            )
            # What the legend shows is the line with its mark.
            axis.plot([], [], **style, label=model)
        axis.axhline(_CHANCE, color="0.6", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set(xlabel="length of a sequence", ylabel="accuracy on fixed sequences, %")
        axis.set_ylim(min(45, *(100 * r.accuracy - 2 for r in results)), 102)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title("Each mark is a seed, lines are means, grey is guessing", fontsize=11)
        if models:
            figure.legend(loc="outside right upper", frameon=False)
        content = io.BytesIO()
        figure.savefig(content, dpi=130)
        return content.getvalue()
