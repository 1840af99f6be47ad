// Small dense products C = A B or C += A B in float, for matrices that lie in the caches.

#pragma once

#include "vec.h"

namespace adatape::ADATAPE_ISA {

// A tile of `rows` x `vecs` vectors stays in registers while k runs from 0 up, which makes every
// element of C one chain of fused multiply-adds in the order of k, whatever tile it lies in.
template <int rows, int vecs>
inline void gemm_tile(int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b,
                      int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  Vec acc[rows][vecs];
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vecs; ++v) acc[r][v] = accumulate ? load(c + r * ldc + v * kLanes) : Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[vecs];
    for (int v = 0; v < vecs; ++v) right[v] = load(b + k * ldb + v * kLanes);
    for (int r = 0; r < rows; ++r) {
      const float left = a[r * a_row + k * a_col];
      for (int v = 0; v < vecs; ++v) acc[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vecs; ++v) store(c + r * ldc + v * kLanes, acc[r][v]);
  }
}

template <int vecs>
inline void gemm_rows(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_col,
                      const float* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) {
    gemm_tile<kTileRows, vecs>(depth, a + r * a_row, a_row, a_col, b, ldb, c + r * ldc, ldc,
                               accumulate);
  }
  for (; r + 2 <= rows; r += 2) {
    gemm_tile<2, vecs>(depth, a + r * a_row, a_row, a_col, b, ldb, c + r * ldc, ldc, accumulate);
  }
  if (r < rows) {
    gemm_tile<1, vecs>(depth, a + r * a_row, a_row, a_col, b, ldb, c + r * ldc, ldc, accumulate);
  }
}

// C (rows, cols) from A (rows, depth), element (i, k) at a[i * a_row + k * a_col], and B
// (depth, cols) with rows ldb apart. cols, ldb and ldc are multiples of kLanes.
inline void gemm(int64_t rows, int64_t cols, int64_t depth, const float* a, int64_t a_row,
                 int64_t a_col, const float* b, int64_t ldb, float* c, int64_t ldc,
                 bool accumulate) {
  int64_t j = 0;
  for (; j + kTileVecs * kLanes <= cols; j += kTileVecs * kLanes) {
    gemm_rows<kTileVecs>(rows, depth, a, a_row, a_col, b + j, ldb, c + j, ldc, accumulate);
  }
  for (; j < cols; j += kLanes) {
    gemm_rows<1>(rows, depth, a, a_row, a_col, b + j, ldb, c + j, ldc, accumulate);
  }
}

}  // namespace adatape::ADATAPE_ISA
