"""The soak of every op and of small models, for a moment, and what it says of memory."""

import sys
from random import Random

import pytest
import torch

from adatape_kernels.benchmarks import memory_soak
from adatape_kernels.benchmarks.memory_soak import SoakSizes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")


def test_a_short_soak_prints_a_table_and_judges_growth(capsys):
    before = torch.get_num_threads()
    try:
        ended = memory_soak.main(["--minutes", "0.1", "--warm-up", "0.1", "--threads", "1"])
    finally:
        torch.set_num_threads(before)
    lines = capsys.readouterr().out.splitlines()
    assert ended == 0
    assert lines[0].split() == ["minute", "calls", "resident", "MB"]
    assert float(lines[1].split()[0]) == pytest.approx(0.1)
    assert lines[-1] == "after 0.1 minutes resident memory grew to 1.000 times itself"


def test_growth_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(memory_soak, "work", lambda sizes: iter(lambda: None, 1))
    monkeypatch.setattr(memory_soak, "resident_megabytes", iter([100.0, 105.0, 120.0]).__next__)
    monkeypatch.setattr(memory_soak.time, "perf_counter", iter(range(0, 10**6, 30)).__next__)
    assert memory_soak.main(["--minutes", "3", "--warm-up", "1"]) == 1


@pytest.mark.parametrize("dtype", memory_soak.DTYPES)
def test_products_on_rounded_rows_are_few(dtype):
    """Feed-forwards of a hundred sizes, once each size was met near it, keep nothing further."""
    sizes = SoakSizes(Random(0), exact=False)
    for _ in range(150):
        memory_soak.dual_ffn(sizes, dtype)
    before = memory_soak.resident_megabytes()
    for _ in range(100):
        memory_soak.dual_ffn(sizes, dtype)
    # Without rounding they kept 73 MB in bfloat16.
    assert memory_soak.resident_megabytes() - before < 40
