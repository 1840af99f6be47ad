import contextlib
import math
import sys

import literal
import pytest
import torch
from checks import assert_close, assert_low_precision, assert_same_bits, interpreted, refused
from hypothesis import given
from hypothesis import strategies as st

from adatape_kernels import reference
from adatape_kernels.ops import cuda, tape_gather, triton_runtime
from adatape_kernels.ops.op import current_backend, operation
from adatape_kernels.reference import wide_dtype

OP = "tape_gather"
COUNTS = [3, 0, 4, 1]


def read(device, *, counts=COUNTS, steps=4, topk=3, bank_size=9, dim=5, shared=False, dtype=None):
    """Bank, indices, weights and counts, with anything at all behind each example's count."""
    dtype, batch = dtype or torch.float32, len(counts)
    bank = torch.randn(*([] if shared else [batch]), bank_size, dim, device=device).to(dtype)
    order = torch.rand(batch, steps, bank_size, device=device).argsort(-1)
    indices, weights = order[..., :topk].int(), torch.rand(batch, steps, topk, device=device)
    counts = torch.tensor(counts, dtype=torch.int32, device=device)
    unused = torch.arange(steps, device=device) >= counts[:, None]
    indices[unused], weights[unused] = 2**31 - 1, math.nan
    return bank, indices, weights.to(wide_dtype(dtype)), counts


def gradients(gather, bank, indices, weights, counts, dtape, *, capacity=None):
    """tape, offsets, dbank and dweights for the gradient `dtape` of the tape."""
    bank, weights = bank.detach().requires_grad_(), weights.detach().requires_grad_()
    tape, offsets = gather(bank, indices, weights, counts, capacity=capacity)
    return [tape.detach(), offsets, *torch.autograd.grad(tape, [bank, weights], dtape)]


def cotangent(bank, counts, capacity=None):
    rows = int(counts.sum()) if capacity is None else capacity
    return torch.randn(rows, bank.shape[-1], device=bank.device, dtype=torch.float64).to(bank.dtype)


def assert_matches_literal(bank, indices, weights, counts, capacity=None):
    tape, offsets = tape_gather(bank, indices, weights, counts, capacity=capacity)
    banks = [bank] * len(counts) if bank.dim() == 2 else bank
    rows, ends = literal.tape_gather(*(x.tolist() for x in (indices, weights, counts)), banks=[
        b.tolist() for b in banks
    ])  # fmt: skip
    assert offsets.dtype == torch.int32 and offsets.tolist() == ends
    assert tape.dtype == bank.dtype and tape.is_contiguous()
    unused = 0 if capacity is None else capacity - len(rows)
    rows += [[0.0] * bank.shape[-1]] * unused
    expected = torch.tensor(rows, dtype=torch.float64).view(-1, bank.shape[-1])
    assert_close(tape, expected, 1e-6)


@pytest.mark.parametrize("capacity", [None, 8, 13])
@pytest.mark.parametrize("topk", [1, 3, 32])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_matches_the_literal_loop(device, shared, topk, capacity):
    given = read(device, shared=shared, topk=topk, bank_size=40)
    assert_matches_literal(*given, capacity=capacity)


@st.composite
def ragged(draw):
    batch, steps = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    counts = draw(st.lists(st.integers(0, steps), min_size=batch, max_size=batch))
    capacity = draw(st.one_of(st.none(), st.integers(sum(counts), sum(counts) + 3)))
    shapes = dict(topk=draw(st.integers(1, 3)), bank_size=draw(st.integers(3, 5)))
    shapes |= dict(dim=draw(st.integers(1, 4)), shared=draw(st.booleans()))
    return dict(counts=counts, steps=steps, **shapes), capacity


@given(case=ragged())
def test_any_counts_match_the_literal_loop(device, case):
    options, capacity = case
    given = read(device, **options)
    assert_matches_literal(*given, capacity=capacity)
    dtape = cotangent(given[0], given[3], capacity)
    actual = gradients(tape_gather, *given, dtape, capacity=capacity)
    wide = [x.double() if x.is_floating_point() else x for x in given]
    expected = gradients(reference.tape_gather, *wide, dtape.double(), capacity=capacity)
    used = torch.arange(options["steps"], device=device) < given[3][:, None]
    assert_close(actual[2], expected[2], 1e-5)
    assert_close(actual[3][used], expected[3][used], 1e-5)
    assert not actual[3][~used].any()


def test_one_entry_of_weight_one_is_copied_exactly(device):
    bank, indices, weights, counts = read(device, topk=1)
    bank[0, 0, 0] = torch.finfo(torch.float32).max
    tape, _ = tape_gather(bank, indices, torch.ones_like(weights), counts)
    rows = [bank[i, indices[i, s, 0]] for i, n in enumerate(COUNTS) for s in range(n)]
    assert_same_bits(tape, torch.stack(rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_accumulates_in_float32(device, dtype):
    """In float16, 60000 + 60000 overflows; in bfloat16, 256 + 1 is 256."""
    big = 60000.0 if dtype == torch.float16 else 256.0
    small = big if dtype == torch.float16 else 1.0
    bank = torch.tensor([[big], [small], [big]], device=device, dtype=dtype)
    indices = torch.tensor([[[0, 1, 2]]], dtype=torch.int32, device=device)
    weights = torch.tensor([[[1.0, 1.0, -1.0]]], device=device)
    tape, _ = tape_gather(bank, indices, weights, indices.new_ones(1))
    assert tape.item() == small


@pytest.mark.parametrize("dtype", [torch.float64])
@pytest.mark.parametrize("capacity", [None, 11])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_gradcheck(device, dtype, shared, capacity):
    bank, indices, weights, counts = read(device, shared=shared, dtype=dtype)
    weights = weights.nan_to_num(0.5).requires_grad_()

    def tape(bank, weights):
        return tape_gather(bank, indices, weights, counts, capacity=capacity)[0]

    assert torch.autograd.gradcheck(tape, (bank.requires_grad_(), weights))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("capacity", [None, 200])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_backward_is_the_reference_s(device, dtype, shared, capacity):
    """A shared bank gathers gradients of many examples; the bank is strided."""
    counts = [i % 9 for i in range(24)]
    bank, indices, weights, counts = read(
        device, counts=counts, steps=8, topk=5, bank_size=12, dim=96, shared=shared, dtype=dtype
    )
    given = [bank[..., :64], indices, weights, counts]
    dtape = cotangent(given[0], counts, capacity)
    actual = gradients(tape_gather, *given, dtape, capacity=capacity)
    wide = [x.double() if x.is_floating_point() else x for x in (*given, dtape)]
    expected = gradients(reference.tape_gather, *wide, capacity=capacity)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e.nan_to_num(0), 1e-12 if dtype == torch.float64 else 1e-5)


def test_strided_inputs_and_gradients(device):
    bank, indices, weights, counts = read(device)
    dtape = torch.tensor(0.5, device=device).expand(8, 5)
    strided = [
        torch.randn(4, 5, 9, device=device).mT,
        indices.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        weights.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        counts.repeat_interleave(2)[::2],
    ]
    assert not any(x.is_contiguous() for x in strided)
    copies = [x.contiguous() for x in (*strided, dtape)]
    for a, e in zip(
        gradients(tape_gather, *strided, dtape), gradients(tape_gather, *copies), strict=True
    ):
        assert_same_bits(a, e)
        assert a.is_contiguous()
    bank, weights = strided[0].requires_grad_(), strided[2].requires_grad_()
    tape_gather(bank, strided[1], weights, strided[3], capacity=9)[0].sum().backward()
    ones = torch.ones(8, 5, device=device)
    *_, dbank, dweights = gradients(tape_gather, *copies[:4], ones)
    assert_same_bits(bank.grad, dbank)
    assert_same_bits(weights.grad, dweights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_low_precision(device, dtype, shared):
    counts = [6] * 16
    given = read(
        device, counts=counts, steps=6, topk=4, bank_size=32, dim=48, shared=shared, dtype=dtype
    )
    dtape = cotangent(given[0], given[3])
    actual = gradients(tape_gather, *given, dtape)
    exact = gradients(
        reference.tape_gather,
        *(x.double() if x.is_floating_point() else x for x in (*given, dtape)),
    )

    def plain(bank, indices, weights, counts, capacity):
        banks = bank.expand(len(counts), *bank.shape[-2:])
        rows = banks[torch.arange(len(counts), device=device)[:, None, None], indices.long()]
        return torch.einsum("bsk,bskd->bsd", weights.to(dtype), rows).flatten(0, 1), None

    rounded = gradients(plain, *given, dtape)
    assert actual[2].dtype == dtype and actual[3].dtype == torch.float32
    for n in (0, 2, 3):
        assert_low_precision(actual[n], rounded[n], exact[n], floor=1e-6)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize("size", [(1, 1, 1), (70, 1, 1), (33, 5, 1), (33, 384, 5), (9, 1088, 32)])
def test_an_example_s_bits_do_not_depend_on_its_batch(device, threads, size, shared):
    """Alone, in the batch and in the permuted batch; dweights, and dbank where it is its own."""
    batch, dim, topk = size
    if interpreted(device) and threads > 1:
        pytest.skip("the interpreter has one thread")
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
            assert_same_bits(actual[3], dweights[order])
            if not shared:
                assert_same_bits(actual[2], dbank[order])


def test_bits_do_not_depend_on_the_number_of_threads(device):
    if interpreted(device):
        pytest.skip("it has no threads of the host")
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
@pytest.mark.parametrize("gather", [tape_gather, reference.tape_gather], ids=["op", "reference"])
def test_poison_stays_where_it_is(device, gather, shared):
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


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_entries_read_again_sum_up(device, shared, deterministic):
    """Within one token, by several tokens of an example, and by other examples."""
    given = read(device, counts=[5, 0, 3, 5], steps=5, topk=4, bank_size=7, dim=130, shared=shared)
    bank, indices, _, counts = given
    indices[0, :5] = torch.tensor([[0, 1, 2, 0], [3, 3, 3, 3], [2, 0, 4, 1], [5, 6, 1, 2], [4] * 4])
    indices[3, :5, 0] = 1
    dtape = cotangent(bank, counts, 15)
    dtape[13:] = math.nan
    wide = [x.double() if x.is_floating_point() else x for x in (*given, dtape)]
    expected = gradients(reference.tape_gather, *wide, capacity=15)
    torch.use_deterministic_algorithms(deterministic)
    try:
        actual = gradients(tape_gather, *given, dtape, capacity=15)
    finally:
        torch.use_deterministic_algorithms(True)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-6)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_corrupt_values_do_no_harm_without_a_copy_to_the_host(device, shared, monkeypatch):
    """Entries move into the bank, counts into 0 to num_tape_tokens; rows beyond capacity drop."""
    if current_backend() not in ("triton", "cuda"):
        pytest.skip("it looks at every value")
    for module in (sys.modules[tape_gather.__module__], cuda):
        monkeypatch.setattr(module, "check_values", lambda *values: None)
    bank, indices, weights, counts = read(device, shared=shared)
    weights = weights.nan_to_num(0.5)
    corrupt = indices.clone()
    corrupt[0, 0] = torch.tensor([-5, 9, 2**31 - 1])
    given = (bank, corrupt, weights, torch.tensor([3, -7, 90, 1], dtype=torch.int32, device=device))
    sound = (bank, corrupt.clamp(0, 8), weights, counts)
    dtape = cotangent(bank, counts)
    expected = gradients(tape_gather, *sound, dtape)
    for a, e in zip(gradients(tape_gather, *given, dtape, capacity=8), expected, strict=True):
        assert_same_bits(a, e)
    tape, offsets, _, dweights = gradients(tape_gather, *given, dtape[:5], capacity=5)
    assert offsets.tolist() == [0, 3, 3, 7, 8]
    assert_same_bits(tape, expected[0][:5])
    assert_same_bits(dweights[2, :2], expected[3][2, :2])
    assert not dweights[2, 2:].any() and not dweights[3].any()


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
    assert len(launches) == 5


@pytest.mark.parametrize("capacity", [None, 0, 3])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize(
    ("counts", "steps", "dim", "bank_size"),
    [([], 4, 5, 9), ([0, 0], 4, 5, 9), ([0, 0], 0, 5, 9), ([0], 4, 0, 9), ([0, 0], 4, 5, 0)],
    ids=["batch", "counts", "steps", "dim", "bank"],
)
def test_empty(device, counts, steps, dim, bank_size, shared, capacity):
    bank, indices, weights, counts = read(
        device, counts=counts, steps=steps, dim=dim, bank_size=max(bank_size, 3), shared=shared
    )
    bank = bank[..., :bank_size, :].requires_grad_()
    weights.requires_grad_()
    tape, offsets = tape_gather(bank, indices, weights, counts, capacity=capacity)
    assert tape.shape == (capacity or 0, dim) and not tape.any()
    assert offsets.tolist() == [0] * (len(counts) + 1)
    tape.sum().backward()
    assert bank.grad.shape == bank.shape and not bank.grad.any()
    assert weights.grad.shape == weights.shape and not weights.grad.any()


@pytest.mark.parametrize("batch", [0, 4])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("capacity", [None, 9])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_opcheck(device, shared, capacity, requires_grad, batch):
    bank, indices, weights, counts = read(device, counts=COUNTS[:batch], shared=shared)
    weights = weights.nan_to_num(0).permute(2, 1, 0).contiguous().permute(2, 1, 0)
    floats = [x.requires_grad_(requires_grad) for x in (bank, weights)]
    args = (floats[0], indices, floats[1], counts, capacity)
    torch.library.opcheck(torch.ops.adatape.tape_gather.default, args)


def test_opcheck_of_the_backward(device):
    bank, indices, weights, counts = read(device)
    args = (cotangent(bank, counts), bank.mT.contiguous().mT, indices, weights, counts)
    torch.library.opcheck(torch.ops.adatape.tape_gather_bwd.default, args)


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


GOOD = dict(
    bank=torch.zeros(2, 9, 4),
    indices=torch.zeros(2, 3, 2, dtype=torch.int32),
    weights=torch.zeros(2, 3, 2),
    counts=torch.tensor([3, 1], dtype=torch.int32),
)


def with_index(entry):
    indices = GOOD["indices"].clone()
    indices[1, 0, 1] = entry
    return indices


@pytest.mark.parametrize(
    ("argument", "value", "parts"),
    [
        ("bank", torch.zeros(9), ["bank_size, dim", "(9,)"]),
        ("bank", torch.zeros(9, 4, dtype=torch.int32), ["floating-point", "int32"]),
        ("bank", torch.zeros(3, 9, 4), ["batch 2", "(3, 9, 4)"]),
        ("indices", torch.zeros(2, 3, dtype=torch.int32), ["topk", "(2, 3)"]),
        ("indices", torch.zeros(2, 3, 2, dtype=torch.int64), ["int32", "int64"]),
        ("indices", torch.zeros(2, 3, 2, dtype=torch.int32, device="meta"), ["cpu", "meta"]),
        ("indices", with_index(-1), ["0 to 8", "got -1"]),
        ("indices", with_index(9), ["0 to 8", "got 9"]),
        ("indices", with_index(2**31 - 1), ["0 to 8", "got 2147483647"]),
        ("weights", torch.zeros(2, 3, 1), ["(2, 3, 2)", "(2, 3, 1)"]),
        ("weights", torch.zeros(2, 3, 2, dtype=torch.float64), ["float32", "float64"]),
        ("weights", torch.zeros(2, 3, 2, device="meta"), ["cpu", "meta"]),
        ("counts", torch.zeros(3, dtype=torch.int32), ["(2,)", "(3,)"]),
        ("counts", torch.zeros(2, dtype=torch.int64), ["int32", "int64"]),
        ("counts", torch.zeros(2, dtype=torch.int32, device="meta"), ["cpu", "meta"]),
        ("counts", torch.tensor([3, -1], dtype=torch.int32), ["0 to 3", "-1"]),
        ("counts", torch.tensor([4, 1], dtype=torch.int32), ["0 to 3", "4"]),
        ("capacity", 3, ["at least the 4", "got 3"]),
        ("capacity", 0, ["at least the 4", "got 0"]),
        ("capacity", -1, ["0 or more", "got -1"]),
    ],
)
def test_bad_input_is_refused(argument, value, parts):
    with refused(argument, *parts):
        tape_gather(**{**GOOD, argument: value})


@pytest.mark.parametrize("capacity", [None, 9])
@pytest.mark.parametrize(
    ("argument", "value", "parts"),
    [
        ("indices", with_index(-1), ["0 to 8", "got -1"]),
        ("indices", with_index(9), ["0 to 8", "got 9"]),
        ("counts", torch.tensor([3, -1], dtype=torch.int32), ["0 to 3", "-1"]),
        ("counts", torch.tensor([4, 1], dtype=torch.int32), ["0 to 3", "4"]),
    ],
)
def test_bad_values_are_refused_on_every_device(device, argument, value, parts, capacity):
    if device != "cpu" and capacity is not None and current_backend() != "eager":
        pytest.skip("a capacity leaves values on the device")
    given = {name: x.to(device) for name, x in {**GOOD, argument: value}.items()}
    with refused(argument, *parts):
        tape_gather(**given, capacity=capacity)
    tape_gather(**{name: x.to(device) for name, x in GOOD.items()}, capacity=capacity)
