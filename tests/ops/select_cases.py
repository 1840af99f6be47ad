"""Calls of `tape_select` for its tests, and what they compare."""

import math

import literal
import torch
from checks import assert_close

from adatape_kernels import reference
from adatape_kernels.ops import tape_select

INF, NAN = math.inf, math.nan
OPTIONS = dict(num_tape_tokens=4, topk=3, halt_threshold=1.2)


def assert_matches_literal(query, keys, *, read_mask=None, bank_lens=None, **options):
    """The op equals the loop of the SPEC for every example; returns the selection."""
    sel = tape_select(query, keys, read_mask=read_mask, bank_lens=bank_lens, **options)
    batch, steps, topk = len(query), options["num_tape_tokens"], options["topk"]
    assert sel.indices.dtype == sel.counts.dtype == torch.int32
    assert sel.weights.dtype == sel.ponder.dtype == reference.wide_dtype(query.dtype)
    for i in range(batch):
        indices, weights, count, ponder = literal.tape_select(
            query[i].tolist(),
            (keys if keys.dim() == 2 else keys[i]).tolist(),
            read_mask=None if read_mask is None else read_mask[i].tolist(),
            bank_len=None if bank_lens is None else int(bank_lens[i]),
            **options,
        )
        unused = steps - count
        assert sel.counts[i] == count
        assert sel.indices[i].tolist() == indices + [[-1] * topk] * unused
        assert_close(sel.weights[i], _rows(weights + [[0.0] * topk] * unused, topk), 1e-5)
        assert_close(sel.ponder[i], ponder, 1e-5)
    return sel


def _rows(rows, width):
    return torch.tensor(rows, dtype=torch.float64).view(-1, width)


def read(query, keys, *, num_tape_tokens=4, topk=2, halt_threshold=INF, **options):
    return assert_matches_literal(
        query,
        keys,
        num_tape_tokens=num_tape_tokens,
        topk=topk,
        halt_threshold=halt_threshold,
        **options,
    )


def gradients(select, query, keys, dweights, dponder, **options):
    """The selection and the gradients of query and keys of Σ weights · dweights + ponder · dponder.

    The selection's outputs come with them: indices, weights, counts, ponder, dquery, dkeys.
    """
    query, keys = query.detach().requires_grad_(), keys.detach().requires_grad_()
    sel = select(query, keys, **options)
    grads = torch.autograd.grad([sel.weights, sel.ponder], [query, keys], [dweights, dponder])
    return [*(x.detach() for x in sel), *grads]


def cotangents(batch, num_tape_tokens, topk, **like):
    return torch.randn(batch, num_tape_tokens, topk, **like), torch.randn(batch, **like)
