"""The C++ kernels once more for each instruction set that this processor has beside its best."""

import os
import subprocess
import sys

import collected_tests
import pytest

from adatape_kernels._build import build_facts

FACTS = build_facts()

pytestmark = pytest.mark.skipif(
    FACTS["compiled"] == "no", reason=f"no compiled part: {FACTS.get('why')}"
)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_the_ops_pass_their_tests(isa):
    if isa == "avx2" and "avx2 fma" not in FACTS["instruction_sets"]:
        pytest.skip("this processor has no AVX2")
    if isa == "avx512" and FACTS["cpu_kernels"] not in ("avx512_bf16", "amx"):
        pytest.skip("AVX-512 is this processor's best, or it has none")
    if isa == "avx512_bf16" and FACTS["cpu_kernels"] != "amx":
        pytest.skip("AVX512-BF16 is this processor's best, or it has none")
    words = ()
    if isa == "avx512":  # all else is what products of bfloat16 and of bytes are chosen beside
        words = ("attention", "select", "read")
    if isa == "avx512_bf16":  # all else is that of amx
        words = ("attention",)
    code, output = collected_tests.run(words, ADATAPE_CPU=isa)
    assert code == 0, output[-3000:]
    assert output.startswith(f"cpu kernels: {isa}\n") and " passed" in output


def test_an_unknown_instruction_set_is_refused():
    script = (
        "import torch, adatape_kernels as ak; q = torch.zeros(1, 1, 8);"
        "cu = torch.tensor([0, 1], dtype=torch.int32);"
        "ak.ops.elastic_attention(q, q, q, cu, torch.ones(2, dtype=torch.int32))"
    )
    environment = {**os.environ, "ADATAPE_CPU": "mmx", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode != 0
    assert "ADATAPE_CPU: expected " in last and "portable, got 'mmx'" in last
