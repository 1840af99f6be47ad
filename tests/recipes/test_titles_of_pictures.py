"""Titles above pictures lie beside each other and inside of the figure, whatever the names."""

import itertools

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from adatape_kernels.data import ImageSet
from adatape_kernels.models import AdaTapeOutput
from adatape_kernels.recipes import pictures

NAMES = [
    "W" * 60,
    "i" * 60,
    "\u4f60\u597d" * 30,
    "%@" * 30,
    "\n\u202e" * 30,
    "a long name of a class",
]


def check_titles(figure):
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # what is painted changes no place
    titles = [axis.title for axis in figure.axes if axis.get_title()]
    boxes = [title.get_window_extent(renderer) for title in (*titles, figure._suptitle)]
    for box in boxes:
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
    for first, second in itertools.combinations(boxes, 2):
        assert not first.overlaps(second)


def given(name, classes, images):
    names = tuple(f"{name}{number}" for number in range(classes))
    pixels, labels = torch.rand(images, 3, 8, 8), torch.arange(images) % classes
    return ImageSet(pixels, labels, pixels, labels, names)


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", [2, 10, 60])
def test_the_names_above_the_mean_images(name, classes):
    check_titles(
        pictures.heatmap(given(name, classes, 2 * classes), torch.rand(2 * classes, 4, 4) < 0.5)
    )


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("images", [2, 3, 5, 60])
def test_the_names_above_the_shortest_and_longest(name, images):
    data = given(name, 2, images)
    wrong = torch.nn.functional.one_hot(1 - data.test_labels, 2).float()
    output = AdaTapeOutput(wrong, torch.ones(images, dtype=torch.int32), torch.rand(images, 1), ())
    figure = pictures.shortest_longest(data, output, torch.rand(images, 4, 4) < 0.5, 2)
    check_titles(figure)
    lines = figure.axes[0].get_title().splitlines()
    assert len(lines) == 3 and lines[1].startswith("taken for ") and lines[2] == "1 token"


def test_narrow_names_keep_more_of_themselves():
    narrow, wide = (pictures.drawn_name(letter * 99, "taken for ") for letter in "iW")
    assert narrow == "taken for iiiiiiii…iiiiiii"
    assert len(wide) < len(narrow) and wide.startswith("taken for W") and "…" in wide
