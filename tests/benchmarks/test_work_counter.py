"""The counter of bytes and products sees every load and store, however a kernel makes them."""

import pytest
import torch

from adatape_kernels.ops import ffn_products, triton_runtime

if not triton_runtime.INTERPRETED:
    pytest.skip("the kernels are counted in the interpreter", allow_module_level=True)

from adatape_kernels.benchmarks.audit.roofline import measured


def test_masks_of_integers_choose_no_elements_by_number():
    """One tile of 50 rows: queries, keys and values come once, and the output goes once."""
    rows, tape, size = 50, 10, 64 * 2
    q, k, v = torch.randn(3, rows, 1, 64).half().unbind(0)
    cu_inputs = torch.tensor([0, rows - tape], dtype=torch.int32)
    offsets = cu_inputs, torch.tensor([rows - tape, rows], dtype=torch.int32)
    work, _ = measured("elastic_attention", q, k, v, *offsets, rows, None)
    assert 4 * rows * size <= work.accessed <= 4 * rows * size + 1024
    assert 4 * rows * size <= work.bytes <= 4 * rows * size + 1024


@pytest.mark.parametrize("products", ["grouped", "epilogue"])
def test_operands_by_tensor_descriptors_are_counted(products):
    rows, dim = 16, 32
    x = torch.randn(rows, dim).half()
    weights = [torch.randn(s).half() for s in ((64, dim), (64,), (dim, 64), (dim,))]
    with ffn_products(products):
        work, _ = measured("dual_ffn", x, rows, 0, None, "relu", *weights, *[None] * 4)
    needed = 2 * (2 * x.numel() + sum(w.numel() for w in weights) + 2 * rows * 64)
    assert work.bytes >= needed
