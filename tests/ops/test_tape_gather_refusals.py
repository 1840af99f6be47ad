"""What `tape_gather` refuses, and what its kernels do where nobody could refuse it."""

import pytest
import torch
from checks import assert_same_bits, cannot_raise, refused
from gather_cases import cotangent, read

from adatape_kernels.ops import tape_gather
from adatape_kernels.ops.op import current_backend, operation

OP = "tape_gather"
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
        ("indices", torch.zeros(2, 3, 2, dtype=torch.int16), ["int32 or int64", "int16"]),
        ("indices", torch.zeros(2, 3, 2, dtype=torch.int32, device="meta"), ["cpu", "meta"]),
        ("weights", torch.zeros(2, 3, 1), ["(2, 3, 2)", "(2, 3, 1)"]),
        ("weights", torch.zeros(2, 3, 2, dtype=torch.float64), ["float32", "float64"]),
        ("weights", torch.zeros(2, 3, 2, device="meta"), ["cpu", "meta"]),
        ("counts", torch.zeros(3, dtype=torch.int32), ["(2,)", "(3,)"]),
        ("counts", torch.zeros(2, dtype=torch.int16), ["int32 or int64", "int16"]),
        ("counts", torch.zeros(2, dtype=torch.int32, device="meta"), ["cpu", "meta"]),
        ("capacity", -1, ["0 or more", "got -1"]),
    ],
)
def test_bad_input_is_refused(argument, value, parts):
    with refused(argument, *parts):
        tape_gather(**{**GOOD, argument: value})


def unseen(device, backend, below, capacity, **parameters):
    """With a capacity a GPU's kernels copy nothing to the host, and so can refuse nothing."""
    looks = backend in ("eager", "cpp") or capacity is None or (device == "cpu" and not below)
    return None if looks else "a capacity leaves values on the device"


@pytest.mark.absent_if(reason=unseen)
@pytest.mark.runs_no_op
@pytest.mark.parametrize("capacity", [None, 9])
@pytest.mark.parametrize("below", [False, True], ids=["dispatcher", "kernel"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
@pytest.mark.parametrize(
    ("argument", "value", "parts"),
    [
        ("indices", with_index(-1), ["0 to 8", "got -1"]),
        ("indices", with_index(9), ["0 to 8", "got 9"]),
        ("indices", with_index(2**31 - 1), ["0 to 8", "got 2147483647"]),
        ("counts", torch.tensor([3, -1], dtype=torch.int32), ["0 to 3", "-1"]),
        ("counts", torch.tensor([4, 1], dtype=torch.int32), ["0 to 3", "4"]),
        ("counts", torch.tensor([2**31 - 1, 1], dtype=torch.int32), ["0 to 3", "2147483647"]),
    ],
)
def test_bad_values_are_refused(device, argument, value, parts, shared, below, capacity):
    """By the dispatcher, on a CPU, and by each kernel that brings its findings to the host."""
    gather = kernel() if below else op_of
    good = {**GOOD, "bank": GOOD["bank"][0]} if shared else GOOD
    given = {name: x.to(device) for name, x in {**good, argument: value}.items()}
    with refused(argument, *parts):
        gather(*given.values(), capacity)
    gather(*(x.to(device) for x in good.values()), capacity)


def op_of(*reads_and_capacity):
    *reads, capacity = reads_and_capacity
    return tape_gather(*reads, capacity=capacity)


def kernel():
    """The backend's function itself, below the dispatcher and its checks."""
    return operation(OP).implementations[current_backend()].function


@pytest.mark.absent_if(reason=cannot_raise)
@pytest.mark.parametrize("capacity", [3, 0])
def test_a_capacity_that_is_too_small_is_refused(device, capacity):
    given = {name: x.to(device) for name, x in GOOD.items()}
    with refused("capacity", "at least the 4", f"got {capacity}"):
        tape_gather(**given, capacity=capacity)
    assert tape_gather(**given, capacity=4)[0].shape == (4, 4)


@pytest.mark.backends("eager", "cpp")
@pytest.mark.runs_no_op
def test_kernels_that_look_at_values_refuse_a_capacity_that_is_too_small(device):
    with refused("capacity", "at least the 4", "got 3"):
        kernel()(*(x.to(device) for x in GOOD.values()), 3)


@pytest.mark.backends("triton", "cuda")
@pytest.mark.runs_no_op
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-example"])
def test_corrupt_values_do_no_harm_without_a_copy_to_the_host(device, shared):
    """Below the dispatcher, which on a CPU looks at every value, and on a GPU at none.

    Entries move into the bank, counts into 0 to num_tape_tokens; rows beyond capacity drop.
    """

    def run(bank, indices, weights, counts, dtape, capacity=None):
        forward, backward = (
            operation(op).implementations[current_backend()].function
            for op in (OP, "tape_gather_bwd")
        )
        reads = indices, weights, counts
        return *forward(bank, *reads, capacity), *backward(dtape, bank, *reads)

    bank, indices, weights, counts = read(device, shared=shared)
    weights = weights.nan_to_num(0.5)
    corrupt = indices.clone()
    corrupt[0, 0] = torch.tensor([-5, 9, 2**31 - 1])
    given = (bank, corrupt, weights, torch.tensor([3, -7, 90, 1], dtype=torch.int32, device=device))
    sound = (bank, corrupt.clamp(0, 8), weights, counts)
    dtape = cotangent(bank, counts)
    expected = run(*sound, dtape)
    for a, e in zip(run(*given, dtape, capacity=8), expected, strict=True):
        assert_same_bits(a, e)
    tape, offsets, _, dweights = run(*given, dtape[:5], capacity=5)
    assert offsets.tolist() == [0, 3, 3, 7, 8]
    assert_same_bits(tape, expected[0][:5])
    assert_same_bits(dweights[2, :2], expected[3][2, :2])
    assert not dweights[2, 2:].any() and not dweights[3].any()
