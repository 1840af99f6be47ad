"""A read whose gradient goes to copies of the rows that were read: `tape_read_again`."""

import pytest
import torch
from checks import assert_close, assert_same_bits, refused

from adatape_kernels.layers.recomputed_bank import recomputed, rows_of_selection
from adatape_kernels.ops import fast_autograd, tape_read, tape_select
from adatape_kernels.ops.tape_read import tape_read_again

OP = ("tape_select", "tape_gather", "tape_read")
BATCH, BANK, DIM, KEY = 5, 17, 6, 3
OPTIONS = dict(num_tape_tokens=3, topk=2, halt_threshold=1.4)
OTHERWISE = dict(loss_type="max", average_query=False, capacity=20)


def given(device, dtype, batch=BATCH):
    query, bank = torch.randn(batch, KEY, device=device), torch.randn(batch, BANK, DIM)
    bank_lens = torch.tensor([BANK, 0, 2, 1, 9], device=device)[:batch]  # three reads, none, one …
    tensors = query.to(dtype).requires_grad_(), bank.to(device, dtype).requires_grad_()
    return *tensors, {**OPTIONS, "bank_lens": bank_lens}


def again(query, bank, *, average_query=True, loss_type="entropy", capacity=None, **options):
    """What `tape_read` returns, by way of copied rows."""
    ways = dict(average_query=average_query, loss_type=loss_type)
    dense = recomputed(bank)
    with torch.no_grad():
        selection = tape_select(query, dense.entries[..., : query.shape[1]], **options, **ways)
    rows = dense.rows(*rows_of_selection(selection.indices, bank.shape[1]))
    return tape_read_again(query, rows, dense.entries, selection, **ways, capacity=capacity)


def results(read, query, bank, ends=("tape", "weights", "ponder"), **options):
    tape, offsets, selection = read(query, bank, **options)
    parts = {
        "tape": (tape.float() * torch.arange(1.0, DIM + 1, device=tape.device)).sum(),
        "weights": selection.weights.square().sum(),
        "ponder": (3 * selection.ponder).sum(),
    }
    objective = sum(parts[end].double() for end in ends)
    grads = torch.autograd.grad(objective, (query, bank))
    return [tape.detach(), offsets, *(x.detach() for x in selection)], grads


@pytest.mark.parametrize("options", [{}, OTHERWISE], ids=["", "otherwise"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_results_and_gradients_are_those_of_tape_read(device, dtype, options):
    query, bank, reading = given(device, dtype)
    options = {**reading, **options}
    actual, grads = results(again, query, bank, **options)
    expected, expected_grads = results(tape_read, query, bank, **options)
    for a, e in zip([*actual, *grads], [*expected, *expected_grads], strict=True):
        assert_same_bits(a, e)


def along(query, bank, *, average_query=True, loss_type="entropy", capacity=None, **options):
    """What `tape_read` returns, of a selection by a bank that has its gradient as a whole."""
    ways = dict(average_query=average_query, loss_type=loss_type)
    entries = bank.detach()
    with torch.no_grad():
        selection = tape_select(query, entries[..., : query.shape[1]], **options, **ways)
    places = selection.indices
    return tape_read_again(
        query, bank, entries, selection, **ways, capacity=capacity, places=places
    )


@pytest.mark.parametrize("options", [{}, OTHERWISE], ids=["", "otherwise"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
def test_the_bank_itself_in_the_place_of_copies(device, dtype, options, shared):
    query, bank, reading = given(device, dtype)
    bank = bank.detach()[0].requires_grad_() if shared else bank
    options = {**reading, **options}
    actual, grads = results(along, query, bank, **options)
    expected, expected_grads = results(tape_read, query, bank, **options)
    for a, e in zip([*actual, *grads], [*expected, *expected_grads], strict=True):
        assert_same_bits(a, e)


@pytest.mark.parametrize("ends", [("tape",), ("ponder",), ("weights", "ponder")])
def test_some_of_the_results_alone(device, ends):
    query, bank, options = given(device, torch.float32)
    _, grads = results(again, query, bank, ends, **options)
    _, expected = results(tape_read, query, bank, ends, **options)
    for a, e in zip(grads, expected, strict=True):
        assert_same_bits(a, e)


def test_no_examples(device):
    query, bank, options = given(device, torch.float32, 0)
    actual, grads = results(again, query, bank, **options)
    assert actual[0].shape == (0, DIM) and actual[1].tolist() == [0]
    assert [g.shape for g in grads] == [query.shape, bank.shape]


@pytest.mark.parametrize("dtype", [torch.float64])
def test_gradcheck(device, dtype):
    query, bank, options = given(device, dtype, 1)
    bank = bank.detach()[:, :5].requires_grad_()
    options["bank_lens"] = None

    def read(query, bank):
        tape, _, selection = again(query, bank, **options)
        return tape, selection.weights, selection.ponder

    assert torch.autograd.gradcheck(read, (query, bank))
    assert torch.autograd.gradgradcheck(read, (query, bank))


@pytest.mark.skipif(
    not fast_autograd.SINGLE_LEVEL, reason="this torch applies autograd functions in C++"
)
@pytest.mark.parametrize("dtype", [torch.float64])
def test_tangents_are_those_of_tape_read(device, dtype):
    query, bank, options = given(device, dtype)
    moved = torch.randn_like(query), torch.randn_like(bank)

    def tangents(read):
        def function(query, bank):
            tape, _, selection = read(query, bank, **options)
            return tape, selection.weights, selection.ponder

        return torch.func.jvp(function, (query.detach(), bank.detach()), moved)[1]

    for a, e in zip(tangents(again), tangents(tape_read), strict=True):
        assert_close(a, e, 1e-12)


@pytest.mark.compiles
@pytest.mark.backends("eager", "cpp")
@pytest.mark.parametrize(("batch", "capacity"), [(BATCH, None), (0, 20)])
def test_opcheck(device, batch, capacity):
    query, bank, options = given(device, torch.float32, batch)
    with torch.no_grad():
        read = tape_select(query, bank[..., :KEY], **options)
    rows = recomputed(bank).rows(*rows_of_selection(read.indices, BANK)).detach()
    places = torch.arange(6, dtype=torch.int32, device=device).view(1, 3, 2).repeat(batch, 1, 1)
    args = (query, rows.requires_grad_(), bank.detach(), places, read.indices, read.weights)
    args = (*args, read.ponder, read.counts, True, "entropy", capacity)
    torch.library.opcheck(torch.ops.adatape.tape_read_again.default, args)


def test_counts_what_it_gathers(device):
    from torch.utils.flop_counter import FlopCounterMode

    query, bank, options = given(device, torch.float32)
    with FlopCounterMode(display=False) as counter:
        again(query, bank, **options)
        reading = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        tape_read(query, bank, **options)
    # The rest is the read's, whose entries tape_select does not count by their lengths either.
    assert reading == counter.get_total_flops() > 0


def test_a_bad_capacity_is_refused(device):
    query, bank, options = given(device, torch.float32)
    with refused("capacity", "0 or more", "got -1"):
        again(query, bank, **options, capacity=-1)


def test_a_bank_that_ends_the_read_has_no_rows_for_the_other_steps():
    indices = torch.tensor([[[3, 1], [0, 2], [-1, -1]], [[4, 0], [-1, -1], [-1, -1]]])
    places, read = rows_of_selection(indices.int(), bank_size=5)
    assert places.tolist() == [[3, 1, 0, 2], [4, 0, 0, 0]]
    assert read.tolist() == [[True] * 4, [True, True, False, False]]
