"""What `elastic_attention` refuses, and which calls a backend does not serve."""

import pytest
import torch
from checks import assert_same_bits, cannot_raise, refused

from adatape_kernels.ops import elastic_attention
from adatape_kernels.ops.op import (
    NotServed,
    current_backend,
    operation,
    record,
    use_backend,
    why_absent,
)

OP, DTYPE = "elastic_attention", {"cuda": torch.float16}


def offsets(*values, **options):
    return torch.tensor(values, dtype=torch.int32, **options)


GOOD = dict(
    q=torch.zeros(6, 2, 4),
    k=torch.zeros(6, 2, 4),
    v=torch.zeros(6, 2, 4),
    cu_inputs=offsets(0, 3, 4),
    cu_tapes=offsets(4, 4, 6),
)


@pytest.mark.parametrize(
    ("argument", "value", "parts"),
    [
        ("q", torch.zeros(6, 8), ["(rows, num_heads, head_dim)", "(6, 8)"]),
        ("q", torch.zeros(6, 2, 0), ["head_dim at least 1", "(6, 2, 0)"]),
        ("q", torch.zeros(6, 2, 4, dtype=torch.int32), ["floating-point", "int32"]),
        ("k", torch.zeros(5, 2, 4), ["(6, 2, 4)", "(5, 2, 4)"]),
        ("k", torch.zeros(6, 2, 4, dtype=torch.bfloat16), ["float32", "bfloat16"]),
        ("v", torch.zeros(6, 2, 5), ["(6, 2, 4)", "(6, 2, 5)"]),
        ("v", torch.zeros(6, 2, 4, device="meta"), ["cpu", "meta"]),
        ("cu_inputs", torch.tensor([0.0, 3.0, 4.0]), ["int32 or int64", "float32"]),
        ("cu_inputs", torch.zeros(1, 3, dtype=torch.int32), ["(batch + 1,)", "(1, 3)"]),
        ("cu_inputs", offsets(), ["(batch + 1,)", "(0,)"]),
        ("cu_inputs", offsets(0, 3, 4, device="meta"), ["cpu", "meta"]),
        ("cu_tapes", torch.tensor([4.0, 4.0, 6.0]), ["int32 or int64", "float32"]),
        ("cu_tapes", offsets(4, 6), ["(3,)", "(2,)"]),
        ("cu_tapes", offsets(4, 4, 6, device="meta"), ["cpu", "meta"]),
    ],
)
def test_bad_input_is_refused(argument, value, parts):
    with refused(argument, *parts):
        elastic_attention(**{**GOOD, argument: value})


BAD_VALUES = [
    ("cu_inputs", offsets(1, 3, 4), ["first offset", "0", "got 1"]),
    ("cu_inputs", offsets(0, 5, 4), ["ascending", "5 then 4 at 1, 2"]),
    ("cu_inputs", offsets(0, -1, 4), ["ascending", "0 then -1 at 0, 1"]),
    ("cu_inputs", offsets(0, 3, 7), ["at most 6", "got 7"]),
    ("cu_tapes", offsets(3, 4, 6), ["first offset", "4", "got 3"]),
    ("cu_tapes", offsets(0, 1, 2), ["first offset", "4", "got 0"]),
    ("cu_tapes", offsets(4, 6, 5), ["ascending", "6 then 5"]),
    ("cu_tapes", offsets(4, 4, 7), ["at most 6", "got 7"]),
    ("cu_tapes", offsets(4, 4, 2**31 - 1), ["at most 6", "got 2147483647"]),
    ("max_rows", 2, ["at least 3", "got 2"]),
]
bad_values = pytest.mark.parametrize(("argument", "value", "parts"), BAD_VALUES)


def served(device, **changes):
    """A call that every backend serves: heads of 64, and a bound on the rows."""
    q = torch.zeros(6, 2, 64, dtype=DTYPE.get(current_backend(), torch.float32), device=device)
    given = {**GOOD, "q": q, "k": q, "v": q, "max_rows": 3, **changes}
    return {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in given.items()}


@pytest.mark.absent_if(reason=cannot_raise)
@bad_values
def test_bad_values_are_refused(device, argument, value, parts):
    with refused(argument, *parts):
        elastic_attention(**served(device, **{argument: value}))
    assert elastic_attention(**served(device)).shape == (6, 2, 64)


@pytest.mark.backends("eager", "cpp")
@pytest.mark.runs_no_op
@bad_values
def test_kernels_that_look_at_values_refuse_them(device, argument, value, parts):
    """Below the dispatcher, which leaves the looking to them."""
    with refused(argument, *parts):
        kernel()(*served(device, **{argument: value}).values(), None)
    assert kernel()(*served(device).values(), None)[0].shape == (6, 2, 64)


def kernel(op=OP):
    """The backend's function itself, below the dispatcher and its checks."""
    return operation(op).implementations[current_backend()].function


@pytest.mark.backends("cpp", "cuda")
@pytest.mark.runs_no_op
@pytest.mark.parametrize("lse", [(2, 5), (1, 6), (2, 0)])
def test_kernels_refuse_an_lse_that_does_not_fit(device, lse):
    q, k, v, *rest = served(device).values()
    with refused("lse", "(2, 6)"):
        kernel("elastic_attention_bwd")(q, q, k, v, q, torch.zeros(lse, device=device), *rest, None)


@pytest.mark.backends("cpp")
@pytest.mark.runs_no_op
def test_the_cpu_kernel_refuses_an_lse_of_another_shape(device):
    q, k, v, *rest = served(device).values()
    with refused("lse", "float32 (2, 6)"):
        kernel("elastic_attention_bwd")(q, q, k, v, q, torch.zeros(6, 2), *rest, None)


@pytest.mark.backends("cuda")
@pytest.mark.runs_no_op
@pytest.mark.parametrize("direction", [OP, f"{OP}_bwd"])
@pytest.mark.parametrize(
    ("argument", "head_dim", "q_dtype", "max_rows"),
    [
        ("q", 32, torch.float16, 3),
        ("q", 64, torch.float32, 3),
        ("max_rows", 64, torch.float16, 513),
        ("max_rows", 64, torch.float16, None),
        ("max_rows", 64, torch.bfloat16, -1),
    ],
)
def test_cuda_kernels_refuse_what_they_cannot_take(
    device, direction, argument, head_dim, q_dtype, max_rows
):
    """Below the dispatcher, which asks their statement before."""
    q = torch.zeros(6, 2, head_dim, dtype=q_dtype, device=device)
    bounds = GOOD["cu_inputs"].to(device), GOOD["cu_tapes"].to(device)
    given = (q, q, q) if direction == OP else (q, q, q, q, q, torch.zeros(2, 6, device=device))
    with refused(argument):
        kernel(direction)(*given, *bounds, max_rows, None)


UNSERVED = [
    ("triton", torch.float32, 257, 20, "it takes heads of up to 256 features, not 257"),
    ("cuda", torch.float32, 64, 20, "it takes bfloat16, float16"),
    ("cuda", torch.float16, 32, 20, "it takes heads of 64 features, not 32"),
    ("cuda", torch.bfloat16, 64, None, "it takes examples of up to 512 rows, by max_rows"),
    ("cuda", torch.float16, 64, 513, "it takes examples of up to 512 rows, by max_rows"),
    ("cpp", torch.float64, 64, 20, "it takes float32, bfloat16, float16"),
]


def not_here(device, backend, unserved, **parameters):
    return why_absent(unserved)


@pytest.mark.no_backend
@pytest.mark.absent_if(reason=not_here)
@pytest.mark.parametrize(("unserved", "dtype", "head_dim", "max_rows", "reason"), UNSERVED)
def test_a_forced_backend_says_which_calls_it_does_not_serve(
    device, unserved, dtype, head_dim, max_rows, reason
):
    """Where a fallback is named, that one serves instead, forward and backward."""
    q = torch.randn(4, 2, head_dim, device=device).to(dtype).requires_grad_()
    call = q, q, q, offsets(0, 3, 4, device=device), offsets(4, 4, 4, device=device)
    with use_backend(unserved):
        with pytest.raises(NotServed) as info:
            elastic_attention(*call, max_rows=max_rows)
    message = str(info.value)
    assert message.startswith(f"elastic_attention: {unserved} cannot serve {dtype} on {device}")
    assert f"{unserved}: {reason}" in message and "\n" not in message
    with use_backend(unserved, fallback="eager"), record() as ran:
        out = elastic_attention(*call, max_rows=max_rows)
        (grad,) = torch.autograd.grad(out.sum(), q)
    assert [*map(tuple, ran)] == [(OP, "eager"), (f"{OP}_bwd", "eager")]
    with use_backend("eager"):
        expected = elastic_attention(*call, max_rows=max_rows)
        (expected_grad,) = torch.autograd.grad(expected.sum(), q)
    assert_same_bits(out, expected)
    assert_same_bits(grad, expected_grad)
