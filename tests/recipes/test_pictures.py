"""Pictures show what they say: no text is cut off or lies on a bar."""

import itertools

import matplotlib
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from adatape_kernels.data import ImageSet
from adatape_kernels.recipes import pictures


def drawn(figure):
    """Draw a figure; return the pixels (left, bottom, right, top) that it has."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer(), figure.bbox


def inside(box, outer):
    return (
        box.x0 >= outer.x0 - 1
        and box.y0 >= outer.y0 - 1
        and box.x1 <= outer.x1 + 1
        and box.y1 <= outer.y1 + 1
    )


@pytest.mark.parametrize("classes", [2, 3, 10, 11, 40])
def test_the_label_of_the_colour_bar_is_whole(classes):
    names = tuple(f"a class with a long name {number}" for number in range(classes))
    images, labels = torch.rand(2 * classes, 3, 8, 8), torch.arange(2 * classes) % classes
    data = ImageSet(images, labels, images, labels, names)
    figure = pictures.heatmap(data, torch.rand(2 * classes, 4, 4) < 0.5)
    renderer, whole = drawn(figure)
    bar = figure.axes[-1]
    label = bar.yaxis.label
    assert label.get_text().split() == "share of the images that read this patch".split()
    assert inside(label.get_window_extent(renderer), whole)
    assert inside(figure._suptitle.get_window_extent(renderer), whole)


@pytest.mark.parametrize(
    "lengths", [[5], [0, 7], [0, 0, 8], [1, 2, 3, 400], [0] * 10 + [360], [3] * 100]
)
def test_the_words_about_the_padded_length_lie_on_no_bar(lengths):
    figure = pictures.tape_lengths(lengths)
    renderer, whole = drawn(figure)
    (axis,) = figure.axes
    (words,) = [text for text in axis.texts if text.get_text() == "padded: always this long"]
    box = words.get_window_extent(renderer)
    assert inside(box, whole)
    for bar in axis.patches:
        assert not box.overlaps(bar.get_window_extent(renderer))
    ticks = [label.get_window_extent(renderer) for label in axis.get_xticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(ticks))


def test_pictures_repeat_to_the_byte(tmp_path):
    with matplotlib.rc_context({"axes.facecolor": "red"}):
        figure = pictures.tape_lengths([1, 2, 3])
    contents = []
    for name in ("first.png", "second.png"):
        figure.savefig(tmp_path / name, dpi=130)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("pullover", "pullover"),
        ("Ba$$in", "Ba$$in"),
        ("two\nlines", "two\\nlines"),
        ("long" * 50, "longlong…glong"),
    ],
)
def test_the_name_of_a_class_as_it_is_drawn(name, shown):
    assert len(pictures.drawn_name(name)) <= 16
    if len(name) <= 16:
        assert pictures.drawn_name(name) == shown
