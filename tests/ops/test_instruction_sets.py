"""The C++ kernels once more for each instruction set that this processor has beside its best."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adatape_kernels._build import build_facts

TESTS = Path(__file__).parent
FACTS = build_facts()

pytestmark = pytest.mark.skipif(
    FACTS["compiled"] == "no", reason=f"no compiled part: {FACTS.get('why')}"
)


def run(isa, *command):
    environment = {**os.environ, "ADATAPE_CPU": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_the_ops_pass_their_tests(isa):
    if isa == "avx2" and "avx2 fma" not in FACTS["instruction_sets"]:
        pytest.skip("this processor has no AVX2")
    if isa == "avx512" and FACTS["cpu_kernels"] not in ("avx512_bf16", "amx"):
        pytest.skip("AVX-512 is this processor's best, or it has none")
    if isa == "avx512_bf16" and FACTS["cpu_kernels"] != "amx":
        pytest.skip("AVX512-BF16 is this processor's best, or it has none")
    command = "-m pytest -q -p no:cacheprovider -m instruction_sets".split()
    if isa == "avx512":  # all else is what products of bfloat16 and of bytes are chosen beside
        command += ["-k", "attention or select or read"]
    if isa == "avx512_bf16":  # all else is that of amx
        command += ["-k", "attention"]
    result = run(isa, *command, str(TESTS))
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


def test_an_unknown_instruction_set_is_refused():
    script = (
        "import torch, adatape_kernels as ak; q = torch.zeros(1, 1, 8);"
        "cu = torch.tensor([0, 1], dtype=torch.int32);"
        "ak.ops.elastic_attention(q, q, q, cu, torch.ones(2, dtype=torch.int32))"
    )
    result = run("mmx", "-c", script)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode != 0
    assert "ADATAPE_CPU: expected " in last and "portable, got 'mmx'" in last
