import math

import pytest
import torch
from checks import assert_close, assert_same_bits

from adatape_kernels.ops.op import current_backend
from adatape_kernels.ops.triton_segment_sum import segment_sum

# The op that it serves decides where it runs.
OP = "tape_gather"

BANK_SIZE = 6


@pytest.fixture
def given(device):
    """Rows with what adds them up: entry 3 takes many, entry 4 none, and poison takes none."""
    if current_backend() != "triton":
        pytest.skip("a part of the Triton launchers")
    entries = torch.tensor([0, 3, 6, 3, 5, 3, 6, 3, 1, 3, 3, 3, 2, 3, 3, 5, 3, 3], device=device)
    row_of = torch.randint(0, 5, (18,), device=device)
    rows, weights = torch.randn(18, 300, device=device), torch.randn(18, device=device)
    unused = entries == BANK_SIZE
    rows[unused], weights[unused], row_of[unused] = math.nan, math.nan, 10**9
    return rows, entries.int(), row_of.int(), weights


def summed(rows, entries, row_of=None, weights=None):
    total = torch.zeros(BANK_SIZE, rows.shape[1], dtype=torch.float64, device=rows.device)
    for p, entry in enumerate(entries.tolist()):
        if entry < BANK_SIZE:
            row = rows[p if row_of is None else row_of[p]].double()
            total[entry] += row if weights is None else row * weights[p].double()
    return total


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [300, 7])
def test_sums_the_rows_of_each_entry(given, ordered, weighted, width):
    rows, entries, row_of, weights = given
    rows = rows[:, :width]
    options = dict(row_of=row_of, weights=weights) if weighted else {}
    actual = segment_sum(rows, entries, BANK_SIZE, rows.dtype, ordered=ordered, **options)
    assert actual.is_contiguous() and not actual[4].any()
    assert_close(actual, summed(rows, entries, **options), 1e-6)


def test_banks_of_the_examples_own(given):
    rows, entries, _, weights = given
    batched = entries.view(2, 9)
    actual = segment_sum(rows, batched, BANK_SIZE, rows.dtype, weights=weights)
    for i, part in enumerate((slice(0, 9), slice(9, 18))):
        assert_close(actual[i], summed(rows[part], entries[part], weights=weights[part]), 1e-6)


@pytest.mark.parametrize("shape", [(18,), (2, 9)], ids=["shared", "per-example"])
def test_is_ordered_and_rounds_once(given, shape):
    rows, entries = given[0].half(), given[1].view(shape)
    first, again = (segment_sum(rows, entries, BANK_SIZE, torch.float16) for _ in range(2))
    assert_same_bits(first, again)
    assert_same_bits(first, segment_sum(rows, entries, BANK_SIZE, torch.float32).half())


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("shape", [(0,), (0, 5), (2, 0)])
def test_nothing_to_sum(given, shape, ordered):
    rows, entries = given[0], given[1].new_empty(shape)
    banks = shape[:-1]
    actual = segment_sum(rows, entries, BANK_SIZE, rows.dtype, ordered=ordered)
    assert actual.shape == (*banks, BANK_SIZE, 300) and not actual.any()
    assert segment_sum(rows, entries, 0, rows.dtype, ordered=ordered).shape == (*banks, 0, 300)
