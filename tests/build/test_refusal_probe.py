"""A refusal raised in C++ reaches Python; where it ends the process, that is found out safely."""

import subprocess
import sys

import pytest

from adatape_kernels.ops import refusal_probe
from adatape_kernels.ops.op import why_absent


@pytest.fixture(autouse=True)
def forgotten():
    refusal_probe.fault.cache_clear()
    yield
    refusal_probe.fault.cache_clear()


@pytest.mark.skipif(why_absent("cpp") is not None, reason="there is no compiled part")
def test_a_refusal_reaches_python():
    assert refusal_probe.raise_one().startswith("indices: expected 0 to 1")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print('indices: expected')", None),
        ("raise ImportError", None),
        ("import os; os.kill(os.getpid(), 11)", "ended the process (SIGSEGV)"),
        ("import os; os.abort()", "ended the process (SIGABRT)"),
        ("import os; os.kill(os.getpid(), 9)", None),  # it says nothing of errors
    ],
)
def test_the_end_of_the_process_is_named(monkeypatch, code, words):
    run = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: run([sys.executable, "-c", code], **options)
    )
    fault = refusal_probe.fault()
    assert (fault is None) if words is None else (words in fault)
