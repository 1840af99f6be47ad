"""What `tape_select` promises beyond its values: bits, poison, and torch's own checks."""

import math

import pytest
import torch
from checks import assert_same_bits, has_one_thread, interpreted, opcheck
from select_cases import OPTIONS, cotangents, gradients

from adatape_kernels import reference
from adatape_kernels.ops import tape_select
from adatape_kernels.ops.op import current_backend

OP = "tape_select"

SIZES = [  # batch, bank_size, key_dim, topk
    (1, 1, 1, 1),
    (37, 1, 64, 1),
    (5, 40, 1, 4),
    (67, 7, 5, 3),
    (70, 31, 16, 3),
    (6, 20_000, 64, 8),
    (3, 40, 1088, 32),
]


def had_elsewhere(device, backend, strides, size, shared, **parameters):
    """For `absent_if`: where kernels are interpreted a size and a kind of bank have one stride."""
    if not interpreted(device, backend):
        return None
    if strides == "transposed":
        return "the launcher copies such tensors; the other cases have the copy"
    cut = (SIZES.index(size) + shared) % 2 == 1
    return None if cut == (strides == "cut") else "the other kind of bank has these strides"


@pytest.mark.many_emulated_threads
@pytest.mark.absent_if(reason=had_elsewhere)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize("strides", ["contiguous", "transposed", "cut"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_an_example_s_bits_do_not_depend_on_its_batch(device, threads, size, strides, shared):
    """Alone, in the batch and in the permuted batch: outputs, and gradients that are its own."""
    batch, bank_size, key_dim, topk = size
    if interpreted(device):
        batch, bank_size = min(batch, 17 if shared else 4), min(bank_size, 1_100)
    elif current_backend() == "eager":  # torch has threads of its own from 32,768 elements on
        bank_size = min(bank_size, 5_000)
    width = key_dim + 2 if strides == "cut" else key_dim
    query = torch.randn(width, batch, device=device).mT
    keys = torch.randn(*([] if shared else [batch]), width, bank_size, device=device).mT
    if strides != "transposed":
        query, keys = query.contiguous(), keys.contiguous()
    query, keys = query[:, :key_dim] / key_dim**0.5, keys[..., :key_dim]
    options = dict(num_tape_tokens=3, topk=topk, halt_threshold=math.inf)
    given = [query, keys, *cotangents(batch, 3, topk, device=device)]
    together = gradients(tape_select, *given, **options)

    def some(examples):
        chosen = [x if x is keys and shared else x[examples] for x in given]
        return gradients(tape_select, *chosen, **options)

    order = torch.randperm(batch, device=device)
    alone = 2 if interpreted(device) else 5
    subsets = [order, *(slice(i, i + 1) for i in range(min(batch, alone)))]
    for subset in subsets:
        for a, e in list(zip(some(subset), together, strict=True))[: 5 if shared else 6]:
            assert_same_bits(a, e[subset])


@pytest.mark.several_threads
@pytest.mark.absent_if(reason=has_one_thread)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize("batch", [1, 6])
def test_bits_do_not_depend_on_the_number_of_threads(device, batch, shared):
    """Few examples of a large bank: threads may share out the examples or the bank."""
    query = torch.randn(batch, 64, device=device)
    keys = torch.randn(*([] if shared else [batch]), 20_000, 64, device=device)
    given = [query, keys, *cotangents(batch, 4, 3, device=device)]
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(gradients(tape_select, *given, **OPTIONS))
    for other in results[1:]:
        for a, e in zip(other, results[0], strict=True):
            assert_same_bits(a, e)


@pytest.mark.several_threads
@pytest.mark.absent_if(reason=has_one_thread)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_equal_rows_tie_where_threads_share_out_the_bank(device, shared):
    """Of two kinds of rows the better one is rare, and stands in every part of the bank."""
    rows = torch.randn(2, 64, device=device)
    query = rows[:1].clone()
    kinds = torch.ones(20_000, dtype=torch.long, device=device)
    kinds[torch.arange(500, 20_000, 499)] = 0
    keys = rows[kinds] if shared else rows[kinds][None]
    better = kinds.eq(0).nonzero().flatten().tolist()
    torch.set_num_threads(3)
    sel = tape_select(query, keys, num_tape_tokens=4, topk=8, halt_threshold=math.inf)
    assert sel.indices.flatten().tolist() == better[:32]


@pytest.mark.many_emulated_threads
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
def test_near_ties_fall_alike_in_any_batch(device, transposed):
    """Nine rows that differ by rounding: the order of a sum's additions decides, so it is fixed."""
    batch = 20 if interpreted(device) else 130
    query = torch.randn(64, batch, device=device).mT
    query = query if transposed else query.contiguous()
    keys = torch.randn(64, device=device) * (1 + 1e-7 * torch.randn(9, 64, device=device))
    options = dict(num_tape_tokens=1, topk=9, halt_threshold=1.0)
    together = tape_select(query, keys, **options).indices
    for i in range(batch):
        assert_same_bits(tape_select(query[i : i + 1], keys, **options).indices[0], together[i])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_another_example_s_poison_stays_with_it(device, shared, poison):
    assert_poison_stays_with_its_example(tape_select, device, shared, poison)


@pytest.mark.no_backend
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_poison_stays_with_its_example_in_the_reference_too(device, shared, poison):
    assert_poison_stays_with_its_example(reference.tape_select, device, shared, poison)


def assert_poison_stays_with_its_example(select, device, shared, poison):
    query = torch.randn(4, 6, device=device)
    keys = torch.randn(*([] if shared else [4]), 20, 6, device=device)
    given = [query, keys, *cotangents(4, 4, 3, device=device)]
    clean = gradients(select, *given, **OPTIONS)
    poisoned = [x.clone() for x in given]
    for x in poisoned:
        if not (x.shape == keys.shape and shared):
            x[2] = poison
    dirty = gradients(select, *poisoned, **OPTIONS)
    others = [0, 1, 3]
    for n in range(5):
        assert_same_bits(dirty[n][others], clean[n][others])
    if not shared:
        assert_same_bits(dirty[5][others], clean[5][others])
        return
    read = dirty[0][2][dirty[0][2] >= 0].long()
    untouched = torch.ones(20, dtype=torch.bool, device=device)
    untouched[read] = False
    assert untouched.any() and dirty[5][untouched].isfinite().all()


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize("poison", [math.nan, -math.inf, math.inf])
def test_entries_that_are_not_read_leak_nothing(device, poison, shared):
    assert_unread_entries_leak_nothing(tape_select, device, poison, shared)


@pytest.mark.no_backend
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize("poison", [math.nan, -math.inf, math.inf])
def test_entries_that_are_not_read_leak_nothing_in_the_reference(device, poison, shared):
    assert_unread_entries_leak_nothing(reference.tape_select, device, poison, shared)


def assert_unread_entries_leak_nothing(select, device, poison, shared):
    """Masked and missing entries may hold anything; unread valid ones NaN, which ranks last."""
    query = torch.randn(3, 6, device=device)
    keys = torch.randn(*([] if shared else [3]), 30, 6, device=device)
    mask = torch.rand(1, 30, device=device).expand(3, 30) < 0.3
    options = dict(OPTIONS, read_mask=mask, bank_lens=torch.full((3,), 25, device=device))
    given = [query, keys, *cotangents(3, 4, 3, device=device)]
    clean = gradients(select, *given, **options)
    poisoned = keys.clone()
    poisoned[..., mask[0], :] = poison
    poisoned[..., 25:, :] = poison
    if math.isnan(poison):
        read = torch.zeros(3, 31, dtype=torch.bool, device=device)
        read.scatter_(1, clean[0].flatten(1).long() % 31, True)
        poisoned[~read[:, :30].any(0) if shared else ~read[:, :30]] = poison
    for a, e in zip(gradients(select, query, poisoned, *given[2:], **options), clean, strict=True):
        assert_same_bits(a, e)


@pytest.mark.compiles
@pytest.mark.parametrize("batch", [0, 1, 4])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("limited", [False, True], ids=["whole", "limited"])
@pytest.mark.parametrize("num_tape_tokens", [0, 3])
def test_opcheck(device, num_tape_tokens, limited, requires_grad, batch):
    query = torch.randn(6, batch, device=device).mT.requires_grad_(requires_grad)
    keys = torch.randn(batch, 9, 8, device=device)[..., :6].requires_grad_(requires_grad)
    mask = torch.zeros(batch, 9, dtype=torch.bool, device=device) if limited else None
    lens = torch.full((batch,), 7, dtype=torch.int32, device=device) if limited else None
    args = (query, keys, num_tape_tokens, 2, 1.4, True, "entropy", mask, lens)
    opcheck(torch.ops.adatape.tape_select.default, args)


@pytest.mark.compiles
@pytest.mark.parametrize("num_tape_tokens", [0, 3])
def test_opcheck_of_the_backward(device, num_tape_tokens):
    query, keys = torch.randn(6, 4, device=device).mT, torch.randn(6, 9, device=device).mT
    sel = tape_select(query, keys, **{**OPTIONS, "num_tape_tokens": num_tape_tokens})
    args = (query, keys, sel.weights, sel.ponder, sel.indices, sel.counts, True, "max")
    opcheck(torch.ops.adatape.tape_select_bwd.default, args)


@pytest.mark.compiles
def test_compiles_once_for_all_sizes(fresh_compiler, device):
    def eager(query, keys, num_tape_tokens, mask):
        return tape_select(
            query, keys, num_tape_tokens=num_tape_tokens, topk=2, halt_threshold=1.5, read_mask=mask
        )

    compiled = torch.compile(eager, fullgraph=True, dynamic=True)
    sizes = [(3, 7, 4, 3), (5, 12, 6, 5), (2, 30, 9, 8)]
    for n, (batch, bank_size, key_dim, steps) in enumerate(sizes):
        query = torch.randn(batch, key_dim, device=device)
        keys = torch.randn(batch, bank_size, key_dim, device=device)
        mask = torch.rand(batch, bank_size, device=device) < 0.2
        given = [query, keys, *cotangents(batch, steps, 2, device=device)]
        options = dict(num_tape_tokens=steps, mask=mask)
        with torch.compiler.set_stance("fail_on_recompile" if n else "default"):
            actual = gradients(compiled, *given, **options)
        for a, e in zip(actual, gradients(eager, *given, **options), strict=True):
            assert_same_bits(a, e)
