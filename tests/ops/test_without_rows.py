"""Calls without rows, examples, heads, widths or tape tokens: results and both derivatives."""

import pytest
import torch

from adatape_kernels.op_types import wide_dtype
from adatape_kernels.ops import (
    FFN,
    add_layer_norm,
    dual_ffn,
    elastic_attention,
    tape_gather,
    tape_select,
)

OP = "tape_select", "tape_gather", "elastic_attention", "dual_ffn", "add_layer_norm"
pytestmark = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64]
)


def leaves(device, *shapes, dtype):
    return [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]


def int32(device, *values):
    return torch.tensor(values, dtype=torch.int32, device=device)


def assert_differentiable(run, inputs, shapes):
    """The results have these shapes and the first input's dtype; twice differentiable."""
    outputs = run(*inputs)
    assert [y.shape for y in outputs] == [torch.Size(s) for s in shapes]
    given = [torch.ones_like(y, requires_grad=True) for y in outputs]
    firsts = torch.autograd.grad(outputs, inputs, given, create_graph=True)
    for x, first in zip(inputs, firsts, strict=True):
        assert (first.shape, first.dtype) == (x.shape, x.dtype)
        assert not first.isnan().any()
    firsts = [first for first in firsts if first.requires_grad]
    if firsts:
        ones = [torch.ones_like(first) for first in firsts]
        seconds = torch.autograd.grad(firsts, [*inputs, *given], ones, allow_unused=True)
        assert not any(second.isnan().any() for second in seconds if second is not None)


@pytest.mark.parametrize("examples", [0, 2])
@pytest.mark.parametrize("rows, heads", [(0, 0), (0, 2), (4, 0), (4, 2)])
def test_attention(device, dtype, rows, heads, examples):
    """No example has a row: the buffer has none, or nobody owns them."""
    offsets = int32(device, *[0] * (examples + 1))

    def run(q, k, v):
        return (elastic_attention(q, k, v, offsets, offsets),)

    shape = rows, heads, 8
    assert_differentiable(run, leaves(device, shape, shape, shape, dtype=dtype), [shape])


def test_attention_without_heads(device, dtype):
    cu_inputs, cu_tapes = int32(device, 0, 2, 3), int32(device, 3, 3, 4)

    def run(q, k, v):
        return (elastic_attention(q, k, v, cu_inputs, cu_tapes),)

    shape = 4, 0, 8
    assert_differentiable(run, leaves(device, shape, shape, shape, dtype=dtype), [shape])


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu"])
@pytest.mark.parametrize("two", [True, False], ids=["two", "one"])
@pytest.mark.parametrize(
    "rows, middle, end, dim, hidden",
    [
        (0, 0, 0, 4, 5),
        (3, 0, 0, 4, 5),
        (3, 0, 3, 4, 5),
        (3, 3, 3, 4, 5),
        (0, 0, 0, 0, 0),
        # 16 divides the widths 0 and 16, so that the kernels with tensor descriptors may serve.
        (3, 1, 3, 0, 0),
        (3, 1, 3, 0, 16),
        (3, 1, 3, 16, 0),
    ],
)
def test_feed_forwards(device, dtype, rows, middle, end, dim, hidden, two, activation):
    shapes = [(hidden, dim), (hidden,), (dim, hidden), (dim,)]
    if two:
        shapes += [(2 * hidden, dim), (2 * hidden,), (dim, hidden), (dim,)]

    def run(x, *parameters):
        ffns = FFN(*parameters[:4]), FFN(*parameters[4:]) if two else None
        return (dual_ffn(x, middle, *ffns, num_rows=end, activation=activation),)

    assert_differentiable(run, leaves(device, (rows, dim), *shapes, dtype=dtype), [(rows, dim)])


@pytest.mark.parametrize("dim", [1, 12])
def test_layer_norm(device, dtype, dim):
    given = leaves(device, (0, dim), (0, dim), (dim,), (dim,), dtype=dtype)
    assert_differentiable(add_layer_norm, given, [(0, dim), (0, dim)])


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize("batch, tokens, valid", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_reading(device, dtype, batch, tokens, valid, shared):
    """No example, no tape token, or no entry of the bank that may be read."""
    lens = torch.full((batch,), valid, device=device)

    def run(query, keys):
        read = tape_select(
            query, keys, num_tape_tokens=tokens, topk=2, halt_threshold=1.5, bank_lens=lens
        )
        return read.weights, read.ponder

    keys = [5, 8] if shared else [batch, 5, 8]
    given = leaves(device, (batch, 8), keys, dtype=dtype)
    assert_differentiable(run, given, [(batch, tokens, 2), (batch,)])


@pytest.mark.parametrize("capacity", [None, 0, 3])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize("batch, tokens", [(0, 3), (2, 0), (2, 3), (0, 0)])
def test_gathering(device, dtype, batch, tokens, shared, capacity):
    """No example, no tape token, or none that was read."""
    indices = torch.full((batch, tokens, 2), -1, dtype=torch.int32, device=device)
    counts = int32(device, *[0] * batch)

    def run(bank, weights):
        return (tape_gather(bank, indices, weights, counts, capacity=capacity)[0],)

    bank = leaves(device, [5, 8] if shared else [batch, 5, 8], dtype=dtype)
    weights = leaves(device, (batch, tokens, 2), dtype=wide_dtype(dtype))
    assert_differentiable(run, [*bank, *weights], [(capacity or 0, 8)])
