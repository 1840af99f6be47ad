// One tape token of adaptive reading, once its entries are known: what the forward and the backward
// of tape_select have in common. The formulas stand in adatape_kernels/reference.py.

#pragma once

#include "../cpu_kernels.h"
#include "row_products.h"

namespace adatape::ADATAPE_ISA {

template <class T>
const T* key_row(const CpuTapeSelectParams& p, int64_t example, int64_t entry) {
  return static_cast<const T*>(p.keys.data) + example * p.keys.stride_example +
         entry * p.keys.stride_row;
}

// While a vector of keys is packed, one that comes so many entries later is fetched: rows that are
// a slice of longer ones are not foreseen by the processor.
constexpr int64_t kRowsFetched = 2 * kLanes;

// Fetches a vector of keys from `first` on.
template <class T>
__attribute__((always_inline)) inline void fetch_rows(const CpuTapeSelectParams& p, int64_t example,
                                                      int64_t first) {
  for (int64_t c = first; c < first + kLanes && c < p.keys.bank_size; ++c) {
    prefetch<kSecondCache>(key_row<T>(p, example, c), p.keys.width);
  }
}

// Writes the weights (topk,) of the entries that one tape token reads, given their scores; returns
// what the token adds to the ponder loss.
inline float merge_weights(const CpuTapeSelectParams& p, const float* scores, float* weights) {
  static_assert(kMaxTopk % kLanes == 0);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(p.keys.width));
  float highest = scores[0], total = 0.0f, squares = 0.0f, largest = 0.0f;
  float powers[kMaxTopk];
  for (int64_t j = 1; j < p.topk; ++j) highest = scores[j] > highest ? scores[j] : highest;
  for (int64_t j = 0; j < kMaxTopk; ++j) {
    powers[j] = j < p.topk ? (scores[j] - highest) * scale : 0.0f;
  }
  for (int64_t j = 0; j < p.topk; j += kLanes) store(powers + j, exp(load(powers + j)));
  for (int64_t j = 0; j < p.topk; ++j) total += powers[j];
  for (int64_t j = 0; j < p.topk; ++j) {
    weights[j] = powers[j] / total;
    squares += weights[j] * weights[j];
    largest = weights[j] > largest ? weights[j] : largest;
  }
  return 1.0f - (p.entropy ? squares : total == total ? largest : total);
}

// Writes the next query, which is the mean of the query and of the weighted sum of keys, or the
// latter alone. It may lie where the query lies.
template <class T>
void next_query(const CpuTapeSelectParams& p, int64_t example, const int32_t* entries,
                const float* weights, const float* query, float* next) {
  const T* rows[kMaxTopk];
  for (int64_t j = 0; j < p.topk; ++j) rows[j] = key_row<T>(p, example, entries[j]);
  const auto mean = [&](Vec q, Vec merged) { return p.average_query ? (q + merged) / 2 : merged; };
  int64_t d = 0;
  for (; d + kLanes <= p.keys.width; d += kLanes) {
    Vec merged = {};
    for (int64_t j = 0; j < p.topk; ++j) merged += weights[j] * load(rows[j] + d);
    store(next + d, mean(load(query + d), merged));
  }
  const int64_t rest = p.keys.width - d;
  if (rest == 0) return;
  Vec merged = {};
  for (int64_t j = 0; j < p.topk; ++j) merged += weights[j] * load_some(rows[j] + d, rest);
  store_some(next + d, mean(load_some(query + d, rest), merged), static_cast<int>(rest));
}

}  // namespace adatape::ADATAPE_ISA
