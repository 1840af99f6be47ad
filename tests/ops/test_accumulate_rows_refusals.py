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
        ("total", torch.zeros(5), ["(any number, 4) like rows", "(5,)"]),
        ("total", torch.zeros(5, 3), ["(any number, 4) like rows", "(5, 3)"]),
        ("total", torch.zeros(5, 4, dtype=torch.float64), ["float32", "float64"]),
        ("rows", torch.zeros(3), ["of 16 to 64 bits (rows, dim)", "(3,)"]),
        ("rows", torch.zeros(3, 4, dtype=torch.int32), ["of 16 to 64 bits", "int32"]),
        ("rows", torch.zeros(3, 4, device="meta"), ["cpu", "meta"]),
        ("source", torch.zeros(2, dtype=torch.int32), ["(3,) like rows", "(2,)"]),
        ("source", torch.zeros(3), ["int32 or int64 (3,) like rows", "float32"]),
        ("source", torch.tensor([3, -1, 5]), ["-1 to 4", "got 5"]),
        ("source", torch.tensor([3, -2, 0]), ["-1 to 4", "got -2"]),
        ("source", torch.tensor([3, -1, 3]), ["once", "got 3 "]),
        ("weights", torch.zeros(3, dtype=torch.float64), ["float32 (3,) like rows", "float64"]),
        ("total_weights", torch.zeros(2), ["(3,) like rows", "(2,)"]),
    ],
)
@pytest.mark.absent_if(reason=cannot_raise)
def test_bad_input_is_refused(device, argument, value, parts, add):
    total = GOOD["total"].clone()
    with refused(argument, *parts):
        add(**{**GOOD, "total": total, argument: value})
    assert not total.any()


@pytest.mark.parametrize("add", [accumulate_rows, accumulate_rows_])
@pytest.mark.parametrize("argument", GOOD)
def test_what_is_no_tensor_is_refused(argument, add):
    with refused(argument, "a tensor", error=TypeError):
        add(**{**GOOD, argument: [1.0]})


@pytest.mark.parametrize("numbers", [[3, -1, 5], [3, -2, 0], [3, -1, 3]])
@pytest.mark.absent_if(reason=cannot_raise)
@pytest.mark.runs_no_op
def test_a_gradient_whose_source_is_none_is_refused(device, numbers):
    source = torch.tensor(numbers, dtype=torch.int32, device=device)
    dsum, rows, weights = (x.to(device) for x in (GOOD["total"], GOOD["rows"], GOOD["weights"]))
    with refused("source", f"got {numbers[-1] if numbers[1] == -1 else -2}"):
        torch.ops.adatape.accumulate_rows_bwd(dsum, None, rows, source, weights, None)


def test_a_gradient_is_refused_while_torch_traces(fresh_compiler):
    """By the op itself: a call in place that is traced must not drop a gradient without a word."""
    given = {**GOOD, "total": torch.zeros(5, 4), "rows": torch.ones(3, 4, requires_grad=True)}
    compiled = torch.compile(accumulate_rows_, backend="aot_eager")
    with pytest.raises(NotImplementedError, match="accumulate_rows_: expected tensors that ask"):
        compiled(**given)


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
