// Adaptive tape reading: the formulas stand in adatape_kernels/reference.py.
//
// The keys are laid out by column once. After that the scores of a tape token's reads are a small
// dense product, in which every score is one chain of fused multiply-adds over the key's features.
// So equal rows of a bank give equal bits wherever they stand, and whoever else reads the bank.

#include "../cpu_kernels.h"
#include "gemm.h"
#include "scratch.h"

namespace adatape::ADATAPE_ISA {
namespace {

// The rank of an entry that cannot be read lies below that of every score, NaN included.
constexpr uint32_t kUnreadableRank = 0;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T>
const T* key_row(const CpuTapeSelectParams& p, int64_t example, int64_t entry) {
  return static_cast<const T*>(p.keys.data) + example * p.keys.stride_example +
         entry * p.keys.stride_row;
}

// Returns unsigned integers that are ordered as the scores are: -0 ranks with 0, and NaN is 1,
// below every number.
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

// An entry of the bank with the rank of its score.
struct RankedEntry {
  uint32_t rank;
  int32_t entry;
};

// Finds the topk best of a row of scores, best first, and the lower entry first among equals. The
// bits of `unread` are all set for an entry that can be read, and all zero, which makes its rank
// zero, for another.
void find_best(const float* scores, const uint32_t* unread, int64_t columns, int64_t topk,
               RankedEntry* best) {
  for (int64_t j = 0; j < topk; ++j) best[j] = {kUnreadableRank, -1};
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

// Writes the weights (topk,) of the entries that one tape token reads, given their scores; returns
// what the token adds to the ponder loss.
float merge_weights(const CpuTapeSelectParams& p, const float* scores, float* weights) {
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

// Writes the next query, which is the mean of the query and of the weighted sum of keys, or the
// latter alone.
template <class T>
void next_query(const CpuTapeSelectParams& p, int64_t example, const int32_t* entries,
                const float* weights, const float* query, float* next) {
  for (int64_t d = 0; d < p.keys.width; ++d) {
    float merged = 0.0f;
    for (int64_t j = 0; j < p.topk; ++j) {
      merged += weights[j] * to_float(key_row<T>(p, example, entries[j])[d]);
    }
    next[d] = p.average_query ? (query[d] + merged) / 2 : merged;
  }
}

// Copies entries `first` to `first + count` of a bank to the columns of `to`, which is
// (key_dim, columns); columns behind the bank become zero.
template <class T>
void by_column(const CpuTapeSelectParams& p, int64_t example, float* to, int64_t first,
               int64_t count, int64_t columns) {
  for (int64_t c = first; c < first + count; c += kLanes) {
    for (int64_t d = 0; d < p.keys.width; ++d) {
      Vec column = {};
      for (int l = 0; l < kLanes && c + l < p.keys.bank_size; ++l) {
        column[l] = to_float(key_row<T>(p, example, c + l)[d]);
      }
      store(to + d * columns + c, column);
    }
  }
}

// Reads all tape tokens of `count` examples from `first` on. While one of them reads on, the scores
// of all are computed together.
template <class T>
void forward(const CpuTapeSelectParams& p, int64_t first, int64_t count) {
  const int64_t width = p.keys.width, columns = round_up(p.keys.bank_size, kColumnMultiple);
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
  int64_t left[kExamplesPerBankPass] = {};
  float halting[kExamplesPerBankPass] = {};
  bool reading[kExamplesPerBankPass];

  for (int64_t e = 0; e < count; ++e) {
    const int64_t i = first + e;
    const T* const query = static_cast<const T*>(p.query) + i * p.stride_query;
    for (int64_t d = 0; d < width; ++d) queries[e * width + d] = to_float(query[d]);
    const int64_t valid = p.bank_lens ? p.bank_lens[i] : p.keys.bank_size;
    for (int64_t c = 0; c < columns; ++c) {
      const bool can_read = c < valid && !(p.read_mask && p.read_mask[i * p.keys.bank_size + c]);
      unread[e * columns + c] = can_read ? ~0u : 0u;
      left[e] += can_read;
    }
    p.counts[i] = 0;
    p.ponder[i] = 0.0f;
    for (int64_t j = 0; j < p.num_tape_tokens * p.topk; ++j) {
      p.indices[i * p.num_tape_tokens * p.topk + j] = -1;
      p.weights[i * p.num_tape_tokens * p.topk + j] = 0.0f;
    }
  }

  for (int64_t token = 0; token < p.num_tape_tokens; ++token) {
    bool nobody = true;
    for (int64_t e = 0; e < count; ++e) {
      reading[e] = halting[e] < p.halt_threshold && left[e] >= p.topk;
      nobody &= !reading[e];
    }
    if (nobody) break;
    gemm<float>({.rows = count,
                 .cols = columns,
                 .depth = width,
                 .a = queries,
                 .stride_a_row = width,
                 .stride_a_col = 1,
                 .b = keys,
                 .stride_b = columns,
                 .c = scores,
                 .stride_c = columns,
                 .accumulate = false});
    for (int64_t e = 0; e < count; ++e) {
      if (!reading[e]) continue;
      const int64_t i = first + e, out = (i * p.num_tape_tokens + token) * p.topk;
      RankedEntry best[kMaxTopk];
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

// Computes the queries of example i once more, and then the gradients from its last tape token to
// its first. dq is the gradient of the query that follows the token.
template <class T>
void backward(const CpuTapeSelectParams& p, int64_t i) {
  const int64_t width = p.keys.width, tokens = p.counts[i], topk = p.topk;
  // The next query is keep · query + take · merged keys.
  const float keep = p.average_query ? 0.5f : 0.0f, take = p.average_query ? 0.5f : 1.0f;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(width));
  Scratch scratch;
  float* const queries = scratch.take((tokens + 1) * width);
  float* const weights = scratch.take(tokens * topk);
  float* const keys = scratch.take(topk * width);
  float* const dq = p.dquery + i * width;
  const T* const query = static_cast<const T*>(p.query) + i * p.stride_query;
  for (int64_t d = 0; d < width; ++d) queries[d] = to_float(query[d]), dq[d] = 0.0f;

  const int32_t* const entries = p.indices + i * p.num_tape_tokens * topk;
  for (int64_t token = 0; token < tokens; ++token) {
    float scores[kMaxTopk];
    const float* const q = queries + token * width;
    for (int64_t j = 0; j < topk; ++j) {
      const T* const key = key_row<T>(p, i, entries[token * topk + j]);
      scores[j] = 0.0f;
      for (int64_t d = 0; d < width; ++d) scores[j] += q[d] * to_float(key[d]);
    }
    merge_weights(p, scores, weights + token * topk);
    next_query<T>(p, i, entries + token * topk, weights + token * topk, q,
                  queries + (token + 1) * width);
  }

  for (int64_t token = tokens - 1; token >= 0; --token) {
    const float* const q = queries + token * width;
    const float* const w = weights + token * topk;
    float largest = 0.0f, ties = 0.0f, mean = 0.0f, dw[kMaxTopk];
    for (int64_t j = 0; j < topk; ++j) largest = w[j] > largest ? w[j] : largest;
    for (int64_t j = 0; j < topk; ++j) ties += w[j] == largest;
    for (int64_t j = 0; j < topk; ++j) {
      const T* const key = key_row<T>(p, i, entries[token * topk + j]);
      float dot = 0.0f;
      for (int64_t d = 0; d < width; ++d) {
        keys[j * width + d] = to_float(key[d]);
        dot += dq[d] * keys[j * width + d];
      }
      const float dcost = p.entropy ? -2.0f * w[j] : w[j] == largest ? -1.0f / ties : 0.0f;
      dw[j] = p.dweights[(i * p.num_tape_tokens + token) * topk + j] + take * dot +
              p.dponder[i] * dcost;
      mean += w[j] * dw[j];
    }
    float* const dread_keys = p.dread_keys + (i * p.num_tape_tokens + token) * topk * width;
    for (int64_t j = 0; j < topk; ++j) dw[j] = w[j] * (dw[j] - mean) * scale;
    for (int64_t d = 0; d < width; ++d) {
      float dquery = keep * dq[d];
      for (int64_t j = 0; j < topk; ++j) {
        dread_keys[j * width + d] = take * w[j] * dq[d] + dw[j] * q[d];
        dquery += dw[j] * keys[j * width + d];
      }
      dq[d] = dquery;
    }
  }
}

}  // namespace

void select_columns(const CpuTapeSelectParams& p, float* to, int64_t first, int64_t count) {
  const int64_t columns = round_up(p.keys.bank_size, kColumnMultiple);
  with_number(p.dtype,
              [&](auto number) { by_column<decltype(number)>(p, 0, to, first, count, columns); });
}

void select_fwd(const CpuTapeSelectParams& p, int64_t example, int64_t count) {
  with_number(p.dtype, [&](auto number) { forward<decltype(number)>(p, example, count); });
}

void select_bwd(const CpuTapeSelectParams& p, int64_t example) {
  with_number(p.dtype, [&](auto number) { backward<decltype(number)>(p, example); });
}

}  // namespace adatape::ADATAPE_ISA
