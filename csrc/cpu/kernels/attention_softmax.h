// Softmax over the scores of attention, a block of keys after another.

#pragma once

#include "attention_operands.h"
#include "row_products.h"

namespace adatape::ADATAPE_ISA {

// e^x is 2^(x log2 e): scores are multiplied by log2 e together with their scale.
constexpr float kLn2 = 0.69314718f;

// Writes a vector of weights as elements, from column c of a row on.
inline void store_weights(float* row, int64_t c, Vec x) { store(row + c, x); }
#if defined(__AVX512BF16__)
inline void store_weights(BFloat16Pair* row, int64_t c, Vec x) {
  const HalfVec half = rounded(x);
  std::memcpy(reinterpret_cast<char*>(row) + 2 * c, &half, sizeof half);
}
#endif

// The lanes of so many columns are added up before they are added to those of the columns before,
// so that no chain of additions is long.
constexpr int64_t kSumColumns = 16 * kLanes;

// What softmax knows of the rows of queries after some blocks of keys. There is room for whole
// vectors of rows.
struct SoftmaxOfRows {
  float* largest;  // of a row's scores, times scale and log2 e
  float* total;    // of a row's weights, which are 2^(score - largest)
  float* kept;     // the factor by which a row's sums before the last block must be multiplied

  SoftmaxOfRows from(int64_t row) const { return {largest + row, total + row, kept + row}; }
  void start(int64_t rows) const {
    for (int64_t r = 0; r < rows; r += kLanes) {
      store(largest + r, broadcast(-__builtin_inff()));
      store(total + r, Vec{});
    }
  }
};

// Returns what weights are multiplied by where they go into sums of these values, of all keys of an
// example: one, or where sums could be infinite before they are divided, a power of two with which
// they are no greater than the greatest value.
template <class T>
float share_of_key(const HeadBlock<T>& values) {
  Vec least = {};
  for (int64_t r = 0; r < values.count; ++r) {
    const T* const row = values.row(r);
    int64_t d = 0;
    for (; d + kLanes <= values.dim; d += kLanes) least = min(negative_size(load(row + d)), least);
    if (d < values.dim) least = min(negative_size(load_some(row + d, values.dim - d)), least);
  }
  const auto keys = static_cast<float>(values.count);
  float share = 1.0f;
  if (max(Vec{} - least) * keys <= 0x1p127f) return share;
  while (share * keys > 1.0f) share *= 0.5f;
  return share;
}

// The scores of some queries and a block of keys: (queries, columns), of which the first `keys`
// columns are keys and the others may be anything. Columns are whole vectors.
struct BlockScores {
  float* at;
  int64_t queries, keys, columns;
  float scale;  // times log2 e

  // Calls body(column, scores) for the vectors of a row, with -inf behind the last key.
  template <class Body>
  __attribute__((always_inline)) void for_vectors(int64_t query, const Body& body) const {
    const float* const row = at + query * columns;
    int64_t c = 0;
    for (; c + kLanes <= keys; c += kLanes) body(c, load(row + c) * scale);
    if (c < keys) body(c, first_lanes(load(row + c) * scale, keys - c, -__builtin_inff()));
  }
};

// Replaces scores by shares of weights, share * 2^(score * scale - largest), as elements, with
// zeros behind the last key. The weights of a row begin where its scores do, and never lie behind
// the score that they are made of.
template <class Element>
void weigh(const BlockScores& scores, float share, Element* weights, const SoftmaxOfRows& softmax) {
  for (int64_t first = 0; first < scores.queries; first += kLanes) {
    const int64_t rest = scores.queries - first, count = rest < kLanes ? rest : kLanes;
    Vec rows[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      Vec highest = broadcast(-__builtin_inff());
      if (i < count)
        scores.for_vectors(first + i, [&](int64_t, Vec x) { highest = max(highest, x); });
      rows[i] = highest;
    }
    const Vec before = load(softmax.largest + first);
    const Vec now = max(before, folded_rows(rows, [](Vec a, Vec b) { return max(a, b); }));
    store(softmax.largest + first, now);
    const Vec lowest = broadcast(-__builtin_inff());
    const Vec kept = before == lowest ? Vec{} : exp2(before - now);
    store(softmax.kept + first, kept);
    // While all scores are -inf nothing may be subtracted, because -inf - -inf is NaN.
    float shifts[kLanes];
    store(shifts, now == lowest ? Vec{} : now);
    for (int64_t i = 0; i < kLanes; ++i) {
      Element* const row = weights + (first + i) * scores.columns;
      Vec sums = {}, some = {};
      if (i < count)
        scores.for_vectors(first + i, [&](int64_t c, Vec x) {
          const Vec e = exp2(x - shifts[i]);
          store_weights(row, c, e * share);
          some += e;
          if (c % kSumColumns != kSumColumns - kLanes) return;
          sums += some;
          some = Vec{};
        });
      rows[i] = sums + some;
    }
    const Vec sums = folded_rows(rows, [](Vec a, Vec b) { return a + b; });
    store(softmax.total + first, load(softmax.total + first) * kept + sums);
  }
}

}  // namespace adatape::ADATAPE_ISA
