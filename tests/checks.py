"""Comparisons that several test files share."""

import contextlib
import re

import pytest
import selection
import torch

from adatape_kernels.ops.op import current_backend, registered_ops


def assert_same_bits(actual, expected):
    """Equal shape, dtype and bits: NaN equals itself, and -0.0 differs from 0.0."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    a, b = (x.detach().contiguous().view(-1).view(torch.uint8) for x in (actual, expected))
    assert torch.equal(a, b), (actual - expected).abs().max()


def assert_close(actual, expected, tolerance):
    """Equal within `tolerance`, relative to the largest magnitude; NaN and infinity where it is."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    actual = actual.detach().double().cpu()
    assert actual.shape == expected.shape
    size = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 1.0
    torch.testing.assert_close(
        actual, expected.detach().cpu(), rtol=0, atol=tolerance * max(size, 1e-3), equal_nan=True
    )


def assert_low_precision(actual, plain, exact, floor):
    """No less exact than twice what plain torch in the same dtype is."""
    exact = exact.detach().double()
    error, allowed = ((x.detach().double() - exact).abs().max() for x in (actual, plain))
    assert error <= 2 * allowed + floor, (error, allowed)


@contextlib.contextmanager
def refused(argument, *parts, error=ValueError):
    """One line that names the argument, what was expected and what came; from C++, the op too."""
    with pytest.raises(error) as info:
        yield
    message = str(info.value)
    op = "|".join(registered_ops())
    assert re.match(rf"(({op}): )?{re.escape(str(argument))}: expected ", message), message
    assert ", got " in message, message
    assert "\n" not in message, message
    for part in parts:
        assert part in message, message


def interpreted(device, backend=None):
    """Whether Triton's interpreter or CUDA's threads on the host serve, one and slow."""
    return selection.interpreted(device, backend or current_backend())


def has_one_thread(device, backend, **parameters):
    """For `absent_if`: what runs on a GPU, or is interpreted, has none of torch's threads."""
    return None if backend in ("eager", "cpp") else f"{backend} does not use torch's threads"


def cannot_raise(device, backend, **parameters):
    """For `absent_if`: a kernel on a GPU leaves bad values unseen; only eager copies them."""
    return "a GPU cannot raise" if device == "cuda" and backend != "eager" else None


def opcheck(op, args):
    """Let torch check an op: for every backend what it writes and returns, tracing for eager.

    Tracing sees no implementation, only the op, and takes nearly all of the time. That what it
    makes runs on every backend is for the tests that compile.
    """
    every = ("test_schema", "test_autograd_registration", "test_faketensor")
    traced = ("test_aot_dispatch_dynamic",) if current_backend() in (None, "eager") else ()
    torch.library.opcheck(op, args, test_utils=(*every, *traced))
