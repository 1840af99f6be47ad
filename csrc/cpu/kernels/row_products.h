// Products of one vector with the rows of a matrix, as they lie in memory.
//
// A row and the vector are multiplied lane by lane, and the lanes of some rows are then added up
// together, by a tree that is the same for every row. So equal rows give equal bits wherever they
// stand.

#pragma once

#include "vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace adatape::ADATAPE_ISA {

#if defined(__AVX512F__)
// Folds quarters 0 and 1 and quarters 2 and 3 of two vectors, which gives one vector.
template <class Fold>
inline Vec folded_quarters(Vec a, Vec b, const Fold& fold) {
  constexpr __mmask16 kAll = 0xffff;
  constexpr int kEven = 0x88, kOdd = 0xdd;  // quarters 0 and 2, or 1 and 3, of both vectors
  const auto as = [](Vec x) { return reinterpret_cast<__m512>(x); };
  return fold(reinterpret_cast<Vec>(_mm512_maskz_shuffle_f32x4(kAll, as(a), as(b), kEven)),
              reinterpret_cast<Vec>(_mm512_maskz_shuffle_f32x4(kAll, as(a), as(b), kOdd)));
}
#endif

// So many rows are multiplied at a time, which the registers hold.
constexpr int kRowsAtOnce = kLanes < 8 ? kLanes : 8;

// Folds the lanes of kRowsAtOnce rows, a vector each, into one vector, in which as many lanes of
// each row are left as there are such groups of rows in a vector's worth of them: 2 with AVX-512,
// and otherwise one.
template <class Fold>
inline Vec folded_group(const Vec* rows, const Fold& fold) {
#if defined(__AVX512F__)
  // The forms without a mask have an undefined operand in some compilers, which warn of it.
  constexpr __mmask16 kAll = 0xffff;
  constexpr __mmask8 kAllTwos = 0xff;
  const auto as = [](Vec x) { return reinterpret_cast<__m512>(x); };
  const auto as_twos = [](Vec x) { return reinterpret_cast<__m512d>(x); };
  const auto twos = [&](Vec a, Vec b) -> Vec {
    return fold(reinterpret_cast<Vec>(_mm512_maskz_unpacklo_ps(kAll, as(a), as(b))),
                reinterpret_cast<Vec>(_mm512_maskz_unpackhi_ps(kAll, as(a), as(b))));
  };
  const auto fours = [&](Vec a, Vec b) -> Vec {
    return fold(reinterpret_cast<Vec>(_mm512_maskz_unpacklo_pd(kAllTwos, as_twos(a), as_twos(b))),
                reinterpret_cast<Vec>(_mm512_maskz_unpackhi_pd(kAllTwos, as_twos(a), as_twos(b))));
  };
  const Vec low = fours(twos(rows[0], rows[1]), twos(rows[2], rows[3]));
  const Vec high = fours(twos(rows[4], rows[5]), twos(rows[6], rows[7]));
  return folded_quarters(low, high, fold);
#elif defined(__AVX2__)
  const auto as = [](Vec x) { return reinterpret_cast<__m256>(x); };
  const auto as_twos = [](Vec x) { return reinterpret_cast<__m256d>(x); };
  const auto twos = [&](Vec a, Vec b) -> Vec {
    return fold(reinterpret_cast<Vec>(_mm256_unpacklo_ps(as(a), as(b))),
                reinterpret_cast<Vec>(_mm256_unpackhi_ps(as(a), as(b))));
  };
  const auto fours = [&](Vec a, Vec b) -> Vec {
    return fold(reinterpret_cast<Vec>(_mm256_unpacklo_pd(as_twos(a), as_twos(b))),
                reinterpret_cast<Vec>(_mm256_unpackhi_pd(as_twos(a), as_twos(b))));
  };
  const Vec low = fours(twos(rows[0], rows[1]), twos(rows[2], rows[3]));
  const Vec high = fours(twos(rows[4], rows[5]), twos(rows[6], rows[7]));
  return fold(reinterpret_cast<Vec>(_mm256_permute2f128_ps(as(low), as(high), 0x20)),
              reinterpret_cast<Vec>(_mm256_permute2f128_ps(as(low), as(high), 0x31)));
#else
  // Halves of the rows' lanes are folded onto each other, as `sum` does.
  Vec result = {};
  for (int i = 0; i < kLanes; ++i) {
    Vec row = rows[i];
    for (int width = kLanes / 2; width > 0; width /= 2) {
      Vec other = {};
      for (int l = 0; l < width; ++l) other[l] = row[l + width];
      row = fold(row, other);
    }
    result[i] = row[0];
  }
  return result;
#endif
}

// Folds the lanes of kLanes rows, a vector each, into one vector, which has a lane for each row.
template <class Fold>
inline Vec folded_rows(const Vec (&rows)[kLanes], const Fold& fold) {
#if defined(__AVX512F__)
  return folded_quarters(folded_group(rows, fold), folded_group(rows + kRowsAtOnce, fold), fold);
#else
  return folded_group(rows, fold);
#endif
}

// Rows of T are multiplied with a query whose features stand in the order of their vectors: one
// after another for rows of float and of float16. A vector of bfloat16 numbers is split into those
// of even and of odd place, which takes one instruction each.
template <class T>
constexpr int64_t kFeaturesOfVector = std::is_same_v<T, bfloat16> ? 2 * kLanes : kLanes;

// Returns how many floats `arrange_query` writes.
template <class T>
constexpr int64_t arranged_size(int64_t width) {
  return (width + kFeaturesOfVector<T> - 1) / kFeaturesOfVector<T> * kFeaturesOfVector<T>;
}

// Copies a query of `width` features in that order, with zeros behind the last.
template <class T>
void arrange_query(const float* query, int64_t width, float* to) {
  for (int64_t d = 0; d < arranged_size<T>(width); ++d) {
    const int64_t first = d / kFeaturesOfVector<T> * kFeaturesOfVector<T>, at = d - first;
    const int64_t from = std::is_same_v<T, bfloat16> ? first + at % kLanes * 2 + at / kLanes : d;
    to[d] = from < width ? query[from] : 0.0f;
  }
}

// Adds to each of `count` sums the products of the features from d on of a row and the query.
template <int count, class T>
inline void add_products(Vec (&sums)[count], const float* query, const T* const (&rows)[count],
                         int64_t d, int64_t features) {
  const Vec q = load(query + d);
  for (int i = 0; i < count; ++i) {
    sums[i] += q * (features < kLanes ? load_some(rows[i] + d, features) : load(rows[i] + d));
  }
}
template <int count>
inline void add_products(Vec (&sums)[count], const float* query,
                         const bfloat16* const (&rows)[count], int64_t d, int64_t features) {
  const Vec even = load(query + d), odd = load(query + d + kLanes);
  for (int i = 0; i < count; ++i) {
    IntVec both = {};
    const size_t bytes = static_cast<size_t>(features) * sizeof(bfloat16);
    if (features < kFeaturesOfVector<bfloat16>) {
      std::memcpy(&both, rows[i] + d, bytes);
    } else {
      std::memcpy(&both, rows[i] + d, sizeof both);
    }
    sums[i] += even * reinterpret_cast<Vec>(both << 16);
    sums[i] += odd * reinterpret_cast<Vec>(both & 0xffff0000u);
  }
}

// The error of a chain of additions grows with its length, so that a lane makes one of so many
// features, and adds the chains up.
constexpr int64_t kFeaturesOfChain = 128 * kLanes;

// Adds to the sums of kRowsAtOnce rows the products of their features from d to `end`.
template <class T>
inline void add_features(Vec (&sums)[kRowsAtOnce], const float* query,
                         const T* const (&rows)[kRowsAtOnce], int64_t d, int64_t end) {
  for (; d + kFeaturesOfVector<T> <= end; d += kFeaturesOfVector<T>) {
    add_products(sums, query, rows, d, kFeaturesOfVector<T>);
  }
  if (d < end) add_products(sums, query, rows, d, end - d);
}

// What group_products returns for rows of more features than a chain has. It is not inlined, so
// that others are not slower for it.
template <class T>
__attribute__((noinline)) Vec long_group_products(const float* query,
                                                  const T* const (&rows)[kRowsAtOnce],
                                                  int64_t width) {
  Vec sums[kRowsAtOnce] = {};
  for (int64_t d = 0; d < width; d += kFeaturesOfChain) {
    Vec chains[kRowsAtOnce] = {};
    const int64_t left = width - d;
    add_features(chains, query, rows, d, d + (left < kFeaturesOfChain ? left : kFeaturesOfChain));
    for (int i = 0; i < kRowsAtOnce; ++i) sums[i] += chains[i];
  }
  return folded_group(sums, [](Vec a, Vec b) { return a + b; });
}

// Multiplies an arranged query with kRowsAtOnce rows of `width` features.
template <class T>
inline Vec group_products(const float* query, const T* const (&rows)[kRowsAtOnce], int64_t width) {
  if (width > kFeaturesOfChain) return long_group_products(query, rows, width);
  Vec sums[kRowsAtOnce] = {};
  add_features(sums, query, rows, 0, width);
  return folded_group(sums, [](Vec a, Vec b) { return a + b; });
}

// Returns the products of an arranged query with the rows that row(0) to row(count - 1) point to,
// at most a vector of them; lanes behind the last hold its product again.
template <class T, class Row>
inline Vec row_products(const float* query, const Row& row, int64_t count, int64_t width) {
  const auto group = [&](int first) {
    const T* rows[kRowsAtOnce];
    for (int i = 0; i < kRowsAtOnce; ++i) rows[i] = row(first + i < count ? first + i : count - 1);
    return group_products(query, rows, width);
  };
#if defined(__AVX512F__)
  return folded_quarters(group(0), group(kRowsAtOnce), [](Vec a, Vec b) { return a + b; });
#else
  return group(0);
#endif
}

}  // namespace adatape::ADATAPE_ISA
