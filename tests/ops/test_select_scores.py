"""The scores that decide what `tape_select` reads: how exact they are, and that equal rows tie."""

import math

import pytest
import torch
from checks import assert_same_bits, interpreted
from select_cases import read

from adatape_kernels import reference
from adatape_kernels.ops import tape_select, triton_runtime
from adatape_kernels.ops.op import operation

OP = "tape_select"
INF, NAN = math.inf, math.nan
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
SHARED = pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])


def keys_of(shared, batch, bank_size, key_dim, device):
    shape = (bank_size, key_dim) if shared else (batch, bank_size, key_dim)
    return torch.randn(shape, device=device)


@DTYPES
@SHARED
@pytest.mark.parametrize("key_dim", [24, 200])
def test_the_order_is_that_of_sums_in_float32(device, key_dim, shared, dtype):
    """No entry stands before one whose exact score is higher by more than float32 may be wrong.

    The query of the second token has 24 bits; a tensor core that rounded it to its keys' dtype
    would be wrong by a thousand times the bound.
    """
    query = torch.randn(3, key_dim, device=device).to(dtype)
    keys = keys_of(shared, 3, 40, key_dim, device)
    near = keys[..., :1, :] + 0.003 * keys  # forty rows that are nearly alike
    near = near.to(dtype)
    sel = tape_select(query, near, num_tape_tokens=2, topk=20, halt_threshold=INF)
    rows = near.double() if not shared else near.double().expand(3, *near.shape)
    q = query.double()
    for step in range(2):
        chosen = rows.take_along_dim(sel.indices[:, step].long()[..., None], 1)
        exact = (chosen * q[:, None]).sum(-1)
        wrong = (chosen * q[:, None]).abs().sum(-1) * (key_dim + 4) * 2.0**-23
        assert ((exact[:, 1:] - exact[:, :-1]) <= wrong[:, 1:] + wrong[:, :-1]).all()
        merged = (sel.weights[:, step, :, None].double() * chosen).sum(1)
        q = (q + merged) / 2


@DTYPES
@SHARED
def test_equal_rows_tie_in_every_tile(device, shared, dtype):
    """Three distinct rows fill a bank of several tiles; later queries have 24 bits."""
    rows = torch.randn(3, 72, device=device).to(dtype)
    kinds = torch.randint(0, 3, (400,) if shared else (2, 400), device=device)
    query = torch.randn(2, 72, device=device).to(dtype)
    sel = tape_select(query, rows[kinds], num_tape_tokens=4, topk=6, halt_threshold=INF)
    for i in range(2):
        left = (kinds if shared else kinds[i]).tolist()
        for step in sel.indices[i].tolist():
            # Whatever kind is best, its entries are read by index, and before any other kind.
            best = left[step[0]]
            assert step == [entry for entry, kind in enumerate(left) if kind == best][:6]
            left = [None if entry in step else kind for entry, kind in enumerate(left)]


@DTYPES
@pytest.mark.parametrize("key_dim", [24, 200])
def test_bits_of_a_shared_bank_do_not_depend_on_the_batch(device, key_dim, dtype):
    batch = 5 if interpreted(device) else 70
    query = torch.randn(batch, key_dim, device=device).to(dtype)
    keys = keys_of(True, batch, 150, key_dim, device).to(dtype)
    options = dict(num_tape_tokens=3, topk=4, halt_threshold=1.5)
    together = tape_select(query, keys, **options)
    for subset in (slice(1, 2), slice(batch - 2, None), torch.arange(batch - 1, -1, -1)):
        for a, e in zip(tape_select(query[subset], keys, **options), together, strict=True):
            assert_same_bits(a, e[subset])


@SHARED
@pytest.mark.parametrize("dtype", [torch.float16])
def test_a_query_below_float16_still_meets_infinity(device, shared, dtype):
    """The second query holds 2⁻²⁵, which float16 rounds to zero; zero times infinity is NaN."""
    rows = [[NAN, 0.0], [0.0, 1.0], [-INF, 0.0], [0.0, -100.0]]
    keys = torch.tensor(rows, device=device, dtype=dtype)
    query = torch.tensor([[2.0**-24, 1.0]], device=device, dtype=dtype)
    sel = read(query, keys if shared else keys[None], num_tape_tokens=2, topk=1)
    assert sel.indices.flatten().tolist() == [1, 3]
    sel = tape_select(
        query,
        keys if shared else keys[None],
        num_tape_tokens=3,
        topk=1,
        halt_threshold=INF,
    )
    assert sel.indices.flatten().tolist() == [1, 3, 2]


@pytest.mark.no_backend
@pytest.mark.skipif(not triton_runtime.INSTALLED, reason="triton is not installed")
def test_a_shared_bank_gives_every_multiprocessor_work(device):
    """At 64 examples and 10,000 entries there are more programs than an H200 has of them, 132."""
    launcher = operation("tape_select").implementations["triton"].function
    with triton_runtime.recording() as launches, torch.device("meta"):
        query = torch.empty(64, 64, dtype=torch.bfloat16)
        keys = torch.empty(10_000, 64, dtype=torch.bfloat16)
        launcher(query, keys, 10, 5, 10.0, True, "entropy", None, None)
    assert len(launches) == 21
    scoring = [each for each in launches if "score" in each.kernel.__name__]
    assert {each.grid for each in scoring} == {(316,)}


@SHARED
@pytest.mark.backends("cpp")
def test_scores_of_many_features_of_one_sign_round_as_torchs(device, shared):
    """The error of a sum that is one long chain grows with its length."""
    batch, width = 64, 1024
    query = (1 + torch.rand(batch, width, device=device)) / 16
    keys = 1 + torch.rand((3, width) if shared else (batch, 3, width), device=device)
    options = {"num_tape_tokens": 1, "topk": 3, "halt_threshold": INF}
    ours, plain = tape_select(query, keys, **options), reference.tape_select(query, keys, **options)
    exact = reference.tape_select(query.double(), keys.double(), **options)
    assert torch.equal(ours.indices, exact.indices) and torch.equal(plain.indices, exact.indices)
    error, its = ((x.weights - exact.weights).square().mean().sqrt() for x in (ours, plain))
    assert error < 1.5 * its
