"""Reading where scores are infinite or NaN, at the borders of tiles."""

import math

import pytest
import torch
from checks import assert_close, interpreted
from select_cases import cotangents, gradients

from adatape_kernels import reference
from adatape_kernels.ops import tape_select

OP = "tape_select"
BANK_SIZE = 300
PLACES = [slice(0, 298), slice(0, 128), slice(1, 257), slice(64, None), slice(2, None), slice(None)]


def half_of_the_options(device, backend, loss_type, average_query, shared, **parameters):
    """In Triton's interpreter, which is slow, each pair of options meets every number once."""
    slow = device == "cpu" and backend == "triton"
    odd = ((loss_type == "max") + average_query + shared) % 2
    return "other cases have each two of these options" if slow and odd else None


@pytest.mark.absent_if(reason=half_of_the_options)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize("average_query", [True, False], ids=["average", "replace"])
@pytest.mark.parametrize("loss_type", ["entropy", "max"])
@pytest.mark.parametrize("number", [-math.inf, math.inf, math.nan, -1e30, 1e30])
def test_infinite_scores(device, number, loss_type, average_query, shared):
    """Keys of one infinite feature, or of one whose product with the query's is infinite."""
    # The second token's gradients are multiplied by such numbers, and so are their roundings.
    tokens = 2 if not math.isfinite(number) else 1
    options = dict(
        num_tape_tokens=tokens,
        topk=3,
        halt_threshold=10.0,
        average_query=average_query,
        loss_type=loss_type,
    )
    # In an interpreter, which is slow, two of the four cases of a number have each of the places.
    places_here = PLACES[shared::2] if interpreted(device) else PLACES
    for places in places_here:
        query = torch.randn(2, 6, device=device)
        keys = torch.randn(*([] if shared else [2]), BANK_SIZE, 6, device=device)
        query[:, 0], keys[..., 0] = (1e30 if abs(number) == 1e30 else 1.0), 0.0
        keys[..., places, 0] = number
        given = query, keys, *cotangents(2, tokens, 3, device=device)
        actual = gradients(tape_select, *given, **options)
        expected = gradients(reference.tape_select, *given, **options)
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, 2e-5)
