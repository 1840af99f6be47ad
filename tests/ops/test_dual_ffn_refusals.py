"""What `dual_ffn` refuses, which calls a backend does not serve, and what corrupt counts do."""

import pytest
import torch
from checks import assert_close, cannot_raise, refused
from ffn_cases import inputs, not_served

from adatape_kernels.ops import FFN, dual_ffn, ffn_products
from adatape_kernels.ops.op import NotServed, current_backend, operation, record, use_backend

OP = "dual_ffn"
pytestmark = [pytest.mark.usefixtures("products"), pytest.mark.absent_if(reason=not_served)]

ONE = FFN(torch.zeros(8, 6), torch.zeros(8), torch.zeros(6, 8), torch.zeros(6))
TWO = FFN(torch.zeros(10, 6), torch.zeros(10), torch.zeros(6, 5), torch.zeros(6))
GOOD = dict(x=torch.zeros(9, 6), num_input_rows=5, input_ffn=ONE, tape_ffn=TWO)


@pytest.mark.parametrize(
    ("where", "changes", "parts"),
    [
        ("x", dict(x=torch.zeros(1, 9, 6)), ["(rows, dim)", "(1, 9, 6)"]),
        ("x", dict(x=torch.zeros(9, 6, dtype=torch.int32)), ["floating-point", "int32"]),
        ("input_ffn.w1", dict(x=torch.zeros(9, 7)), ["(8, 7)", "(8, 6)"]),
        ("input_ffn.w1", dict(x=torch.zeros(9, 6).double()), ["float64", "float32"]),
        ("input_ffn.w1", dict(x=torch.zeros(9, 6, device="meta")), ["meta", "cpu"]),
        ("input_ffn.b1", dict(input_ffn=ONE._replace(b1=torch.zeros(7))), ["(8,)", "(7,)"]),
        ("input_ffn.w2", dict(input_ffn=ONE._replace(w2=torch.zeros(8, 6))), ["(6, 8)", "(8, 6)"]),
        ("input_ffn.b2", dict(input_ffn=ONE._replace(b2=torch.zeros(6).half())), ["float16"]),
        ("tape_ffn.w2", dict(tape_ffn=ONE), ["(6, 4)", "(6, 8)"]),
        ("tape_ffn.b1", dict(tape_ffn=TWO._replace(b1=torch.zeros(5))), ["(10,)", "(5,)"]),
        (
            "tape_ffn.b2",
            dict(tape_ffn=TWO._replace(b2=torch.zeros(6, device="meta"))),
            ["cpu", "meta"],
        ),
        ("num_input_rows", dict(num_input_rows=-1), ["0 to 9", "got -1"]),
        ("num_input_rows", dict(num_input_rows=10), ["0 to 9", "got 10"]),
        ("num_input_rows", dict(num_input_rows=8, num_rows=7), ["num_rows = 7", "got 8"]),
        ("num_input_rows", dict(num_input_rows=torch.tensor([5])), ["integer scalar", "(1,)"]),
        ("num_input_rows", dict(num_input_rows=torch.tensor(5.0)), ["integer", "float32"]),
        ("num_input_rows", dict(num_input_rows=torch.tensor(5, device="meta")), ["cpu", "meta"]),
        ("num_rows", dict(num_rows=-1), ["0 to 9", "got -1"]),
        ("num_rows", dict(num_rows=10), ["0 to 9", "got 10"]),
    ],
)
def test_bad_input_is_refused(where, changes, parts):
    with refused(where, *parts):
        dual_ffn(**{**GOOD, **changes})


def cut_on_the_host(device, backend, on_device, products, counts=None, **parameters):
    on_host_only = backend == "cuda" or (backend == "triton" and products != "grouped")
    if on_device == "both counts":
        return "it cuts the rows on the host" if on_host_only else None
    known = counts is None or 0 <= counts[0] <= 9
    return None if known else "an int of which the host knows that it is wrong"


@pytest.mark.absent_if(reason=cannot_raise)
@pytest.mark.absent_if(reason=cut_on_the_host)
@pytest.mark.parametrize(
    ("counts", "parts"),
    [
        ((-1, 9), ["0 <= num_input_rows", "got -1 and 9"]),
        ((10, 10), ["num_rows <= 9", "got 10 and 10"]),
        ((6, 4), ["num_input_rows <= num_rows", "got 6 and 4"]),
        ((5, 10), ["num_rows <= 9", "got 5 and 10"]),
        ((1 << 40, 9), ["num_rows <= 9", f"got {1 << 40} and 9"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("on_device", ["both counts", "the last"])
def test_row_counts_on_the_device_are_refused(device, on_device, counts, parts):
    """The host sees them when the op runs, no earlier."""
    x, *ffns, _ = inputs(9, device=device)
    middle, end = (torch.tensor(count, device=device) for count in counts)
    if on_device == "the last":
        middle = counts[0]
    with refused("num_input_rows", *parts):
        dual_ffn(x, middle, *ffns, num_rows=end)
    assert dual_ffn(x, 5, *ffns, num_rows=torch.tensor(9, device=device)).shape == (9, 6)


@pytest.mark.backends("eager", "cpp")
@pytest.mark.runs_no_op
@pytest.mark.parametrize(
    ("argument", "num_input_rows", "max_tape_rows", "bounds", "parts"),
    [
        ("num_input_rows", -1, 4, None, ["num_rows <= 9", "got -1"]),
        ("num_input_rows", 6, 4, None, ["num_rows <= 9", "got 6 and 10"]),
        ("num_input_rows", 5, 4, (5, 10), ["num_rows <= 9", "got 5 and 10"]),
        ("num_input_rows", None, 9, (6, 4), ["num_rows <= 9", "got 6 and 4"]),
    ],
)
def test_kernels_that_look_at_row_counts_refuse_them(
    device, argument, num_input_rows, max_tape_rows, bounds, parts
):
    x, *ffns, _ = inputs(9, device=device)
    bounds = None if bounds is None else torch.tensor(bounds, device=device)
    with refused(argument, *parts):
        kernel("dual_ffn")(
            x, num_input_rows, max_tape_rows, bounds, "gelu_tanh", *ffns[0], *ffns[1]
        )


@pytest.mark.backends("cpp", "cuda")
@pytest.mark.runs_no_op
@pytest.mark.parametrize("direction", ["dual_ffn", "dual_ffn_bwd"])
@pytest.mark.parametrize(
    "case", ["nowhere", "too many", "negative", "negative tape", "more tape rows"]
)
def test_the_kernels_refuse_what_they_cannot_take(device, direction, case):
    """Below the dispatcher and the public function, each of which would have refused it before."""
    x, *ffns, dy = inputs(9, device=device)
    cuda = current_backend() == "cuda"
    argument, words, num_input_rows, max_tape_rows, bounds = {
        "nowhere": ("bounds", "where num_input_rows is None", None, 0, None),
        "too many": ("num_input_rows", "num_rows <= 9", 6, 4, None),
        "negative": ("num_input_rows", "num_rows <= 9", -1, 4, None),
        "negative tape": ("num_input_rows", "num_rows <= 9", 5, -1, None),
        "more tape rows": ("max_tape_rows", "at least the 4", 5, 3, (5, 9)),
    }[case]
    if cuda and case in ("nowhere", "more tape rows"):  # what it is told on the device is unseen
        argument, words, num_input_rows, bounds = "num_input_rows", "an int", None, (5, 9)
    bounds = None if bounds is None else torch.tensor(bounds, device=device)
    parameters = "gelu_tanh", *ffns[0], *ffns[1]
    with refused(argument, words):
        if direction == "dual_ffn" or case == "negative tape":  # there is no such tensor to save
            kernel("dual_ffn")(x, num_input_rows, max_tape_rows, bounds, *parameters)
        else:
            max_input_rows = 9 if num_input_rows is None else max(num_input_rows, 0)
            saved = x.new_zeros(max_input_rows, 8), x.new_zeros(max_tape_rows, 10)
            kernel(direction)(dy, x, *saved, num_input_rows, bounds, *parameters)


def kernel(op):
    """The backend's function itself, below the dispatcher and its checks."""
    return operation(op).implementations[current_backend()].function


def grouped(device, backend, products, **parameters):
    return "it takes any count" if backend == "triton" and products == "grouped" else None


@pytest.mark.backends("triton", "cuda")
@pytest.mark.checks_what_ran
@pytest.mark.absent_if(reason=grouped)
def test_products_on_slices_serve_a_count_on_the_host_only(device):
    """A forced backend says why; where a fallback is named, that one serves."""
    x, *ffns, _ = inputs(9, device=device)
    backend, reason = current_backend(), "takes num_input_rows on the host only"
    middle = torch.tensor(5, device=device)
    with pytest.raises(NotServed, match=rf"dual_ffn: {backend} cannot serve .*{reason}"):
        dual_ffn(x, middle, *ffns)
    with use_backend(backend, fallback="eager"):
        expected = dual_ffn(x, 5, *ffns)
        with record() as ran:
            actual = dual_ffn(x, middle, *ffns)
    assert {each.backend for each in ran} == {"eager"}
    assert_close(actual, expected.double(), 1e-5)


@pytest.mark.backends("triton")
@pytest.mark.absent_if(reason=cut_on_the_host)
@pytest.mark.runs_no_op
@pytest.mark.parametrize("bounds", [(-7, 99), (99, -7), (9, 3), (1 << 40, -(1 << 40))])
@pytest.mark.parametrize("on_device", ["both counts", "the last"])
def test_corrupt_counts_lead_out_of_no_tensor(device, on_device, bounds):
    """On a GPU nobody can check them in time."""
    x, *ffns, dy = inputs(9, device=device)
    sizes = (9, 9) if on_device == "both counts" else (5, 4)
    rest = torch.tensor(bounds, device=device), "gelu_tanh", *ffns[0], *ffns[1]
    forward, backward = (
        operation(op).implementations["triton"].function for op in (OP, "dual_ffn_bwd")
    )
    num_input_rows = None if on_device == "both counts" else 5
    y, hidden, tape_hidden = forward(x, num_input_rows, sizes[1], *rest)
    grads = backward(dy, x, hidden, tape_hidden, num_input_rows, *rest)
    assert all(result.isfinite().all() for result in (y, hidden, tape_hidden, *grads))


def test_an_unknown_form_is_refused():
    with refused("ffn_products", "cublas, grouped, epilogue", "'cutlass'"), ffn_products("cutlass"):
        raise AssertionError("entered an unknown form")
