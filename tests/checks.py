"""Comparisons that several test files share."""

import contextlib
import re

import pytest
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


def interpreted(device):
    """Whether Triton's interpreter or CUDA's threads on the host serve, one and slow."""
    return device == "cpu" and current_backend() in ("triton", "cuda")
