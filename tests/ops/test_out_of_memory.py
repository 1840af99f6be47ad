"""What is said when memory runs out: the op, what the memory is for, and how many bytes that is."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from adatape_kernels import ops
from adatape_kernels.ops.op import current_backend

OP = ("tape_select", "tape_gather", "dual_ffn")
compiled = pytest.mark.backends("cpp", "cuda")
pytestmark = pytest.mark.runs_no_op  # whatever is asked for here fails
MOST_ROWS = 2**31 - 1
DIM = 2**16


def message_of(call):
    with pytest.raises(RuntimeError) as found:
        call()
    return str(found.value)


def absurd_selection(device, batch):
    """A call for the most tape tokens that there may be, of examples that are one in memory."""
    query = torch.zeros(1, 8, device=device).expand(batch, 8)
    options = {"num_tape_tokens": MOST_ROWS, "topk": 2, "halt_threshold": 1.0}
    return lambda: ops.tape_select(query, torch.zeros(40, 8, device=device), **options)


def absurd_tape(device):
    numbers = torch.zeros(1, 1, 1, dtype=torch.int32, device=device)
    counts = torch.ones(1, dtype=torch.int32, device=device)
    bank = torch.zeros(40, 1, device=device).expand(40, DIM)
    return lambda: ops.tape_gather(bank, numbers, numbers.float(), counts, capacity=MOST_ROWS)


def absurd_hidden(device):
    # The hidden features of many rows, rows and parameters being one in memory each. The output,
    # which the suite fills with NaN, is small.
    rows, width = 2**20, 2**28
    x, one = torch.zeros(1, 1, device=device).expand(rows, 1), torch.zeros(1, 1, device=device)
    bias = torch.zeros(1, device=device)
    ffn = ops.FFN(one.expand(width, 1), bias.expand(width), one.expand(1, width), bias)
    return lambda: ops.dual_ffn(x, rows, ffn)


@pytest.mark.backends("cpp", "cuda", "eager")
def test_memory_and_bytes_are_named(device):
    for call in (absurd_selection(device, 2**10), absurd_tape(device), absurd_hidden(device)):
        message = message_of(call)
        assert "memory" in message and any(len(word) > 11 for word in message.split()), message
        assert current_backend() == "eager" or "\n" not in message


@compiled
@pytest.mark.parametrize("batch", [2**10, 2**30])
def test_selection_names_the_tensor(device, batch):
    wanted = min(batch * MOST_ROWS * 2 * 4, 2**63 - 1)
    assert message_of(absurd_selection(device, batch)) == (
        f"tape_select: out of memory: cannot allocate {wanted} bytes for weights"
    )


@compiled
def test_gathering_names_the_tensor(device):
    wanted = MOST_ROWS * DIM * 4
    assert message_of(absurd_tape(device)) == (
        f"tape_gather: out of memory: cannot allocate {wanted} bytes for tape"
    )


@compiled
def test_feed_forward_names_the_tensor(device):
    assert message_of(absurd_hidden(device)).startswith("dual_ffn: out of memory: cannot allocate ")


LIMITED = """
    import resource
    import torch
    from adatape_kernels import ops

    torch.set_num_threads({threads})
    limit = resource.RLIM_INFINITY, resource.RLIM_INFINITY

    def message_below(megabytes, call):
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + megabytes * 2**20, limit[1]))
        try:
            call()
        except RuntimeError as error:
            print(error)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limit)

    def select(query, keys):
        return ops.tape_select(query, keys, num_tape_tokens=2, topk=2, halt_threshold=9.0)

    select(torch.randn(3, 64), torch.randn(3, 10, 64)).weights  # starts the pool's threads
    {body}
"""


def printed_below_limits(body, threads=2):
    text = textwrap.dedent(LIMITED).format(threads=threads, body=body)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
throws = pytest.mark.skipif(
    "ADATAPE_SANITIZER" in os.environ,
    reason="under a sanitizer `new` ends the process where memory runs out, and does not throw",
)


@needs_proc
@throws
@pytest.mark.backends("cpp")
@pytest.mark.parametrize("threads", [1, 2])
def test_working_memory_of_a_thread_of_the_pool(device, threads):
    """It is named, and the call after the one that failed is served."""
    body = """
query, keys = torch.randn(3, 2**21), torch.randn(3, 2, 2**21)
message_below(28, lambda: select(query, keys))  # the queries of the batch take 24 of them
print(torch.equal(select(query, keys).indices[:1], select(query[:1], keys[:1]).indices))
"""
    assert printed_below_limits(body, threads) == [
        f"tape_select: out of memory: cannot allocate {2**23} bytes for working memory",
        "True",
    ]


@needs_proc
@throws
@pytest.mark.backends("cpp")
def test_copies_and_lists_on_the_host(device):
    body = """
x = torch.randn(64, 2**18).t()
ffn = ops.FFN(torch.randn(8, 64), torch.randn(8), torch.randn(64, 8), torch.randn(64))
message_below(10, lambda: ops.dual_ffn(x, 2**18, ffn))
query, keys = torch.randn(3, 1, requires_grad=True), torch.randn(3 * 2**21, 1, requires_grad=True)
loss = select(query, keys).weights.sum()
message_below(40, loss.backward)
"""
    assert printed_below_limits(body) == [
        f"dual_ffn: out of memory: cannot allocate {2**26} bytes for a contiguous copy of an "
        "argument",
        f"tape_select_bwd: out of memory: cannot allocate {(3 * 2**21 + 1) * 8} bytes for the "
        "starts of segments",
    ]
