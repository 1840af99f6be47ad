"""The emulation of AMX, in tests/tiles, does what Intel's manual says; it sees each fault."""

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from adatape_kernels._build import build_facts

EMULATION = Path(__file__).parents[1] / "tiles/emulated_tiles.cpp"
FACTS = build_facts()

# A product of parts of tiles, whose rows lie apart; then what tells of the order of its sums, and
# of numbers below the normal ones.
PROGRAM = """
#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

uint16_t bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

constexpr int kRows = 5, kPairs = 3, kColumns = 7;
Shapes shapes;
uint16_t a[kRows][8], b[kPairs][16];
float c[kRows][9];

void multiply() {
  asm volatile("" ::: "memory");
  _tile_loadconfig(&shapes);
  _tile_loadd(3, c, sizeof c[0]);
  _tile_loadd(1, a, sizeof a[0]);
  _tile_loadd(6, b, sizeof b[0]);
  _tile_dpbf16ps(3, 1, 6);
  _tile_stored(3, c, sizeof c[0]);
  _tile_release();
  asm volatile("" ::: "memory");
}

int main() {
  shapes.rows[3] = kRows, shapes.row_bytes[3] = 4 * kColumns;
  shapes.rows[1] = kRows, shapes.row_bytes[1] = 4 * kPairs;
  shapes.rows[6] = kPairs, shapes.row_bytes[6] = 4 * kColumns;
  float expected[kRows][9];
  for (auto& row : a) for (auto& x : row) x = bfloat16(static_cast<float>((&x - &a[0][0]) % 11));
  for (auto& row : b) for (auto& x : row) x = bfloat16(static_cast<float>(3 - (&x - &b[0][0]) % 8));
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < 9; ++n) {
      c[m][n] = expected[m][n] = static_cast<float>(m - n);
      for (int k = 0; k < 2 * kPairs && n < kColumns; ++k) {
        expected[m][n] += static_cast<float>((8 * m + k) % 11) *
                          static_cast<float>(3 - (16 * (k / 2) + 2 * n + k % 2) % 8);
      }
    }
  }
  multiply();
  std::printf("product %d", std::memcmp(c, expected, sizeof c));

  std::memset(a, 0, sizeof a);
  for (auto& row : b) for (auto& x : row) x = bfloat16(1.0f);
  a[0][0] = bfloat16(0x1p24f), a[0][1] = bfloat16(1.0f);
  a[0][2] = bfloat16(-0x1p24f), a[0][3] = bfloat16(1.0f);
  a[1][0] = 1;  // below the normal numbers
  std::memset(c, 0, sizeof c);
  multiply();
  std::printf(" sum %g below %g", static_cast<double>(c[0][0]), static_cast<double>(c[1][0]));
}
"""

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="g++ was not found"),
    pytest.mark.skipif(
        "avx2 fma" not in FACTS.get("instruction_sets", ""),
        reason="the emulation needs AVX2, or there is no compiled part that says so",
    ),
    pytest.mark.skipif(
        "amx" in FACTS.get("instruction_sets", ""), reason="this processor has AMX itself"
    ),
]


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulation") / "emulated_tiles.o"
    options = ["-std=c++20", "-O2", "-mavx2", "-mfma"]
    subprocess.run(["g++", *options, "-c", EMULATION, "-o", path], check=True, timeout=200)
    return path


@pytest.fixture
def run(tmp_path, emulation):
    """Compiles the program with one text replaced; returns its process."""

    def compile_and_run(old="", new=""):
        assert not old or PROGRAM.count(old) == 1
        (tmp_path / "main.cpp").write_text(PROGRAM.replace(old, new) if old else PROGRAM)
        options = ["-std=c++20", "-O2", "-mamx-tile", "-mamx-bf16"]
        command = ["g++", *options, tmp_path / "main.cpp", emulation, "-o", tmp_path / "main"]
        subprocess.run(command, check=True, timeout=200)
        return subprocess.run([tmp_path / "main"], capture_output=True, text=True, timeout=100)

    return compile_and_run


def test_a_product_of_parts_of_tiles(run):
    process = run()
    assert (process.returncode, process.stderr) == (0, "")
    # Sums of even and of odd place are apart, or the first 1 would be lost beside 2^24.
    assert process.stdout == "product 0 sum 2 below 0"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  _tile_loadconfig(&shapes);\n", "", "an instruction before LDTILECFG"),
        ("_tile_loadd(3, c, sizeof c[0]);", "_tile_zero(4);", "a tile that was not configured"),
        ("shapes.rows[6] = kPairs", "shapes.rows[6] = 4", "tiles that do not fit each other"),
        ("shapes.rows[3] = kRows", "shapes.rows[3] = 17", "more than 16 rows"),
        ("row_bytes[1] = 4 * kPairs", "row_bytes[1] = 68", "more than 64 bytes in a row"),
        ("uint8_t palette = 1", "uint8_t palette = 2", "an unknown palette"),
    ],
)
def test_a_fault_ends_the_process(run, old, new, message):
    process = run(old, new)
    assert process.returncode == 70
    assert process.stderr.startswith("emulated tiles: ") and message in process.stderr


def test_an_instruction_that_nobody_knows_stays_illegal(run):
    process = run("  _tile_release();\n", "  __builtin_trap();\n")
    assert process.returncode == -signal.SIGILL
