"""What attention's kernels in Triton are compiled to for an H100: what overlaps with what."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adatape_kernels.ops import triton_runtime

pytestmark = pytest.mark.skipif(not triton_runtime.INSTALLED, reason="triton is not installed")

PROGRAM = Path(__file__).with_name("compiled_attention.py")
BLOCKS, SHARED, RESERVED = 4, 228 << 10, 1 << 10  # of a multiprocessor; of each block


@pytest.fixture(scope="module")
def compiled():
    result = subprocess.run(
        [sys.executable, PROGRAM],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def test_copies_are_in_flight_while_a_tile_is_computed(compiled):
    """The last wait of a loop, behind it, is for all copies; those in it leave a tile of each."""
    forward = compiled["_elastic_attention_fwd_kernel"]
    assert forward["in flight"] == [2, 0]  # keys and values
    assert BLOCKS * (forward["shared"] + RESERVED) <= SHARED
    # Keys and values; then queries, dout and two statistics of each.
    assert compiled["_elastic_attention_bwd_kernel"]["in flight"] == [2, 0, 4, 0]


def test_the_last_keys_are_loaded_beside_the_queries(compiled):
    """All loads of 16 bytes are issued before the first store to shared memory waits for one."""
    names = compiled["_elastic_attention_fwd_kernel"]["instructions"]
    wide = [i for i, name in enumerate(names) if name.startswith("LDG.E.128")]
    assert len(wide) == 14  # of queries, and of keys and values in tiles of 64 and of 16
    assert not any(name.startswith("STS.128") for name in names[wide[0] : wide[-1]])


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_products_do_not_wait_for_one_another(compiled, direction):
    """ptxas waits behind each wgmma where it cannot tell its registers from those of others."""
    names = compiled[f"_elastic_attention_{direction}_kernel"]["instructions"]
    products = sum(name.startswith("HGMMA") for name in names)
    waits = sum(name.startswith("WARPGROUP.DEPBAR") for name in names)
    assert products >= 20 and waits <= products // 2
