"""Gradients of examples whose last tile of rows is not full, in half precision."""

import math

import pytest
import torch
from attention_cases import by_reference, gradients, layout, not_served, qkv
from checks import assert_close, assert_same_bits

from adatape_kernels.ops import elastic_attention

OP = "elastic_attention"
pytestmark = pytest.mark.absent_if(reason=not_served)


@pytest.mark.parametrize("dtype", [torch.float16])
@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("tensor", ["q", "k", "v"])
def test_poison_in_a_tile_that_is_not_full(device, tensor, number, dtype):
    """It reaches what the formula says and no other row, of its own example or of the next."""
    cu_inputs, cu_tapes, (own, other) = layout(device, [66, 3], [4, 2])
    for row in (own[0], own[-1]):
        given = qkv(75, 1, 8, device=device, dtype=dtype)
        given[0][..., 0] = given[1][..., 0] = 1.0
        given["qkv".index(tensor)][row, :, 0] = number
        actual = gradients(elastic_attention, *given, cu_inputs, cu_tapes)
        expected = gradients(by_reference, *(x.double() for x in given), cu_inputs, cu_tapes)
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, 3e-3)
            assert a[other].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16])
@pytest.mark.parametrize("head_dim", [8, 48, 160])
def test_gradients_are_as_close_as_eager_s(device, head_dim, dtype):
    """For examples of one tile and of several, the last of them full or not."""
    cu_inputs, cu_tapes, _ = layout(device, [64, 60, 128, 1], [0, 10, 9, 0])
    given = qkv(280, 1, head_dim, device=device, dtype=dtype)
    actual = gradients(elastic_attention, *given, cu_inputs, cu_tapes)
    expected = gradients(by_reference, *(x.double() for x in given), cu_inputs, cu_tapes)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 160])
def test_an_example_has_the_bits_that_it_has_alone(device, head_dim, dtype):
    """Wherever its tiles begin, at the borders of one and of two tiles of each width."""
    for rows in (31, 32, 33, 64, 65):
        cu_inputs, cu_tapes, places = layout(device, [rows - 2, 5, rows - 1], [2, 0, 1])
        given = qkv(2 * rows + 5, 1, head_dim, device=device, dtype=dtype)
        together = gradients(elastic_attention, *given, cu_inputs, cu_tapes)
        for place, inputs, tapes in ((places[0], rows - 2, 2), (places[2], rows - 1, 1)):
            offsets = layout(device, [inputs], [tapes])[:2]
            alone = gradients(elastic_attention, *(x[place] for x in given), *offsets)
            for a, e in zip(together, alone, strict=True):
                assert_same_bits(a[place], e)
