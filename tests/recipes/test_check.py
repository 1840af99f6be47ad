"""`adatape-kernels check`: it trusts right kernels, and finds each kind of wrong one."""

import dataclasses

import pytest
import torch

from adatape_kernels.cli import main
from adatape_kernels.ops.op import operation, why_absent
from adatape_kernels.recipes import check

LARGEST = ("up to 1520 rows", "384 × 1536", "bank of 20000")
"""What the names of the cases that take the most time have in them."""


@pytest.fixture(autouse=True)
def compiled_kernels_only(monkeypatch):
    """Triton's interpreter would take minutes over sizes meant for a processor."""
    if reason := why_absent("cpp"):
        pytest.skip(f"no compiled part: {reason}")
    monkeypatch.setattr(check, "KERNEL_BACKENDS", ("cpp",))


@pytest.fixture
def altered(monkeypatch):
    """Puts a function around a compiled kernel, and has the checks of its op run, and the model's.

    That every op is checked, that right kernels of the others pass, and that right ones pass the
    largest cases, is seen where nothing is altered.
    """
    right, every = {}, check.registered_ops()
    cases = list(check.check_cases())
    smaller = [case for case in cases if not any(size in case.name for size in LARGEST)]
    assert len(smaller) == len(cases) - 5
    monkeypatch.setattr(check, "registered_ops", lambda: [op for op in every if of_altered(op)])
    monkeypatch.setattr(check, "check_cases", lambda: smaller)

    def of_altered(op):
        return any(op.removesuffix("_bwd") == each.removesuffix("_bwd") for each in right)

    def alter(op, change):
        right[op] = given = operation(op).implementations["cpp"]

        def wrong(*args):
            return change(given.function(*args), args)

        operation(op).replace("cpp", dataclasses.replace(given, function=wrong))

    yield alter
    for op, given in right.items():
        operation(op).replace("cpp", given)


def test_right_kernels_are_trusted_in_one_line(capsys):
    assert main(["check", "--device", "cpu"]) == 0
    *lines, verdict = capsys.readouterr().out.splitlines()
    assert all(line.endswith(" ok") for line in lines)
    for op in ("tape_select", "tape_gather", "elastic_attention", "dual_ffn"):
        for dtype in ("float32", "bfloat16"):
            assert any(line.startswith(op) and f"cpp {dtype} " in line for line in lines)
    assert f"results can be trusted, {len(lines)} checks passed" in verdict


def scaled(out, args):
    return (out[0] * 1.001, *out[1:])


def batch_dependent(out, args):
    """One bit, and only beside others."""
    cu_inputs = args[3]
    return (out[0].nextafter(out[0] + 1) if len(cu_inputs) > 2 else out[0], out[1])


def leaking(out, args):
    return (out[0] + 0 * args[1].float().sum(), *out[1:])


def crashing(out, args):
    raise RuntimeError("no kernel image\nis available")


@pytest.mark.parametrize(
    ("op", "change", "words"),
    [
        ("dual_ffn", scaled, "error "),
        ("elastic_attention_bwd", scaled, "error "),
        ("elastic_attention", crashing, "RuntimeError: no kernel image"),
        ("tape_select", leaking, "bits depend on its batch"),
        ("tape_select", lambda out, args: (*out[:2], out[2].flip(2), out[3]), "otherwise"),
    ],
)
def test_a_wrong_kernel_is_found(altered, capsys, op, change, words):
    altered(op, change)
    assert main(["check", "--device", "cpu"]) == 1
    *lines, verdict = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if not line.endswith(" ok")]
    assert any(words in line for line in failed)
    assert f"results can NOT be trusted, {len(failed)} of {len(lines)} checks failed" in verdict


def test_bits_that_depend_on_the_batch_are_found(altered, capsys):
    """A float32 bit is within every tolerance, so that only the comparison of bits can see it."""
    altered(
        "elastic_attention",
        lambda o, a: batch_dependent(o, a) if o[0].dtype == torch.float32 else o,
    )
    assert main(["check", "--device", "cpu"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert [line.split(",")[0] for line in failed] == ["elastic_attention"]
    assert "bits depend on its batch" in failed[0]
