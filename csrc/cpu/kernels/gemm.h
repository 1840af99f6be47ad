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

// Half a vector of float.
using NarrowVec = float __attribute__((vector_size(kVecBytes / 2)));
constexpr int kNarrowLanes = kLanes / 2;
inline NarrowVec load_narrow(const float* from) {
  NarrowVec result;
  std::memcpy(&result, from, sizeof result);
  return result;
}
inline void store_narrow(float* to, NarrowVec x) { std::memcpy(to, &x, sizeof x); }
inline NarrowVec multiply_add(NarrowVec sum, const float* left, NarrowVec right) {
  return sum + *left * right;
}
// Where AVX-512 runs in two halves, half a vector takes half the time. Otherwise it costs no more
// than a whole one does.
template <class Element>
constexpr bool kHasNarrow = kLanes == 16 && std::is_same_v<Element, float>;

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

// In float an element of C is a chain of fused multiply-adds in the order of the depth, or the sum
// of some chains, one after another: the error of a chain grows with its length, most of all where
// numbers have one sign. The chains of a product are about as long as each other.
constexpr int64_t kLongestChain = 128;

// The product C = A B, or C += A B if `accumulate`. Strides are in elements. The rows of B and C
// are contiguous, and there is room for whole vectors in them: what C has behind its columns may be
// anything.
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
  // B may lie in two places: row `first_b` of it then is at `other_b`, followed by the rest.
  int64_t first_b = -1;
  const Element* other_b = nullptr;
  int64_t longest_chain = kLongestChain;  // a multiple of 16
};

// Whether an element of C can be the sum of several chains. Pairs make one, because what was
// rounded to bfloat16 has greater errors, and so do quads, which have none.
template <class Element>
constexpr bool kHasChains = std::is_same_v<Element, float>;
// Returns the length of all chains but the last one, which is a multiple of any vector's.
inline int64_t chain_length(int64_t depth, int64_t longest) {
  constexpr int64_t kMultiple = 16;
  static_assert(kMultiple % kLanes == 0);
  if (depth <= longest) return depth;
  const int64_t chains = (depth + longest - 1) / longest;
  const int64_t length = (depth + chains - 1) / chains;
  return (length + kMultiple - 1) / kMultiple * kMultiple;
}

// Where the rows of A begin, unless a caller says otherwise.
template <class Element>
struct LeftRows {
  const Element* a;
  int64_t stride;

  explicit LeftRows(const SmallProduct<Element>& p) : a(p.a), stride(p.stride_a_row) {}
  const Element* operator()(int64_t r) const { return a + r * stride; }
};

// Stores the rows of C, unless a caller does: (r) gives what writes a vector of row r. That must be
// inlined, or else the sums do not stay in registers.
template <class Element>
struct StoreRows {
  float* c;
  int64_t stride;

  explicit StoreRows(const SmallProduct<Element>& p) : c(p.c), stride(p.stride_c) {}
  auto operator()(int64_t r) const {
    return [row = c + r * stride](int64_t j, Vec x)
               __attribute__((always_inline)) { store(row + j, x); };
  }
};

// The sums of a tile of so many rows and vectors, and half a vector more if `narrow`, which are to
// stay in registers. With no whole vector there is one that is not used, because no array is empty.
template <int rows, int vecs, bool narrow>
struct TileSums {
  Vec whole[rows][vecs > 0 ? vecs : 1] = {};
  NarrowVec half[rows] = {};

  __attribute__((always_inline)) void add(const float* c, int64_t stride) {
    for (int i = 0; i < rows; ++i, c += stride) {
      for (int v = 0; v < vecs; ++v) whole[i][v] += load(c + v * kLanes);
      if constexpr (narrow) half[i] += load_narrow(c + vecs * kLanes);
    }
  }
  __attribute__((always_inline)) void store_half(int i, float* c) const {
    if constexpr (narrow) store_narrow(c + vecs * kLanes, half[i]);
  }
};

// Adds the products of columns `k` to `end` of the rows `a` with the rows of B from `b` on, and
// moves `b` behind them.
template <bool two_places, int rows, int vecs, bool narrow, class Element, class Aside>
__attribute__((always_inline)) inline void add_products(TileSums<rows, vecs, narrow>& sums,
                                                        const SmallProduct<Element>& p, int64_t j,
                                                        const Element* const (&a)[rows],
                                                        const Element*& b, int64_t k, int64_t end,
                                                        const Aside& aside) {
  for (; k < end; ++k, b += p.stride_b) {
    aside();
    if constexpr (two_places) {
      if (k == p.first_b) b = p.other_b + j;
    }
    decltype(load_elements(b)) right[vecs > 0 ? vecs : 1];
    NarrowVec right_half;
    for (int v = 0; v < vecs; ++v) right[v] = load_elements(b + v * kLanes);
    if constexpr (narrow) right_half = load_narrow(b + vecs * kLanes);
    for (int i = 0; i < rows; ++i) {
      const Element* const left = a[i] + k * p.stride_a_col;
      for (int v = 0; v < vecs; ++v) {
        sums.whole[i][v] = multiply_add(sums.whole[i][v], left, right[v]);
      }
      if constexpr (narrow) sums.half[i] = multiply_add(sums.half[i], left, right_half);
    }
  }
}

// Adds all chains of a tile but the last to C, whose first is `c`. Returns where the last begins.
template <bool two_places, int vecs, bool narrow, int rows, class Element, class Aside>
__attribute__((noinline)) int64_t add_chains(const SmallProduct<Element>& p, int64_t j,
                                             const Element* const (&a)[rows], const Element*& b,
                                             float* c, const Aside& aside) {
  const int64_t length = chain_length(p.depth, p.longest_chain);
  int64_t k = 0;
  for (; p.depth - k > length; k += length) {
    TileSums<rows, vecs, narrow> sums;
    add_products<two_places>(sums, p, j, a, b, k, k + length, aside);
    if (p.accumulate || k > 0) sums.add(c, p.stride_c);
    for (int i = 0; i < rows; ++i) {
      for (int v = 0; v < vecs; ++v) store(c + i * p.stride_c + v * kLanes, sums.whole[i][v]);
      sums.store_half(i, c + i * p.stride_c);
    }
  }
  return k;
}

// Computes a tile of `rows` rows and `vecs` vectors of C, and half a vector more if `narrow`, from
// row r and column j on. Where there are some chains, C holds the sum of those before the last. So
// every element of C is added up in the same order, whatever tile it lies in.
template <int rows, int vecs, bool narrow, class Element, class Aside, class Left, class Write>
inline void gemm_tile(const SmallProduct<Element>& p, int64_t r, int64_t j, const Aside& aside,
                      const Left& left_row, const Write& write) {
  constexpr bool kTwoPlaces = !std::is_same_v<Write, StoreRows<Element>>;
  const Element* a[rows];
  for (int i = 0; i < rows; ++i) a[i] = left_row(r + i);
  const Element* b = p.b + j;
  float* const c = p.c + r * p.stride_c + j;
  int64_t chain = 0;
  if (kHasChains<Element> && p.depth > p.longest_chain) {
    chain = add_chains<kTwoPlaces, vecs, narrow>(p, j, a, b, c, aside);
  }
  TileSums<rows, vecs, narrow> sums;
  add_products<kTwoPlaces>(sums, p, j, a, b, chain, p.depth, aside);
  if (p.accumulate || chain > 0) sums.add(c, p.stride_c);
  for (int i = 0; i < rows; ++i) {
    const auto write_vector = write(r + i);
    for (int v = 0; v < vecs; ++v) write_vector(j + v * kLanes, sums.whole[i][v]);
    sums.store_half(i, c + i * p.stride_c);
  }
}

// Computes these vectors of every row of C, from column j on.
template <int vecs, bool narrow, class Element, class... Rest>
inline void gemm_columns(const SmallProduct<Element>& p, int64_t j, const Rest&... rest) {
  int64_t r = 0;
  for (; r + kTileRows <= p.rows; r += kTileRows) {
    gemm_tile<kTileRows, vecs, narrow>(p, r, j, rest...);
  }
  for (; r + 2 <= p.rows; r += 2) gemm_tile<2, vecs, narrow>(p, r, j, rest...);
  if (r < p.rows) gemm_tile<1, vecs, narrow>(p, r, j, rest...);
}

// The same for a number of vectors, 1 to `most`, the last of which is half a one if `narrow`.
template <int most, class Element, class Aside, class Left, class Write>
inline void gemm_up_to(int64_t vecs, bool narrow, const SmallProduct<Element>& p, int64_t j,
                       const Aside& aside, const Left& left_row, const Write& write) {
  if (vecs == most) {
    if constexpr (kHasNarrow<Element> && std::is_same_v<Write, StoreRows<Element>>) {
      if (narrow) return gemm_columns<most - 1, true>(p, j, aside, left_row, write);
    }
    return gemm_columns<most, false>(p, j, aside, left_row, write);
  }
  if constexpr (most > 1) gemm_up_to<most - 1>(vecs, narrow, p, j, aside, left_row, write);
}

// Computes the product. What else is to be done meanwhile, in small pieces, is done by aside(),
// once in each step of a tile. Tiles are about as wide as each other, because narrow ones are slow.
template <class Element, class Aside, class Left, class Write>
inline void gemm(const SmallProduct<Element>& p, const Aside& aside, const Left& left_row,
                 const Write& write) {
  const int64_t behind = p.cols % kLanes;
  int64_t vecs = (p.cols + kLanes - 1) / kLanes, j = 0;
  for (int64_t tiles = (vecs + kTileVecs - 1) / kTileVecs; tiles > 0; --tiles) {
    const int64_t some = (vecs + tiles - 1) / tiles;
    const bool narrow = tiles == 1 && behind > 0 && behind <= kNarrowLanes;
    gemm_up_to<kTileVecs>(some, narrow, p, j, aside, left_row, write);
    vecs -= some;
    j += some * kLanes;
  }
}
template <class Element, class Aside>
inline void gemm(const SmallProduct<Element>& p, const Aside& aside) {
#if defined(__AMX_BF16__)
  if constexpr (kWholeTile<Element> > 1) return multiply_in_tiles(p, aside);
#endif
  gemm(p, aside, LeftRows(p), StoreRows(p));
}
template <class Element>
inline void gemm(const SmallProduct<Element>& p) {
  gemm(p, [] {});
}

}  // namespace adatape::ADATAPE_ISA
