"""Pictures of what a model read: which patches, how many, and at what cost."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adatape_kernels.data.image_set import ImageSet, unit_range
from adatape_kernels.models import AdaTapeOutput
from adatape_kernels.recipes.model_comparison import Cost, ModelComparison

_ELASTIC, _PADDED = "#1b7f79", "#b8b8b8"

# The number of images that a mean image is made of, which more would not make clearer.
_MEAN_IMAGES = 200
# The number of classes that are drawn, since more would be too small to see.
_MOST_CLASSES = 11


def require(command: str) -> None:
    """Raise RuntimeError where matplotlib or tqdm, which `command` needs, is not installed."""
    from importlib.util import find_spec

    for package in ("matplotlib", "tqdm"):
        if find_spec(package) is None:
            raise RuntimeError(
                f"{command}: expected {package} to be installed "
                "(pip install 'adatape-kernels[demo]')"
            )


def draw_all(
    out: Path,
    data: ImageSet,
    output: AdaTapeOutput,
    comparison: ModelComparison,
    bank_patch_size: int,
) -> None:
    """Write heatmap.png, tape_lengths.png, shortest_longest.png and costs.png into `out`.

    Args:
        out: an existing folder.
        data: its test half is drawn.
        output: the model's output for every test image.
        comparison: the costs and tape lengths to draw.
        bank_patch_size: side in pixels of the patches that the model's bank is made of.
    """
    import matplotlib

    matplotlib.use("Agg")
    side = data.test_images[torch.zeros(1, dtype=torch.long)].shape[-1] // bank_patch_size
    read = patches_read(output, side)
    for name, figure in (
        ("heatmap", heatmap(data, read)),
        ("tape_lengths", tape_lengths(comparison.images_by_tape_length)),
        ("shortest_longest", shortest_longest(data, output, read, bank_patch_size)),
        ("costs", cost_shares(comparison.costs())),
    ):
        figure.savefig(out / f"{name}.png", dpi=130)


def patches_read(output: AdaTapeOutput, side: int) -> Tensor:
    """Return which patches of a bank of side · side each image read, (images, side, side) bool."""
    indices = output.reads[0].indices.flatten(1).long()
    read = torch.zeros(len(indices), side * side + 1, dtype=torch.bool)
    # The index -1, where nothing was read, goes to a column of its own, which is dropped.
    read.scatter_(1, indices.where(indices >= 0, side * side), True)
    return read[:, :-1].view(-1, side, side)


def heatmap(data: ImageSet, read: Tensor) -> Any:
    """Draw how often each bank patch is read, for every class and over all, above mean images."""
    import matplotlib.pyplot as plt

    labels = data.test_labels
    panels = [(name, (labels == c).nonzero()[:, 0]) for c, name in enumerate(data.class_names)]
    panels = [(name, chosen) for name, chosen in panels if len(chosen)][:_MOST_CLASSES]
    panels.append(("all", torch.arange(len(labels))))
    rows = -(-len(panels) // 4)
    figure, axes = plt.subplots(
        rows, 8, figsize=(13, 1.8 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for panel, (title, chosen) in enumerate(panels):
        row, column = divmod(panel, 4)
        mean_axis, heat_axis = axes[row, 2 * column], axes[row, 2 * column + 1]
        some = chosen[torch.arange(0, len(chosen), -(-len(chosen) // _MEAN_IMAGES))]
        mean_axis.imshow(_shown(unit_range(data.test_images[some]).mean(0)), cmap="gray")
        mean_axis.set_title(f"{title}: mean image", fontsize=9)
        heat_axis.set_title("patches read", fontsize=9)
        image = heat_axis.imshow(
            read[chosen].float().mean(0).numpy(), cmap="viridis", vmin=0, vmax=1
        )
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the images that read this patch")
    figure.suptitle("Which bank patches are read, by class and over all test images")
    return figure


def _shown(image: Tensor) -> Any:
    """Return an image (channels, height, width) as matplotlib shows it."""
    return image.permute(1, 2, 0).squeeze(2).numpy()


def tape_lengths(images_by_tape_length: list[int]) -> Any:
    """Draw how many test images read each number of tape tokens."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    counts = images_by_tape_length
    bars = axis.bar(range(len(counts)), counts, color=_ELASTIC)
    axis.bar_label(bars, labels=[str(count) if count else "" for count in counts], padding=2)
    axis.axvline(len(counts) - 1, color=_PADDED, linestyle="--")
    axis.annotate(
        "padded: always this long",
        (len(counts) - 1.1, 0.5),
        xycoords=("data", "axes fraction"),
        ha="right",
        va="center",
        rotation=90,
        color="0.4",
    )
    axis.set(xlabel="tape tokens read", ylabel="test images", xticks=range(len(counts)))
    axis.margins(y=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("Each image reads as much as it needs")
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
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    # Images are ordered by tape length, and among equal lengths by ponder loss.
    score = output.tape_lens + output.ponder.sum(1) / (1 + output.ponder.sum(1))
    order = score.argsort()
    columns = min(columns, len(order))
    figure, axes = plt.subplots(
        2, columns, figsize=(1.5 * columns, 4.3), layout="constrained", squeeze=False
    )
    margin, width = 0.06 - 0.5, bank_patch_size - 0.12
    for axis_row, chosen in zip(axes, (order[:columns], order[-columns:].flip(0)), strict=True):
        images = unit_range(data.test_images[chosen])
        for axis, pixels, image in zip(axis_row, images, chosen.tolist(), strict=True):
            axis.imshow(_shown(pixels), cmap="gray")
            axis.axis("off")
            for y, x in read[image].nonzero().tolist():
                corner = (x * bank_patch_size + margin, y * bank_patch_size + margin)
                axis.add_patch(Rectangle(corner, width, width, fill=False, color="#ff9f1c", lw=1.2))
            label, guess = int(data.test_labels[image]), int(output.logits[image].argmax())
            wrong = "" if label == guess else f"\ntaken for {data.class_names[guess]}"
            axis.set_title(
                f"{data.class_names[label]}{wrong}\n{int(output.tape_lens[image])} tokens",
                fontsize=9,
            )
    figure.suptitle("The shortest tapes (above) and the longest (below); outlined: patches read")
    return figure


def cost_shares(costs: list[Cost]) -> Any:
    """Draw each cost of the elastic model as a share of that of the padded model."""
    import matplotlib.pyplot as plt

    costs = costs[::-1]  # bars are drawn from the bottom upwards
    shares = [cost.elastic / cost.padded for cost in costs]
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
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
