"""The working memory of C++ kernels is given back: threads keep little of what they once needed."""

import subprocess
import sys
import textwrap

import pytest

OP = "tape_select"
pytestmark = [
    pytest.mark.backends("cpp"),
    pytest.mark.runs_no_op,  # another process calls it
    pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc"),
]

# Every query is longer than all before it, and the copy that a thread multiplies is its working
# memory.
GROWING_QUERIES = """
    import threading
    import torch
    from adatape_kernels import ops

    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

    most = 2_750_000
    query, keys = torch.randn(2, most), torch.randn(2, 2, most)

    def read(size):
        some = query[:, :size], keys[:, :, :size]
        ops.tape_select(*some, num_tape_tokens=1, topk=2, halt_threshold=9.0)

    def read_all():
        for size in range(1_000_000, most, 30_000):  # 4 to 11 MB
            read(size)

    torch.set_num_threads({threads})
    read(most)
    before = resident()
    {call}
    print(resident() - before)
"""


def growth(threads, call):
    text = textwrap.dedent(GROWING_QUERIES).format(threads=threads, call=call)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_that_were_outgrown_are_given_back(device, threads):
    # They are 430 MB for each thread.
    assert growth(threads, "read_all()") < 60


def test_a_thread_that_ends_leaves_nothing(device):
    call = "[(t.start(), t.join()) for t in [threading.Thread(target=read_all) for _ in range(4)]]"
    assert growth(1, call) < 60
