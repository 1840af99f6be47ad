// Small dense products of matrices of float that lie in the caches.

#pragma once

#include "vec.h"

namespace adatape::ADATAPE_ISA {

// The product C = A B, or C += A B if `accumulate`. Strides are in elements. The rows of B and C
// are contiguous; cols, stride_b and stride_c are multiples of kLanes.
struct SmallProduct {
  int64_t rows;   // of A and C
  int64_t cols;   // of B and C
  int64_t depth;  // columns of A, rows of B
  const float* a;
  int64_t stride_a_row;  // from a row of A to the next
  int64_t stride_a_col;  // from a column of A to the next
  const float* b;
  int64_t stride_b;  // from a row of B to the next
  float* c;
  int64_t stride_c;  // from a row of C to the next
  bool accumulate;
};

// Computes a tile of `rows` rows and `vecs` vectors of C, from row r and column j on. The tile
// stays in registers while k counts up to the depth. So every element of C is one chain of fused
// multiply-adds in the order of k, whatever tile it lies in.
template <int rows, int vecs>
inline void gemm_tile(const SmallProduct& p, int64_t r, int64_t j) {
  const float* const a = p.a + r * p.stride_a_row;
  const float* const b = p.b + j;
  float* const c = p.c + r * p.stride_c + j;
  Vec acc[rows][vecs];
  for (int i = 0; i < rows; ++i) {
    for (int v = 0; v < vecs; ++v) {
      acc[i][v] = p.accumulate ? load(c + i * p.stride_c + v * kLanes) : Vec{};
    }
  }
  for (int64_t k = 0; k < p.depth; ++k) {
    Vec right[vecs];
    for (int v = 0; v < vecs; ++v) right[v] = load(b + k * p.stride_b + v * kLanes);
    for (int i = 0; i < rows; ++i) {
      const float left = a[i * p.stride_a_row + k * p.stride_a_col];
      for (int v = 0; v < vecs; ++v) acc[i][v] += left * right[v];
    }
  }
  for (int i = 0; i < rows; ++i) {
    for (int v = 0; v < vecs; ++v) store(c + i * p.stride_c + v * kLanes, acc[i][v]);
  }
}

// Computes `vecs` vectors of every row of C, from column j on.
template <int vecs>
inline void gemm_columns(const SmallProduct& p, int64_t j) {
  int64_t r = 0;
  for (; r + kTileRows <= p.rows; r += kTileRows) gemm_tile<kTileRows, vecs>(p, r, j);
  for (; r + 2 <= p.rows; r += 2) gemm_tile<2, vecs>(p, r, j);
  if (r < p.rows) gemm_tile<1, vecs>(p, r, j);
}

inline void gemm(const SmallProduct& p) {
  int64_t j = 0;
  for (; j + kTileVecs * kLanes <= p.cols; j += kTileVecs * kLanes) gemm_columns<kTileVecs>(p, j);
  for (; j < p.cols; j += kLanes) gemm_columns<1>(p, j);
}

}  // namespace adatape::ADATAPE_ISA
