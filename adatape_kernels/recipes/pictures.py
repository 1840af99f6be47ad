"""Pictures of what a model read: which patches, how many, and at what cost."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.data.image_set import ImageSet, unit_range
from adatape_kernels.data.printable import printable
from adatape_kernels.models import AdaTapeOutput
from adatape_kernels.recipes.model_comparison import Cost, ModelComparison
from adatape_kernels.recipes.run_folder import RunFolder

_ELASTIC, _PADDED = "#1b7f79", "#b8b8b8"

# The number of images that a mean image is made of, which more would not make clearer.
_MEAN_IMAGES = 200
# The number of classes that are drawn, since more would be too small to see.
_MOST_CLASSES = 11
# The number of characters of a class's name that fit above a picture, if they are narrow.
_MOST_CHARACTERS = 16
# The room above a picture for a line of text, and the size of the text, both in points.
_ROOM = 98
_TEXT_SIZE = 9
# Fonts with the letters of many languages, as Linux, Windows and macOS have them.
_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "Microsoft YaHei",
    "Malgun Gothic",
    "PingFang SC",
    "Hiragino Sans GB",
    "Arial Unicode MS",
)
# The number of tape lengths that fit below an axis.
_MOST_TICKS = 21


def require(command: str) -> None:
    """Raise RuntimeError where matplotlib or tqdm, which `command` needs, cannot be used.

    matplotlib reads settings of the user when it is imported, and may fail over them; that should
    show before hours of training, not behind them.
    """
    from importlib.util import find_spec

    for package in ("matplotlib", "tqdm"):
        if find_spec(package) is None:
            raise RuntimeError(
                f"{command}: expected {package} to be installed "
                "(pip install 'adatape-kernels[demo]')"
            )
    try:
        import matplotlib.figure  # noqa: F401
    except Exception as error:
        raise RuntimeError(
            f"{command}: expected matplotlib to be importable, got {printable(error)}"
        ) from None


def draw_all(
    out: RunFolder,
    data: ImageSet,
    output: AdaTapeOutput,
    comparison: ModelComparison,
    bank_patch_size: int | None,
) -> None:
    """Write heatmap.png, tape_lengths.png, shortest_longest.png and costs.png into `out`.

    The first and the third, which show places in the image, are there for a bank of patches alone.
    Of a model that reads no tape rows_alive.png is in the place of tape_lengths.png.

    Args:
        out: what writes into the folder.
        data: its test half is drawn.
        output: the model's output for every test image, on the CPU.
        comparison: the costs and tape lengths to draw.
        bank_patch_size: side in pixels of the patches that the model's bank is made of; None where
            it is made of something else, or where there is no bank.
    """
    with plain_settings():
        figures = {"costs": cost_shares(comparison.costs())}
        if comparison.rows_by_layer is None:
            figures["tape_lengths"] = tape_lengths(comparison.images_by_tape_length)
        else:
            figures["rows_alive"] = rows_alive(comparison.rows_by_layer, len(output))
        if bank_patch_size is not None:
            side = data.test_images[torch.zeros(1, dtype=torch.long)].shape[-1] // bank_patch_size
            read = patches_read(output, side)
            figures["heatmap"] = heatmap(data, read)
            figures["shortest_longest"] = shortest_longest(data, output, read, bank_patch_size)
        for name, figure in figures.items():
            content = io.BytesIO()
            figure.savefig(content, dpi=130)
            out.write(f"{name}.png", content.getvalue())


@contextlib.contextmanager
def plain_settings() -> Iterator[None]:
    """Draw as matplotlib does by itself, and without warnings.

    Settings of the user, such as text by way of TeX, could make names fail; and a glyph that no
    font has, which is drawn as a box, is no reason for a warning. A letter that matplotlib's own
    font lacks is taken from one of `_FONTS` that is installed.
    """
    import matplotlib
    from matplotlib.font_manager import get_font_names

    installed = {*get_font_names()}
    family = ["DejaVu Sans", *(name for name in _FONTS if name in installed)]
    with (
        matplotlib.rc_context(matplotlib.rcParamsDefault),
        matplotlib.rc_context({"font.family": family}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def drawn_name(name: str, words: str = "") -> str:
    """Return a class's name as pictures show it: printable, in one line, and not too long.

    Args:
        name: the class's name.
        words: what stands before the name in its line, and comes back with it.
    """
    for characters in range(_MOST_CHARACTERS, 1, -1):
        line = words + printable(name, characters)
        if _width(line) <= _ROOM:
            break
    return line


def _width(line: str) -> float:
    """Return the width in points of a line above a picture."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    font = FontProperties(size=_TEXT_SIZE)
    return TextToPath().get_text_width_height_descent(line, font, ismath=False)[0]


def axes_of(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """Return a figure of a size in inches and its axes (rows, columns).

    The figure knows no window system and is known to nobody else, so that it goes when it is done.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def titled(axis: Any, text: str) -> None:
    """Put a text with names of users above a picture; `$` is a letter there like any other."""
    axis.set_title(text, fontsize=_TEXT_SIZE, parse_math=False)


def without_axis(axis: Any) -> None:
    """Show a picture alone: no frame, and no ticks, which would be laid out though not drawn."""
    axis.axis("off")
    axis.set(xticks=[], yticks=[])


def patches_read(output: AdaTapeOutput, side: int) -> Tensor:
    """Return which patches of a bank of side · side each image read, (images, side, side) bool."""
    indices = output.reads[0].indices.flatten(1).long()
    read = torch.zeros(len(indices), side * side + 1, dtype=torch.bool)
    # The index -1, where nothing was read, goes to a column of its own, which is dropped.
    read.scatter_(1, indices.where(indices >= 0, side * side), True)
    return read[:, :-1].view(-1, side, side)


def heatmap(data: ImageSet, read: Tensor) -> Any:
    """Draw how often each bank patch is read, for every class and over all, above mean images."""
    labels = data.test_labels
    panels = [(name, (labels == c).nonzero()[:, 0]) for c, name in enumerate(data.class_names)]
    panels = [(name, chosen) for name, chosen in panels if len(chosen)][:_MOST_CLASSES]
    panels = [(drawn_name(name), chosen) for name, chosen in panels]
    panels.append(("all", torch.arange(len(labels))))
    rows = -(-len(panels) // 4)
    figure, axes = axes_of(rows, 8, 13, 1.8 * rows + 0.5)
    for axis in axes.flat:
        without_axis(axis)
    for panel, (title, chosen) in enumerate(panels):
        row, column = divmod(panel, 4)
        mean_axis, heat_axis = axes[row, 2 * column], axes[row, 2 * column + 1]
        some = chosen[torch.arange(0, len(chosen), -(-len(chosen) // _MEAN_IMAGES))]
        mean_axis.imshow(shown_image(unit_range(data.test_images[some]).mean(0)), cmap="gray")
        titled(mean_axis, title)
        titled(heat_axis, "patches read")
        image = heat_axis.imshow(
            read[chosen].float().mean(0).numpy(), cmap="viridis", vmin=0, vmax=1
        )
    # In two lines the label is no longer than the bar, even beside a single row of pictures.
    label = "share of the images\nthat read this patch"
    figure.colorbar(image, ax=axes, shrink=0.8, label=label)
    figure.suptitle(
        "Mean image, and which bank patches are read, by class and over all test images"
    )
    return figure


def shown_image(image: Tensor) -> Any:
    """Return an image (channels, height, width) as matplotlib shows it."""
    return image.permute(1, 2, 0).squeeze(2).numpy()


def tape_lengths(images_by_tape_length: list[int]) -> Any:
    """Draw how many test images read each number of tape tokens."""
    figure, ((axis,),) = axes_of(1, 1, 6, 3.6)
    counts = images_by_tape_length
    bars = axis.bar(range(len(counts)), counts, color=_ELASTIC)
    axis.axvline(len(counts) - 1, color=_PADDED, linestyle="--")
    for text in axis.bar_label(bars, [str(count) if count else "" for count in counts], padding=3):
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    # The text stands to the right of the last bar, where no bar can be behind it.
    axis.annotate(
        "padded: always this long",
        (len(counts) - 1 + bars[0].get_width() / 2, 0.5),
        xytext=(4, 0),
        textcoords="offset points",
        xycoords=("data", "axes fraction"),
        ha="left",
        va="center",
        rotation=90,
        color="0.2",
        annotation_clip=False,
    )
    ticks = range(0, len(counts), -(-len(counts) // _MOST_TICKS))
    axis.set(xlabel="tape tokens read", ylabel="test images", xticks=ticks)
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("Each image reads as much as it needs")
    return figure


def rows_alive(rows_by_layer: list[int], images: int) -> Any:
    """Draw how many rows of an image each layer computes, on average over the test images."""
    figure, ((axis,),) = axes_of(1, 1, 6, 3.6)
    rows, layers = [count / images for count in rows_by_layer], range(1, len(rows_by_layer) + 1)
    bars = axis.bar(layers, rows, color=_ELASTIC)
    axis.axhline(rows[0], color=_PADDED, linestyle="--")
    axis.bar_label(bars, [f"{count:.3g}" for count in rows], padding=3)
    axis.set(
        xlabel="layer", ylabel="rows of an image", xticks=layers[:: -(-len(rows) // _MOST_TICKS)]
    )
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("Rows leave when they have halted (dashed: all rows)")
    return figure


def shortest_longest(
    data: ImageSet, output: AdaTapeOutput, read: Tensor, bank_patch_size: int, columns: int = 8
) -> Any:
    """Draw the test images with the shortest and the longest tapes, and what they read.

    Args:
        data: its test half is drawn.
        output: the model's output for every test image.
        read: (images, side, side) bool, the bank patches that each image read.
        bank_patch_size: side of a bank patch in pixels.
        columns: number of images with short tapes, and of images with long ones.
    """
    from matplotlib.patches import Rectangle

    # Images are ordered by tape length, and among equal lengths by ponder loss.
    score = output.tape_lens + output.ponder.sum(1) / (1 + output.ponder.sum(1))
    order = score.argsort()
    columns = min(columns, len(order))
    figure, axes = axes_of(2, columns, max(7, 1.5 * columns), 4.3)
    margin, width = 0.06 - 0.5, bank_patch_size - 0.12
    for axis_row, chosen in zip(axes, (order[:columns], order[-columns:].flip(0)), strict=True):
        images = unit_range(data.test_images[chosen])
        for axis, pixels, image in zip(axis_row, images, chosen.tolist(), strict=True):
            axis.imshow(shown_image(pixels), cmap="gray")
            without_axis(axis)
            for y, x in read[image].nonzero().tolist():
                corner = (x * bank_patch_size + margin, y * bank_patch_size + margin)
                axis.add_patch(Rectangle(corner, width, width, fill=False, color="#ff9f1c", lw=1.2))
            label, guess = int(data.test_labels[image]), int(output.logits[image].argmax())
            name = drawn_name(data.class_names[label])
            taken_for = drawn_name(data.class_names[guess], "taken for ")
            wrong = "" if label == guess else f"\n{taken_for}"
            tokens = int(output.tape_lens[image])
            titled(axis, f"{name}{wrong}\n{tokens} {'token' if tokens == 1 else 'tokens'}")
    figure.suptitle("The shortest tapes (above) and the longest (below); outlined: patches read")
    return figure


def cost_shares(costs: list[Cost]) -> Any:
    """Draw each cost of the elastic model as a share of that of the padded model."""
    costs = costs[::-1]  # bars are drawn from the bottom upwards
    shares = [cost.elastic / cost.padded for cost in costs]
    figure, ((axis,),) = axes_of(1, 1, 7, 3.6)
    bars = axis.barh([cost.label for cost in costs], shares, color=_ELASTIC)
    texts = [
        f"{share:.2f}  ({cost.elastic / cost.unit:,.4g} : {cost.padded / cost.unit:,.4g})"
        for share, cost in zip(shares, costs, strict=True)
    ]
    axis.axvline(1, color=_PADDED, linestyle="--")
    for text in axis.bar_label(bars, texts, padding=4):
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    axis.set_xlim(0, 1.45 * max(1, *shares))
    axis.set_xlabel("elastic as a share of padded (dashed: 1)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("Same weights, same test images: cost of elastic : padded")
    return figure
