"""Rows that have no features have weights all the same, whose gradients are sums of nothing."""

import pytest
import torch
from row_cases import addends, gradients

from adatape_kernels.ops import accumulate_rows, accumulate_rows_

OP = ("accumulate_rows", "accumulate_rows_")


def summed(total, rows, source, weights, total_weights):
    return accumulate_rows(total, rows, source, weights, total_weights=total_weights)


@pytest.mark.few_emulated_threads
@pytest.mark.parametrize("weighted", [False, True], ids=["one weight", "two weights"])
def test_the_gradients_of_weights_are_zero(device, weighted):
    given = addends(device, dim=0, weighted=weighted)
    _, dtotal, drows, *of_weights = gradients(summed, given, torch.zeros(17, 0, device=device))
    assert dtotal.shape == (17, 0) and drows.shape == (11, 0)
    assert [x.tolist() for x in of_weights] == [[0.0] * 11] * (1 + weighted)
    accumulate_rows_(*given[:4], total_weights=given[4])


@pytest.mark.runs_no_op
@pytest.mark.parametrize("shape", [(3, 0), (0, 4)])
def test_an_empty_total_has_no_place_that_two_elements_share(device, shape):
    """Whatever its strides are."""
    total = torch.zeros(1, 1, device=device).expand(5, 4)[: shape[0], : shape[1]]
    assert total.shape == shape and total.stride() == (0, 0)
    rows = torch.zeros(2, shape[1], device=device)
    source = torch.full((2,), -1, dtype=torch.int32, device=device)
    weights = torch.ones(2, device=device)
    assert accumulate_rows_(total, rows, source, weights) is total
    torch.ops.adatape.accumulate_rows_(total, rows, source, weights, None)
