// The gradient of adaptive tape reading: the formulas stand in adatape_kernels/reference.py.

#include "columns.h"
#include "scratch.h"
#include "tape_select_step.h"

namespace adatape::ADATAPE_ISA {
namespace {

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
      scores[j] = dot(q, key_row<T>(p, i, entries[token * topk + j]), width);
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
      for (int64_t d = 0; d < width; ++d) keys[j * width + d] = to_float(key[d]);
      const float product = dot(dq, keys + j * width, width);
      const float dcost = p.entropy ? -2.0f * w[j] : w[j] == largest ? -1.0f / ties : 0.0f;
      dw[j] = p.dweights[(i * p.num_tape_tokens + token) * topk + j] + take * product +
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

void select_bwd(const CpuTapeSelectParams& p, int64_t example) {
  with_number(p.dtype, [&](auto number) { backward<decltype(number)>(p, example); });
}

}  // namespace adatape::ADATAPE_ISA
