"""What `accumulate_rows` and `accumulate_rows_` refuse."""

import pytest
import torch
from checks import cannot_raise, refused
from row_cases import addends

from adatape_kernels.ops import accumulate_rows, accumulate_rows_

OP = ("accumulate_rows", "accumulate_rows_")

GOOD = {
    "total": torch.zeros(5, 4),
    "rows": torch.zeros(3, 4),
    "source": torch.tensor([3, -1, 0]),
    "weights": torch.ones(3),
    "total_weights": torch.ones(3),
}


@pytest.mark.runs_no_op
@pytest.mark.parametrize("add", [accumulate_rows, accumulate_rows_])
@pytest.mark.parametrize(
    ("argument", "value", "parts"),
    [
        ("total", torch.zeros(5, 3), ["(any number, 4)", "(5, 3)"]),
        ("total", torch.zeros(5, 4, dtype=torch.float64), ["float32", "float64"]),
        ("rows", torch.zeros(3), ["rows, dim", "(3,)"]),
        ("rows", torch.zeros(3, 4, device="meta"), ["cpu", "meta"]),
        ("source", torch.zeros(2, dtype=torch.int32), ["(3,)", "(2,)"]),
        ("source", torch.zeros(3), ["int32 or int64", "float32"]),
        ("source", torch.tensor([3, -1, 5]), ["-1 to 4", "got 5"]),
        ("source", torch.tensor([3, -2, 0]), ["-1 to 4", "got -2"]),
        ("source", torch.tensor([3, -1, 3]), ["once", "got 3 "]),
        ("weights", torch.zeros(3, dtype=torch.float64), ["float32 (3,)", "float64"]),
        ("total_weights", torch.zeros(2), ["(3,)", "(2,)"]),
    ],
)
@pytest.mark.absent_if(reason=cannot_raise)
def test_bad_input_is_refused(device, argument, value, parts, add):
    total = GOOD["total"].clone()
    with refused(argument, *parts):
        add(**{**GOOD, "total": total, argument: value})
    assert not total.any()


@pytest.mark.runs_no_op
def test_in_place_refuses_gradients_and_places_that_several_share(device):
    total, rows, source, weights, _ = addends(device, weighted=False)
    asking = rows.clone().requires_grad_()
    for add in (accumulate_rows_, lambda *a: torch.ops.adatape.accumulate_rows_(*a, None)):
        with refused("accumulate_rows_", "no gradient", error=NotImplementedError):
            add(total, asking, source, weights)
        with torch.no_grad():
            add(total.clone(), asking, source, weights)
    dual = torch.autograd.forward_ad
    with dual.dual_level(), pytest.raises(NotImplementedError, match="no gradient"):
        accumulate_rows_(total, dual.make_dual(rows, rows), source, weights)
    with refused("total", "place of its own"):
        accumulate_rows_(total[:1].expand(17, 9), rows, source, weights)
