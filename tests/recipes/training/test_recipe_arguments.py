"""The functions of recipes that a user calls refuse what they cannot use, by name."""

import math

import pytest
import torch
from checks import refused

from adatape_kernels.data import ImageSet, Normaliser
from adatape_kernels.data.augment import turn_and_move
from adatape_kernels.models import AdaTapeViT
from adatape_kernels.recipes import demo, measure, model_comparison
from adatape_kernels.recipes.training import train as recipe
from adatape_kernels.recipes.training.train_config import TrainConfig
from adatape_kernels.recipes.training.train_loop import epoch_generator, train
from adatape_kernels.recipes.training.train_plan import TrainPlan

NO_COUNT = (None, True, 1.0, math.nan, 1j, "1", [], torch.tensor(1), 0, -1)


@pytest.fixture(scope="module")
def given():
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    data = ImageSet(images, labels, images, labels, tuple("0123456789"))
    return AdaTapeViT(demo.CONFIG), data, Normaliser.of(images)


@pytest.mark.parametrize("value", NO_COUNT)
def test_counts(given, value, tmp_path):
    model, data, normalise = given
    with refused("rounds"):
        model_comparison.compare(model, data, normalise, value)
    with refused("rounds"):
        measure.seconds({"a": list}, value)
    with refused("epochs"):
        demo.run(tmp_path / "out", epochs=value)
    if value != 0 or value is None or isinstance(value, torch.Tensor):
        with refused("seed"):
            demo.run(tmp_path / "out", seed=value)
        with refused("warmup"):
            measure.seconds({"a": list}, 1, warmup=value)
        with refused("seed"):
            epoch_generator(value, 0)
        with refused("epoch"):
            epoch_generator(0, value)
        with refused("epochs_done"):
            plan = TrainPlan(epochs=1, batch=2, learning_rate=0.1)
            train(model, data, plan, normalise, turn_and_move, epochs_done=value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [None, 5, "x", {}])
def test_objects(given, value):
    model, data, normalise = given
    plan = TrainPlan(epochs=1, batch=2, learning_rate=0.1)
    with refused("plan", error=TypeError):
        train(model, data, value, normalise, turn_and_move)
    with refused("data", error=TypeError):
        train(model, value, plan, normalise, turn_and_move)
    with refused("model", error=TypeError):
        train(value, data, plan, normalise, turn_and_move)
    with refused("model", error=TypeError):
        model_comparison.compare(value, data, normalise, 1)


def test_options_of_training(tmp_path):
    out = tmp_path / "out"
    for value in (None, 5, "digits", ["data"]):
        with refused("options", error=TypeError):
            recipe.run(out, value)
    for value in (None, 1, "yes"):
        with refused("resume"):
            recipe.run(out, {"data": "digits"}, resume=value)
    for value in (5, 1j, "a\0b", ""):
        with refused("data-dir"):
            recipe.run(out, {"data": "mnist"}, data_dir=value)
    for name in ("foo", 5, None, "Dim"):
        with refused("options"):
            recipe.run(out, {"data": "digits", name: 3})
        with refused("options"):
            TrainConfig.of({"data": "digits", name: 3})
    assert not out.exists()
