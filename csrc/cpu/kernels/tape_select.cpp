// Adaptive tape reading: see adatape_kernels/reference.py for the formulas.
//
// The keys are laid out by column once, after which a step's scores are a small dense product in
// which every score is one chain of fused multiply-adds over the key's features: equal rows of a
// bank give equal bits wherever they stand, and whoever else reads the bank.

#include "../kernels.h"
#include "gemm.h"
#include "scratch.h"

namespace adatape::ADATAPE_ISA {
namespace {

constexpr uint32_t kReadRank = 0;  // below every score, NaN included

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T>
const T* key_row(const SelectParams& p, int64_t example, int64_t entry) {
  return static_cast<const T*>(p.keys.data) + example * p.keys.example + entry * p.keys.row;
}

// Unsigned integers in the order of the scores: NaN is 1, and -0 equals 0.
IntVec rank(Vec score) {
  const IntVec bits = reinterpret_cast<IntVec>(score + 0.0f);
  const IntVec negative = (bits >> 31) != 0;
  const IntVec order = negative ? ~bits : bits | 0x80000000u;
  return score != score ? IntVec{} + 1 : order;
}

bool any(IntVec mask) {
  uint32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
}

struct Best {
  uint32_t rank;
  int32_t entry;
};

// The k best of a row of scores, best first, the lower entry first among equals. Entries whose
// `unread` is 0 rank below all others, and all bits set leaves a rank as it is.
void find_best(const float* scores, const uint32_t* unread, int64_t columns, int64_t topk,
               Best* best) {
  for (int64_t j = 0; j < topk; ++j) best[j] = {kReadRank, -1};
  for (int64_t c = 0; c < columns; c += kLanes) {
    IntVec mask;
    std::memcpy(&mask, unread + c, sizeof mask);
    const IntVec ranks = rank(load(scores + c)) & mask;
    if (!any(ranks > best[topk - 1].rank)) continue;
    for (int l = 0; l < kLanes; ++l) {
      if (ranks[l] <= best[topk - 1].rank) continue;
      int64_t j = topk - 1;
      for (; j > 0 && best[j - 1].rank < ranks[l]; --j) best[j] = best[j - 1];
      best[j] = {ranks[l], static_cast<int32_t>(c + l)};
    }
  }
}

// weights (topk,) from the scores of the chosen; returns what the step adds to the ponder loss.
float merge_weights(const SelectParams& p, const float* scores, float* weights) {
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(p.keys.width));
  float highest = scores[0], total = 0.0f, squares = 0.0f, largest = 0.0f;
  for (int64_t j = 1; j < p.topk; ++j) highest = scores[j] > highest ? scores[j] : highest;
  for (int64_t j = 0; j < p.topk; ++j) {
    weights[j] = __builtin_expf((scores[j] - highest) * scale);
    total += weights[j];
  }
  for (int64_t j = 0; j < p.topk; ++j) {
    weights[j] /= total;
    squares += weights[j] * weights[j];
    largest = weights[j] > largest ? weights[j] : largest;
  }
  return 1.0f - (p.entropy ? squares : total == total ? largest : total);
}

// next = the mean of query and Σ weights · keys, or the latter alone.
template <class T>
void next_query(const SelectParams& p, int64_t example, const int32_t* entries,
                const float* weights, const float* query, float* next) {
  for (int64_t d = 0; d < p.keys.width; ++d) {
    float merged = 0.0f;
    for (int64_t j = 0; j < p.topk; ++j) {
      merged += weights[j] * to_float(key_row<T>(p, example, entries[j])[d]);
    }
    next[d] = p.average_query ? (query[d] + merged) / 2 : merged;
  }
}

template <class T>
void by_column(const SelectParams& p, int64_t example, float* to, int64_t first, int64_t count,
               int64_t columns) {
  for (int64_t c = first; c < first + count; c += kLanes) {
    for (int64_t d = 0; d < p.keys.width; ++d) {
      Vec column = {};
      for (int l = 0; l < kLanes && c + l < p.keys.size; ++l) {
        column[l] = to_float(key_row<T>(p, example, c + l)[d]);
      }
      store(to + d * columns + c, column);
    }
  }
}

template <class T>
void forward(const SelectParams& p, int64_t first, int64_t count) {
  const int64_t width = p.keys.width, columns = round_up(p.keys.size, kColumnMultiple);
  Scratch scratch;
  const float* keys = p.keys_by_column;
  if (keys == nullptr) {
    float* const own = scratch.take(width * columns);
    by_column<T>(p, first, own, 0, columns, columns);
    keys = own;
  }
  float* const queries = scratch.take(count * width);
  float* const scores = scratch.take(count * columns);
  auto* const unread = reinterpret_cast<uint32_t*>(scratch.take(count * columns));
  int64_t left[kSelectExamples] = {};
  float halting[kSelectExamples] = {};
  bool reading[kSelectExamples];

  for (int64_t e = 0; e < count; ++e) {
    const int64_t i = first + e;
    const T* const query = static_cast<const T*>(p.query) + i * p.query_row;
    for (int64_t d = 0; d < width; ++d) queries[e * width + d] = to_float(query[d]);
    const int64_t valid = p.bank_lens ? p.bank_lens[i] : p.keys.size;
    for (int64_t c = 0; c < columns; ++c) {
      const bool can_read = c < valid && !(p.read_mask && p.read_mask[i * p.keys.size + c]);
      unread[e * columns + c] = can_read ? ~0u : 0u;
      left[e] += can_read;
    }
    p.counts[i] = 0;
    p.ponder[i] = 0.0f;
    for (int64_t j = 0; j < p.steps * p.topk; ++j) {
      p.indices[i * p.steps * p.topk + j] = -1;
      p.weights[i * p.steps * p.topk + j] = 0.0f;
    }
  }

  for (int64_t step = 0; step < p.steps; ++step) {
    bool nobody = true;
    for (int64_t e = 0; e < count; ++e) {
      reading[e] = halting[e] < p.halt_threshold && left[e] >= p.topk;
      nobody &= !reading[e];
    }
    if (nobody) break;
    gemm(count, columns, width, queries, width, 1, keys, columns, scores, columns, false);
    for (int64_t e = 0; e < count; ++e) {
      if (!reading[e]) continue;
      const int64_t i = first + e, out = (i * p.steps + step) * p.topk;
      Best best[kMaxTopk];
      float chosen[kMaxTopk];
      find_best(scores + e * columns, unread + e * columns, columns, p.topk, best);
      for (int64_t j = 0; j < p.topk; ++j) {
        p.indices[out + j] = best[j].entry;
        chosen[j] = scores[e * columns + best[j].entry];
        unread[e * columns + best[j].entry] = 0;
      }
      left[e] -= p.topk;
      p.ponder[i] += merge_weights(p, chosen, p.weights + out);
      halting[e] += p.weights[out];
      p.counts[i] += 1;
      float* const query = queries + e * width;
      next_query<T>(p, i, p.indices + out, p.weights + out, query, query);
    }
  }
}

template <class T>
void backward(const SelectParams& p, int64_t i) {
  const int64_t width = p.keys.width, steps = p.counts[i], topk = p.topk;
  const float keep = p.average_query ? 0.5f : 0.0f, take = p.average_query ? 0.5f : 1.0f;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(width));
  Scratch scratch;
  float* const queries = scratch.take((steps + 1) * width);
  float* const weights = scratch.take(steps * topk);
  float* const keys = scratch.take(topk * width);
  float* const dq = p.dquery + i * width;
  const T* const query = static_cast<const T*>(p.query) + i * p.query_row;
  for (int64_t d = 0; d < width; ++d) queries[d] = to_float(query[d]), dq[d] = 0.0f;

  const int32_t* const entries = p.indices + i * p.steps * topk;
  for (int64_t s = 0; s < steps; ++s) {
    float scores[kMaxTopk];
    const float* const q = queries + s * width;
    for (int64_t j = 0; j < topk; ++j) {
      const T* const key = key_row<T>(p, i, entries[s * topk + j]);
      scores[j] = 0.0f;
      for (int64_t d = 0; d < width; ++d) scores[j] += q[d] * to_float(key[d]);
    }
    merge_weights(p, scores, weights + s * topk);
    next_query<T>(p, i, entries + s * topk, weights + s * topk, q, queries + (s + 1) * width);
  }

  for (int64_t s = steps - 1; s >= 0; --s) {
    const float* const q = queries + s * width;
    const float* const w = weights + s * topk;
    float largest = 0.0f, ties = 0.0f, mean = 0.0f, dw[kMaxTopk];
    for (int64_t j = 0; j < topk; ++j) largest = w[j] > largest ? w[j] : largest;
    for (int64_t j = 0; j < topk; ++j) ties += w[j] == largest;
    for (int64_t j = 0; j < topk; ++j) {
      const T* const key = key_row<T>(p, i, entries[s * topk + j]);
      float dot = 0.0f;
      for (int64_t d = 0; d < width; ++d) {
        keys[j * width + d] = to_float(key[d]);
        dot += dq[d] * keys[j * width + d];
      }
      const float dcost = p.entropy ? -2.0f * w[j] : w[j] == largest ? -1.0f / ties : 0.0f;
      dw[j] = p.dweights[(i * p.steps + s) * topk + j] + take * dot + p.dponder[i] * dcost;
      mean += w[j] * dw[j];
    }
    float* const drows = p.drows + (i * p.steps + s) * topk * width;
    for (int64_t j = 0; j < topk; ++j) dw[j] = w[j] * (dw[j] - mean) * scale;
    for (int64_t d = 0; d < width; ++d) {
      float dquery = keep * dq[d];
      for (int64_t j = 0; j < topk; ++j) {
        drows[j * width + d] = take * w[j] * dq[d] + dw[j] * q[d];
        dquery += dw[j] * keys[j * width + d];
      }
      dq[d] = dquery;
    }
  }
}

}  // namespace

void select_columns(const SelectParams& p, float* to, int64_t first, int64_t count) {
  const int64_t columns = round_up(p.keys.size, kColumnMultiple);
  p.dtype == DType::kFloat ? by_column<float>(p, 0, to, first, count, columns)
                           : by_column<bfloat16>(p, 0, to, first, count, columns);
}

void select_fwd(const SelectParams& p, int64_t example, int64_t count) {
  p.dtype == DType::kFloat ? forward<float>(p, example, count)
                           : forward<bfloat16>(p, example, count);
}

void select_bwd(const SelectParams& p, int64_t example) {
  p.dtype == DType::kFloat ? backward<float>(p, example) : backward<bfloat16>(p, example);
}

}  // namespace adatape::ADATAPE_ISA
