"""What `dual_ffn` promises beyond its values: torch's checks, FLOPs, its forms in Triton."""

import threading

import pytest
import torch
from checks import assert_same_bits, opcheck
from ffn_cases import gradients, inputs, not_served
from torch.utils.flop_counter import FlopCounterMode

from adatape_kernels.ops import dual_ffn, ffn_products, triton_runtime
from adatape_kernels.ops.op import use_backend

OP = "dual_ffn"
pytestmark = [pytest.mark.usefixtures("products"), pytest.mark.absent_if(reason=not_served)]


def op_args(x, num_input_rows, max_tape_rows, bounds, *ffns, activation="gelu_tanh"):
    return (x, num_input_rows, max_tape_rows, bounds, activation, *(p for f in ffns for p in f))


@pytest.mark.compiles
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("two", [True, False], ids=["two", "one"])
@pytest.mark.parametrize("rows", [0, 9])
@pytest.mark.parametrize("on_device", [False, True], ids=["ints", "scalars"])
def test_opcheck(device, on_device, rows, two, requires_grad):
    x, input_ffn, tape_ffn, _ = inputs(rows, device=device)
    ffns = input_ffn, tape_ffn if two else [None] * 4
    for p in (x, *input_ffn, *(tape_ffn if two else ())):
        p.requires_grad_(requires_grad)
    middle = min(rows, 5) if two else rows
    op = torch.ops.adatape.dual_ffn.default
    if not on_device:
        opcheck(op, op_args(x, middle, rows - middle, None, *ffns))
        return
    bounds = torch.tensor([min(middle, 4), min(rows, 7 if two else 4)], device=device)
    split = (None, rows) if two else (rows, 0)
    opcheck(op, op_args(x, *split, bounds, *ffns))


@pytest.mark.compiles
@pytest.mark.parametrize("two", [True, False], ids=["two", "one"])
def test_opcheck_of_the_backward(device, two):
    x, input_ffn, tape_ffn, dy = inputs(9, device=device)
    ffns = input_ffn, tape_ffn if two else [None] * 4
    args = op_args(x, 5 if two else 9, 4 if two else 0, None, *ffns)
    _, hidden, tape_hidden = torch.ops.adatape.dual_ffn.default(*args)
    back = (dy, x, hidden, tape_hidden, args[1], *args[3:])
    opcheck(torch.ops.adatape.dual_ffn_bwd.default, back)


@pytest.mark.compiles
@pytest.mark.parametrize("on_device", [False, True], ids=["ints", "scalars"])
def test_compiles_once_for_all_sizes(fresh_compiler, device, on_device):
    compiled = torch.compile(dual_ffn, fullgraph=True, dynamic=True)
    sizes = [(11, 7, 9, 4, 5), (20, 3, 17, 6, 8), (5, 2, 4, 3, 9)]
    for n, (rows, middle, end, dim, hidden) in enumerate(sizes):
        x, *ffns, dy = inputs(rows, device=device, dim=dim, hidden=hidden, tape_hidden=hidden + 5)
        if on_device:
            middle, end = (torch.tensor(c, device=device) for c in (middle, end))
        with torch.compiler.set_stance("fail_on_recompile" if n else "default"):
            actual = gradients(compiled, x, middle, *ffns, dy, end)
        for a, e in zip(actual, gradients(dual_ffn, x, middle, *ffns, dy, end), strict=True):
            assert_same_bits(a, e)


@pytest.mark.parametrize("two", [True, False], ids=["two", "one"])
def test_counted_flops_are_those_of_the_rows_that_exist(device, two):
    """Two products a row of 2 · dim · hidden; a GLU's first is twice as wide; backward, twice."""
    x, input_ffn, tape_ffn, dy = inputs(12, device=device, dim=6, hidden=8, tape_hidden=5)
    given = x, 7, input_ffn, tape_ffn if two else None
    forward = 7 * 2 * 2 * 6 * 8 + 3 * 2 * 3 * 6 * 5 if two else 10 * 2 * 2 * 6 * 8
    with FlopCounterMode(display=False) as counter:
        dual_ffn(*given, num_rows=10)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        gradients(dual_ffn, *given, dy, 10)
    assert counter.get_total_flops() == 3 * forward


def kernels(launches):
    return [each.kernel.__name__ for each in launches]


@pytest.mark.backends("triton")
@pytest.mark.parametrize("on_device", [False, True], ids=["ints", "scalars"])
def test_each_form_has_its_launches(device, products, on_device):
    """Grouped: one a product, whatever the host knows. Rows to slice need a number on the host."""
    x, *ffns, dy = inputs(9, device=device)
    x.requires_grad_()
    with triton_runtime.recording() as launches:
        y = dual_ffn(x, torch.tensor(5, device=device) if on_device else 5, *ffns)
    assert (
        kernels(launches)
        == {
            "cublas": ["_dual_ffn_act_fwd_kernel"] * 2,
            "epilogue": ["_dual_ffn_up_kernel"],
            "grouped": ["_dual_ffn_up_kernel", "_dual_ffn_down_kernel"],
        }[products]
    )
    with triton_runtime.recording() as launches:
        y.backward(dy)
    assert (
        kernels(launches)
        == {
            "cublas": ["_dual_ffn_act_bwd_kernel"] * 2,
            "epilogue": ["_dual_ffn_up_kernel"] * 2,
            "grouped": [
                *["_dual_ffn_up_kernel"] * 2,
                "_dual_ffn_down_kernel",
                *["_dual_ffn_weight_kernel"] * 2,
                "_dual_ffn_row_sums_kernel",
            ],
        }[products]
    )


@pytest.mark.backends("triton")
@pytest.mark.parametrize("on_device", [False, True], ids=["ints", "scalars"])
def test_without_a_choice_the_host_s_count_decides_the_form(device, products, on_device):
    x, *ffns, dy = inputs(9, device=device)
    x.requires_grad_()
    with ffn_products(None), triton_runtime.recording() as launches:
        y = dual_ffn(x, torch.tensor(5, device=device) if on_device else 5, *ffns)
        y.backward(dy)
    assert ("_dual_ffn_up_kernel" in kernels(launches)) == on_device
    assert ("_dual_ffn_act_bwd_kernel" in kernels(launches)) == (not on_device)


@pytest.mark.backends("triton")
def test_the_backward_takes_its_forward_s_form(device, products):
    x, *ffns, dy = inputs(9, device=device)
    y = dual_ffn(x.requires_grad_(), 5, *ffns)
    other = "epilogue" if products == "cublas" else "cublas"
    with ffn_products(other), triton_runtime.recording() as launches:
        y.backward(dy)
    assert ("_dual_ffn_up_kernel" in kernels(launches)) == (products != "cublas")


@pytest.mark.backends("triton")
def test_the_form_is_a_choice_of_the_thread(device):
    seen = []
    with ffn_products("grouped"):
        x, *ffns, _ = inputs(9, device=device)

        def other():
            with use_backend("triton"), triton_runtime.recording() as launches:
                dual_ffn(x, 5, *ffns)
            seen.extend(kernels(launches))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert set(seen) == {"_dual_ffn_act_fwd_kernel"}
