"""The comparison's numbers: spreads, the Pareto front, the table and the picture."""

import pytest

from adatape_kernels.recipes.compare import compare_picture
from adatape_kernels.recipes.compare.compare_config import MODELS
from adatape_kernels.recipes.compare.compare_picture import drawn
from adatape_kernels.recipes.compare.compare_result import (
    CompareResult,
    Spread,
    front_in_words,
    grouped,
    pareto_front,
)
from adatape_kernels.recipes.compare.compare_table import table


def made_result(model, size=2, seed=0, accuracy=0.5, speed=1000.0, flops=1e6):
    tape = 3.5 if model.startswith("adatape") else None
    return CompareResult(
        model, size, seed, accuracy, speed, (speed, speed), flops, 1234, 3, 600, 9.5, 0.7, 0.75,
        17.0, tape,
    )  # fmt: skip


def named(groups):
    return [(group.model, group.size) for group in groups]


def test_the_front_holds_what_nothing_beats():
    results = [
        made_result("vit", 2, accuracy=0.80, speed=4000, flops=1e6),
        made_result("vit", 4, accuracy=0.85, speed=2000, flops=2e6),
        made_result("avit", 4, accuracy=0.85, speed=1500, flops=1.5e6),  # slower, fewer FLOPs
        made_result("uvit", 4, accuracy=0.79, speed=4000, flops=1e6),  # as fast, less accurate
        made_result("adatape-input", 2, accuracy=0.90, speed=1000, flops=3e6),
        made_result("adatape-learn", 2, accuracy=0.90, speed=1000, flops=4e6),
    ]
    groups = grouped(results)
    by_speed = pareto_front(groups, "images_per_second")
    # Two that are equal in both do not beat one another.
    assert named(by_speed) == [
        ("vit", 2), ("vit", 4), ("adatape-input", 2), ("adatape-learn", 2),
    ]  # fmt: skip
    by_flops = pareto_front(groups, "flops_per_image")
    assert named(by_flops) == [("vit", 2), ("avit", 4), ("adatape-input", 2)]
    assert front_in_words(groups, "flops_per_image") == (
        "AdaTape is on the Pareto front: adatape-input of 2 layers"
    )
    assert front_in_words(groups[:4], "flops_per_image") == "there is no AdaTape among the models"
    worse = grouped([*results[:2], made_result("adatape-input", 2, accuracy=0.7, speed=10)])
    assert front_in_words(worse, "images_per_second") == "AdaTape is not on the Pareto front"
    one = grouped([made_result("adatape-learn", size) for size in (1,)])
    assert front_in_words(one, "images_per_second").endswith("adatape-learn of 1 layer")


def test_the_front_is_that_of_means():
    results = [
        made_result("vit", seed=0, accuracy=0.9),
        made_result("vit", seed=1, accuracy=0.7),
        made_result("avit", seed=0, accuracy=0.81),
        made_result("avit", seed=1, accuracy=0.81),
    ]
    assert named(pareto_front(grouped(results), "flops_per_image")) == [("avit", 2)]


def test_a_spread_needs_two_seeds():
    assert Spread.of([2.0]) == (2.0, None)
    assert Spread.of([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))


def test_the_table_has_a_line_for_each_model_and_size():
    results = [
        made_result(model, size, seed, accuracy=0.5 + 0.02 * seed)
        for model in ("vit", "adatape-input")
        for size in (2, 4)
        for seed in (0, 1)
    ]
    lines = table(results).splitlines()
    assert [line.count("|") for line in lines[:6]] == [10] * 6 and lines[6] == ""
    assert len({len(line) for line in lines[:6]}) == 1
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[:4] == ["vit", "2", "51.00 ± 1.41", "1,000 ± 0"]
    assert cells[6:8] == ["", "1,234"]
    assert "3.50 ± 0.00" in lines[4]
    assert "means over 2 seeds ± their standard deviation" in lines[7]
    assert any("Accuracy against FLOPs per image: AdaTape is on" in line for line in lines)
    single = table([result for result in results if result.seed == 0])
    assert "±" not in single and "of one seed" in single


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_the_picture_has_every_model_and_cuts_no_text(seeds, monkeypatch):
    """In a font's own measure: no text reaches over the picture's edge, and none is a box."""
    figures = []
    axes_of = compare_picture.axes_of

    def axes(*arguments):
        figure, grid = axes_of(*arguments)
        figures.append(figure)
        return figure, grid

    monkeypatch.setattr(compare_picture, "axes_of", axes)
    results = [
        made_result(model, size, seed, 0.5 + 0.01 * number + 0.02 * size, 9e4 / size, 1e6 * size)
        for number, model in enumerate(MODELS)
        for size in (2, 4, 6)
        for seed in seeds
    ]
    assert drawn(results, "a title").startswith(b"\x89PNG")
    (figure,) = figures
    figure.canvas.draw()
    width, height = figure.get_size_inches() * figure.dpi
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["Pareto front", *MODELS]
    styles = [(line.get_marker(), str(line.get_linestyle())) for line in figure.axes[0].lines]
    own = [style for style in styles if style[0] not in ("None", "", None)]
    assert len({marker for marker, _ in own}) == len(MODELS)
    for artist in (legend, figure._suptitle, *(axis.title for axis in figure.axes)):
        box = artist.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    assert "AdaTape is" in figure.axes[0].get_title().replace("\n", " ")
