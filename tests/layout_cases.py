"""Batches of known layouts, for the tests of `ElasticBatch`."""

import itertools
import math

import torch

from adatape_kernels import ElasticBatch

DIM = 3


def numbered(rows, device, dim=DIM):
    """Rows that all differ, so that a misplaced one shows."""
    return torch.arange(1.0, rows * dim + 1, device=device).view(rows, dim)


def offsets(lens, device="cpu", start=0):
    ends = list(itertools.accumulate(lens, initial=start))
    return torch.tensor(ends, dtype=torch.int32, device=device)


def make(input_lens, tape_lens, device, unused=0):
    """A batch in physical order, and the rows of each example as a list of lists.

    Unused rows hold NaN.
    """
    inputs, tapes = sum(input_lens), sum(tape_lens)
    data = numbered(inputs + tapes + unused, device)
    data[inputs + tapes :] = math.nan
    cu_inputs, cu_tapes = offsets(input_lens, device), offsets(tape_lens, device, start=inputs)
    batch = ElasticBatch.from_offsets(data, cu_inputs, cu_tapes, exact=unused == 0)
    a, b, rows = cu_inputs.tolist(), cu_tapes.tolist(), data.tolist()
    examples = [rows[a[i] : a[i + 1]] + rows[b[i] : b[i + 1]] for i in range(len(input_lens))]
    return batch, examples
