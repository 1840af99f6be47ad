"""What the ops make of the compiled part's facts: adatape_kernels/ops/compiled_part.py."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys, types, torch
cuda = sys.argv[1]
if cuda != "broken":
    facts = {"cuda": cuda}
    sys.modules["adatape_kernels._C"] = types.SimpleNamespace(build_facts=lambda: facts)
else:
    sys.modules["adatape_kernels._C"] = types.SimpleNamespace(build_facts=lambda: 1 / 0)
from adatape_kernels.ops.op import explain, registered_ops
for op in registered_ops():
    found = explain(op, "cpu", torch.float32)["cpp"], explain(op, "cuda", torch.bfloat16)["cuda"]
    print(op, *found, sep="|")
"""


def served_with(facts):
    """What each op says of cpp on a CPU, and of cuda on a GPU, where the build says so."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SCRIPT, facts]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = (line.split("|") for line in result.stdout.splitlines())
    return {op: (cpp, cuda) for op, cpp, cuda in rows}


@pytest.mark.parametrize(
    ("facts", "cpp", "cuda"),
    [
        ("13.0 for 80-real, 90a-real, 100", "serves", "serves"),
        ("none: torch 2.13 has no CUDA", "serves", "torch 2.13 has no CUDA"),
        ("broken", "ZeroDivisionError: division by zero", "ZeroDivisionError: division by zero"),
    ],
)
def test_kernels_are_there_as_the_build_says(facts, cpp, cuda):
    """The last stands for a module that is older than torch, and cannot be loaded."""
    served = served_with(facts)
    assert len(served) == 18
    for op, found in served.items():
        assert found[0] == cpp, op
        norm = op.startswith("add_layer_norm")
        assert found[1] == ("there is no such kernel" if norm else cuda), op
