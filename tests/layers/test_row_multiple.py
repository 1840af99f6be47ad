"""Batches whose numbers of rows are rounded up, and encoders that round them."""

import pytest
import torch

from adatape_kernels import ElasticBatch, layers

OP = None


def encoder(row_multiple, dtype=torch.float32):
    torch.manual_seed(0)
    reader = layers.TapeReader(16, num_tape_tokens=5, topk=2, halt_threshold=1.5, query="gap")
    stack = [layers.ElasticEncoderLayer(16, 2, 32, tape_ffn_dim=8) for _ in range(3)]
    readers = {1: reader, 2: reader}
    return layers.ElasticEncoder(stack, 16, readers, row_multiple=row_multiple).to(dtype)


def encoded(row_multiple, dtype):
    model = encoder(row_multiple, dtype)
    torch.manual_seed(1)
    rows = torch.randn(19, 16).to(dtype).requires_grad_()
    x = ElasticBatch.from_packed(rows, torch.tensor([0, 7, 8, 19]))
    y, reads = model(x, torch.randn(3, 30, 16).to(dtype))
    y.pool("mean").float().square().sum().backward()
    gradients = [rows.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    return y, reads, gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_rounding(dtype):
    exact, reads, gradients = encoded(1, dtype)
    rounded, same_reads, same_gradients = encoded(64, dtype)
    assert exact.exact and not rounded.exact
    assert len(rounded.data) % 64 == 0
    for read, same in zip(reads, same_reads, strict=True):
        assert torch.equal(read.indices, same.indices)
    pairs = [
        (rounded.to_packed()[0], exact.to_packed()[0]),
        *zip(same_gradients, gradients, strict=True),
    ]
    for actual, expected in pairs:
        if dtype == torch.float32:
            torch.testing.assert_close(actual, expected)
        else:
            # A product of another number of rows may sum in another order, by which an element of
            # a gradient near 0 may be off by more than its own size.
            distance = (actual - expected).float().norm()
            assert distance <= 2e-2 * expected.float().norm() + 2e-2


@pytest.mark.parametrize("rows, multiple, rounded", [(0, 4, 0), (3, 4, 4), (8, 4, 8), (5, 1, 5)])
def test_rows_are_a_multiple_and_the_new_ones_zero(rows, multiple, rounded):
    x = ElasticBatch.from_padded(torch.ones(1, rows, 2)).round_rows(multiple)
    assert x.data.shape == (rounded, 2)
    assert x.data.sum() == 2 * rows and x.lens.tolist() == [rows]


def test_a_multiple_below_one_is_refused():
    with pytest.raises(ValueError, match="multiple: expected 1 or more, got 0"):
        ElasticBatch.from_padded(torch.ones(1, 2, 2)).round_rows(0)
    with pytest.raises(ValueError, match="row_multiple: expected 1 to 2147483647, got 0"):
        encoder(0)
