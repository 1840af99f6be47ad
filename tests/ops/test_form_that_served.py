"""Which form of `dual_ffn` served a call in Triton is recorded, forward and backward."""

import pytest
import torch

from adatape_kernels import use_backend
from adatape_kernels.benchmarks.harness import labels
from adatape_kernels.ops import FFN, FFN_PRODUCTS, dual_ffn, ffn_products
from adatape_kernels.ops.dual_ffn.products import recorded_forms
from adatape_kernels.ops.op import operation
from adatape_kernels.ops.triton_runtime import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU's benchmarks show it")


def step(num_input_rows, dtype=torch.float32, dim=16):
    x = torch.randn(5, dim, dtype=dtype, requires_grad=True)
    ffn = FFN(*(torch.randn(s, dtype=dtype) for s in ((32, dim), (32,), (dim, 32), (dim,))))
    with use_backend("triton"), recorded_forms() as forms:
        dual_ffn(x, num_input_rows, ffn).sum().backward()
    return forms


@pytest.mark.parametrize("form", FFN_PRODUCTS)
def test_a_form_that_was_asked_for(form):
    with ffn_products(form):
        assert step(5) == [form, form]


def test_the_form_that_arithmetic_chooses():
    assert step(5) == ["cublas", "cublas"]  # float32
    assert step(5, torch.float16) == ["epilogue", "epilogue"]
    # The backward saves twice the bytes that the forward does.
    assert step(5, torch.float16, dim=768) == ["cublas", "epilogue"]


def test_rows_that_the_host_does_not_know():
    x, bounds = torch.randn(5, 4), torch.tensor([3, 5])
    ffn = [torch.randn(s) for s in ((8, 4), (8,), (4, 8), (4,))]
    with recorded_forms() as forms:
        operation("dual_ffn").implementations["triton"].function(
            x, None, 0, bounds, "relu", *ffn, *[None] * 4
        )
    assert forms == ["grouped"]


def test_what_eager_serves_has_no_form():
    with use_backend("eager"), recorded_forms() as forms:
        ffn = FFN(*(torch.randn(s) for s in ((8, 4), (8,), (4, 8), (4,))))
        dual_ffn(torch.randn(3, 4), 3, ffn)
    assert forms == []


def test_the_note_of_a_row_names_the_forms():
    assert labels.in_forms(["epilogue", "cublas", "epilogue"]) == "dual_ffn: cublas and epilogue"
    assert labels.in_forms([]) == ""
