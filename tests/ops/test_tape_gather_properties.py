"""What `tape_gather` promises beyond its values: bits, poison, copies, and torch's own checks."""

import contextlib
import math

import pytest
import torch
from checks import assert_close, assert_same_bits, has_one_thread, interpreted, opcheck
from gather_cases import COUNTS, cotangent, gradients, read

from adatape_kernels import reference
from adatape_kernels.ops import tape_gather, triton_runtime
from adatape_kernels.ops.op import current_backend, operation

OP = "tape_gather"


@pytest.mark.many_emulated_threads
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize("size", [(1, 1, 1), (70, 1, 1), (33, 5, 1), (33, 384, 5), (9, 1088, 32)])
def test_an_example_s_bits_do_not_depend_on_its_batch(device, threads, size, shared):
    """Alone, in the batch and in the permuted batch; dweights, and dbank where it is its own.

    On a GPU torch adds up eager's dweights in an order that follows how many there are.
    """
    batch, dim, topk = size
    of_torch = current_backend() == "eager" and torch.device(device).type == "cuda"
    if interpreted(device):
        batch, dim = min(batch, 3), min(dim, 300)
    counts = torch.randint(0, 4, (batch,)).tolist()
    given = read(device, counts=counts, steps=3, topk=topk, bank_size=40, dim=dim, shared=shared)
    bank = given[0]
    dtape = cotangent(bank, given[3])
    tape, offsets, dbank, dweights = gradients(tape_gather, *given, dtape)
    rows = [torch.arange(offsets[i], offsets[i + 1], device=device) for i in range(batch)]

    orders = [torch.randperm(batch).tolist(), *([i] for i in range(batch))]
    for order in orders:
        chosen = [x if x is bank and shared else x[order] for x in given]
        own = torch.cat([rows[i] for i in order])
        for capacity in (None, len(own) + 2):
            pad = 0 if capacity is None else 2
            padded = torch.nn.functional.pad(dtape[own], (0, 0, 0, pad), value=math.nan)
            actual = gradients(tape_gather, *chosen, padded, capacity=capacity)
            assert_same_bits(actual[0][: len(own)], tape[own])
            if of_torch:
                assert_close(actual[3], dweights[order], 1e-5)
            else:
                assert_same_bits(actual[3], dweights[order])
            if not shared:
                assert_same_bits(actual[2], dbank[order])


@pytest.mark.several_threads
@pytest.mark.absent_if(reason=has_one_thread)
def test_bits_do_not_depend_on_the_number_of_threads(device):
    given = read(device, counts=[10] * 64, steps=10, topk=5, bank_size=200, dim=384, shared=True)
    dtape = cotangent(given[0], given[3])
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(gradients(tape_gather, *given, dtape))
    for other in results[1:]:
        for a, e in zip(other, results[0], strict=True):
            assert_same_bits(a, e)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_poison_stays_where_it_is(device, shared):
    assert_poison_stays_where_it_is(tape_gather, device, shared)


@pytest.mark.no_backend
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_poison_stays_where_it_is_in_the_reference_too(device, shared):
    assert_poison_stays_where_it_is(reference.tape_gather, device, shared)


def assert_poison_stays_where_it_is(gather, device, shared):
    """NaN in example 2's weights, gradient and bank, in unread entries and in unused rows."""
    bank, indices, weights, counts = read(device, shared=shared, bank_size=30)
    dtape = cotangent(bank, counts, 10)
    clean = gradients(gather, bank, indices, weights, counts, dtape, capacity=10)
    bank, weights, dtape = bank.clone(), weights.clone(), dtape.clone()
    weights[2], dtape[8:] = math.nan, math.nan
    offsets = clean[1].tolist()
    dtape[offsets[2] : offsets[3]] = math.nan
    read_by = [set(indices[i, :n].flatten().tolist()) for i, n in enumerate(COUNTS)]
    for i in range(4):
        own = set().union(*read_by) if shared else read_by[i]
        unread = [m for m in range(30) if m not in own]
        (bank if shared else bank[i])[unread] = math.nan
    if not shared:
        bank[2] = math.nan
    tape, _, dbank, dweights = gradients(gather, bank, indices, weights, counts, dtape, capacity=10)
    for i in (0, 1, 3):
        assert_same_bits(tape[offsets[i] : offsets[i + 1]], clean[0][offsets[i] : offsets[i + 1]])
        assert_same_bits(dweights[i], clean[3][i])
        if not shared:
            assert_same_bits(dbank[i], clean[2][i])
    assert not tape[8:].any()
    if shared:
        others = [m for m in range(30) if m not in read_by[2]]
        assert_same_bits(dbank[others], clean[2][others])


def test_capacity_copies_nothing_to_the_host():
    """Tensors without data have nothing to copy."""
    with triton_runtime.recording() as launches, torch.device("meta"):
        bank, counts = torch.empty(30, 16), torch.empty(4, dtype=torch.int32)
        indices, weights = torch.empty(4, 6, 3, dtype=torch.int32), torch.empty(4, 6, 3)
        forward, backward = (
            operation(op).implementations["triton"].function for op in (OP, "tape_gather_bwd")
        )
        tape, _ = forward(bank, indices, weights, counts, 24)
        backward(tape, bank, indices, weights, counts)
    assert len(launches) == 6


@pytest.mark.compiles
@pytest.mark.parametrize("batch", [0, 4])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("capacity", [None, 9])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_opcheck(device, shared, capacity, requires_grad, batch):
    bank, indices, weights, counts = read(device, counts=COUNTS[:batch], shared=shared)
    weights = weights.nan_to_num(0).permute(2, 1, 0).contiguous().permute(2, 1, 0)
    floats = [x.requires_grad_(requires_grad) for x in (bank, weights)]
    args = (floats[0], indices, floats[1], counts, capacity)
    opcheck(torch.ops.adatape.tape_gather.default, args)


@pytest.mark.compiles
def test_opcheck_of_the_backward(device):
    bank, indices, weights, counts = read(device)
    args = (cotangent(bank, counts), bank.mT.contiguous().mT, indices, weights, counts)
    opcheck(torch.ops.adatape.tape_gather_bwd.default, args)


@pytest.mark.compiles
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "capacity"])
def test_compiles_once_for_all_sizes(fresh_compiler, device, exact):
    """Exact sizes need torch's own switch for outputs sized by data; a capacity needs nothing."""
    compiled = torch.compile(tape_gather, fullgraph=True, dynamic=True)
    switch = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
    sizes = [
        ([2, 5, 0, 1], 6, 7, 9),
        ([4, 1], 5, 5, 8),
        ([1, 0, 1, 2], 2, 11, 3),
        ([0, 0], 3, 5, 4),
    ]
    with switch if exact else contextlib.nullcontext():
        for n, (counts, steps, bank_size, dim) in enumerate(sizes):
            given = read(device, counts=counts, steps=steps, bank_size=bank_size, dim=dim)
            capacity = None if exact else sum(counts) + 2 + n
            given = [*given, cotangent(given[0], given[3], capacity)]
            with torch.compiler.set_stance("fail_on_recompile" if n else "default"):
                actual = gradients(compiled, *given, capacity=capacity)
            expected = gradients(tape_gather, *given, capacity=capacity)
            for a, e in zip(actual, expected, strict=True):
                assert_same_bits(a, e)
