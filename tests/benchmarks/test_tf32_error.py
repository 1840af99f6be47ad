"""Why float32's attention does not go by tensor cores: what parts of TF32 would make of it."""

import math

import torch

from adatape_kernels.benchmarks.audit.tf32_error import errors, parts, three_products


def product(a, b):
    """The product of two numbers, as the emulation has tensor cores compute it."""
    return three_products(torch.tensor([[a]]), torch.tensor([[b]]), 4).item()


def test_two_parts_are_all_but_the_last_bit_of_a_number():
    x = torch.randn(1000) * torch.logspace(-20, 20, 1000)
    big, small = parts(x)
    for part in (big, small):
        assert not (part.view(torch.int32) & 0x1FFF).any()
    assert ((big.double() + small.double() - x).abs() <= x.double().abs() * 2**-22).all()


def test_numbers_that_are_infinite_or_nan_stay_so():
    for number in (math.inf, -math.inf, math.nan):
        found, expected = product(number, 2.0), number * 2.0
        assert found == expected or (math.isnan(found) and math.isnan(expected))
    assert math.isnan(product(math.inf, 0.0))


def test_large_numbers_whose_products_float32_knows_are_lost():
    """They round to infinity, or two overflows of opposite signs meet."""
    largest = torch.finfo(torch.float32).max
    assert largest * 1e-30 < 1e9 and not math.isfinite(product(largest, 1e-30))
    products = [product(1e30 * (1 + i / 100), -1e30) for i in range(20)]
    assert 0 < products.count(-math.inf) < 20


def test_gradients_would_be_less_accurate_than_twice_torch_s_error():
    """Whether the backward pass goes by tensor cores or not."""
    for form in ("tf32x3, 8 at a time", "tf32x3 forward only, 8 at a time"):
        assert max(errors(form, "positive", rows=57, head_dim=64, seeds=1)) > 2
    assert max(errors("multiply-adds", "positive", rows=57, head_dim=64, seeds=1)) < 2
