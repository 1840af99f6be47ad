"""Attention's sums over many rows or features round as plain torch's do, whatever their signs.

The error of one chain of additions grows with its length, most of all where all numbers have one
sign: a chain over 2,000 keys is seven times as wrong as torch's own products are.
"""

import pytest
import torch
from attention_cases import by_reference, gradients, layout

from adatape_kernels import ops, use_backend

OP = "elastic_attention"
pytestmark = pytest.mark.backends("cpp")


def rms(x):
    return x.square().mean().sqrt().item()


def errors_over_torchs(ours, plain, exact):
    """For each tensor the root mean square error, in those of plain torch in the same dtype."""
    return [rms(a - e) / rms(p - e) for a, p, e in zip(ours, plain, exact, strict=True)]


def attention_errors(q, k, v, dout, scale):
    rows = len(q)
    offsets = layout("cpu", [rows - rows // 7], [rows // 7])[:2]
    given = q, k, v, dout
    return errors_over_torchs(
        gradients(ops.elastic_attention, *given, *offsets, softmax_scale=scale),
        gradients(by_reference, *given, *offsets, softmax_scale=scale),
        gradients(by_reference, *(x.double() for x in given), *offsets, softmax_scale=scale),
    )


def of_one_sign(shape):
    return 1 + torch.rand(shape)


@pytest.mark.parametrize("rows", [300, 1300])
def test_attention_over_many_values_of_one_sign(device, rows):
    q, k = torch.randn(2, rows, 2, 16)
    v, dout = of_one_sign((2, rows, 2, 16))
    errors = attention_errors(q, k, v, dout, 0.25)
    assert max(errors) < 1.5, errors


@pytest.mark.parametrize("rows", [40, 300])
def test_attention_over_many_features(device, rows):
    """Scores are sums over features; an error of one is as large a part of a weight."""
    q, k = of_one_sign((2, rows, 3, 512))
    v, dout = torch.randn(2, rows, 3, 512)
    errors = attention_errors(q, k, v, dout, 0.1)
    assert max(errors) < 1.5, errors


@pytest.mark.parametrize("rows", [60, 300])
def test_gradients_that_cancel(device, rows):
    """Where one key has nearly all of the weight, and all gradients have about the same mean."""
    q, k, v, dout = of_one_sign((4, rows, 3, 128))
    errors = attention_errors(q, k, v, dout, 1.0)
    assert max(errors) < 1.5, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 64, 1500])
def test_values_as_large_as_numbers_are(device, rows, dtype):
    """The mean of such values is one, so no sum of them on the way to it may be infinite."""
    largest = 0.99 * torch.finfo(dtype).max
    q, k = torch.randn(2, rows, 1, 16).to(dtype)
    v = (largest * torch.tensor([1.0, -1.0]).repeat(8)).expand(rows, 1, 16).to(dtype)
    out = ops.elastic_attention(q, k, v, *layout("cpu", [rows], [0])[:2])
    torch.testing.assert_close(out.double(), v.double(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("rows", [3, 9])
def test_few_rows_of_one_sign(device, rows):
    """Of small matrices torch's products have short chains; errors are those of many calls."""
    q, k, v, dout = of_one_sign((4, rows, 400, 64))
    errors = attention_errors(q, k, v, dout, 0.125)
    assert max(errors) < 2, errors


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-37), (torch.bfloat16, 1e-35)])
def test_values_that_are_tiny(device, dtype, size):
    """What is done for large values does not push these below the numbers that there are."""
    q, k, v, dout = torch.randn(4, 1100, 1, 16)
    given = [x.to(dtype) for x in (q, k, size * v, dout)]
    errors = attention_errors(*given, 0.25)
    assert errors[0] < 2, errors


@pytest.mark.checks_what_ran
@pytest.mark.parametrize("lower", [2.0, 12.5])
@pytest.mark.parametrize("values", [1.0, 100.0])
def test_gradients_of_a_part_of_the_keys(device, values, lower):
    """With the output and the logsumexp of all keys, the gradients of parts of them add up."""
    rows = 64
    q, dout = torch.randn(2, rows, 1, 16)
    keys = torch.cat([torch.randn(rows, 1, 16), torch.randn(rows, 1, 16)])
    v = torch.cat([torch.randn(rows, 1, 16), values * torch.randn(rows, 1, 16)])
    # One feature more lowers the scores of the second half, whose weights are small.
    extra = torch.cat([torch.zeros(rows, 1, 1), torch.full((rows, 1, 1), -4 * lower)])
    q = torch.cat([q, torch.ones(rows, 1, 1)], -1)
    keys = torch.cat([keys, extra], -1)
    v = torch.nn.functional.pad(v, (0, 1))
    dout = torch.nn.functional.pad(dout, (0, 1))

    exact = [x.double().transpose(0, 1).requires_grad_() for x in (q, keys, v)]
    scores = exact[0] @ exact[1].mT / 4
    out = torch.softmax(scores, -1) @ exact[2]
    expected = torch.autograd.grad(out, exact, dout.double().transpose(0, 1))
    out = out.detach().transpose(0, 1).float().contiguous()
    lse = torch.logsumexp(scores.detach(), -1).float()
    offsets = layout(device, [rows], [0])[:2]

    def summed(backend):
        parts = []
        with use_backend(backend):
            for half in (slice(0, rows), slice(rows, None)):
                given = dout, q, keys[half], v[half], out, lse, *offsets, None, 0.25
                parts.append(torch.ops.adatape.elastic_attention_bwd(*given))
        (dq_a, *a), (dq_b, *b) = parts
        return [dq_a + dq_b, *(torch.cat(pair) for pair in zip(a, b, strict=True))]

    for ours, plain, e in zip(summed("cpp"), summed("eager"), expected, strict=True):
        error, allowed = (rms(x.transpose(0, 1) - e) for x in (ours, plain))
        assert error < 2 * allowed, (error, allowed)


@pytest.mark.parametrize("score", [1e5, 1e6])
def test_gradients_beside_a_huge_score(device, score):
    """The logsumexp of such a row is rounded so far that its weights do not add up to one."""
    q, k, v, dout = torch.randn(4, 64, 1, 16)
    q[0] *= 4 * score / (q[0] * k).sum(-1).abs().max()
    errors = attention_errors(q, k, v, dout, 0.25)
    assert max(errors) < 2, errors
