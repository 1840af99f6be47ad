"""`adatape-kernels info`: what it says of backends is what the implementations state."""

import json

import pytest
import torch

from adatape_kernels.cli import info_command, main
from adatape_kernels.ops.device_facts import EMULATED
from adatape_kernels.ops.implementation import FLOAT_DTYPES, short
from adatape_kernels.ops.op import BACKENDS, operation, registered_ops
from adatape_kernels.ops.support import Support, is_here, supported


@pytest.fixture
def told(capsys):
    def run(*argv):
        assert main(["info", *argv]) == 0
        return capsys.readouterr().out

    return run


def test_json_holds_every_typical_call_with_its_reason(told):
    found = [Support(**entry) for entry in json.loads(told("--json"))["calls"]]
    assert {(s.op, s.device, s.dtype, s.backend) for s in found} == {
        (op, device, short(dtype), backend)
        for op in registered_ops()
        for device in ("cpu", "cuda")
        for dtype in FLOAT_DTYPES
        for backend in BACKENDS
    }
    for entry in found:
        op = operation(entry.op)
        args = op.typical[entry.call](getattr(torch, entry.dtype))
        elsewhere = {"installed": not is_here(entry.device)}
        assert entry.reason == op.refusal(entry.backend, args, entry.device, **elsewhere)
        assert entry.default == (op.serving(args, entry.device, **elsewhere) == entry.backend)
    defaults = [s for s in found if s.default]
    assert len({(s.op, s.call, s.device, s.dtype) for s in found}) == len(defaults)


def test_the_table_shows_each_op_and_one_default_a_dtype(told):
    text = told()
    for op in registered_ops():
        assert op.removesuffix("_bwd") in text
    rows = [line for line in text.splitlines() if "f64*" in line or "f64 " in line]
    assert rows and all(row.count("*") == len(FLOAT_DTYPES) for row in rows)


def test_the_table_is_made_of_the_statements():
    entries = [
        Support("op", "short rows", "cpu", "float32", "eager", None, False, None),
        Support("op", "short rows", "cpu", "float32", "cpp", None, True, None),
        Support("op", "short rows", "cpu", "float32", "triton", "why not", False, None),
        Support("op", "short rows", "cpu", "float32", "cuda", "why not", False, None),
        Support("op", "long rows", "cpu", "float32", "eager", None, True, None),
        Support("op", "long rows", "cpu", "float32", "cpp", "too long", False, None),
        Support("op", "long rows", "cpu", "float32", "triton", "why not", False, None),
        Support("op", "long rows", "cpu", "float32", "cuda", "why not", False, None),
    ]
    lines = [line.split() for line in info_command.table(entries)]
    assert lines == [
        ["op", "call", *BACKENDS],
        ["op", "short", "rows", "f32", "f32*", "(1)", "(1)"],
        ["long", "rows", "f32*", "(2)", "(1)", "(1)"],
        ["(1)", "why", "not"],
        ["(2)", "too", "long"],
    ]


@pytest.mark.parametrize(
    ("head_dim", "max_rows", "shared_memory", "reason"),
    [
        (64, 512, 227, None),
        (64, 512, 163, None),
        (64, 320, 99, None),
        (64, 321, 99, "up to 320 rows"),
        (64, 513, 227, "up to 512 rows"),
        (64, None, 227, "max_rows, which is unknown"),
        (32, 512, 227, "heads of 64 features, not 32"),
    ],
)
@pytest.mark.parametrize("direction", ["elastic_attention", "elastic_attention_bwd"])
def test_cuda_attention_states_what_it_serves(direction, head_dim, max_rows, shared_memory, reason):
    """By the device's facts, so that what a GPU would get can be read on any machine."""
    rows = torch.empty(600, 3, head_dim, dtype=torch.float16, device="meta")
    given = operation(direction).implementations["cuda"]
    facts = EMULATED._replace(shared_memory_per_block=shared_memory * 1024)
    others = (None,) * (4 if direction == "elastic_attention" else 7)
    found = given.limits(facts, rows, *others, max_rows, None)
    assert (found is None) if reason is None else reason in found
    assert given.dtypes == (torch.bfloat16, torch.float16)


def test_what_a_gpu_would_get_is_told_without_one():
    """By an installation made for one: attention in C++ for short examples, in halves only."""
    told = list(supported("cuda"))
    served = {(s.op, s.backend) for s in told if s.reason is None}
    for op in registered_ops():
        assert {(op, "eager"), (op, "triton")} <= served and (op, "cpp") not in served
    by_cuda = {
        (s.call, s.dtype)
        for s in told
        if s.op == "elastic_attention" and s.backend == "cuda" and s.reason is None
    }
    short = "heads of 64, max_rows up to 256"
    assert {(short, "float16"), (short, "bfloat16")} <= by_cuda
    assert not any(dtype == "float32" or "unknown" in call for call, dtype in by_cuda)


@pytest.mark.skipif(is_here("cuda"), reason="there is a GPU")
def test_triton_s_interpreter_changes_nothing_that_is_told_of_a_gpu():
    of_triton = [s for s in supported("cuda") if s.backend == "triton" and s.call != "wider heads"]
    assert {s.dtype for s in of_triton if s.reason is None} == {"float32", "bfloat16", "float16"}


@pytest.mark.parametrize("absent", [None, "torch 9 has no CUDA"])
def test_what_is_not_installed_is_a_note(absent):
    """Beside a device that is not here, where the table tells what an installation for it has."""
    entry = Support("op", "rows", "cuda", "float32", "cuda", None, False, absent)
    others = [
        Support("op", "rows", "cuda", "float32", backend, "why not", False, None)
        for backend in BACKENDS[:3]
    ]
    last = list(info_command.table([*others, entry]))[-1].strip()
    note = "cuda is not in this installation: torch 9 has no CUDA"
    assert (last == note) == (absent is not None)
