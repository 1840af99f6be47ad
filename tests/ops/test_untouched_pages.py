"""Large gradients on the CPU, of which the operating system has written the zeros already."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from checks import assert_close, assert_same_bits

from adatape_kernels import ops, use_backend
from adatape_kernels.ops.op import record

OP = ("tape_select", "tape_gather", "tape_read")
pytestmark = pytest.mark.backends("cpp")

READ = dict(num_tape_tokens=3, topk=2, halt_threshold=9.0)
# Of more than 32 MiB, so that malloc maps pages for the gradient alone.
BANKS = {"own": (2, 4200, 1024), "shared": (8400, 1024), "bfloat16": (2, 8400, 1024)}


def gradients(query, bank):
    query, bank = query.detach().requires_grad_(), bank.detach().requires_grad_()
    tape, _, read = ops.tape_read(query, bank, **READ)
    objective = (tape.float() * torch.arange(1.0, 1025.0)).sum() + read.ponder.sum()
    return read.indices, torch.autograd.grad(objective, (query, bank))


@pytest.mark.checks_what_ran
@pytest.mark.parametrize("kind", BANKS)
def test_rows_that_were_not_read_are_zero(device, kind):
    """Where torch fills new memory with NaN, and where it does not."""
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    given = torch.randn(2, 64).to(dtype), torch.randn(BANKS[kind], dtype=dtype)
    with use_backend("eager"):
        expected_indices, (expected_dquery, expected) = gradients(*given)
    for filled in (False, True):
        torch.utils.deterministic.fill_uninitialized_memory = filled
        try:
            with record() as ran:
                indices, (dquery, dbank) = gradients(*given)
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = True
        assert {each.backend for each in ran} == {"cpp"}
        assert torch.equal(indices, expected_indices)
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        assert_close(dquery, expected_dquery, tolerance)
        read = (dbank != 0).any(-1)
        assert_same_bits(read, (expected != 0).any(-1))
        assert int(read.sum()) <= indices.numel()
        assert_close(dbank[read], expected[read], tolerance)
        assert_same_bits(dbank[read] != 0, expected[read] != 0)


# malloc serves large blocks out of memory that it keeps, in which earlier tensors have left NaN: in
# every page, or in each 16th, as the others were given back.
KEPT_MEMORY = """
    import ctypes
    import torch
    from adatape_kernels import ops

    PAGE, DONTNEED = 4096, 4
    libc = ctypes.CDLL(None, use_errno=True)
    query = torch.randn(2, 64, requires_grad=True)
    bank = torch.randn(2, 4200, 1024, requires_grad=True)
    size = bank.numel() * bank.element_size()
    held = []  # so that each gradient leaves one hole less where no NaN lie
    for _ in range(10):
        tape, _, read = ops.tape_read(query, bank, num_tape_tokens=3, topk=2, halt_threshold=9.0)
        dtape = torch.ones_like(tape)
        poison = [torch.full_like(bank, float("nan")) for _ in range(3)]
        places = [each.data_ptr() for each in poison]
        for place in places if {dropped} else ():
            for start in range(place // PAGE * PAGE + PAGE, place + size - 16 * PAGE, 16 * PAGE):
                address = ctypes.c_void_p(start)
                assert libc.madvise(address, ctypes.c_size_t(15 * PAGE), DONTNEED) == 0
        del poison
        dquery, dbank = torch.autograd.grad(tape, (query, bank), dtape)
        held.append(dbank)
        kept = sum(max(0, size - abs(dbank.data_ptr() - place)) for place in places)
        if kept > size // 2:
            break
    assert kept > size // 2, "malloc did not keep the block"
    print(int((dbank != 0).any(-1).sum()), int(dbank.isnan().sum()))
"""


@pytest.mark.runs_no_op  # another process calls it
@pytest.mark.skipif(sys.platform != "linux", reason="it sets what glibc's malloc looks at")
@pytest.mark.skipif(
    "ADATAPE_SANITIZER" in os.environ,
    reason="a sanitizer's malloc does not serve freed blocks again at once, as glibc's does",
)
@pytest.mark.parametrize("dropped", [False, True])
def test_memory_that_malloc_has_kept_is_cleared(device, dropped):
    keep = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31)}
    text = textwrap.dedent(KEPT_MEMORY).format(dropped=dropped)
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, env={**os.environ, **keep}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["12", "0"]
