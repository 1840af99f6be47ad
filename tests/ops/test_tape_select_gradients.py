"""The gradients of `tape_select`."""

import math

import pytest
import torch
from checks import assert_close, assert_low_precision, assert_same_bits
from select_cases import OPTIONS, cotangents, gradients

from adatape_kernels import reference
from adatape_kernels.ops import tape_select

OP = "tape_select"


@pytest.mark.parametrize("dtype", [torch.float64])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize("loss_type", ["entropy", "max"])
@pytest.mark.parametrize("average_query", [True, False], ids=["average", "replace"])
def test_gradcheck(device, dtype, average_query, loss_type, shared):
    """Gaps between the scores are far wider than gradcheck's steps of 1e-6."""
    query = torch.randn(3, 5, dtype=dtype, device=device, requires_grad=True)
    shape = (9, 5) if shared else (3, 9, 5)
    keys = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)

    def outputs(query, keys):
        sel = tape_select(query, keys, average_query=average_query, loss_type=loss_type, **OPTIONS)
        return sel.weights, sel.ponder

    assert torch.autograd.gradcheck(outputs, (query, keys))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize("loss_type", ["entropy", "max"])
@pytest.mark.parametrize("average_query", [True, False], ids=["average", "replace"])
@pytest.mark.parametrize("topk", [1, 4, 32])
def test_backward_is_the_reference_s(device, dtype, topk, average_query, loss_type, shared):
    """The closed form against autograd of the float64 reference; equal rows tie in "max"."""
    query = torch.randn(6, 16, device=device, dtype=dtype)
    rows = torch.randn(*([] if shared else [6]), 60, 16, device=device, dtype=dtype)
    keys = torch.cat([rows, rows[..., :20, :]], -2)
    given = [query, keys, *cotangents(6, 5, topk, device=device, dtype=dtype)]
    options = dict(num_tape_tokens=5, topk=topk, halt_threshold=1.7)
    options |= dict(average_query=average_query, loss_type=loss_type)
    actual = gradients(tape_select, *given, **options)
    expected = gradients(reference.tape_select, *(x.double() for x in given), **options)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, tolerance)


@pytest.fixture
def nondeterministic():
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_backward_without_a_fixed_order(nondeterministic, device, dtype):
    """Outside deterministic mode a shared bank's gradient may be summed in any order."""
    query = torch.randn(6, 16, device=device).to(dtype)
    keys = torch.randn(20, 16, device=device).to(dtype)
    given = [query, keys, *cotangents(6, 5, 3, device=device)]
    options = dict(OPTIONS, num_tape_tokens=5)
    *_, dquery, dkeys = gradients(tape_select, *given, **options)
    *_, exact_dquery, exact_dkeys = gradients(
        reference.tape_select, *(x.double() for x in given), **options
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert_close(dquery, exact_dquery, tolerance)
    assert_close(dkeys, exact_dkeys, tolerance)


@pytest.mark.parametrize("output", ["weights", "ponder"])
def test_gradient_of_one_output_alone(device, output):
    query, keys = torch.randn(3, 5, device=device), torch.randn(9, 5, device=device)
    dweights, dponder = cotangents(3, 4, 3, device=device)
    (dponder if output == "weights" else dweights).zero_()
    *_, dquery, dkeys = gradients(tape_select, query, keys, dweights, dponder, **OPTIONS)
    query.requires_grad_()
    keys.requires_grad_()
    sel = tape_select(query, keys, **OPTIONS)
    getattr(sel, output).backward(dweights if output == "weights" else dponder)
    assert_same_bits(query.grad, dquery)
    assert_same_bits(keys.grad, dkeys)


def test_strided_inputs_and_gradients(device):
    """Views and expanded gradients, as sum().backward() makes, give what contiguous ones give."""
    query, keys = torch.randn(5, 7, device=device).mT, torch.randn(7, 8, 12, device=device).mT
    keys = keys[..., :5]
    views = [
        torch.randn(3, 4, 7, device=device).permute(2, 1, 0),
        torch.tensor(2.0, device=device).expand(7),
    ]
    strided = gradients(tape_select, query, keys, *views, **OPTIONS)
    copies = [x.contiguous() for x in (query, keys, *views)]
    for a, e in zip(strided, gradients(tape_select, *copies, **OPTIONS), strict=True):
        assert_same_bits(a, e)
    query, keys = query.requires_grad_(), keys.requires_grad_()
    sel = tape_select(query, keys, **OPTIONS)
    (sel.weights.sum() + sel.ponder.sum()).backward()
    ones = torch.ones_like(sel.weights), torch.ones_like(sel.ponder)
    *_, dquery, dkeys = gradients(tape_select, query, keys, *ones, **OPTIONS)
    assert_same_bits(query.grad, dquery)
    assert_same_bits(keys.grad, dkeys)
    assert dquery.is_contiguous() and dkeys.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(device, dtype):
    """The entries are chosen from exact products; plain torch, in `dtype`, is told them."""
    query = torch.randn(8, 32, device=device).to(dtype)
    keys = torch.randn(8, 50, 32, device=device).to(dtype)
    dweights, dponder = cotangents(8, 4, 3, device=device)
    given = (query, keys, dweights, dponder)
    actual = gradients(tape_select, *given, **OPTIONS)
    exact = gradients(reference.tape_select, *(x.double() for x in given), **OPTIONS)
    assert torch.equal(actual[0], exact[0])

    def plain(query, keys, **options):
        weights, ponder = torch.zeros_like(dweights, dtype=dtype), torch.zeros_like(query[:, 0])
        for s in range(4):
            used = actual[0][:, s, :1] >= 0
            index = actual[0][:, s, :, None].long().clamp(min=0).expand(-1, -1, 32)
            rows = keys.gather(1, index)
            w = torch.softmax((rows @ query[..., None]).squeeze(-1) / math.sqrt(32), -1)
            merged = (w[:, None] @ rows).squeeze(1)
            query = torch.where(used, (query + merged) / 2, query)
            weights[:, s] = w.where(used, 0)
            ponder = ponder + (1 - w.square().sum(-1)).where(used[:, 0], 0)
        return reference.TapeSelection(actual[0], weights, actual[2], ponder)

    rounded = gradients(plain, query, keys, dweights.to(dtype), dponder.to(dtype))
    assert actual[-1].dtype == actual[-2].dtype == dtype
    for n in (1, 3, 4, 5):  # weights, ponder, dquery, dkeys
        assert_low_precision(actual[n], rounded[n], exact[n], floor=1e-6)


def test_gradients_of_unused_rows_are_not_read(device):
    query, keys = torch.randn(3, 6, device=device), torch.randn(3, 9, 6, device=device)
    dweights, dponder = cotangents(3, 4, 3, device=device)
    clean = gradients(tape_select, query, keys, dweights, dponder, **OPTIONS)
    unused = torch.arange(4, device=device) >= clean[2][:, None]
    assert unused.any()
    dweights[unused] = math.nan
    for a, e in zip(
        gradients(tape_select, query, keys, dweights, dponder, **OPTIONS), clean, strict=True
    ):
        assert_same_bits(a, e)
