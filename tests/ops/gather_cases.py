"""Reads for the tests of `tape_gather`, and what they compare."""

import math

import torch

from adatape_kernels.op_types import wide_dtype

COUNTS = [3, 0, 4, 1]


def read(device, *, counts=COUNTS, steps=4, topk=3, bank_size=9, dim=5, shared=False, dtype=None):
    """Bank, indices, weights and counts, with anything at all behind each example's count."""
    dtype, batch = dtype or torch.float32, len(counts)
    bank = torch.randn(*([] if shared else [batch]), bank_size, dim, device=device).to(dtype)
    order = torch.rand(batch, steps, bank_size, device=device).argsort(-1)
    indices, weights = order[..., :topk].int(), torch.rand(batch, steps, topk, device=device)
    counts = torch.tensor(counts, dtype=torch.int32, device=device)
    unused = torch.arange(steps, device=device) >= counts[:, None]
    indices[unused], weights[unused] = 2**31 - 1, math.nan
    return bank, indices, weights.to(wide_dtype(dtype)), counts


def gradients(gather, bank, indices, weights, counts, dtape, *, capacity=None):
    """tape, offsets, dbank and dweights for the gradient `dtape` of the tape."""
    bank, weights = bank.detach().requires_grad_(), weights.detach().requires_grad_()
    tape, offsets = gather(bank, indices, weights, counts, capacity=capacity)
    return [tape.detach(), offsets, *torch.autograd.grad(tape, [bank, weights], dtape)]


def cotangent(bank, counts, capacity=None):
    rows = int(counts.sum()) if capacity is None else capacity
    return torch.randn(rows, bank.shape[-1], device=bank.device, dtype=torch.float64).to(bank.dtype)
