"""A call's own threshold and longest tape: as if the model had been built with them."""

import dataclasses
import math

import pytest
import torch

import adatape_kernels as ak
from adatape_kernels.recipes import measure

LIMITS = [
    {},
    {"halt_threshold": 0.7},
    {"num_tape_tokens": 2},
    {"num_tape_tokens": 0},
    {"halt_threshold": 0.0},
    {"halt_threshold": math.inf, "num_tape_tokens": 20},
]


def model_and_images(**options):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "depth": 2, "num_classes": 5, "read_layers": (0, 1), **options}
    model = ak.models.adatape_vit("Ti/4", bank_patch_size=2, **sizes).eval()
    torch.nn.init.normal_(model.head.weight)
    return model, torch.randn(4, 3, 16, 16)


def built_with(model, limits):
    other = type(model)(dataclasses.replace(model.config, **limits)).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("bank", ["input", "learn"])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_a_call_with_limits_is_a_model_that_was_built_with_them(limits, bank):
    model, images = model_and_images(bank=bank, bank_size=90)
    expected = built_with(model, limits)(images)
    for forward in (model, model.padded()):
        output = forward(images, **limits)
        assert torch.equal(output.tape_lens, expected.tape_lens)
        torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)
    output = model(images, capacity=4 * 20, **limits)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert model.config.halt_threshold == 2.0 and model(images).tape_lens.tolist() != []


def test_gradients_are_those_of_a_model_that_was_built_so():
    model, images = model_and_images()
    limits = {"halt_threshold": 0.9, "num_tape_tokens": 4}
    other = built_with(model, limits)
    for each, given in ((model.train(), limits), (other.train(), {})):
        each.loss(each(images, **given), torch.tensor([0, 1, 2, 3])).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, other.get_parameter(name).grad)


def test_checkpointed_layers_take_limits():
    model, images = model_and_images()
    expected = model(images, num_tape_tokens=1)
    model.set_grad_checkpointing()
    torch.testing.assert_close(
        model.train()(images, num_tape_tokens=1).logits, expected.logits, atol=1e-4, rtol=1e-4
    )


def test_a_loaded_model_takes_limits(tmp_path):
    model, images = model_and_images()
    file = ak.save(model, tmp_path)
    loaded = ak.load(file, halt_threshold=0.5, num_tape_tokens=3)
    assert (loaded.config.halt_threshold, loaded.config.num_tape_tokens) == (0.5, 3)
    expected = model(images, halt_threshold=0.5, num_tape_tokens=3)
    assert torch.equal(loaded(images).logits, expected.logits)
    vit = ak.models.create_model("vit_tiny_patch16_224", image_size=32, depth=1)
    plain = ak.save(vit, tmp_path)
    with pytest.raises(ValueError, match=r"^num_tape_tokens: expected None for a model that reads"):
        ak.load(plain, num_tape_tokens=3)


@pytest.mark.parametrize(
    "limits, words",
    [
        ({"halt_threshold": math.nan}, "halt_threshold: expected a number, got nan"),
        ({"halt_threshold": "1"}, "halt_threshold: expected a number"),
        ({"num_tape_tokens": -1}, "num_tape_tokens: expected 0 to"),
        ({"num_tape_tokens": 1.5}, "num_tape_tokens: expected an int, got 1.5"),
    ],
)
def test_what_is_no_limit_is_refused(limits, words):
    model, images = model_and_images()
    for forward in (model, model.padded()):
        with pytest.raises((ValueError, TypeError), match=f"^{words}"):
            forward(images, **limits)


def test_flops_equal_the_padded_models_where_nothing_is_dropped():
    """With every tape read to its end there is nothing to save."""
    model, images = model_and_images()
    limits = {"halt_threshold": math.inf, "num_tape_tokens": 3}
    ours, padded = (
        measure.flops(lambda forward=forward: forward(images, **limits))
        for forward in (model, model.padded())
    )
    assert ours == padded
    assert measure.flops(lambda: model(images, num_tape_tokens=1)) < ours
