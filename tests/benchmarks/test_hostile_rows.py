"""CSV files of rows of any origin: rows, or one line that names the file."""

import numpy as np
import pytest

from adatape_kernels.benchmarks.harness import records
from adatape_kernels.benchmarks.harness.cases import OURS
from adatape_kernels.benchmarks.harness.records import CaseKey
from adatape_kernels.benchmarks.reports import compare_results
from adatape_kernels.recipes.measure import Timing

CASE = CaseKey("tape_gather", "forward", "float32", "B=2")


@pytest.fixture
def path(tmp_path):
    rows = [
        records.row(CASE, name, "cpu", status="ok", timing=Timing(0.5, 0.4, 0.6), flops=1e9)
        for name in (OURS, "peer")
    ]
    records.append(tmp_path / "rows.csv", rows)
    return tmp_path / "rows.csv"


def one_line(path):
    with pytest.raises(ValueError) as info:
        records.read(path)
    message = str(info.value)
    assert message.startswith(f"{path}: expected ") and ", got " in message
    assert message.isprintable() and len(message) < 1000


@pytest.mark.parametrize("time", ["nan", "inf", "-1", "1e999", "0.5\x1b[31m", '"', '"0.5"x'])
def test_a_time_that_is_none_is_one_line(path, time):
    text = path.read_text()
    assert text.count(",0.5,") == 2
    path.write_text(text.replace(",0.5,", f",{time},", 1))
    one_line(path)
    assert compare_results.main([str(path), str(path)]) == 2


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"\x1b[31m,b\n", b'"' * 10, b"x" * 200_000, b"op\n" * 1000]
)
def test_another_file_is_one_line(path, content):
    path.write_bytes(content)
    one_line(path)


def test_a_field_that_is_too_long_for_the_csv_module_is_one_line(path):
    path.write_text(path.read_text() + "a" * 200_000 + "\n")
    one_line(path)


def test_a_vast_file_is_one_line(path):
    with path.open("r+b") as stream:
        stream.truncate(1 << 40)
    one_line(path)


def test_mutated_rows_are_rows_or_one_line(path):
    rng, content, read = np.random.default_rng(1), path.read_bytes(), 0
    for _ in range(1000):
        changed = bytearray(content)
        for place in rng.integers(len(content), size=rng.integers(1, 5)):
            changed[place] = rng.choice([*b'",\n0-.e', rng.integers(256)])
        if rng.integers(4) == 0:
            del changed[rng.integers(len(content)) :]
        path.write_bytes(changed)
        try:
            records.read(path)
            read += 1
        except ValueError:
            one_line(path)
    assert 50 < read < 950
