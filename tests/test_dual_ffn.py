import math
import threading

import literal
import pytest
import torch
import torch.nn.functional as F
from checks import assert_close, assert_low_precision, assert_same_bits, refused
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from adatape_kernels import reference
from adatape_kernels.ops import FFN, FFN_PRODUCTS, dual_ffn, ffn_products, triton_runtime
from adatape_kernels.ops.op import current_backend, use_backend

OP = "dual_ffn"


@pytest.fixture(params=FFN_PRODUCTS, autouse=True)
def products(request):
    """Every test of the Triton backend runs in both forms; the other backends have one."""
    _, backend = request.node.callspec.params.get("device", (None, None))
    if request.param != FFN_PRODUCTS[0] and backend != "triton":
        pytest.skip("a choice of the Triton backend")
    with ffn_products(request.param):
        yield request.param


def ffn(dim, hidden, gates, *, device, dtype=torch.float32):
    shapes = (gates * hidden, dim), (gates * hidden,), (dim, hidden), (dim,)
    return FFN(*(torch.randn(s, device=device).to(dtype) / s[-1] ** 0.5 for s in shapes))


def inputs(rows, *, device, dim=6, hidden=8, tape_hidden=5, dtype=torch.float32):
    """x, both parameter sets, and a gradient of the output."""
    like = dict(device=device, dtype=dtype)
    x, dy = (torch.randn(rows, dim, device=device).to(dtype) for _ in range(2))
    return x, ffn(dim, hidden, 1, **like), ffn(dim, tape_hidden, 2, **like), dy


def gradients(run, x, num_input_rows, input_ffn, tape_ffn, dy, num_rows=None):
    """y, dx, and the gradients of every parameter."""
    x = x.detach().requires_grad_()
    input_ffn = FFN(*(p.detach().requires_grad_() for p in input_ffn))
    tape_ffn = tape_ffn and FFN(*(p.detach().requires_grad_() for p in tape_ffn))
    y = run(x, num_input_rows, input_ffn, tape_ffn, num_rows=num_rows)
    grads = torch.autograd.grad(y, [x, *input_ffn, *(tape_ffn or ())], dy)
    return [y.detach(), *grads]


def by_reference(*args, **options):
    return reference.dual_ffn(*args, **options)[0]


def double(*values):
    return [
        x and FFN(*(p.double() for p in x)) if isinstance(x, FFN | None) else x.double()
        for x in values
    ]


def assert_matches_literal(x, num_input_rows, input_ffn, tape_ffn, num_rows=None):
    y = dual_ffn(x, num_input_rows, input_ffn, tape_ffn, num_rows=num_rows)
    expected = literal.dual_ffn(
        x.tolist(),
        int(num_input_rows),
        [p.tolist() for p in input_ffn],
        tape_ffn and [p.tolist() for p in tape_ffn],
        len(x) if num_rows is None else int(num_rows),
    )
    assert y.dtype == x.dtype and y.is_contiguous()
    assert_close(y, torch.tensor(expected, dtype=torch.float64).view(x.shape), 1e-5)


@pytest.mark.parametrize("counts", ["ints", "scalars", "int32 scalars"])
@pytest.mark.parametrize("two", [True, False], ids=["two", "one"])
@pytest.mark.parametrize("rows", [(5, 9), (5, None), (0, 9), (9, 9), (0, 0), (11, 11)])
def test_matches_the_literal_loop(device, rows, two, counts):
    """Row counts as ints and as scalars on the device."""
    x, input_ffn, tape_ffn, _ = inputs(11, device=device)
    middle, end = rows
    if counts != "ints":
        dtype = torch.int32 if counts == "int32 scalars" else torch.int64
        middle = torch.tensor(middle, device=device, dtype=dtype)
        end = None if end is None else torch.tensor(end, device=device, dtype=dtype)
    assert_matches_literal(x, middle, input_ffn, tape_ffn if two else None, end)


def test_one_count_on_the_device(device):
    x, input_ffn, tape_ffn, _ = inputs(11, device=device)
    assert_matches_literal(x, 5, input_ffn, tape_ffn, torch.tensor(9, device=device))
    assert_matches_literal(x, torch.tensor(5, device=device), input_ffn, tape_ffn, 9)


@given(rows=st.lists(st.integers(0, 6), min_size=3, max_size=3), two=st.booleans())
def test_any_rows_match_the_literal_loop(device, rows, two):
    """Input, tape and unused rows, with gradients."""
    num_input_rows, num_rows, total = rows[0], sum(rows[:2]), sum(rows)
    x, input_ffn, tape_ffn, dy = inputs(total, device=device)
    given = x, num_input_rows, input_ffn, tape_ffn if two else None
    assert_matches_literal(*given, num_rows)
    actual = gradients(dual_ffn, *given, dy, num_rows)
    x, dy, *ffns = double(x, dy, *given[2:])
    expected = gradients(by_reference, x, num_input_rows, *ffns, dy, num_rows)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64])
@pytest.mark.parametrize("two", [True, False], ids=["two", "one"])
@pytest.mark.parametrize("num_rows", [None, 6, torch.tensor(6)], ids=["all", "int", "scalar"])
def test_gradcheck(device, dtype, two, num_rows):
    x, input_ffn, tape_ffn, _ = inputs(7, device=device, dtype=dtype, dim=3, hidden=4)
    end = num_rows.to(device) if isinstance(num_rows, torch.Tensor) else num_rows

    def run(x, *parameters):
        tape_ffn = FFN(*parameters[4:]) if two else None
        return dual_ffn(x, 4, FFN(*parameters[:4]), tape_ffn, num_rows=end)

    given = [x, *input_ffn, *(tape_ffn if two else ())]
    assert torch.autograd.gradcheck(run, [p.requires_grad_() for p in given])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("two", [True, False], ids=["two", "one"])
def test_backward_is_the_reference_s(device, dtype, two):
    x, input_ffn, tape_ffn, dy = inputs(
        200, device=device, dtype=dtype, dim=48, hidden=96, tape_hidden=33
    )
    tape_ffn = tape_ffn if two else None
    actual = gradients(dual_ffn, x, 170, input_ffn, tape_ffn, dy, 190)
    x, dy, *ffns = double(x, dy, input_ffn, tape_ffn)
    expected = gradients(by_reference, x, 170, *ffns, dy, 190)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("on_device", [False, True], ids=["ints", "scalars"])
@pytest.mark.parametrize(
    "sizes", [(144, 144, 80), (70, 133, 69), (20, 41, 13)], ids=["aligned", "odd", "narrow"]
)
def test_many_tiles(device, sizes, on_device, dtype):
    """Several tiles each way; the gradients of narrow weights are summed in several parts."""
    if on_device and device == "cpu" and current_backend() == "cuda":
        pytest.skip("Triton serves it, in a test of its own")
    dim, hidden, tape_hidden = sizes
    x, input_ffn, tape_ffn, dy = inputs(
        300, device=device, dtype=dtype, dim=dim, hidden=hidden, tape_hidden=tape_hidden
    )
    x[270:] = dy[270:] = math.nan
    middle, end = (torch.tensor(n, device=device) if on_device else n for n in (201, 270))
    actual = gradients(dual_ffn, x, middle, input_ffn, tape_ffn, dy, end)
    rounded = gradients(by_reference, x, 201, input_ffn, tape_ffn, dy, 270)
    x, dy, *ffns = double(x, dy, input_ffn, tape_ffn)
    exact = gradients(by_reference, x, 201, *ffns, dy, 270)
    for a, r, e in zip(actual, rounded, exact, strict=True):
        assert_low_precision(a, r, e, floor=1e-6 * e.abs().max().item())


def test_strided_inputs_and_gradients(device):
    x, input_ffn, tape_ffn, _ = inputs(9, device=device)
    x = torch.randn(6, 9, device=device).mT
    transposed = [FFN(*(p.mT.contiguous().mT if p.dim() == 2 else p for p in f))
                  for f in (input_ffn, tape_ffn)]  # fmt: skip
    dy = torch.randn(9, 1, device=device).expand(9, 6)
    actual = gradients(dual_ffn, x, 5, *transposed, dy, 8)
    expected = gradients(dual_ffn, x.contiguous(), 5, input_ffn, tape_ffn, dy.contiguous(), 8)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-6)
        assert a.is_contiguous()
    leaf = x.requires_grad_()
    dual_ffn(leaf, 5, input_ffn, tape_ffn, num_rows=8).sum().backward()
    ones = torch.ones(9, 6, device=device)
    assert_close(leaf.grad, gradients(dual_ffn, x, 5, input_ffn, tape_ffn, ones, 8)[1], 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(device, dtype):
    x, input_ffn, tape_ffn, dy = inputs(
        64, device=device, dtype=dtype, dim=48, hidden=96, tape_hidden=32
    )
    actual = gradients(dual_ffn, x, 50, input_ffn, tape_ffn, dy)

    def plain(x, middle, a, b, num_rows):
        act = F.gelu(F.linear(x[:middle], a.w1, a.b1), approximate="tanh")
        glu = F.glu(F.linear(x[middle:], b.w1, b.b1))
        return torch.cat([F.linear(act, a.w2, a.b2), F.linear(glu, b.w2, b.b2)])

    rounded = gradients(plain, x, 50, input_ffn, tape_ffn, dy)
    x, dy, *ffns = double(x, dy, input_ffn, tape_ffn)
    exact = gradients(by_reference, x, 50, *ffns, dy)
    for a, r, e in zip(actual, rounded, exact, strict=True):
        assert a.dtype == dtype
        assert_low_precision(a, r, e, floor=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_casts_like_a_linear_layer(device, dtype):
    x, input_ffn, tape_ffn, dy = inputs(9, device=device)
    with torch.autocast(device, dtype=dtype):
        y, *grads = gradients(dual_ffn, x, 5, input_ffn, tape_ffn, dy.to(dtype))
    assert y.dtype == dtype
    assert all(g.dtype == torch.float32 for g in grads)
    low = [FFN(*(p.to(dtype) for p in f)) for f in (input_ffn, tape_ffn)]
    expected = gradients(dual_ffn, x.to(dtype), 5, *low, dy.to(dtype))
    for a, e in zip([y, *grads], expected, strict=True):
        assert_same_bits(a.to(dtype), e)


@pytest.mark.parametrize("kind", ["input", "tape"])
def test_poison_stays_in_its_row(device, kind):
    """A poisoned row and unused rows, gradient included; the other kind's parameters stay clean."""
    x, input_ffn, tape_ffn, dy = inputs(12, device=device)
    clean = gradients(dual_ffn, x, 6, input_ffn, tape_ffn, dy, 10)
    row = 2 if kind == "input" else 8
    x, dy = x.clone(), dy.clone()
    x[row] = x[10:] = dy[row] = dy[10:] = math.nan
    for end in (10, torch.tensor(10, device=device)):
        dirty = gradients(dual_ffn, x, 6, input_ffn, tape_ffn, dy, end)
        others = [r for r in range(12) if r != row]
        for n in (0, 1):
            assert_close(dirty[n][others], clean[n][others], 1e-6)
            assert not dirty[n][10:].any() and dirty[n][row].isnan().all()
        for n in range(6, 10) if kind == "input" else range(2, 6):
            assert_close(dirty[n], clean[n], 1e-6)


@pytest.mark.parametrize("two", [True, False], ids=["two", "one"])
@pytest.mark.parametrize("rows", [0, 3])
def test_no_rows(device, rows, two):
    """No row at all, and rows that are all unused: zero, and zero gradients."""
    x, input_ffn, tape_ffn, dy = inputs(rows, device=device)
    for end in (0, torch.tensor(0, device=device)):
        for g in gradients(dual_ffn, x, 0, input_ffn, tape_ffn if two else None, dy, end):
            assert not g.any()


def op_args(x, max_input_rows, max_tape_rows, bounds, *ffns):
    return (x, max_input_rows, max_tape_rows, bounds, *(p for f in ffns for p in f))


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("two", [True, False], ids=["two", "one"])
@pytest.mark.parametrize("rows", [0, 9])
def test_opcheck(device, rows, two, requires_grad):
    x, input_ffn, tape_ffn, _ = inputs(rows, device=device)
    ffns = input_ffn, tape_ffn if two else [None] * 4
    for p in (x, *input_ffn, *(tape_ffn if two else ())):
        p.requires_grad_(requires_grad)
    middle = min(rows, 5) if two else rows
    op = torch.ops.adatape.dual_ffn.default
    torch.library.opcheck(op, op_args(x, middle, rows - middle, None, *ffns))
    bounds = torch.tensor([min(middle, 4), min(rows, 7 if two else 4)], device=device)
    torch.library.opcheck(op, op_args(x, rows, rows if two else 0, bounds, *ffns))


@pytest.mark.parametrize("two", [True, False], ids=["two", "one"])
def test_opcheck_of_the_backward(device, two):
    x, input_ffn, tape_ffn, dy = inputs(9, device=device)
    ffns = input_ffn, tape_ffn if two else [None] * 4
    args = op_args(x, 5 if two else 9, 4 if two else 0, None, *ffns)
    _, hidden, tape_hidden = torch.ops.adatape.dual_ffn.default(*args)
    back = (dy, x, hidden, tape_hidden, *args[3:])
    torch.library.opcheck(torch.ops.adatape.dual_ffn_bwd.default, back)


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


def kernels(launches):
    return [each.kernel.__name__ for each in launches]


@pytest.fixture
def triton_only(device):
    if current_backend() != "triton":
        pytest.skip("about the Triton backend")


def test_each_form_has_its_launches(triton_only, device, products):
    """Grouped: one a product, whatever the host knows. Rows to slice need a number on the host."""
    x, *ffns, dy = inputs(9, device=device)
    for middle in (5, torch.tensor(5, device=device)):
        slices = products == "cublas" and isinstance(middle, int)
        x.requires_grad_()
        with triton_runtime.recording() as launches:
            y = dual_ffn(x, middle, *ffns)
        assert kernels(launches) == (
            ["_dual_ffn_act_fwd_kernel"] * 2
            if slices
            else ["_dual_ffn_up_kernel", "_dual_ffn_down_kernel"]
        )
        with triton_runtime.recording() as launches:
            y.backward(dy)
        assert kernels(launches) == (
            ["_dual_ffn_act_bwd_kernel"] * 2
            if slices
            else [
                "_dual_ffn_up_kernel",
                "_dual_ffn_down_kernel",
                *["_dual_ffn_weight_kernel"] * 2,
                "_dual_ffn_row_sums_kernel",
            ]
        )


def test_the_backward_takes_its_forward_s_form(triton_only, device, products):
    x, *ffns, dy = inputs(9, device=device)
    y = dual_ffn(x.requires_grad_(), 5, *ffns)
    other = next(name for name in FFN_PRODUCTS if name != products)
    with ffn_products(other), triton_runtime.recording() as launches:
        y.backward(dy)
    assert ("_dual_ffn_up_kernel" in kernels(launches)) == (products == "grouped")


@pytest.mark.parametrize("bounds", [(-7, 99), (99, -7), (9, 3), (1 << 40, -(1 << 40))])
@pytest.mark.parametrize("on_device", ["both counts", "the last"])
def test_corrupt_counts_lead_out_of_no_tensor(triton_only, device, on_device, bounds):
    """On a GPU nobody can check them in time."""
    x, *ffns, dy = inputs(9, device=device)
    sizes = (9, 9) if on_device == "both counts" else (5, 4)
    rest = torch.tensor(bounds, device=device), *ffns[0], *ffns[1]
    y, hidden, tape_hidden = torch.ops.adatape.dual_ffn(x, *sizes, *rest)
    grads = torch.ops.adatape.dual_ffn_bwd(dy, x, hidden, tape_hidden, *rest)
    assert all(result.isfinite().all() for result in (y, hidden, tape_hidden, *grads))


def test_the_form_is_a_choice_of_the_thread(triton_only, device):
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


def test_an_unknown_form_is_refused():
    with refused("ffn_products", "cublas, grouped", "'cutlass'"), ffn_products("cutlass"):
        raise AssertionError("entered an unknown form")


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
        ("num_input_rows", dict(num_input_rows=torch.tensor(-1)), ["0 <=", "got -1"]),
        ("num_input_rows", dict(num_input_rows=torch.tensor(10)), ["<= 9", "got 10"]),
        ("num_input_rows", dict(num_rows=torch.tensor(4)), ["<= num_rows", "got 5 and 4"]),
        ("num_input_rows", dict(num_rows=torch.tensor(10)), ["<= 9", "got 5 and 10"]),
        ("num_rows", dict(num_rows=-1), ["0 to 9", "got -1"]),
        ("num_rows", dict(num_rows=10), ["0 to 9", "got 10"]),
    ],
)
def test_bad_input_is_refused(where, changes, parts):
    with refused(where, *parts):
        dual_ffn(**{**GOOD, **changes})
