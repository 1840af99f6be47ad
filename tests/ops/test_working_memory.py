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
        for size in range(1_000_000, most, 60_000):  # 4 to 11 MB
            read(size)

    def growth(threads, call):
        torch.set_num_threads(threads)
        read(most)
        before = resident()
        call()
        return resident() - before

    def read_all_on_threads_that_end():
        for thread in [threading.Thread(target=read_all) for _ in range(4)]:
            thread.start()
            thread.join()

    print(growth(1, read_all), growth(2, read_all), growth(1, read_all_on_threads_that_end))
"""


def test_blocks_that_were_outgrown_are_given_back(device):
    """By one thread, by two of the pool, and by threads that come and go: one process runs all."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(GROWING_QUERIES)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # They are 215 MB for each thread.
    growths = [float(number) for number in done.stdout.split()]
    assert len(growths) == 3 and max(growths) < 60, growths
