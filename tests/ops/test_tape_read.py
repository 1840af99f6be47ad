"""The two ops that it is composed of have tests of their own; here, what the composition adds."""

import pytest
import torch
from checks import assert_close, assert_same_bits, opcheck, refused

from adatape_kernels.ops import tape_gather, tape_read, tape_select

OP = ("tape_select", "tape_gather")
BATCH, BANK, DIM, KEY = 4, 9, 6, 3
OPTIONS = dict(num_tape_tokens=3, topk=2, halt_threshold=1.4)


def given(device, shared, dtype=torch.float32):
    shape = (BANK, DIM) if shared else (BATCH, BANK, DIM)
    query, bank = torch.randn(BATCH, KEY, device=device), torch.randn(shape, device=device)
    return query.to(dtype).requires_grad_(), bank.to(dtype).requires_grad_()


def composed(query, bank, *, capacity=None, **options):
    selection = tape_select(query, bank[..., : query.shape[1]], **options)
    tape, offsets = tape_gather(
        bank, selection.indices, selection.weights, selection.counts, capacity=capacity
    )
    return tape, offsets, selection


def results(read, query, bank, **options):
    """Outputs, and gradients through tape, weights and ponder."""
    tape, offsets, selection = read(query, bank, **{**OPTIONS, **options})
    objective = (tape.float() * torch.arange(1.0, DIM + 1, device=tape.device)).sum()
    objective = objective + selection.weights.square().sum() + (3 * selection.ponder).sum()
    grads = torch.autograd.grad(objective, (query, bank))
    return [tape.detach(), offsets, *(x.detach() for x in selection)], grads


@pytest.mark.parametrize("capacity", [None, 20])
@pytest.mark.parametrize("shared", [True, False], ids=["learnable", "input-driven"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_what_the_two_ops_compose_to(device, dtype, shared, capacity):
    query, bank = given(device, shared, dtype)
    read_mask = torch.rand(BATCH, BANK, device=device) < 0.2
    options = dict(capacity=capacity, read_mask=read_mask, loss_type="max")
    actual, grads = results(tape_read, query, bank, **options)
    expected, expected_grads = results(composed, query, bank, **options)
    for a, e in zip(actual, expected, strict=True):
        assert_same_bits(a, e)
    for a, e in zip(grads, expected_grads, strict=True):
        assert a.dtype == dtype
        assert_close(a, e.double(), 1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float64])
@pytest.mark.parametrize("shared", [True, False], ids=["learnable", "input-driven"])
def test_gradcheck(device, dtype, shared):
    query, bank = given(device, shared, dtype)

    def read(query, bank):
        tape, _, selection = tape_read(query, bank, **OPTIONS)
        return tape, selection.weights, selection.ponder

    assert torch.autograd.gradcheck(read, (query, bank))


@pytest.mark.compiles
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("batch", [0, BATCH])
@pytest.mark.parametrize("capacity", [None, 20])
def test_opcheck(device, batch, requires_grad, capacity):
    query, bank = (x.detach()[:batch].requires_grad_(requires_grad) for x in given(device, False))
    args = (query, bank, 3, 2, 1.4, True, "entropy", None, None, capacity)
    opcheck(torch.ops.adatape.tape_read.default, args)


@pytest.mark.compiles
def test_compiles_once_for_all_sizes(fresh_compiler, device):
    compiled = torch.compile(tape_read, fullgraph=True, dynamic=True)
    for n, (batch, size) in enumerate([(4, 9), (3, 12), (6, 8)]):
        query, bank = torch.randn(batch, KEY, device=device), torch.randn(batch, size, DIM)
        bank = bank.to(device).requires_grad_()
        query.requires_grad_()
        with torch.compiler.set_stance("fail_on_recompile" if n else "default"):
            actual, grads = results(compiled, query, bank, capacity=30)
        expected, expected_grads = results(tape_read, query, bank, capacity=30)
        for a, e in zip([*actual, *grads], [*expected, *expected_grads], strict=True):
            assert_same_bits(a, e)


def test_counts_the_flops_of_both(device):
    from torch.utils.flop_counter import FlopCounterMode

    query, bank = given(device, False)
    counted = []
    for read in (tape_read, composed):
        with FlopCounterMode(display=False) as counter:
            read(query, bank, **OPTIONS)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize(
    ("argument", "changed", "parts"),
    [
        ("query", dict(query=torch.zeros(BATCH)), ["(batch, key_dim)", "(4,)"]),
        ("bank", dict(bank=torch.zeros(BATCH, BANK, 2)), ["at least key_dim = 3", "(4, 9, 2)"]),
        ("bank", dict(bank=torch.zeros(DIM)), ["at least key_dim = 3", "(6,)"]),
        ("bank", dict(bank=torch.zeros(1, BATCH, BANK, DIM)), ["key_dim = 3", "(1, 4, 9, 6)"]),
        ("bank", dict(bank=torch.zeros(5, BANK, DIM)), ["batch 4", "(5, 9, 3)"]),
        ("bank", dict(bank=torch.zeros(1, DIM)), ["topk = 2", "got 1"]),
        ("bank", dict(bank=torch.zeros(BANK, DIM).to_sparse()), ["torch.strided", "sparse_coo"]),
        ("topk", dict(topk=0), ["1 to 32", "got 0"]),
        ("capacity", dict(capacity=-1), ["0 or more", "got -1"]),
    ],
)
def test_bad_input_is_refused(argument, changed, parts):
    good = dict(query=torch.zeros(BATCH, KEY), bank=torch.zeros(BATCH, BANK, DIM))
    with refused(argument, *parts):
        tape_read(**{**good, **OPTIONS, **changed})
