"""Tokens of patches by a product, beside the convolution that they are defined by."""

import pytest
import torch
from checks import assert_same_bits
from fake_gpu import GPU, fake_gpu
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from adatape_kernels import models
from adatape_kernels.models.patch_tokens import tokens_of_patches, tokens_of_strip

OP = None


class Convolutions(TorchDispatchMode):
    """Counts the convolutions that run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "convolution" in func.overloadpacket.__name__
        return func(*args, **(kwargs or {}))


def convolution(size, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return nn.Conv2d(3, 10, size, stride=size, dtype=dtype, **options)


def by_convolution(embed, images):
    weight, bias = embed.weight, embed.bias
    tokens = nn.functional.conv2d(images, weight, bias, embed.stride)
    return tokens.flatten(2).mT


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 12, 20), (1, 3, 4, 4), (0, 3, 8, 8)])
def test_product_is_the_convolution(shape, channels_last, bias):
    embed, images = convolution(4, bias=bias), torch.randn(shape, dtype=torch.float64)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    images.requires_grad_()
    with Convolutions() as ran:
        tokens = tokens_of_patches(images, embed, 4)
    assert ran.count == 0
    inputs, found = [images, *embed.parameters()], []
    for each in (tokens, by_convolution(embed, images)):
        weights = torch.arange(each.numel()).view_as(each).sin()
        found.append([each, *torch.autograd.grad((each * weights).sum(), inputs)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_worse(dtype):
    embed, images = convolution(8, dtype), torch.randn(2, 3, 32, 32, dtype=dtype)
    exact = by_convolution(convolution(8).to(dtype).double(), images.double())
    product, own = tokens_of_patches(images, embed, 8), by_convolution(embed, images)
    error, allowed = (product - exact).abs().max(), (own - exact).abs().max()
    assert product.dtype == dtype
    assert error <= 2 * allowed + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strips(dtype):
    embed, strip = convolution(4, dtype), torch.randn(3, 4, 28, dtype=dtype)
    with Convolutions() as ran:
        tokens = tokens_of_strip(strip, embed, 4)
    assert ran.count == 0
    assert tokens.shape == (7, 10)
    expected = by_convolution(embed.double(), strip.double().unsqueeze(0))[0]
    torch.testing.assert_close(tokens.double(), expected, rtol=2e-2, atol=2e-2)


def model():
    torch.manual_seed(0)
    made = models.adatape_vit("Ti/8", image_size=16, depth=1, num_classes=5)
    nn.init.normal_(made.head.weight)
    return made


def test_models_run_no_convolution():
    with Convolutions() as ran:
        model()(torch.randn(2, 3, 16, 16))
        model()([torch.randn(3, 16, 8), torch.randn(3, 16, 16)])
    assert ran.count == 0


def test_modules_that_are_not_plain_are_called():
    made, seen = model(), []
    for module in (made.patch_embed, made.bank_embed):
        module.register_forward_hook(lambda _, args, out: seen.append(out) or 2 * out)
    images = torch.randn(2, 3, 16, 16)
    tokens, _ = made.embed(images)
    assert [out.shape[2:] for out in seen] == [(2, 2), (4, 4)]
    made.embed_elastic(images)
    made.embed_elastic([torch.randn(3, 16, 8)])
    assert len(seen) == 6
    expected = made.with_class_token(2 * by_convolution(made.patch_embed, images)) + made.position
    torch.testing.assert_close(tokens, expected)


def test_overlapping_patches_are_a_convolution():
    embed, images = nn.Conv2d(3, 10, 8, stride=4, padding=2), torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(tokens_of_patches(images, embed, 4), embed(images).flatten(2).mT)


def test_an_exported_program_computes_the_same_bits():
    made, images = model().eval(), torch.randn(2, 3, 16, 16)
    program = torch.export.export(made, (images,), {"capacity": 20})
    assert not any("conv" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        found, expected = (each(images, capacity=20) for each in (program.module(), made))
        assert_same_bits(found.logits, expected.logits)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_models_run_no_convolution_on_another_device():
    """So that a step on a GPU that is none has the bits of one on the CPU."""
    images = torch.randn(2, 3, 16, 16)
    expected = model()(images).logits
    with fake_gpu():
        made, moved = model().to(GPU), images.to(GPU)
        assert_same_bits(made(moved).logits.cpu(), expected)
