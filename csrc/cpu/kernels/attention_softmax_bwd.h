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

// The product of a query's output and its gradient, and how much it may be off because the output
// was rounded.
struct OutputProduct {
  float value, rounding;
};

// Replaces the scores by the weights, but for a factor.
//
// A row's weights add up to one, and the mean of their gradients, by the weights, is the product of
// the output and its gradient. Neither is so to the last bit. `lse` was rounded, the more the
// greater the scores are, and where nearly all of the weight is one key's, what is more than the
// mean cancels only for the mean of the very numbers at hand. So both are taken from these. Where
// they differ by more than rounding, the keys are not all that `lse` and the output are of: then
// these are taken at their word.
inline RowWeights weigh(const ScoreRow& row, const OutputProduct& output) {
  const auto weights = [&](int64_t c) {
    const Vec w = exp2(load(row.scores + c) * row.scale - row.lse);
    store(row.scores + c, w);
    return w;
  };
  Vec totals = {}, products = {}, sizes = {};
  const int64_t whole = row.keys / kLanes * kLanes;
  for (int64_t c = 0; c < whole;) {
    const int64_t end = whole - c > kSumColumns ? c + kSumColumns : whole;
    Vec some = {}, some_products = {};
    for (; c < end; c += kLanes) {
      const Vec w = weights(c), product = w * load(row.dweights + c);
      some += w;
      some_products += product;
      sizes -= negative_size(product);
    }
    totals += some;
    products += some_products;
  }
  if (whole < row.keys) {
    const Vec w = weights(whole);
    const Vec product = first_lanes(w * load(row.dweights + whole), row.keys - whole, 0.0f);
    totals += first_lanes(w, row.keys - whole, 0.0f);
    products += product;
    sizes -= negative_size(product);
  }
  const float total = sum(totals), mean = sum(products) / total;
  const float most = 1 + __builtin_fminf(0x1p-23f * (4 + __builtin_fabsf(row.lse)), 7);
  const float rounding = output.rounding + 0x1p-21f * sum(sizes) / total;
  if (total <= most && total * most >= 1 && __builtin_fabsf(mean - output.value) <= rounding) {
    return {1 / total, mean};
  }
  return {1, output.value};
}

// Replaces the scores of some queries by the weights, and the gradients of the weights by those of
// the scores before they were scaled. What is written are elements of numbers that follow each
// other by query, where the scores were and in `ds_by_query`, and by key, where the gradients of
// the weights were. As float they are the same, so that `ds_by_query` lies there too.
// output(r) returns query r's OutputProduct.
template <class Output>
inline void differentiate(float* scores, float* ds, float*, int64_t queries, int64_t keys,
                          int64_t columns, float scale, const float* lse, const Output& output) {
  for (int64_t r = 0; r < queries; ++r) {
    const ScoreRow row{scores + r * columns, ds + r * columns, keys, scale, lse[r]};
    const RowWeights weights = weigh(row, output(r));
    for (int64_t c = 0; c < columns; c += kLanes) {
      const Vec w = load(row.scores + c) * weights.factor;
      store(row.scores + c, w);
      store(row.dweights + c, w * (load(row.dweights + c) - weights.mean));
    }
  }
}

#if defined(__AVX512BF16__)
template <class Output>
void differentiate(float* scores, float* ds, BFloat16Pair* ds_by_query, int64_t queries,
                   int64_t keys, int64_t columns, float scale, const float* lse,
                   const Output& output) {
  for (int64_t r = 0; r < queries; r += 2) {
    // No pair of rows is written before it was read, as its place is at most that of its first row.
    auto* const pairs = reinterpret_cast<BFloat16Pair*>(scores) + r / 2 * columns;
    const int64_t count = queries - r < 2 ? 1 : 2;
    ScoreRow rows[2];
    RowWeights weights[2];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (r + i) * columns;
      rows[i] = {scores + at, ds + at, keys, scale, lse[r + i]};
      weights[i] = weigh(rows[i], output(r + i));
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

// Returns that of a row of the output and of its gradient.
template <class T>
OutputProduct product_of_rows(const HeadBlock<T>& out, const HeadBlock<T>& dout, int64_t r) {
  const T *const o = out.row(r), *const d_o = dout.row(r);
  Vec products = {}, sizes = {};
  for (int64_t d = 0; d < out.dim; d += kLanes) {
    const int lanes = static_cast<int>(out.dim - d < kLanes ? out.dim - d : kLanes);
    const Vec product = lanes < kLanes ? load_some(o + d, lanes) * load_some(d_o + d, lanes)
                                       : load(o + d) * load(d_o + d);
    products += product;
    sizes -= negative_size(product);
  }
  // Some units in the last place of the output, of which there are 24, 11 or 8 bits.
  constexpr float kUnits = std::is_same_v<T, float>     ? 0x1p-22f
                           : std::is_same_v<T, float16> ? 0x1p-10f
                                                        : 0x1p-7f;
  return {sum(products), kUnits * sum(sizes)};
}

}  // namespace adatape::ADATAPE_ISA
