// Products of bfloat16 matrices by AMX, which keeps eight tiles of 16 rows of 64 bytes each.
//
// One instruction adds the product of two tiles to a third: 16 rows of 16 pairs of numbers, times
// 16 rows of 16 columns' pairs, to 16 rows of 16 sums in float. So pairs lie as they do for
// AVX512-BF16, and matrices are padded to whole tiles. Numbers below the normal ones count as 0.

#pragma once

#include <type_traits>

#include "numbers.h"

namespace adatape::ADATAPE_ISA {

template <class Element>
struct SmallProduct;

// What the rows and the depth of operands of such elements are padded to.
#if defined(__AMX_BF16__)
template <class Element>
constexpr int64_t kWholeTile = std::is_same_v<Element, BFloat16Pair> ? 16 : 1;
#else
template <class Element>
constexpr int64_t kWholeTile = 1;
#endif

// Returns so many rows, or elements along the depth, with those that fill up the last tile.
template <class Element>
constexpr int64_t whole_tiles(int64_t count) {
  return (count + kWholeTile<Element> - 1) / kWholeTile<Element> * kWholeTile<Element>;
}

#if defined(__AMX_BF16__)
constexpr int64_t kTileSide = kWholeTile<BFloat16Pair>;

// The operand of LDTILECFG.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64);
inline constexpr TileShapes kTileShapes;

// A thread can use tiles, all of the full size, while such an object lives.
class TilesInUse {
 public:
  TilesInUse() { _tile_loadconfig(&kTileShapes); }
  ~TilesInUse() { _tile_release(); }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;
};

// Computes rows × cols tiles of C, from row r and column j on. The sums stay in tiles 0 to 3, while
// tiles 4 and 5 hold those of A, and 6 and 7 those of B.
template <int rows, int cols, class Element, class Aside>
inline void multiply_tiles(const SmallProduct<Element>& p, int64_t r, int64_t j,
                           const Aside& aside) {
  const Element* const a = p.a + r * p.stride_a_row;
  const Element* const a_below = a + kTileSide * p.stride_a_row;
  const Element* const b = p.b + j;
  float* const c = p.c + r * p.stride_c + j;
  float* const c_below = c + kTileSide * p.stride_c;
  // An element has 4 bytes in each of the matrices.
  const int64_t a_bytes = 4 * p.stride_a_row, b_bytes = 4 * p.stride_b, c_bytes = 4 * p.stride_c;
  // Some compilers do not know that the instructions below read memory, so that what has not been
  // written yet must be written here.
  asm volatile("" ::: "memory");
  if (p.accumulate) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (cols > 1) _tile_loadd(1, c + kTileSide, c_bytes);
    if constexpr (rows > 1) _tile_loadd(2, c_below, c_bytes);
    if constexpr (rows > 1 && cols > 1) _tile_loadd(3, c_below + kTileSide, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (cols > 1) _tile_zero(1);
    if constexpr (rows > 1) _tile_zero(2);
    if constexpr (rows > 1 && cols > 1) _tile_zero(3);
  }
  for (int64_t k = 0; k < p.depth; k += kTileSide) {
    const Element* const right = b + k * p.stride_b;
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, right, b_bytes);
    aside();
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (cols > 1) {
      _tile_loadd(7, right + kTileSide, b_bytes);
      aside();
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (rows > 1) {
      _tile_loadd(5, a_below + k, a_bytes);
      aside();
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (rows > 1 && cols > 1) {
      aside();
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (cols > 1) _tile_stored(1, c + kTileSide, c_bytes);
  if constexpr (rows > 1) _tile_stored(2, c_below, c_bytes);
  if constexpr (rows > 1 && cols > 1) _tile_stored(3, c_below + kTileSide, c_bytes);
}

template <int rows, class Element, class Aside>
inline void multiply_rows_of_tiles(const SmallProduct<Element>& p, int64_t r, const Aside& aside) {
  int64_t j = 0;
  for (; j + kTileSide < p.cols; j += 2 * kTileSide) multiply_tiles<rows, 2>(p, r, j, aside);
  if (j < p.cols) multiply_tiles<rows, 1>(p, r, j, aside);
}

// Computes a product while the thread's tiles are in use. A, B and C have room for whole tiles:
// behind the depth both A and B have zeros, and what lies behind the rows of A only matters to what
// lies there in C. A's columns are contiguous. Every element of C is a sum in the order of the
// depth, whatever tile it lies in.
template <class Element, class Aside>
inline void multiply_in_tiles(const SmallProduct<Element>& p, const Aside& aside) {
  int64_t r = 0;
  for (; r + kTileSide < p.rows; r += 2 * kTileSide) multiply_rows_of_tiles<2>(p, r, aside);
  if (r < p.rows) multiply_rows_of_tiles<1>(p, r, aside);
}
#endif

}  // namespace adatape::ADATAPE_ISA
