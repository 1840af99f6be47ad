"""Attention's sums over many rows or features round as plain torch's do, whatever their signs.

The error of one chain of additions grows with its length, most of all where all numbers have one
sign: a chain over 2,000 keys is seven times as wrong as torch's own products are.
"""

import pytest
import torch
from attention_cases import by_reference, gradients, layout

from adatape_kernels import ops

OP = "elastic_attention"
pytestmark = pytest.mark.backends("cpp")


def rms(x):
    return x.square().mean().sqrt().item()


def errors_over_torchs(ours, plain, exact):
    """For each tensor the root mean square error, in those of plain torch in the same dtype."""
    return [rms(a - e) / rms(p - e) for a, p, e in zip(ours, plain, exact, strict=True)]


def attention_errors(q, k, v, dout, scale):
    rows = len(q)
    offsets = layout("cpu", [rows - rows // 7], [rows // 7])[:2]
    given = q, k, v, dout
    return errors_over_torchs(
        gradients(ops.elastic_attention, *given, *offsets, softmax_scale=scale),
        gradients(by_reference, *given, *offsets, softmax_scale=scale),
        gradients(by_reference, *(x.double() for x in given), *offsets, softmax_scale=scale),
    )


def of_one_sign(shape):
    return 1 + torch.rand(shape)


@pytest.mark.parametrize("rows", [300, 1300])
def test_attention_over_many_values_of_one_sign(device, rows):
    q, k = torch.randn(2, rows, 2, 16)
    v, dout = of_one_sign((2, rows, 2, 16))
    errors = attention_errors(q, k, v, dout, 0.25)
    assert max(errors) < 1.5, errors


@pytest.mark.parametrize("rows", [40, 300])
def test_attention_over_many_features(device, rows):
    """Scores are sums over features; an error of one is as large a part of a weight."""
    q, k = of_one_sign((2, rows, 3, 512))
    v, dout = torch.randn(2, rows, 3, 512)
    errors = attention_errors(q, k, v, dout, 0.1)
    assert max(errors) < 1.5, errors


@pytest.mark.parametrize("rows", [60, 300])
def test_gradients_that_cancel(device, rows):
    """Where one key has nearly all of the weight, and all gradients have about the same mean."""
    q, k, v, dout = of_one_sign((4, rows, 3, 128))
    errors = attention_errors(q, k, v, dout, 1.0)
    assert max(errors) < 1.5, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 64, 1500])
def test_values_as_large_as_numbers_are(device, rows, dtype):
    """The mean of such values is one, so no sum of them on the way to it may be infinite."""
    largest = 0.99 * torch.finfo(dtype).max
    q, k = torch.randn(2, rows, 1, 16).to(dtype)
    v = (largest * torch.tensor([1.0, -1.0]).repeat(8)).expand(rows, 1, 16).to(dtype)
    out = ops.elastic_attention(q, k, v, *layout("cpu", [rows], [0])[:2])
    torch.testing.assert_close(out.double(), v.double(), rtol=1e-2, atol=0)
