"""A tensor argument may have any strides: a view gives the bits that its contiguous copy gives.

Of the products in `dual_ffn`, and of eager, no bits are promised: torch chooses how it adds up.
"""

import pytest
import small_calls
import torch
from checks import assert_close, assert_same_bits

from adatape_kernels.ops.op import current_backend, operation

OP = tuple(op for op in small_calls.OPS if not op.endswith("_bwd"))
DTYPE = torch.float32


def strided(x):
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
    wide[..., ::2] = 7
    view = wide[..., 1::2]
    view.copy_(x)
    return view


def transposed(x):
    return x.mT.contiguous().mT if x.dim() > 1 else strided(x)


def permuted(x):
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def with_gaps_between_rows(x):
    wide = x.new_zeros(*(size + 1 for size in x.shape))
    view = wide[tuple(slice(1, None) for _ in x.shape)]
    view.copy_(x)
    return view


def behind_others(x):
    """Contiguous, but three elements into its storage."""
    storage = x.new_zeros(x.numel() + 3)
    view = storage[3:].view(x.shape)
    view.copy_(x)
    return view


def expanded(x):
    """All examples, or rows, or elements are the first one."""
    return x[:1].expand_as(x)


def expanded_columns(x):
    return x[..., :1].expand_as(x)


def negated(x):
    """The imaginary part of a conjugate has its sign in a bit of the tensor."""
    if not x.is_floating_point() or x.dtype in (torch.float16, torch.bfloat16):
        return behind_others(x)
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view


VIEWS = [
    strided,
    transposed,
    permuted,
    with_gaps_between_rows,
    behind_others,
    expanded,
    expanded_columns,
    negated,
]
# What works in place has tests of its own.
CALLS = [
    (op, own)
    for op in small_calls.OPS
    if not op.endswith("_")
    for own in ((True, False) if "tape" in op else (True,))
]


def call_and_arguments(device, op, own_banks):
    """The op and the arguments of a small call that the backend serves."""
    if operation(op).implementations.get(current_backend()) is None:
        pytest.skip("there is no such kernel")
    half = current_backend() == "cuda" and op.startswith("elastic_attention")
    dtype, head_dim = (torch.float16, 64) if half else (DTYPE, 8)
    args = small_calls.call_of(op, dtype, own_banks=own_banks, head_dim=head_dim)
    args = [x.to(device) if isinstance(x, torch.Tensor) else x for x in args]
    return getattr(torch.ops.adatape, op), args


def assert_the_views_do_not_show(op, call, args, views):
    """The call with some arguments replaced by views, by their places, beside dense copies."""
    dense = {
        place: view.resolve_neg().clone(memory_format=torch.contiguous_format)
        for place, view in views.items()
    }
    expected, actual = (
        call(*(given.get(place, x) for place, x in enumerate(args))) for given in (dense, views)
    )
    # torch adds up a product, or a column, in an order that follows the strides.
    of_torch = current_backend() == "eager" or op.startswith("dual_ffn")
    for a, e in zip(actual, expected, strict=True):
        if of_torch:
            assert_close(a, e, 1e-5)
        else:
            assert_same_bits(a, e)


def view_of(op, name, x, view):
    """The view of an argument, or None where it has none that makes a valid call."""
    other = view(x) if isinstance(x, torch.Tensor) else None
    return None if other is None or _is_corrupt(op, name, other) else other


def is_slow(device, backend, **parameters):
    interpreted = device == "cpu" and backend == "triton"
    return "test_several_strides_do_not_show has it" if interpreted else None


def is_quick(device, backend, **parameters):
    return None if is_slow(device, backend) else "each argument is tried alone"


@pytest.mark.absent_if(reason=is_slow)
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
@pytest.mark.parametrize(("op", "own_banks"), CALLS)
@pytest.mark.runs_no_op
@pytest.mark.many_emulated_threads
def test_strides_do_not_show(device, op, own_banks, view):
    """Each argument alone is a view."""
    call, args = call_and_arguments(device, op, own_banks)
    for place, name in enumerate(small_calls.names_of(op)):
        other = view_of(op, name, args[place], view)
        if other is not None:
            assert_the_views_do_not_show(op, call, args, {place: other})


@pytest.mark.absent_if(reason=is_quick)
@pytest.mark.parametrize("first", range(len(VIEWS)), ids=lambda n: VIEWS[n].__name__)
@pytest.mark.parametrize(("op", "own_banks"), CALLS)
@pytest.mark.runs_no_op
def test_several_strides_do_not_show(device, op, own_banks, first):
    """All arguments are views, each of another kind, so that none has its neighbour's strides.

    Over the cases each argument is a view of each kind.
    """
    call, args = call_and_arguments(device, op, own_banks)
    views = {}
    for place, name in enumerate(small_calls.names_of(op)):
        other = view_of(op, name, args[place], VIEWS[(first + place) % len(VIEWS)])
        if other is not None:
            views[place] = other
    assert_the_views_do_not_show(op, call, args, views)


def _is_corrupt(op, name, offsets):
    """Whether expanding made offsets, or numbers of rows, of what were none."""
    numbers = ("cu_inputs", "cu_tapes", "bounds", "source")
    return name in numbers and bool((offsets == offsets[0]).all())
