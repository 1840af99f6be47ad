"""The harness that runs CUDA kernels on the host (tests/cuda_host) sees what it is there to see.

Faults are planted in copies of a kernel, each of which a sanitizer or the harness must report.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

HOST = Path(__file__).parents[1] / "cuda_host"
CUDA = Path(__file__).parents[2] / "csrc/cuda"

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="g++ was not found")

# Forty examples' counts of 1, summed by the block of tape_gather_offsets_kernel.
PROGRAM = """
#include "kernels/tape_gather_kernels.cuh"

#include <cstdio>
#include <vector>

int main() {
  using namespace adatape::cuda;
  constexpr int64_t kBatch = 40;
  std::vector<int32_t> counts(kBatch, 1), offsets(kBatch + 1);
  CudaTapeGatherParams p{};
  p.counts = counts.data(), p.offsets = offsets.data();
  p.batch = kBatch, p.num_tape_tokens = 1, p.topk = 1;
  cuda_host::run({.kernel_name = "test", .grid = {.x = 1}, .block_threads = kGatherThreads},
                 [&] { tape_gather_offsets_kernel(p); });
  std::printf("total %d", offsets[kBatch]);
}
"""
SANITIZERS = {"address": "address,undefined", "thread": "thread"}


@pytest.fixture(scope="session")
def torch_include():
    import torch

    return Path(torch.__path__[0]) / "include"


@pytest.fixture(scope="session")
def compiled(tmp_path_factory, torch_include):
    """Compiles a file, the harness itself once only; returns what the compiler made."""
    made = {}

    def compile_one(sanitizer, source, *includes):
        key = sanitizer, source
        if key not in made:
            made[key] = tmp_path_factory.mktemp("objects") / "object.o"
            command = [
                "g++",
                "-c",
                "-std=c++20",
                "-O1",
                "-g",
                f"-fsanitize={SANITIZERS[sanitizer]}",
                "-fno-sanitize-recover=all",
                "-fno-strict-aliasing",
                "-DADATAPE_CUDA_HOST",
                "-include",
                HOST / "cuda_host.h",
                "-I",
                HOST,
                *includes,
                "-isystem",
                torch_include,
                source,
                "-o",
                made[key],
            ]
            subprocess.run(command, check=True, timeout=200)
        return made[key]

    return compile_one


@pytest.fixture
def run(tmp_path, compiled):
    """Compiles the program with one text of the kernels replaced; returns its process."""

    def compile_and_run(sanitizer, old="", new=""):
        shutil.copytree(CUDA, tmp_path / "cuda")
        kernels = tmp_path / "cuda/kernels/tape_gather_kernels.cuh"
        source = kernels.read_text()
        if old:
            assert source.count(old) == 1
            kernels.write_text(source.replace(old, new))
        (tmp_path / "main.cpp").write_text(PROGRAM)
        objects = [
            compiled(sanitizer, tmp_path / "main.cpp", "-I", tmp_path / "cuda"),
            compiled(sanitizer, HOST / "cuda_host.cpp"),
        ]
        link = ["g++", f"-fsanitize={SANITIZERS[sanitizer]}", "-pthread", *objects]
        subprocess.run([*link, "-o", tmp_path / "main"], check=True, timeout=100)
        return subprocess.run([tmp_path / "main"], capture_output=True, text=True, timeout=100)

    return compile_and_run


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_kernel_as_it_is_runs_clean(run, sanitizer):
    process = run(sanitizer)
    assert (process.returncode, process.stdout) == (0, "total 40"), process.stderr


def test_a_read_behind_the_end_is_caught(run):
    process = run("address", "example < p.batch ? count_of(p, example) : 0", "count_of(p, example)")
    assert process.returncode != 0
    assert "heap-buffer-overflow" in process.stderr


def test_a_missing_barrier_is_caught(run):
    barrier = "    if (lane == kWarpSize - 1) ends[warp] = end;\n"
    process = run("thread", f"{barrier}    __syncthreads();\n", barrier)
    assert process.returncode != 0
    assert "data race" in process.stderr


def test_a_barrier_that_some_threads_never_reach_is_caught(run):
    barrier = "    if (lane == kWarpSize - 1) ends[warp] = end;\n    __syncthreads();\n"
    process = run("address", barrier, barrier.replace("__sync", "if (lane == 0) __sync"))
    assert process.returncode != 0
    assert "cuda_host: test, block (0, 0, 0)" in process.stderr


def test_a_shuffle_mask_that_leaves_out_lanes_is_caught(run):
    shuffle = "__shfl_up_sync(kFullMask, end, by)"
    process = run("address", shuffle, shuffle.replace("kFullMask", "kFullMask >> 16"))
    assert process.returncode != 0
    assert "__shfl_up_sync: its mask leaves itself out" in process.stderr


def test_a_shuffle_that_some_lanes_skip_is_caught(run):
    shuffle = "const int32_t other = __shfl_up_sync(kFullMask, end, by);"
    skipped = "const int32_t other = lane < 16 ? __shfl_up_sync(kFullMask, end, by) : 0;"
    process = run("address", shuffle, skipped)
    assert process.returncode != 0
    assert "__shfl_up_sync of mask 4294967295" in process.stderr
