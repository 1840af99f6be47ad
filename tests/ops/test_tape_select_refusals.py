"""What `tape_select` refuses, and what its kernels do where nobody could refuse it."""

import pytest
import torch
from checks import assert_same_bits, cannot_raise, refused
from select_cases import INF, NAN, cotangents

from adatape_kernels.ops import tape_select
from adatape_kernels.ops.op import current_backend, operation

OP = "tape_select"

GOOD = dict(
    query=torch.zeros(3, 4),
    keys=torch.zeros(3, 6, 4),
    num_tape_tokens=2,
    topk=2,
    halt_threshold=1.0,
)


@pytest.mark.parametrize(
    ("argument", "value", "parts"),
    [
        ("query", torch.zeros(4), ["(batch, key_dim)", "(4,)"]),
        ("query", torch.zeros(3, 0), ["key_dim at least 1", "(3, 0)"]),
        ("query", torch.zeros(3, 4, dtype=torch.int64), ["floating-point", "int64"]),
        ("keys", torch.zeros(4), ["bank_size, 4", "(4,)"]),
        ("keys", torch.zeros(3, 6, 5), ["bank_size, 4", "(3, 6, 5)"]),
        ("keys", torch.zeros(2, 6, 4), ["batch 3", "(2, 6, 4)"]),
        ("keys", torch.zeros(3, 6, 4, dtype=torch.float64), ["float32", "float64"]),
        ("keys", torch.zeros(3, 1, 4), ["topk = 2", "got 1"]),
        ("keys", torch.zeros(0, 4), ["topk = 2", "got 0"]),
        ("keys", torch.zeros(3, 6, 4, device="meta"), ["cpu", "meta"]),
        ("topk", 0, ["1 to 32", "got 0"]),
        ("topk", -1, ["1 to 32", "got -1"]),
        ("topk", 33, ["1 to 32", "got 33"]),
        ("num_tape_tokens", -1, ["0 or more", "got -1"]),
        ("halt_threshold", NAN, ["a number", "nan"]),
        ("loss_type", "kl", ["'entropy' or 'max'", "'kl'"]),
        ("read_mask", torch.zeros(3, 6), ["bool (3, 6)", "float32"]),
        ("read_mask", torch.zeros(3, 5, dtype=torch.bool), ["bool (3, 6)", "(3, 5)"]),
        ("read_mask", torch.zeros(3, 6, dtype=torch.bool, device="meta"), ["cpu", "meta"]),
        ("bank_lens", torch.zeros(3), ["int32 or int64 (3,)", "float32"]),
        ("bank_lens", torch.zeros(2, dtype=torch.int32), ["(3,)", "(2,)"]),
        ("bank_lens", torch.zeros(3, dtype=torch.int32, device="meta"), ["cpu", "meta"]),
    ],
)
def test_bad_input_is_refused(argument, value, parts):
    with refused(argument, *parts):
        tape_select(**{**GOOD, argument: value})


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize("lens_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("lens", "bad"),
    [
        ([1, 7, 2], "7"),
        ([1, 2, -1], "-1"),
        ([2**31 - 1, 0, 0], "2147483647"),
        ([-(2**31), 0, 0], "-2147483648"),
    ],
)
@pytest.mark.absent_if(reason=cannot_raise)
def test_lengths_outside_the_bank_are_refused(device, lens, bad, lens_dtype, shared):
    keys = GOOD["keys"][0] if shared else GOOD["keys"]
    given = {**GOOD, "keys": keys, "bank_lens": torch.tensor(lens, dtype=lens_dtype)}
    given = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    with refused("bank_lens", "0 to 6", bad):
        tape_select(**given)
    given["bank_lens"] = given["bank_lens"].clamp(0, 6)
    assert tape_select(**given).counts.shape == (3,)


@pytest.mark.backends("triton", "cuda")
@pytest.mark.runs_no_op
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize("lens_dtype", [torch.int32, torch.int64])
def test_kernels_keep_lengths_outside_the_bank_within_it(device, lens_dtype, shared):
    """Below the dispatcher nobody has looked at them, as on a GPU, where a kernel cannot raise."""
    query, keys = torch.randn(5, 4, device=device), torch.randn(5, 9, 4, device=device)
    keys = keys[0] if shared else keys
    lens = torch.tensor([9, -1, 10, 2**31 - 1, -(2**31)], dtype=lens_dtype, device=device)
    select = operation(OP).implementations[current_backend()].function
    options = (4, 2, INF, True, "entropy", None)
    actual = select(query, keys, *options, lens)
    for a, e in zip(actual, select(query, keys, *options, lens.clamp(0, 9)), strict=True):
        assert_same_bits(a, e)
    assert actual[3].tolist() == [4, 0, 4, 4, 0]


@pytest.mark.backends("triton")  # the others take only what tape_select returned
@pytest.mark.runs_no_op
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_corrupt_indices_and_counts_stay_inside(device, shared):
    """A GPU's cannot be checked without a copy to the host: the kernel may read no further."""
    query, keys = torch.randn(3, 6, device=device), torch.randn(3, 9, 6, device=device)
    keys = keys[0] if shared else keys
    dweights, dponder = cotangents(3, 4, 2, device=device)
    indices = torch.tensor([-(2**31), -1, 9, 2**31 - 1], dtype=torch.int32, device=device)
    indices = indices.view(1, 4, 1).expand(3, 4, 2)
    counts = torch.tensor([-5, 4, 2**31 - 1], dtype=torch.int32, device=device)
    dquery, dkeys = (
        operation("tape_select_bwd")
        .implementations[current_backend()]
        .function(query, keys, dweights, dponder, indices, counts, True, "entropy")
    )
    assert dquery.shape == query.shape and dkeys.shape == keys.shape
    assert not dquery[0].any()


@pytest.mark.backends("cuda")
@pytest.mark.runs_no_op
@pytest.mark.parametrize("topk", [0, -1, 33])
def test_cuda_kernels_refuse_a_topk_that_they_have_no_room_for(device, topk):
    """Below the public function, which refuses it before."""
    query, keys = torch.randn(2, 4, device=device), torch.randn(40, 4, device=device)
    select = operation(OP).implementations[current_backend()].function
    with refused("topk", "1 to 32", f"got {topk}"):
        select(query, keys, 2, topk, 1.0, True, "entropy", None, None)
