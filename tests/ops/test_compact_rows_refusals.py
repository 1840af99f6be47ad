"""What `compact_rows` and its gradient refuse."""

import pytest
import torch
from checks import cannot_raise, refused

from adatape_kernels.ops import compact_rows
from adatape_kernels.ops.op import current_backend, operation

OP = "compact_rows"
GOOD = {
    "data": torch.zeros(5, 4),
    "keep": torch.tensor([True, True, False, True, True]),
    "cu_inputs": torch.tensor([0, 2, 3]),
    "cu_tapes": torch.tensor([3, 4, 5]),
}


@pytest.mark.runs_no_op
@pytest.mark.parametrize(
    ("argument", "value", "parts"),
    [
        ("data", torch.zeros(5), ["of 16 to 64 bits (rows, dim)", "(5,)"]),
        ("data", torch.zeros(5, 4, dtype=torch.int32), ["floating-point", "int32"]),
        ("keep", torch.ones(4, dtype=torch.bool), ["(5,) like data", "(4,)"]),
        ("keep", torch.ones(5), ["bool (5,) like data", "float32"]),
        ("keep", torch.ones(5, dtype=torch.bool, device="meta"), ["cpu", "meta"]),
        ("cu_inputs", torch.tensor([0, 2, 1]), ["ascending", "2 then 1"]),
        ("cu_inputs", torch.tensor([0.0, 2.0, 3.0]), ["int32 or int64", "float32"]),
        ("cu_tapes", torch.tensor([3, 4]), ["(3,) like cu_inputs", "(2,)"]),
        ("cu_tapes", torch.tensor([3.0, 4.0, 5.0]), ["int32 or int64", "float32"]),
        ("cu_tapes", torch.tensor([2, 4, 5]), ["to be 3", "got 2"]),
        ("cu_tapes", torch.tensor([3, 4, 6]), ["at most 5", "got 6"]),
        ("capacity", -1, ["0 or more", "got -1"]),
        ("capacity", 3, ["at least the 4 rows kept", "got 3"]),
    ],
)
@pytest.mark.absent_if(reason=cannot_raise)
def test_bad_input_is_refused(device, argument, value, parts):
    with refused(argument, *parts):
        compact_rows(**{**GOOD, argument: value})


@pytest.mark.parametrize("argument", [*GOOD, "capacity"])
def test_other_types_are_refused(argument):
    with refused(argument, error=TypeError):
        compact_rows(**{**GOOD, argument: 2.5})


@pytest.mark.parametrize(
    ("numbers", "parts"),
    [([0, 2, 2], ["got 2 at 2"]), ([0, -1, 3], ["got 3 at 2"]), ([0, 1, 5], ["5 rows", "got 5"])],
)
@pytest.mark.absent_if(reason=cannot_raise)
@pytest.mark.runs_no_op
def test_a_gradient_whose_source_does_not_ascend_is_refused(device, numbers, parts):
    source = torch.tensor(numbers, dtype=torch.int32, device=device)
    with refused("source", *parts):
        torch.ops.adatape.compact_rows_bwd(torch.zeros(3, 4, device=device), source, 5)


@pytest.mark.backends("triton")
@pytest.mark.runs_no_op
def test_without_a_capacity_triton_refuses_offsets_that_are_none(device):
    """Below the dispatcher, which looks at no value there: the number of rows is copied anyway."""
    forward = operation(OP).implementations[current_backend()].function
    data, keep, *_ = (x.to(device) for x in GOOD.values())
    cu_inputs, cu_tapes = torch.tensor([[0, 2, 1], [3, 4, 5]], device=device, dtype=torch.int32)
    with refused("cu_inputs", "ascending"):
        forward(data, keep, cu_inputs, cu_tapes, None)
