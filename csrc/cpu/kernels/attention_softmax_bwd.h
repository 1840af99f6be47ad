// The gradients of attention's scores, for some queries and all keys.

#pragma once

#include "attention_operands.h"
#include "attention_softmax.h"

namespace adatape::ADATAPE_ISA {

// A query's row of scores in the backward.
struct ScoreRow {
  float* scores;
  float* dweights;   // gradients of the weights
  int64_t keys;      // those that the row has; columns behind them are no keys
  float scale, lse;  // both times log2 e
};

// A query's weights are what stands in its row times `factor`. The gradients of its scores are the
// weights times what the gradients of the weights are more than `mean`.
struct RowWeights {
  float factor, mean;
};

// Replaces the scores by the weights, but for a factor.
//
// The weights add up to one, but for rounding: that of `lse`, which is the greater the greater
// scores are. What is more than that is not: then the keys are not all that `lse` is of, and the
// factor is one. The mean is that of the gradients of the weights, by the weights. It is the
// product of the output and its gradient, too, which product_of_output() returns, but not to the
// last bit: where nearly all of the weight is one key's, only the mean of the very numbers at hand
// cancels.
template <class Product>
inline RowWeights weigh(const ScoreRow& row, const Product& product_of_output) {
  const auto weights = [&](int64_t c) {
    const Vec w = exp2(load(row.scores + c) * row.scale - row.lse);
    store(row.scores + c, w);
    return w;
  };
  Vec totals = {}, products = {};
  const int64_t whole = row.keys / kLanes * kLanes;
  for (int64_t c = 0; c < whole;) {
    const int64_t end = whole - c > kSumColumns ? c + kSumColumns : whole;
    Vec some = {}, some_products = {};
    for (; c < end; c += kLanes) {
      const Vec w = weights(c);
      some += w;
      some_products += w * load(row.dweights + c);
    }
    totals += some;
    products += some_products;
  }
  if (whole < row.keys) {
    const Vec w = weights(whole);
    totals += first_lanes(w, row.keys - whole, 0.0f);
    products += first_lanes(w * load(row.dweights + whole), row.keys - whole, 0.0f);
  }
  const float total = sum(totals);
  constexpr float kMostRounding = 0x1p-8f;
  const float rounding = 0x1p-21f * (8 + __builtin_fabsf(row.lse));
  if (!(__builtin_fabsf(total - 1) <= (rounding < kMostRounding ? rounding : kMostRounding))) {
    return {1.0f, product_of_output()};
  }
  return {1 / total, sum(products) / total};
}

// Replaces the scores of some queries by the weights, and the gradients of the weights by those of
// the scores before they were scaled. What is written are elements of numbers that follow each
// other by query, where the scores were and in `ds_by_query`, and by key, where the gradients of
// the weights were. As float they are the same, so that `ds_by_query` lies there too.
// product_of_output(r) returns the product of query r's output and its gradient.
template <class Product>
inline void differentiate(float* scores, float* ds, float*, int64_t queries, int64_t keys,
                          int64_t columns, float scale, const float* lse,
                          const Product& product_of_output) {
  for (int64_t r = 0; r < queries; ++r) {
    const ScoreRow row{scores + r * columns, ds + r * columns, keys, scale, lse[r]};
    const RowWeights weights = weigh(row, [&] { return product_of_output(r); });
    for (int64_t c = 0; c < columns; c += kLanes) {
      const Vec w = load(row.scores + c) * weights.factor;
      store(row.scores + c, w);
      store(row.dweights + c, w * (load(row.dweights + c) - weights.mean));
    }
  }
}

#if defined(__AVX512BF16__)
template <class Product>
void differentiate(float* scores, float* ds, BFloat16Pair* ds_by_query, int64_t queries,
                   int64_t keys, int64_t columns, float scale, const float* lse,
                   const Product& product_of_output) {
  for (int64_t r = 0; r < queries; r += 2) {
    // No pair of rows is written before it was read, as its place is at most that of its first row.
    auto* const pairs = reinterpret_cast<BFloat16Pair*>(scores) + r / 2 * columns;
    const int64_t count = queries - r < 2 ? 1 : 2;
    ScoreRow rows[2];
    RowWeights weights[2];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (r + i) * columns;
      rows[i] = {scores + at, ds + at, keys, scale, lse[r + i]};
      weights[i] = weigh(rows[i], [&] { return product_of_output(r + i); });
    }
    for (int64_t c = 0; c < columns; c += kLanes) {
      HalfVec w_halves[2] = {}, ds_halves[2] = {};
      for (int64_t i = 0; i < count; ++i) {
        const Vec w = load(rows[i].scores + c) * weights[i].factor;
        w_halves[i] = rounded(w);
        ds_halves[i] = rounded(w * (load(rows[i].dweights + c) - weights[i].mean));
        char* const by_key = reinterpret_cast<char*>(rows[i].dweights) + 2 * c;
        std::memcpy(by_key, &ds_halves[i], sizeof(HalfVec));
      }
      store_pairs(pairs + c, paired(w_halves[0], w_halves[1]));
      store_pairs(ds_by_query + r / 2 * columns + c, paired(ds_halves[0], ds_halves[1]));
    }
    // Behind an odd number of keys stands what no key has, and it may be anything.
    for (int64_t i = 0; i < count && keys % 2 > 0; ++i) {
      reinterpret_cast<BFloat16Pair*>(rows[i].dweights)[keys / 2].bits &= 0xffff;
    }
  }
}
#endif

// Returns the product of a row of each of two matrices.
template <class T>
float product_of_rows(const HeadBlock<T>& left, const HeadBlock<T>& right, int64_t r) {
  const T *const a = left.row(r), *const b = right.row(r);
  Vec products = {};
  for (int64_t d = 0; d < left.dim; d += kLanes) {
    const int lanes = static_cast<int>(left.dim - d < kLanes ? left.dim - d : kLanes);
    products += load_some(a + d, lanes) * load_some(b + d, lanes);
  }
  return sum(products);
}

}  // namespace adatape::ADATAPE_ISA
