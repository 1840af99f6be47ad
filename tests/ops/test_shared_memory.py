"""CUDA C++ within the shared memory of the GPU that it runs on: 99, 163 or 227 kB for a block.

The host harness plays each of these GPUs, and its `launch` refuses what one of them would refuse.
"""

import re
import shutil
import subprocess
from pathlib import Path

import emulation
import pytest
import torch

from adatape_kernels.offsets import cumulative
from adatape_kernels.ops import elastic_attention, tape_select
from adatape_kernels.ops.elastic_attention.compiled import most_rows
from adatape_kernels.ops.op import NotServed, record, use_backend
from adatape_kernels.recipes import check
from adatape_kernels.recipes.check_cases import check_cases

CARDS = {"8.6, 8.9 and 12.0": 99, "8.0": 163, "9.0 and 10.0": 227}
SOURCES = Path(__file__).parents[2] / "csrc/cuda"

pytestmark = [
    pytest.mark.skipif(emulation.cuda_host_library() is None, reason="the host was not built"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU that is here"),
]
each_card = pytest.mark.parametrize("kib", CARDS.values(), ids=CARDS)


def selected(bank_size, key_dim, dtype, shared=False, topk=5):
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, key_dim, generator=generator).to(dtype)
    shape = (bank_size, key_dim) if shared else (2, bank_size, key_dim)
    keys = torch.randn(shape, generator=generator).to(dtype)
    with use_backend("cuda"), emulation.noted_launches(run=True) as launches:
        found = tape_select(query, keys, num_tape_tokens=3, topk=topk, halt_threshold=3.0)
    return found, launches


@pytest.mark.parametrize(
    ("bank_size", "key_dim", "dtype", "resident_from"),
    [
        (784, 64, torch.bfloat16, 163),  # 100,352 bytes and the exchange do not fit into 99 kB
        (740, 64, torch.bfloat16, 99),
        (60, 64, torch.float32, 99),  # by one warp
        (900, 32, torch.float32, None),  # 115,200 bytes are too many everywhere
    ],
)
def test_a_bank_stays_in_shared_memory_where_it_fits(bank_size, key_dim, dtype, resident_from):
    """The results are the same bits in either form."""
    results, bank = {}, bank_size * key_dim * dtype.itemsize
    for kib in CARDS.values():
        with emulation.shared_memory(kib):
            results[kib], launches = selected(bank_size, key_dim, dtype)
        (launch,) = launches
        resident = resident_from is not None and kib >= resident_from
        assert (launch.dynamic >= bank) == resident, (kib, launch)
        assert launch.bytes <= kib << 10
    for kib in CARDS.values():
        for a, b in zip(results[kib], results[227], strict=True):
            assert torch.equal(a, b)


@each_card
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("key_dim", [16, 5000, 6100])
def test_queries_of_any_width_fit(kib, shared, key_dim):
    """Those of two examples, which share a block, lie in the GPU's memory at 6,100 features."""
    with emulation.shared_memory(kib):
        found, launches = selected(40, key_dim, torch.float32, shared, topk=2)
    assert found.counts.min() > 0
    assert all(launch.bytes <= kib << 10 for launch in launches)


@each_card
def test_the_first_case_of_check_is_right_on_every_card(kib):
    """On the smallest it could not be launched while each card was taken for one of 9.0."""
    case = next(check_cases())
    assert (case.op, case.name) == ("tape_select", "input-driven bank of 784, k = 5")
    with emulation.shared_memory(kib):
        assert check._accuracy(case, "cuda", torch.bfloat16) is None


def attended(rows, max_rows=None):
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(rows + 3, 3, 1, 64, generator=generator).half().unbind(1)
    lens = torch.tensor([rows - 7, 2], dtype=torch.int32)
    cu_inputs = cumulative(lens)
    cu_tapes = cumulative(torch.tensor([7, 1], dtype=torch.int32), start=rows - 5)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with emulation.noted_launches(run=True) as launches, record() as ran:
        out = elastic_attention(*leaves, cu_inputs, cu_tapes, max_rows=max_rows or rows)
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
    assert {each.backend for each in ran} == {"cuda"}
    return [out.detach(), *grads], launches


def test_the_longest_example_of_each_card_has_the_same_bits():
    results = {}
    for kib, rows in ((99, 320), (227, 320)):
        with emulation.shared_memory(kib), use_backend("cuda"):
            results[kib], launches = attended(rows)
            assert all(each.bytes <= kib << 10 for each in launches)
            assert len(launches) == 2
    for a, b in zip(results[99], results[227], strict=True):
        assert torch.equal(a, b)


@each_card
def test_a_longer_example_is_refused_here_and_in_csrc(kib):
    with emulation.shared_memory(kib) as facts:
        most = most_rows(facts)
        assert most == {99: 320, 163: 512, 227: 512}[kib]
        with use_backend("cuda"), pytest.raises(NotServed, match=f"examples of up to {most} rows"):
            attended(20, max_rows=most + 1)
        q = torch.zeros(4, 1, 64, dtype=torch.half)
        offsets = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([4, 4], dtype=torch.int32)
        raw = torch.ops.adatape_cuda.elastic_attention.default
        words = f"max_rows: expected 0 to {most}, got {most + 1}"
        with pytest.raises(RuntimeError, match=words):
            raw(q, q, q, *offsets, most + 1, None)
        assert raw(q, q, q, *offsets, most, None)[0].shape == q.shape


def test_a_launch_that_asks_for_too_much_is_refused_with_its_numbers():
    words = r"tape_select.cu:\d+: 49152 bytes of dynamic and 2308 of static shared memory, where a"
    with emulation.shared_memory(34), pytest.raises(RuntimeError, match=words):
        selected(300, 64, torch.float32)


@pytest.mark.skipif(not shutil.which("nm"), reason="nm was not found")
def test_launches_state_the_static_memory_that_kernels_have():
    """Against the symbols of the variables that are __shared__, which on the host are static."""
    command = ["nm", "-SC", emulation.cuda_host_library()]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for size, function, arguments in re.findall(
        r"^\w+ (\w+) [bBu] adatape::cuda::(\w+)(<.*>)?\(.*\)::\w+$", symbols, re.MULTILINE
    ):
        of_function = found.setdefault(function, {})
        of_function[arguments] = of_function.get(arguments, 0) + int(size, 16)
    statics = {
        "tape_select_kernel": {2308},
        "tape_select_tile_kernel": {16640},
        "tape_select_merge_kernel": {256},
        "tape_select_bwd_kernel": {512},
        "bias_act_bwd_kernel": {4096, 8192},
        "block_sum": {32},
        "block_rank": {32},
        "compact_block_sum": {32},
        "write_offsets": {32},
        "write_starts": {32},
    }
    assert {name: set(sizes.values()) for name, sizes in found.items()} == statics
    for source in SOURCES.rglob("*.cuh"):
        for line in source.read_text().splitlines():
            # A macro that is no declaration, or a variable of another file, would pass unseen.
            if re.match(r"\s*__shared__", line):
                assert re.match(r"\s*__shared__ \w+(<\w+>)? \w+(\[.*\])?;$", line), line
