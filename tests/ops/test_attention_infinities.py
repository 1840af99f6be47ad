"""Attention whose scores are infinite or NaN, in every place of a block and of its borders."""

import functools
import math

import pytest
import torch
from attention_cases import by_reference, gradients, layout, not_served, qkv
from checks import assert_close

from adatape_kernels.ops import elastic_attention
from adatape_kernels.ops.op import current_backend

OP = "elastic_attention"
# CUDA C++ takes half-precision heads of 64, whose number of rows it knows.
DTYPE = {"cuda": torch.bfloat16}
# Longer than a block of keys, of which the CPU's kernels take 1024.
LONG = {"cpp": 1040, "eager": 1040, "triton": 131, "cuda": 300}
SHORT = 140
pytestmark = pytest.mark.parametrize("max_rows, head_dim", [(512, 64), (None, 5)])


def served(device, backend, **parameters):
    """For `absent_if`: C++ for GPUs serves heads of 64, and no other backend needs to."""
    if (backend == "cuda") != (parameters["head_dim"] == 64):
        return "another backend's heads"
    dtype = DTYPE.get(backend, torch.float32)
    return not_served(device, backend, dtype=dtype, **parameters)


def example(device, rows, head_dim):
    """q, k, v and dout of two examples of so many rows and of five, and the longer one's rows."""
    dtype = DTYPE.get(current_backend(), torch.float32)
    cu_inputs, cu_tapes, places = layout(device, [rows - 3, 4], [3, 1])
    q, k, v, dout = qkv(rows + 5, 1, head_dim, device=device, dtype=dtype)
    return [q, k, v, dout], (cu_inputs, cu_tapes), torch.tensor(places[0], device=device)


def assert_same_as_float64(given, offsets, max_rows):
    """Results and gradients are close where they are finite, and infinite or NaN where they are."""
    # What is infinite in float32 is so in float64 too if its factors are.
    run = functools.partial(elastic_attention, max_rows=max_rows)
    actual = gradients(run, *given, *offsets)
    expected = gradients(by_reference, *(x.double() for x in given), *offsets)
    tolerance = 1e-5 if given[0].dtype == torch.float32 else 3e-2
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, tolerance)
    return expected


def blocks(rows, most=None):
    """Ranges of keys that begin or end at a border of some kernel's blocks, or beside it.

    Those that end within `most` rows are in shorter examples too, whose borders are the same.
    """
    borders = [b for b in (1, 16, 32, 64, 128, 256, 512, 1024) if b + 1 < rows]
    ranges = [slice(0, b) for b in borders if most is None or b > most]
    ranges += [slice(0, b + 1) for b in borders[-2:]]
    ranges += [slice(b, None) for b in borders[-2:]] + [slice(1, None), slice(0, rows - 1)]
    return [*ranges, slice(borders[-2], borders[-1]), slice(0, None, 2)]


@pytest.mark.absent_if(reason=served)
@pytest.mark.parametrize("how", ["infinite key", "overflow"])
def test_keys_that_nobody_wants(device, how, max_rows, head_dim):
    """Scores of -inf in whole blocks, before and behind others and alone."""
    long = LONG[current_backend()]
    short = min(SHORT, long)
    cases = [(short, unwanted) for unwanted in blocks(short)]
    if long > short:
        cases += [(long, unwanted) for unwanted in blocks(long, most=short)]
    for rows, unwanted in cases:
        given, offsets, own = example(device, rows, head_dim)
        q, k, _, _ = given
        q[..., 0] = 1.0 if how == "infinite key" else 1e30
        k[..., 0] = 0.0
        k[own[unwanted], :, 0] = -math.inf if how == "infinite key" else -1e30
        out, _, _, dv = assert_same_as_float64(given, offsets, max_rows)
        assert out.isfinite().all() and not dv[own[unwanted]].any()


@pytest.mark.absent_if(reason=served)
@pytest.mark.parametrize("rows", [1, 17, 70, "long"])
def test_rows_without_any_score(device, rows, max_rows, head_dim):
    """All scores of some queries, or of all of one example, are -inf, whose softmax is NaN."""
    rows = LONG[current_backend()] if rows == "long" else rows
    for queries in (slice(None), slice(0, 1), slice(-1, None)):
        given, offsets, own = example(device, max(rows, 4), head_dim)
        q, k, _, _ = given
        q[..., 0] = 0.5
        q[own[queries], :, 0] = math.inf
        k[own, :, 0] = -1.0
        out, *_ = assert_same_as_float64(given, offsets, max_rows)
        assert out[own[queries]].isnan().all()


@pytest.mark.absent_if(reason=served)
@pytest.mark.parametrize("number", [math.inf, math.nan])
@pytest.mark.parametrize("tensor", ["q", "k", "v"])
def test_poison_at_the_borders(device, number, tensor, max_rows, head_dim):
    """One infinite number or NaN in the first or the last row of a block."""
    long = LONG[current_backend()]
    short = min(SHORT, long)
    for rows, row in ((long, 0), (long, long - 1), *((short, row) for row in (31, 32, 63, 64))):
        given, offsets, own = example(device, rows, head_dim)
        poisoned = given["qkv".index(tensor)]
        given[0][..., 0] = given[1][..., 0] = 1.0
        poisoned[own[row], :, 0] = number
        assert_same_as_float64(given, offsets, max_rows)
