"""Pictures of what is read: no text is cut or covers another, whatever the names and the sizes."""

import itertools
import json

import matplotlib
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from adatape_kernels.cli import main
from adatape_kernels.op_types import TapeSelection
from adatape_kernels.recipes import pictures
from adatape_kernels.recipes.heatmap import heatmap_pictures
from adatape_kernels.recipes.heatmap.read_statistics import LengthsRead, entries_read, places_read

NAMES = ["W" * 60, "Ba$$in", "图像图像图像图像图像", "x_1^2$", "\n\u202e" * 30]


def read_of(images, steps, topk, entries):
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(images, entries, generator=generator).argsort(1)
    indices = order[:, : steps * topk].view(images, steps, topk).int()
    weights, counts = torch.rand(images, steps, topk), torch.full((images,), steps).int()
    return TapeSelection(indices, weights, counts, torch.rand(images))


def drawn(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def check_texts(figure):
    """Each text is inside of the figure, and titles lie on no other."""
    renderer = drawn(figure)
    titles = [axis.title for axis in figure.axes if axis.get_title()]
    if figure._suptitle is not None:
        titles.append(figure._suptitle)
    seen = [
        text
        for axis in figure.axes
        if axis.axison
        for text in (axis.xaxis.label, axis.yaxis.label, *axis.get_yticklabels())
    ]
    for text in (*titles, *seen):
        box = text.get_window_extent(renderer)
        # Numbers of an axis are math; those out of its range are kept, and not drawn.
        if text.get_text() and not text.get_text().startswith("$\\mathdefault"):
            assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1, text
            assert box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1, text
    boxes = [title.get_window_extent(renderer) for title in titles]
    for first, second in itertools.combinations(boxes, 2):
        assert not first.overlaps(second)


@pytest.mark.parametrize("classes, shown", [(5, True), (11, False), (1, False)])
def test_titles_of_classes(classes, shown):
    labels = torch.arange(2 * classes) % classes
    places = places_read(read_of(2 * classes, 2, 3, 64), labels, classes, 8)
    names = [f"{number}{NAMES[number % len(NAMES)]}" for number in range(classes)]
    means = [torch.rand(3, 8, 8) for _ in range(classes + 1)] if shown else None
    with pictures.plain_settings():
        panels = heatmap_pictures.class_panels(places, range(classes), means, names)
        assert len(panels) == min(classes, 11) + 1 and panels[-1].title == "all"
        assert all((panel.image is not None) == shown for panel in panels)
        figure = heatmap_pictures.draw_panels(panels, "Which patches are read before layer 0")
        check_texts(figure)


@pytest.mark.parametrize("bank_size", [5, 1000])
def test_texts_of_entries(bank_size):
    labels = torch.arange(30) % len(NAMES)
    found = entries_read(read_of(30, 2, 2, bank_size), labels, len(NAMES), bank_size)
    with pictures.plain_settings():
        check_texts(heatmap_pictures.draw_entries(found, NAMES))


def test_texts_of_lengths():
    with pictures.plain_settings():
        figure = heatmap_pictures.draw_lengths(LengthsRead(9.5, 1.5, 30.0, 2.0, torch.nan, 0.1))
        check_texts(figure)
        assert len(figure.axes[0].patches) == 4  # nothing is known of blurred images


@pytest.mark.parametrize("side, images", [(4, 1), (32, 2), (56, 1)])
def test_a_number_is_no_wider_than_its_patch_or_is_not_there(side, images):
    numbers, read = side <= 32, read_of(images, 11, 1, side * side)
    pixels = [torch.rand(3, 112, 112)] * images
    with pictures.plain_settings():
        titles = [pictures.drawn_name(NAMES[number % len(NAMES)]) for number in range(images)]
        figure = heatmap_pictures.draw_examples(pixels, titles, read, side)
        assert ("step" in figure._suptitle.get_text()) == numbers
        check_texts(figure)
        renderer = drawn(figure)
        for axis in figure.axes[:images]:
            texts = [text for text in axis.texts if text.get_text()]
            assert len(axis.patches) == 11
            assert [text.get_text() for text in texts] == [
                str(step + 1) for step in range(11) if numbers
            ]
            patch = axis.patches[0].get_window_extent(renderer)
            assert all(text.get_window_extent(renderer).width <= patch.width for text in texts)


def test_letters_that_matplotlibs_font_lacks_are_taken_from_one_that_is_installed(monkeypatch):
    names = ["DejaVu Sans", "WenQuanYi Micro Hei", "Comic Sans MS"]
    monkeypatch.setattr("matplotlib.font_manager.get_font_names", lambda: names)
    with pictures.plain_settings():
        assert matplotlib.rcParams["font.family"] == ["DejaVu Sans", "WenQuanYi Micro Hei"]


def test_no_image_of_the_set_is_shown(runs, tmp_path):
    out = tmp_path / "h"
    given = ["heatmap", str(runs / "input"), "--beside", str(runs / "input"), "--no-images"]
    assert main([*given, "--out", str(out)]) == 0
    names = {file.name for file in out.iterdir()}
    assert names == {"report.json", "heatmap.png", "steps.png", "lengths.png", "beside.png"}
    report = json.loads((out / "report.json").read_text())
    (read,) = report["reads"]
    assert len(read["centre_share_by_step"]) == len(read["images_by_step"])
    assert report["class_names"] == [str(digit) for digit in range(10)]


def test_banks_of_different_sizes_are_drawn_in_units_of_their_means():
    shares = torch.tensor([[0.1, 0.3], [0.0, 0.0]]), torch.full((4, 4), 0.7)
    panels = [heatmap_pictures.Panel("a", None, share) for share in shares]
    figure = heatmap_pictures.draw_panels(panels, "title", relative=True)
    first, second = (axis.images[0].get_array() for axis in figure.axes[:2])
    assert torch.as_tensor(first).flatten().tolist() == pytest.approx([1, 3, 0, 0])
    assert torch.as_tensor(second).flatten().tolist() == pytest.approx([1] * 16)
    assert [axis.get_title() for axis in figure.axes[:2]] == [
        "a\nup to 3.0 times",
        "a\nup to 1.0 times",
    ]
    assert figure.axes[0].images[0].get_clim() == pytest.approx((0, 3))


def test_an_entry_that_two_classes_read_alike_is_theirs_alike():
    """The first class has three images, the second one; both read entry 0 and their own."""
    labels = torch.tensor([0, 0, 0, 1])
    indices = torch.tensor([[[0, 1]], [[0, 1]], [[0, 1]], [[0, 2]]], dtype=torch.int32)
    weights = torch.ones(4, 1, 2)
    read = TapeSelection(indices, weights, torch.ones(4).int(), torch.ones(4))
    figure = heatmap_pictures.draw_entries(entries_read(read, labels, 2, 4), ["a", "b"])
    shown = torch.as_tensor(figure.axes[1].images[0].get_array())
    assert shown.tolist() == [[0.5, 1.0, 0.0, 0.0], [0.5, 0.0, 1.0, 0.0]]
