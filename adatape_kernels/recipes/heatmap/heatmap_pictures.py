"""Pictures of what is read: over classes, steps and examples, and of a bank's entries."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adatape_kernels.op_types import TapeSelection
from adatape_kernels.recipes.heatmap.read_statistics import EntriesRead, LengthsRead, PlacesRead
from adatape_kernels.recipes.pictures import axes_of, drawn_name, shown_image, titled

# Light to dark, and as dark in grey: what is read most is darkest.
_COLOURS = "cividis_r"
_MOST_CLASSES, _MOST_STEPS, _MOST_ENTRIES = 11, 16, 40
_BAR = "#0072b2"


class Panel(NamedTuple):
    """A mean image, and the share of images that read each of its patches."""

    title: str
    image: Tensor
    """(channels, height, width) in 0 to 1."""
    share: Tensor
    """(side, side)."""


def draw_panels(panels: Sequence[Panel], title: str) -> Any:
    """Draw mean images, and beside each what is read of it, on one scale."""
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = axes_of(rows, 2 * columns, max(6.5, 3.3 * columns), 1.9 * rows + 0.9)
    for axis in axes.flat:
        axis.axis("off")
    most = max(0.01, *(panel.share.max().item() for panel in panels))
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        mean_axis, heat_axis = axes[row, 2 * column], axes[row, 2 * column + 1]
        mean_axis.imshow(shown_image(panel.image), cmap="gray")
        titled(mean_axis, panel.title)
        heat = heat_axis.imshow(panel.share.numpy(), cmap=_COLOURS, vmin=0, vmax=most)
        titled(heat_axis, f"up to {panel.share.max():.0%}")
    figure.colorbar(heat, ax=axes, shrink=0.8, label="share of the images\nthat read this patch")
    figure.suptitle(title, parse_math=False)
    return figure


def class_panels(
    places: PlacesRead, means: Sequence[Tensor | None], mean: Tensor, names: Sequence[str]
) -> list[Panel]:
    """Return a panel for each class that has images, as many as can be seen, and one for all.

    Args:
        places: where images are read.
        means: the mean image of each class, None where it has none.
        mean: the mean image of all.
        names: the classes' names.
    """
    panels = [
        Panel(drawn_name(name), image, places.by_class[c])
        for c, (name, image) in enumerate(zip(names, means, strict=True))
        if image is not None
    ]
    return [*panels[:_MOST_CLASSES], Panel("all", mean, places.over_all)]


def draw_steps(places: PlacesRead) -> Any:
    """Draw where the images that take a step read in it, step by step."""
    steps = [s for s in range(len(places.by_step)) if places.images_by_step[s]][:_MOST_STEPS]
    columns = min(8, max(1, len(steps)))
    rows = max(1, -(-len(steps) // columns))
    figure, axes = axes_of(rows, columns, max(5, 1.5 * columns), 1.9 * rows + 0.7)
    for axis in axes.flat:
        axis.axis("off")
    for number, step in enumerate(steps):
        axis = axes.flat[number]
        axis.imshow(places.by_step[step].numpy(), cmap=_COLOURS, vmin=0)
        titled(axis, f"step {step + 1}\n{int(places.images_by_step[step]):,} images")
    figure.suptitle("Where each step reads; each picture on a scale of its own, dark is often")
    return figure


def draw_examples(
    images: Sequence[Tensor], titles: Sequence[str], read: TapeSelection, side: int
) -> Any:
    """Draw images, and on each the patches that it read, numbered by the step.

    Args:
        images: (channels, height, width) each, in 0 to 1.
        titles: what stands above each.
        read: of the same images.
        side: number of patches along either axis.
    """
    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    figure, axes = axes_of(rows, columns, max(5, 2.1 * columns), 2.5 * rows + 0.6)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title, indices in zip(axes.flat, images, titles, read.indices, strict=False):
        height, width = image.shape[1:]
        axis.imshow(shown_image(image), cmap="gray", alpha=0.75)
        titled(axis, title)
        for step, chosen in enumerate(indices.tolist()):
            for index in chosen:
                if index >= 0:
                    _draw_patch(axis, index, step, height / side, width / side, side)
    figure.suptitle("Patches that were read, and the step that read each")
    return figure


def _draw_patch(axis: Any, index: int, step: int, height: float, width: float, side: int) -> None:
    """Outline a patch, and write the number of its step into it."""
    from matplotlib.patches import Rectangle

    y, x = divmod(index, side)
    corner = (x * width - 0.5, y * height - 0.5)
    axis.add_patch(Rectangle(corner, width, height, fill=False, color="#d55e00", linewidth=1))
    axis.text(
        corner[0] + width / 2, corner[1] + height / 2, str(step + 1),
        ha="center", va="center", fontsize=6, color="black",
        bbox={"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 0.3},
    )  # fmt: skip


def draw_entries(entries: EntriesRead, names: Sequence[str]) -> Any:
    """Draw how often the entries of a learnable bank are read, and by which classes."""
    order = entries.counts.argsort(descending=True, stable=True)
    figure, axes = axes_of(1, 2, 11, 4.4)
    ranks, shares = axes[0, 0], axes[0, 1]
    ranks.plot(range(1, len(order) + 1), entries.counts[order].numpy(), color=_BAR)
    ranks.set_yscale("symlog", linthresh=1)
    ranks.set(xlabel="entries, from the most read on", ylabel="times read")
    ranks.spines[["top", "right"]].set_visible(False)
    most = float(torch.tensor(float(len(order))).log2())
    ranks.set_title(
        f"{entries.dead:,} of {len(order):,} entries are never read;\n"
        f"entropy {entries.entropy:.1f} of {most:.1f} bits"
    )
    top = order[:_MOST_ENTRIES]
    shown = [c for c in range(len(names)) if entries.by_class[c].any()][:_MOST_CLASSES]
    of_class = entries.by_class[shown][:, top].double()
    of_class = of_class / entries.by_class[shown].sum(1, keepdim=True).clamp(min=1)
    heat = shares.imshow(of_class.numpy(), cmap=_COLOURS, vmin=0, aspect="auto")
    shares.set_yticks(
        range(len(shown)), [drawn_name(names[c]) for c in shown], fontsize=8, parse_math=False
    )
    shares.set(xlabel=f"the {len(top)} entries that are read most")
    shares.set_title("Share of a class's reads")
    figure.colorbar(heat, ax=shares)
    return figure


def draw_lengths(lengths: LengthsRead) -> Any:
    """Draw how long tapes are, on average, of which images."""
    figure, axes = axes_of(1, 1, 6.5, 3.4)
    axis = axes[0, 0]
    shown = {
        "all": lengths.mean,
        "classified right": lengths.right,
        "classified wrong": lengths.wrong,
        "all, with noise": lengths.noisy,
        "all, blurred": lengths.blurred,
    }
    known = {name: value for name, value in shown.items() if value == value}
    bars = axis.barh(list(known)[::-1], list(known.values())[::-1], color=_BAR)
    axis.bar_label(bars, [f"{value:.2f}" for value in list(known.values())[::-1]], padding=4)
    axis.margins(x=0.15)
    axis.set_xlabel("mean number of tape tokens of a test image")
    axis.spines[["top", "right"]].set_visible(False)
    return figure
