"""Attention's kernels for AMX on a processor without it, which tests/tiles emulates.

The kernels are those of the compiled part, instruction by instruction.
"""

import json
import os
import platform
import subprocess
import sys

import collected_tests
import emulation
import pytest

from adatape_kernels._build import build_facts

LIBRARY = emulation.emulated_tiles_library()
FACTS = build_facts()

pytestmark = [
    pytest.mark.skipif(FACTS["compiled"] == "no", reason=f"no compiled part: {FACTS.get('why')}"),
    pytest.mark.skipif(
        platform.machine() not in ("x86_64", "AMD64"), reason="this processor is no x86-64"
    ),
    pytest.mark.skipif(
        "avx512_bf16" not in FACTS.get("instruction_sets", ""),
        reason="tiles alone are emulated, and this processor lacks AVX512-BF16",
    ),
    pytest.mark.skipif(
        "amx" in FACTS.get("instruction_sets", ""),
        reason="this processor has AMX: the ops' other tests run it, not emulated",
    ),
    pytest.mark.skipif(LIBRARY is None, reason="the emulation was not built: `make test` does it"),
]


def run(script):
    """Run a script in which `emulation` and LIBRARY are known."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    lines = ("import sys, emulation", f"LIBRARY = {str(LIBRARY)!r}", script)
    process = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env={**environment, "ADATAPE_EMULATED_TILES": str(LIBRARY)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, (process.stdout + process.stderr)[-3000:]


def test_attention_passes_its_tests():
    """With every count of rows and of features that leaves a part of a tile empty."""
    code, output = collected_tests.run(["attention"], tiles=LIBRARY)
    assert code == 0, output[-3000:]
    counts = emulation.TileCounts(**json.loads(output.rpartition("tiles: ")[2]))
    assert " passed" in output
    assert counts.in_use == 0 and counts.products > 10_000 and counts.releases > 100, counts


FEW_ROWS = """
import torch
from adatape_kernels.ops import elastic_attention
emulation.load_emulated_tiles(LIBRARY)
for rows, dtype in ((31, torch.bfloat16), (64, torch.float32), (64, torch.float16)):
    q = torch.randn(rows, 1, 16).to(dtype).requires_grad_()
    offsets = torch.tensor([0, rows], dtype=torch.int32)
    elastic_attention(q, q, q, offsets, torch.full_like(offsets, rows)).sum().backward()
    assert emulation.tile_counts(LIBRARY).products == 0, (rows, dtype)
q = torch.randn(32, 1, 16).bfloat16()
elastic_attention(q, q, q, torch.tensor([0, 32], dtype=torch.int32), torch.tensor([32, 32]).int())
# Two by two tiles of scores, and two by one of outputs, each over one tile's depth.
assert emulation.tile_counts(LIBRARY) == (6, 1, 0), emulation.tile_counts(LIBRARY)
"""


def test_tiles_multiply_long_examples_in_bfloat16_alone():
    run(FEW_ROWS)
