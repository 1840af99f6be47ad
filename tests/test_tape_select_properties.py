import math

import pytest
import torch
from checks import assert_close, assert_low_precision, assert_same_bits, interpreted
from hypothesis import given
from hypothesis import strategies as st
from test_tape_select import assert_matches_literal

from adatape_kernels import reference
from adatape_kernels.ops import tape_select
from adatape_kernels.ops.op import current_backend, operation

OP = "tape_select"
OPTIONS = dict(num_tape_tokens=4, topk=3, halt_threshold=1.2)


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


@pytest.mark.parametrize("dtype", [torch.float64])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize("loss_type", ["entropy", "max"])
@pytest.mark.parametrize("average_query", [True, False], ids=["average", "replace"])
def test_gradcheck(device, dtype, average_query, loss_type, shared):
    """Gaps between the scores are far wider than gradcheck's steps of 1e-6."""
    query = torch.randn(3, 5, dtype=dtype, device=device, requires_grad=True)
    shape = (9, 5) if shared else (3, 9, 5)
    keys = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)

    def outputs(query, keys):
        sel = tape_select(query, keys, average_query=average_query, loss_type=loss_type, **OPTIONS)
        return sel.weights, sel.ponder

    assert torch.autograd.gradcheck(outputs, (query, keys))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize("loss_type", ["entropy", "max"])
@pytest.mark.parametrize("average_query", [True, False], ids=["average", "replace"])
@pytest.mark.parametrize("topk", [1, 4, 32])
def test_backward_is_the_reference_s(device, dtype, topk, average_query, loss_type, shared):
    """The closed form against autograd of the float64 reference; equal rows tie in "max"."""
    query = torch.randn(6, 16, device=device, dtype=dtype)
    rows = torch.randn(*([] if shared else [6]), 60, 16, device=device, dtype=dtype)
    keys = torch.cat([rows, rows[..., :20, :]], -2)
    given = [query, keys, *cotangents(6, 5, topk, device=device, dtype=dtype)]
    options = dict(num_tape_tokens=5, topk=topk, halt_threshold=1.7)
    options |= dict(average_query=average_query, loss_type=loss_type)
    actual = gradients(tape_select, *given, **options)
    expected = gradients(reference.tape_select, *(x.double() for x in given), **options)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, tolerance)


@pytest.fixture
def nondeterministic():
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_backward_without_a_fixed_order(nondeterministic, device, dtype):
    """Outside deterministic mode a shared bank's gradient may be summed in any order."""
    query = torch.randn(6, 16, device=device).to(dtype)
    keys = torch.randn(20, 16, device=device).to(dtype)
    given = [query, keys, *cotangents(6, 5, 3, device=device)]
    options = dict(OPTIONS, num_tape_tokens=5)
    *_, dquery, dkeys = gradients(tape_select, *given, **options)
    *_, exact_dquery, exact_dkeys = gradients(
        reference.tape_select, *(x.double() for x in given), **options
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert_close(dquery, exact_dquery, tolerance)
    assert_close(dkeys, exact_dkeys, tolerance)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_corrupt_indices_and_counts_stay_inside(device, shared):
    """A GPU's cannot be checked without a copy to the host: the kernel may read no further."""
    if current_backend() != "triton":
        pytest.skip("eager and C++ take only what tape_select returned")
    query, keys = torch.randn(3, 6, device=device), torch.randn(3, 9, 6, device=device)
    keys = keys[0] if shared else keys
    dweights, dponder = cotangents(3, 4, 2, device=device)
    indices = torch.tensor([-(2**31), -1, 9, 2**31 - 1], dtype=torch.int32, device=device)
    indices = indices.view(1, 4, 1).expand(3, 4, 2)
    counts = torch.tensor([-5, 4, 2**31 - 1], dtype=torch.int32, device=device)
    dquery, dkeys = (
        operation("tape_select_bwd")
        .implementations["triton"]
        .function(query, keys, dweights, dponder, indices, counts, True, "entropy")
    )
    assert dquery.shape == query.shape and dkeys.shape == keys.shape
    assert not dquery[0].any()


@pytest.mark.parametrize("output", ["weights", "ponder"])
def test_gradient_of_one_output_alone(device, output):
    query, keys = torch.randn(3, 5, device=device), torch.randn(9, 5, device=device)
    dweights, dponder = cotangents(3, 4, 3, device=device)
    (dponder if output == "weights" else dweights).zero_()
    *_, dquery, dkeys = gradients(tape_select, query, keys, dweights, dponder, **OPTIONS)
    query.requires_grad_()
    keys.requires_grad_()
    sel = tape_select(query, keys, **OPTIONS)
    getattr(sel, output).backward(dweights if output == "weights" else dponder)
    assert_same_bits(query.grad, dquery)
    assert_same_bits(keys.grad, dkeys)


def test_strided_inputs_and_gradients(device):
    """Views and expanded gradients, as sum().backward() makes, give what contiguous ones give."""
    query, keys = torch.randn(5, 7, device=device).mT, torch.randn(7, 8, 12, device=device).mT
    keys = keys[..., :5]
    views = [
        torch.randn(3, 4, 7, device=device).permute(2, 1, 0),
        torch.tensor(2.0, device=device).expand(7),
    ]
    strided = gradients(tape_select, query, keys, *views, **OPTIONS)
    copies = [x.contiguous() for x in (query, keys, *views)]
    for a, e in zip(strided, gradients(tape_select, *copies, **OPTIONS), strict=True):
        assert_same_bits(a, e)
    query, keys = query.requires_grad_(), keys.requires_grad_()
    sel = tape_select(query, keys, **OPTIONS)
    (sel.weights.sum() + sel.ponder.sum()).backward()
    *_, dquery, dkeys = gradients(
        tape_select, query, keys, torch.ones_like(sel.weights), torch.ones_like(sel.ponder),
        **OPTIONS,
    )  # fmt: skip
    assert_same_bits(query.grad, dquery)
    assert_same_bits(keys.grad, dkeys)
    assert dquery.is_contiguous() and dkeys.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(device, dtype):
    """The entries are chosen from exact products; plain torch, in `dtype`, is told them."""
    query = torch.randn(8, 32, device=device).to(dtype)
    keys = torch.randn(8, 50, 32, device=device).to(dtype)
    dweights, dponder = cotangents(8, 4, 3, device=device)
    given = (query, keys, dweights, dponder)
    actual = gradients(tape_select, *given, **OPTIONS)
    exact = gradients(reference.tape_select, *(x.double() for x in given), **OPTIONS)
    assert torch.equal(actual[0], exact[0])

    def plain(query, keys, **options):
        weights, ponder = torch.zeros_like(dweights, dtype=dtype), torch.zeros_like(query[:, 0])
        for s in range(4):
            used = actual[0][:, s, :1] >= 0
            index = actual[0][:, s, :, None].long().clamp(min=0).expand(-1, -1, 32)
            rows = keys.gather(1, index)
            w = torch.softmax((rows @ query[..., None]).squeeze(-1) / math.sqrt(32), -1)
            merged = (w[:, None] @ rows).squeeze(1)
            query = torch.where(used, (query + merged) / 2, query)
            weights[:, s] = w.where(used, 0)
            ponder = ponder + (1 - w.square().sum(-1)).where(used[:, 0], 0)
        return reference.TapeSelection(actual[0], weights, actual[2], ponder)

    rounded = gradients(plain, query, keys, dweights.to(dtype), dponder.to(dtype))
    assert actual[-1].dtype == actual[-2].dtype == dtype
    for n in (1, 3, 4, 5):  # weights, ponder, dquery, dkeys
        assert_low_precision(actual[n], rounded[n], exact[n], floor=1e-6)


SIZES = [  # batch, bank_size, key_dim, topk
    (1, 1, 1, 1),
    (37, 1, 64, 1),
    (5, 40, 1, 4),
    (67, 7, 5, 3),
    (70, 31, 16, 3),
    (6, 20_000, 64, 8),
    (3, 40, 1088, 32),
]


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize("strides", ["contiguous", "transposed", "cut"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_an_example_s_bits_do_not_depend_on_its_batch(device, threads, size, strides, shared):
    """Alone, in the batch and in the permuted batch: outputs, and gradients that are its own."""
    batch, bank_size, key_dim, topk = size
    if interpreted(device):
        if threads > 1:
            pytest.skip("the interpreter has one thread")
        if strides == "transposed":
            pytest.skip("the launcher copies such tensors; the other cases have the copy")
        batch, bank_size = min(batch, 17 if shared else 4), min(bank_size, 1_100)
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


def test_bits_do_not_depend_on_the_number_of_threads(device):
    if interpreted(device):
        pytest.skip("the interpreter has one thread")
    query, keys = torch.randn(6, 64, device=device), torch.randn(6, 20_000, 64, device=device)
    given = [query, keys, *cotangents(6, 4, 3, device=device)]
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(gradients(tape_select, *given, **OPTIONS))
    for other in results[1:]:
        for a, e in zip(other, results[0], strict=True):
            assert_same_bits(a, e)


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


@pytest.mark.parametrize("select", [tape_select, reference.tape_select], ids=["op", "reference"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_another_example_s_poison_stays_with_it(device, select, shared, poison):
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
@pytest.mark.parametrize("select", [tape_select, reference.tape_select], ids=["op", "reference"])
@pytest.mark.parametrize("poison", [math.nan, -math.inf, math.inf])
def test_entries_that_are_not_read_leak_nothing(device, select, poison, shared):
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


def test_gradients_of_unused_rows_are_not_read(device):
    query, keys = torch.randn(3, 6, device=device), torch.randn(3, 9, 6, device=device)
    dweights, dponder = cotangents(3, 4, 3, device=device)
    clean = gradients(tape_select, query, keys, dweights, dponder, **OPTIONS)
    unused = torch.arange(4, device=device) >= clean[2][:, None]
    assert unused.any()
    dweights[unused] = math.nan
    for a, e in zip(
        gradients(tape_select, query, keys, dweights, dponder, **OPTIONS), clean, strict=True
    ):
        assert_same_bits(a, e)


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
    torch.library.opcheck(torch.ops.adatape.tape_select.default, args)


@pytest.mark.parametrize("num_tape_tokens", [0, 3])
def test_opcheck_of_the_backward(device, num_tape_tokens):
    query, keys = torch.randn(6, 4, device=device).mT, torch.randn(6, 9, device=device).mT
    sel = tape_select(query, keys, **{**OPTIONS, "num_tape_tokens": num_tape_tokens})
    args = (query, keys, sel.weights, sel.ponder, sel.indices, sel.counts, True, "max")
    torch.library.opcheck(torch.ops.adatape.tape_select_bwd.default, args)


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


@st.composite
def reads(draw):
    """Small integers in query and keys, so that the first scores tie often and exactly."""
    batch, topk = draw(st.integers(0, 3)), draw(st.integers(1, 4))
    bank_size, key_dim = draw(st.integers(topk, 9)), draw(st.integers(1, 3))
    number = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 3.0, math.inf, math.nan])

    def tensor(*shape):
        size = math.prod(shape)
        return torch.tensor(draw(st.lists(number, min_size=size, max_size=size))).view(shape)

    mask = draw(st.lists(st.booleans(), min_size=batch * bank_size, max_size=batch * bank_size))
    lens = draw(st.lists(st.integers(0, bank_size), min_size=batch, max_size=batch))
    return dict(
        query=tensor(batch, key_dim),
        keys=tensor(batch, bank_size, key_dim),
        read_mask=torch.tensor(mask, dtype=torch.bool).view(batch, bank_size),
        bank_lens=torch.tensor(lens, dtype=torch.int32),
        topk=topk,
        halt_threshold=draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, math.inf])),
    )


@given(case=reads())
def test_one_step_with_any_ties_matches_the_literal_loop(device, case):
    """One step: after it, a merged query may tie in exact arithmetic and differ by rounding."""
    case = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in case.items()}
    assert_matches_literal(**case, num_tape_tokens=1)
