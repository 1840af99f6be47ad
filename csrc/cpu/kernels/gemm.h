// Small dense products of matrices that lie in the caches.

#pragma once

#include "tile_products.h"
#include "vec.h"

namespace adatape::ADATAPE_ISA {

// The elements of the matrices that are multiplied are numbers in float or, where the processor
// multiplies them so, pairs of numbers in bfloat16 that follow each other along the depth: two
// columns of A, two rows of B. Sums are float.
inline Vec load_elements(const float* from) { return load(from); }
inline Vec multiply_add(Vec sum, const float* left, Vec right) { return sum + *left * right; }
#if defined(__AVX512BF16__)
inline IntVec load_elements(const BFloat16Pair* from) {
  IntVec result;
  std::memcpy(&result, from, sizeof result);
  return result;
}
inline Vec multiply_add(Vec sum, const BFloat16Pair* left, IntVec right) {
  uint32_t bits;
  std::memcpy(&bits, left, sizeof bits);
  const __m512i lefts = _mm512_set1_epi32(static_cast<int>(bits));
  return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                reinterpret_cast<__m512bh>(lefts),
                                                reinterpret_cast<__m512bh>(right)));
}
#endif

// The product C = A B, or C += A B if `accumulate`. Strides are in elements. The rows of B and C
// are contiguous; cols, stride_b and stride_c are multiples of kLanes.
template <class Element>
struct SmallProduct {
  int64_t rows;   // of A and C
  int64_t cols;   // of B and C
  int64_t depth;  // columns of A, rows of B
  const Element* a;
  int64_t stride_a_row;  // from a row of A to the next
  int64_t stride_a_col;  // from a column of A to the next
  const Element* b;
  int64_t stride_b;  // from a row of B to the next
  float* c;
  int64_t stride_c;  // from a row of C to the next
  bool accumulate;
};

// Computes a tile of `rows` rows and `vecs` vectors of C, from row r and column j on. The tile
// stays in registers while k counts up to the depth. So every element of C is one chain of fused
// multiply-adds in the order of k, whatever tile it lies in.
template <int rows, int vecs, class Element, class Aside>
inline void gemm_tile(const SmallProduct<Element>& p, int64_t r, int64_t j, const Aside& aside) {
  const Element* const a = p.a + r * p.stride_a_row;
  const Element* const b = p.b + j;
  float* const c = p.c + r * p.stride_c + j;
  Vec acc[rows][vecs];
  for (int i = 0; i < rows; ++i) {
    for (int v = 0; v < vecs; ++v) {
      acc[i][v] = p.accumulate ? load(c + i * p.stride_c + v * kLanes) : Vec{};
    }
  }
  for (int64_t k = 0; k < p.depth; ++k) {
    aside();
    decltype(load_elements(b)) right[vecs];
    for (int v = 0; v < vecs; ++v) right[v] = load_elements(b + k * p.stride_b + v * kLanes);
    for (int i = 0; i < rows; ++i) {
      const Element* const left = a + i * p.stride_a_row + k * p.stride_a_col;
      for (int v = 0; v < vecs; ++v) acc[i][v] = multiply_add(acc[i][v], left, right[v]);
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int v = 0; v < vecs; ++v) store(c + i * p.stride_c + v * kLanes, acc[i][v]);
  }
}

// Computes `vecs` vectors of every row of C, from column j on.
template <int vecs, class Element, class Aside>
inline void gemm_columns(const SmallProduct<Element>& p, int64_t j, const Aside& aside) {
  int64_t r = 0;
  for (; r + kTileRows <= p.rows; r += kTileRows) gemm_tile<kTileRows, vecs>(p, r, j, aside);
  for (; r + 2 <= p.rows; r += 2) gemm_tile<2, vecs>(p, r, j, aside);
  if (r < p.rows) gemm_tile<1, vecs>(p, r, j, aside);
}

// Computes the product. What else is to be done meanwhile, in small pieces, is done by aside(),
// once in each step of a tile.
template <class Element, class Aside>
inline void gemm(const SmallProduct<Element>& p, const Aside& aside) {
#if defined(__AMX_BF16__)
  if constexpr (kWholeTile<Element> > 1) return multiply_in_tiles(p, aside);
#endif
  int64_t j = 0;
  for (; j + kTileVecs * kLanes <= p.cols; j += kTileVecs * kLanes) {
    gemm_columns<kTileVecs>(p, j, aside);
  }
  for (; j < p.cols; j += kLanes) gemm_columns<1>(p, j, aside);
}
template <class Element>
inline void gemm(const SmallProduct<Element>& p) {
  gemm(p, [] {});
}

}  // namespace adatape::ADATAPE_ISA
