"""Batches whose rows leave, and sums that they come home to, for the tests of both ops."""

import math

import torch

from adatape_kernels.op_types import wide_dtype

INPUT_LENS, TAPE_LENS = (5, 0, 12, 3), (3, 1, 0, 4)


def batch_of(
    device, *, input_lens=INPUT_LENS, tape_lens=TAPE_LENS, unused=3, dim=9, share=0.6, dtype=None
):
    """data, keep and both offsets; the rows that leave, or that nobody owns, are NaN."""
    lens = torch.tensor([[0, *input_lens], [sum(input_lens), *tape_lens]])
    cu_inputs, cu_tapes = lens.cumsum(1).int().to(device).unbind(0)
    rows = sum(input_lens) + sum(tape_lens)
    keep = torch.rand(rows + unused, device=device) < share
    data = torch.randn(rows + unused, dim, device=device).to(dtype or torch.float32)
    data[~keep], data[rows:] = math.nan, math.nan
    return data, keep, cu_inputs, cu_tapes


def addends(device, *, num_total=17, num_rows=11, dim=9, dtype=None, wide_total=False, weighted):
    """total, rows, source, weights and total_weights; what is not added is NaN."""
    dtype = dtype or torch.float32
    wide = wide_dtype(dtype)
    total = torch.randn(num_total, dim, device=device).to(wide if wide_total else dtype)
    rows = torch.randn(num_rows, dim, device=device).to(dtype)
    weights, total_weights = torch.randn(2, num_rows, device=device, dtype=wide).unbind(0)
    places = torch.randperm(max(num_total, num_rows), device=device)[:num_rows]
    left_out = (places >= num_total) | (places % 5 == 3)
    source = places.masked_fill(left_out, -1).int()
    rows[left_out], weights[left_out], total_weights[left_out] = math.nan, math.nan, math.nan
    return total, rows, source, weights, total_weights if weighted else None


def gradients(function, given, dresult, **options):
    """The first result of a call, and the gradients of its arguments that are floating-point."""
    given = [x.detach().requires_grad_() if is_float(x) else x for x in given]
    results = function(*given, **options)
    result = results if isinstance(results, torch.Tensor) else results[0]
    leaves = [x for x in given if is_float(x)]
    return [result.detach(), *torch.autograd.grad(result, leaves, dresult)]


def is_float(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def widened(given):
    return [x.double() if is_float(x) else x for x in given]
