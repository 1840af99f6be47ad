"""What the ops make of the compiled part's facts: adatape_kernels/ops/compiled_part.py."""

import os
import subprocess
import sys

import pytest

# Torch is imported once; each build that is played has a process of its own.
SCRIPT = """
import os, sys, types, torch

def play(number, cuda):
    if cuda != "broken":
        facts = {"cuda": cuda}
        sys.modules["adatape_kernels._C"] = types.SimpleNamespace(build_facts=lambda: facts)
    else:
        sys.modules["adatape_kernels._C"] = types.SimpleNamespace(build_facts=lambda: 1 / 0)
    from adatape_kernels.ops.op import explain, registered_ops
    for op in registered_ops():
        cpp = explain(op, "cpu", torch.float32)["cpp"]
        print(number, op, cpp, explain(op, "cuda", torch.bfloat16)["cuda"], sep="|", flush=True)

for number, cuda in enumerate(sys.argv[1:]):
    if (child := os.fork()) == 0:
        play(number, cuda)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, cuda
"""
# The facts, and what is said of cpp and of cuda. The last stands for a module that is older than
# torch, and cannot be loaded.
BUILDS = [
    ("13.0 for 80-real, 90a-real, 100", "serves", "serves"),
    ("none: torch 2.13 has no CUDA", "serves", "torch 2.13 has no CUDA"),
    ("broken", "ZeroDivisionError: division by zero", "ZeroDivisionError: division by zero"),
]


@pytest.fixture(scope="module")
def served():
    """What each op says, in each of the builds, of cpp on a CPU and of cuda on a GPU."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, *(facts for facts, _, _ in BUILDS)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [line.split("|") for line in result.stdout.splitlines()]
    return [{op: found for n, op, *found in rows if n == str(i)} for i in range(len(BUILDS))]


@pytest.mark.parametrize("number", range(len(BUILDS)), ids=["with cuda", "without", "broken"])
def test_kernels_are_there_as_the_build_says(served, number):
    _, cpp, cuda = BUILDS[number]
    assert len(served[number]) == 18
    for op, found in served[number].items():
        assert found[0] == cpp, op
        norm = op.startswith("add_layer_norm")
        assert found[1] == ("there is no such kernel" if norm else cuda), op
