"""What `add_layer_norm` refuses, and which calls a backend does not serve."""

import pytest
import torch
from checks import refused
from norm_cases import stream

from adatape_kernels.ops import add_layer_norm
from adatape_kernels.ops.op import NotServed, current_backend, record, use_backend

OP = "add_layer_norm"

GOOD = dict(zip(("x", "branch", "weight", "bias"), stream("cpu"), strict=True))


@pytest.mark.parametrize(
    ("argument", "value", "parts"),
    [
        ("x", torch.zeros(12), ["rows, dim", "(12,)"]),
        ("x", torch.zeros(7, 0), ["dim at least 1", "(7, 0)"]),
        ("x", torch.zeros(7, 12, dtype=torch.int32), ["floating-point", "int32"]),
        ("branch", torch.zeros(7, 11), ["(7, 12)", "(7, 11)"]),
        ("branch", torch.zeros(7, 12, dtype=torch.int32), ["floating-point", "int32"]),
        ("branch", torch.zeros(7, 12, device="meta"), ["cpu", "meta"]),
        ("weight", torch.zeros(11), ["(12,)", "(11,)"]),
        ("weight", torch.zeros(12, dtype=torch.float16), ["float32", "float16"]),
        ("weight", torch.zeros(12, device="meta"), ["cpu", "meta"]),
        ("bias", torch.zeros(1, 12), ["(12,)", "(1, 12)"]),
        ("bias", torch.zeros(12, dtype=torch.float64), ["float32", "float64"]),
        ("bias", torch.zeros(12, device="meta"), ["cpu", "meta"]),
    ],
)
def test_bad_input_is_refused(argument, value, parts):
    with refused(argument, *parts):
        add_layer_norm(**{**GOOD, argument: value})


@pytest.mark.backends("triton")
@pytest.mark.checks_what_ran
def test_rows_wider_than_a_program_are_not_served(device):
    """The forced backend says why; where a fallback is named, that one serves, both ways."""
    x, branch, weight, bias = (t.requires_grad_() for t in stream(device, rows=2, dim=4097))
    with pytest.raises(NotServed, match=r"triton: it takes rows of up to 4096 features, not 4097"):
        add_layer_norm(x, branch, weight, bias)
    with use_backend(current_backend(), fallback="eager"), record() as ran:
        add_layer_norm(x, branch, weight, bias)[1].sum().backward()
    assert [*map(tuple, ran)] == [(OP, "eager"), (f"{OP}_bwd", "eager")]
