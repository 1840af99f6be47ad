"""Recipes by name: what they decide, for which image sets, and that given options go first."""

import pytest
from checks import refused

from adatape_kernels.recipes.training.named_recipes import MODEL_FIELDS, RECIPES, recipe_values
from adatape_kernels.recipes.training.train_config import TrainConfig

pytestmark = pytest.mark.no_backend

PAIRS = [(name, data) for name, sets in RECIPES.items() for data in sets]
CHANNELS = {"fashion-mnist": 1}


@pytest.mark.parametrize(("name", "data"), PAIRS)
def test_a_recipe_decides_what_it_lists(name, data):
    config = TrainConfig.of({"data": data, "recipe": name})
    assert config.recipe == name
    for field, value in recipe_values(name, data).items():
        assert getattr(config, field) == value, field
    given = {"data": data, "recipe": name, "epochs": 3, "mixup": 0.9, "ema": 0.5, "topk": 2}
    other = TrainConfig.of(given)
    assert (other.epochs, other.mixup, other.ema, other.topk) == (3, 0.9, 0.5, 2)
    assert other.lr == config.lr
    assert TrainConfig.of_saved(vars(config)) == config


@pytest.mark.parametrize("data", RECIPES["small"])
def test_small_ones_have_less_than_a_million_parameters(data):
    config = TrainConfig.of({"data": data, "recipe": "small"})
    model = config.model(10, CHANNELS.get(data, 3))
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert config.reads and config.vit_config(10, 3).num_tape_tokens > 0


def test_a_model_that_is_given_keeps_its_own_sizes():
    small = {"data": "cifar10", "recipe": "small"}
    named = TrainConfig.of({**small, "model_name": "adatape_tiny_patch16_224.learn"})
    assert named.vit_config(10, 3).dim == 192 and named.bank == "learn"
    assert TrainConfig.of({**small, "variant": "Ti/8"}).vit_config(10, 3).patch_size == 8
    assert TrainConfig.of({**small, "model_name": "vit"}).model(10, 3).config.depth == 6
    large = {"data": "imagefolder", "recipe": "imagenet", "image_size": 32}
    config = TrainConfig.of({**large, "model_name": "vit_tiny_patch16_224"})
    assert config.vit_config(10, 3).dim == 192
    config = TrainConfig.of({**large, "dim": 48, "depth": 2})
    assert (config.vit_config(10, 3).dim, config.vit_config(10, 3).key_split) == (48, 6)
    assert TrainConfig.of({**large, "num_tape_tokens": 0}).vit_config(10, 3).read_layers == ()


def test_fields_of_a_model_belong_to_a_recipe():
    assert MODEL_FIELDS.keys() <= RECIPES.keys()


@pytest.mark.parametrize(
    ("data", "recipe", "words"),
    [
        ("digits", "small", "none for digits"),
        ("mnist", "imagenet", "none for mnist"),
        ("cifar10", "imagenet", "small for cifar10"),
        ("imagefolder", "small", "imagenet for imagefolder"),
        ("cifar10", "huge", "'small' or 'imagenet'"),
        ("cifar10", ["small"], "'small' or 'imagenet'"),
    ],
)
def test_a_recipe_is_for_some_sets(data, recipe, words):
    with refused("recipe", words):
        TrainConfig.of({"data": data, "recipe": recipe})


def test_no_recipe_with_a_source():
    with refused("recipe", "none with a source"):
        TrainConfig.of({"data": "cifar10", "recipe": "small"}, source=object())
