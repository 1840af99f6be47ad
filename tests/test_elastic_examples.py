"""Examples taken out of an elastic batch and put into one: adatape_kernels/elastic_examples.py."""

import numpy as np
import pytest
import torch
from checks import assert_same_bits, refused
from hypothesis import given
from hypothesis import strategies as st
from layout_cases import DIM, make
from torch.utils.data import DataLoader

from adatape_kernels import ElasticBatch

OP = None  # no backend: every test runs once a device

ROWS = torch.zeros(2, DIM)
lens = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=5)
bounds = st.one_of(st.none(), st.integers(-7, 7))
slices = st.builds(slice, bounds, bounds, st.sampled_from([None, 1, 2, -1, -2]))


def split(case):
    return [inputs for inputs, _ in case], [tapes for _, tapes in case]


@given(case=lens, unused=st.integers(0, 2), part=slices)
def test_examples_are_those_of_a_list(device, case, unused, part):
    batch, examples = make(*split(case), device, unused)
    assert len(batch) == len(examples) and bool(batch) == (len(examples) > 0)
    for example, rows, (inputs, tapes) in zip(batch, examples, case, strict=True):
        assert (len(example.inputs), len(example.tape)) == (inputs, tapes)
        assert torch.cat(example).tolist() == rows
    for i in range(-len(examples), len(examples)):
        assert torch.cat(batch[i]).tolist() == examples[i]
    chosen = batch[part]
    assert [torch.cat(each).tolist() for each in chosen] == examples[part]
    assert chosen.exact and chosen.input_lens.tolist() == split(case[part])[0]
    again = ElasticBatch.from_offsets(chosen.data, chosen.cu_inputs, chosen.cu_tapes)
    for name in ("num_input_rows", "min_inputs", "max_inputs", "max_tapes"):
        assert getattr(chosen, name) == getattr(again, name)
    if examples:
        joined = ElasticBatch.from_examples(batch)
        used = int(batch.lens.sum())
        assert_same_bits(joined.data, batch.data[:used])
        assert_same_bits(joined.cu_inputs, batch.cu_inputs)
        assert_same_bits(joined.cu_tapes, batch.cu_tapes)


def test_examples_are_views_through_which_gradients_pass(device):
    batch, _ = make([2, 0, 3], [1, 2, 0], device)
    batch.requires_grad_()
    for number, (inputs, tape) in enumerate(batch, start=1):
        (number * inputs.sum() + 10 * number * tape.sum()).backward(retain_graph=True)
    expected = [1, 1, 3, 3, 3, 10, 20, 20]
    assert batch.data.grad[:, 0].tolist() == expected
    batch.data.grad = None
    batch[::-2].data.sum().backward()
    assert batch.data.grad[:, 0].tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert batch[0].inputs.data_ptr() == batch.data.data_ptr()


def test_a_slice_rounds_its_rows_up_as_the_batch_does(device):
    batch, _ = make([2, 1, 3], [1, 2, 0], device)
    rounded = batch.round_rows(8)[1:]
    assert rounded.row_multiple == 8 and rounded.data.shape == (8, DIM) and not rounded.exact
    assert rounded.lens.tolist() == [3, 3]


@pytest.mark.parametrize("index", [True, 1.0, "0", None, (0, 1), [0], torch.tensor(0)])
def test_what_is_no_index_is_refused(device, index):
    batch, _ = make([2, 1], [1, 2], device)
    with refused("index", error=TypeError):
        batch[index]


@pytest.mark.parametrize("index", [2, -3, 1 << 70])
def test_an_index_out_of_range_is_refused(device, index):
    batch, _ = make([2, 1], [1, 2], device)
    with refused("index", "2 examples", error=IndexError):
        batch[index]


def test_indices_of_numpy(device):
    batch, examples = make([2, 1], [1, 2], device)
    assert torch.cat(batch[np.int8(-1)]).tolist() == examples[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_makes_batches(workers):
    data = [torch.full((n, DIM), float(n)) for n in range(1, 6)]
    loader = DataLoader(
        data, batch_size=2, collate_fn=ElasticBatch.from_examples, num_workers=workers
    )
    assert [batch.lens.tolist() for batch in loader] == [[1, 2], [3, 4], [5]]


@pytest.mark.parametrize(
    ("examples", "argument", "error"),
    [
        ([], "examples", ValueError),
        (ROWS, "examples", TypeError),
        (None, "examples", TypeError),
        ([ROWS, 3], "examples[1]", TypeError),
        ([(ROWS, ROWS, ROWS)], "examples[0]", TypeError),
        ([(ROWS, 3)], "examples[0]", TypeError),
        ([[ROWS, ROWS]], "examples[0]", TypeError),
        ([ROWS[0]], "examples[0]", ValueError),
        ([ROWS, ROWS[:, 1:]], "examples[1]", ValueError),
        ([(ROWS, ROWS[:, 1:])], "examples[0]", ValueError),
        ([ROWS, ROWS.half()], "examples[1]", ValueError),
        ([ROWS, ROWS.to("meta")], "examples[1]", ValueError),
        ([ROWS.to_sparse()], "examples[0]", ValueError),
    ],
)
def test_from_examples_refuses(examples, argument, error):
    with refused(argument, error=error):
        ElasticBatch.from_examples(examples)


@given(case=lens, more=st.integers(0, 2))
def test_padding_to_a_length(device, case, more):
    batch, examples = make(*split(case), device, unused=2)
    batch.requires_grad_()
    longest = max(map(len, examples), default=0)
    padded, mask = batch.to_padded(longest + more)
    assert padded.shape == (len(case), longest + more, DIM)
    for i, rows in enumerate(examples):
        assert padded[i].tolist() == rows + [[0.0] * DIM] * (longest + more - len(rows))
        assert int(mask[i].sum()) == len(rows)
    (grad,) = torch.autograd.grad(padded.sum(), batch.data)
    assert (grad[: len(grad) - 2] == 1).all() and not grad[len(grad) - 2 :].any()


def test_padding_to_less_than_the_longest_is_refused():
    batch, _ = make([2, 1], [1, 2], "cpu")
    for wrong, error in ((2, ValueError), (-1, ValueError), (3.0, TypeError), (True, TypeError)):
        with refused("length", error=error):
            batch.to_padded(wrong)
