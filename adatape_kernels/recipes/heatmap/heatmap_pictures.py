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
# A number of two digits of 96 / side points fits into a patch of a single image, and one of less
# than 3 points is none that can be read.
_POINTS_ACROSS, _LEAST_POINTS = 96, 3.0


class Panel(NamedTuple):
    """A mean image, and the share of images that read each of its patches."""

    title: str
    image: Tensor | None
    """(channels, height, width) in 0 to 1; None where no image is shown."""
    share: Tensor
    """(side, side)."""


def draw_panels(panels: Sequence[Panel], title: str, *, relative: bool = False) -> Any:
    """Draw mean images, and beside each what is read of it, on one scale.

    Args:
        panels: what is drawn, all with an image or all without.
        title: what stands above them.
        relative: draw each share in units of the panel's mean, by which banks of different sizes
            are comparable.
    """
    parts = 1 if panels[0].image is None else 2
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    # One picture alone has the room that its title needs; two share the room of one title.
    width = max(6.5, 3.3 * columns if parts == 2 else 1.75 * columns + 1.6)
    height = 1.75 * rows + 0.7 if parts == 2 else 2.1 * rows + 0.6
    figure, axes = axes_of(rows, parts * columns, width, height)
    for axis in axes.flat:
        axis.axis("off")
    shares = [
        panel.share / panel.share.mean().clamp(min=1e-9) if relative else panel.share
        for panel in panels
    ]
    most = max(0.01, *(share.max().item() for share in shares))
    for number, (panel, share) in enumerate(zip(panels, shares, strict=True)):
        row, column = divmod(number, columns)
        heat_axis = axes[row, parts * column + parts - 1]
        heat = heat_axis.imshow(share.numpy(), cmap=_COLOURS, vmin=0, vmax=most)
        highest = f"up to {share.max():.1f} times" if relative else f"up to {share.max():.0%}"
        if panel.image is None:
            titled(heat_axis, f"{panel.title}\n{highest}")
        else:
            mean_axis = axes[row, parts * column]
            mean_axis.imshow(shown_image(panel.image), cmap="gray")
            titled(mean_axis, panel.title)
            titled(heat_axis, highest)
    label = "share of the images\nthat read this patch"
    if relative:
        label = "reads of this patch,\nthe mean being 1"
    figure.colorbar(heat, ax=axes, shrink=0.8, label=label)
    figure.suptitle(title, parse_math=False)
    return figure


def class_panels(
    places: PlacesRead,
    classes: Sequence[int],
    means: Sequence[Tensor] | None,
    names: Sequence[str],
) -> list[Panel]:
    """Return a panel for each class that has images, as many as can be seen, and one for all.

    Args:
        places: where images are read.
        classes: numbers of the classes that have images.
        means: the mean image of each of these classes, and that of all; None to show no image.
        names: the names of all classes.
    """
    images = [None] * (len(classes) + 1) if means is None else means
    panels = [
        Panel(drawn_name(names[c]), image, places.by_class[c])
        for c, image in zip(classes, images, strict=False)
    ]
    return [*panels[:_MOST_CLASSES], Panel("all", images[-1], places.over_all)]


def draw_steps(places: PlacesRead) -> Any:
    """Draw where the images that take a step read in it, step by step."""
    steps = [s for s in range(len(places.by_step)) if places.images_by_step[s]][:_MOST_STEPS]
    columns = min(8, max(1, len(steps)))
    rows = max(1, -(-len(steps) // columns))
    figure, axes = axes_of(rows, columns, max(7.5, 1.5 * columns), 1.9 * rows + 0.7)
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
    size = min(6.0, _POINTS_ACROSS / side)
    numbered = size >= _LEAST_POINTS
    for axis, image, title, indices in zip(axes.flat, images, titles, read.indices, strict=False):
        height, width = image.shape[1:]
        axis.imshow(shown_image(image), cmap="gray", alpha=0.75)
        titled(axis, title)
        for step, chosen in enumerate(indices.tolist()):
            for index in chosen:
                if index >= 0:
                    corner = (
                        index % side * width / side - 0.5,
                        index // side * height / side - 0.5,
                    )
                    _draw_patch(axis, corner, width / side, height / side)
                    if numbered:
                        _write_step(axis, corner, width / side, height / side, step, size)
    steps = ", and the step that read each" if numbered else ""
    figure.suptitle(f"Patches that were read{steps}")
    return figure


def _draw_patch(axis: Any, corner: tuple[float, float], width: float, height: float) -> None:
    """Outline a patch."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import Normal, Stroke

    # A light line on both sides of a dark one is seen on any image, in black and white too.
    outline = Rectangle(corner, width, height, fill=False, color="#a63d00", linewidth=0.9)
    outline.set_path_effects([Stroke(linewidth=2.1, foreground="white"), Normal()])
    axis.add_patch(outline)


def _write_step(
    axis: Any, corner: tuple[float, float], width: float, height: float, step: int, size: float
) -> None:
    """Write the number of a step, counted from 1 there, into the patch that it read."""
    axis.text(
        corner[0] + width / 2, corner[1] + height / 2, str(step + 1),
        ha="center", va="center", fontsize=size, color="black",
        bbox={"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 0.3},
    )  # fmt: skip


def draw_entries(entries: EntriesRead, names: Sequence[str]) -> Any:
    """Draw how often the entries of a learnable bank are read, and by which classes."""
    order = entries.counts.argsort(descending=True, stable=True)
    figure, axes = axes_of(1, 2, 11, 4.4)
    ranks, shares = axes[0, 0], axes[0, 1]
    ranks.plot(range(1, len(order) + 1), entries.counts[order].numpy(), color=_BAR)
    ranks.set_yscale("symlog", linthresh=1)
    ranks.set_ylim(bottom=0)
    ranks.xaxis.get_major_locator().set_params(integer=True)
    ranks.set(xlabel="entries, from the most read on", ylabel="times read")
    ranks.spines[["top", "right"]].set_visible(False)
    most = float(torch.tensor(float(len(order))).log2())
    ranks.set_title(
        f"{entries.dead:,} of {len(order):,} entries are never read;\n"
        f"entropy {entries.entropy:.1f} of {most:.1f} bits"
    )
    top = order[:_MOST_ENTRIES]
    shown = [c for c in range(len(names)) if entries.by_class[c].any()][:_MOST_CLASSES]
    # Classes with more images, or with longer tapes, would otherwise seem to read each entry more.
    of_class = entries.by_class[shown].double()
    of_class = of_class[:, top] / of_class.sum(1, keepdim=True).clamp(min=1)
    of_class = of_class / of_class.sum(0).clamp(min=1e-9)
    heat = shares.imshow(of_class.numpy(), cmap=_COLOURS, vmin=0, aspect="auto")
    shares.set_yticks(
        range(len(shown)), [drawn_name(names[c]) for c in shown], fontsize=8, parse_math=False
    )
    shares.set_xticks(
        [place for place in range(len(top)) if place == 0 or place % 5 == 4],
        [str(place + 1) for place in range(len(top)) if place == 0 or place % 5 == 4],
    )
    shares.set(xlabel=f"the {len(top)} entries that are read most")
    shares.set_title(
        "Which classes read them: an entry that is read\n"
        f"tells {entries.class_information:.2f} bits of the class"
    )
    figure.colorbar(
        heat, ax=shares, label="share of the entry's reads,\nif all classes read as often"
    )
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
